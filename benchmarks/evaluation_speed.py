"""Episodes evaluated all at once, beside the same episodes one by one: seconds, and whether the returns are the same.

python benchmarks/evaluation_speed.py --checkpoint outputs/best_checkpoint.pt [--episodes 100]
"""

import argparse
import time

import numpy as np
from harness import write

import utils


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=2_000_000)
    args = parser.parse_args()

    agent, part = utils.load(args.checkpoint, compile=False, cuda_graphs=False)
    world = agent.make_eval_env(agent.cfg)
    utils.evaluate(agent, world.make, 1, 0)  # the simulator and PyTorch load what they load once

    start = time.perf_counter()
    together = utils.evaluate(agent, world.make, args.episodes, args.seed)
    at_once = time.perf_counter() - start
    start = time.perf_counter()
    alone = [utils.evaluate(agent, world.make, 1, args.seed + i) for i in range(args.episodes)]
    one_by_one = time.perf_counter() - start

    same = int(sum(a.returns[0] == r for a, r in zip(alone, together.returns)))
    gap = float(np.max(np.abs(np.concatenate([a.returns for a in alone]) - together.returns)))
    cfg = agent.cfg
    result = {
        "agent": {"env": world.name, "d_model": cfg.d_model, "n_layers": cfg.n_layers, "updates": part["updates"]},
        "data": part["run"]["data"]["name"],
        "episodes": args.episodes,
        "steps": int(together.lengths.sum()),
        "at_once_s": round(at_once, 2),
        "one_by_one_s": round(one_by_one, 2),
        "ratio": round(one_by_one / at_once, 2),
        "identical_returns": same,
        "largest_difference": gap,
    }
    print(
        f"{args.episodes} episodes, {result['steps']:,} steps: at once {at_once:.1f} s, one by one {one_by_one:.1f} s, "
    )
    print(f"ratio {result['ratio']}; {same} of {args.episodes} returns are identical, largest difference {gap:g}")
    print(write("evaluation_speed", result))


if __name__ == "__main__":
    main()
