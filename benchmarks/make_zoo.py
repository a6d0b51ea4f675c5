"""A finished run into the zoo: stripped of what only training needs, evaluated as it lies there, and written down.

    python benchmarks/make_zoo.py outputs/RUN --name hopper-medium-bamba [--episodes 100] [--full_precision]
    python benchmarks/make_zoo.py --animate docs/figures/zoo.gif hopper-medium-bamba walker2d-medium-bamba

The score in zoo/manifest.json is that of the stripped file: `python utils.py --checkpoint zoo/NAME.pt --episodes 100`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from harness import facts

import utils
from common import checkpoint, logger, plotting, zoo
from common.files import sha256_of
from reporting.runs import flags_of

LARGEST = 20_000_000  # bytes, of the whole zoo


def entry_of(name: str, path: Path, episodes: int) -> dict:
    """Evaluate the checkpoint at `path`; what the manifest says of it."""
    report = utils.evaluate_checkpoint(utils.EvalArgs(checkpoint=str(path), episodes=episodes))
    ckpt, row = report.ckpt, report.row
    data, score = ckpt["run"]["data"], "score" if report.env.score else "return_mean"
    flags = [word for word in flags_of(ckpt["config"]) if word.split("=")[0] not in ("--device", "--threads")]
    return {
        "name": name,
        "file": f"{name}.pt",
        "agent": ckpt["system"],
        "data": data["name"],
        "data_source": data["source"],
        "data_sha256": data.get("sha256", ""),
        "command": "python trainer.py " + " ".join(flags),
        "seed": ckpt["config"]["seed"],
        "updates": ckpt["updates"],
        "env_steps": ckpt["steps"],
        "env": report.env.name,
        "score": row[f"eval/{score}"],
        "score_std": row[f"eval/{score}_std" if score == "score" else "eval/return_std"],
        "score_name": report.score_name,
        "episodes": episodes,
        "first_episode_seed": report.args.seed,
        "trained_with": ckpt["versions"],
    }


def animate(path: Path, names: list[str], seconds: float = 4.0, rate: float = 12.5) -> None:
    """First episodes of some of the zoo beside each other, from their second second on, about as fast as they are."""
    strips = []
    for name in names:
        agent, _ = utils.load(zoo.ZOO / f"{name}.pt", cuda_graphs=False, compile=False)
        env, frames = utils.agent_of(agent.cfg.agent).make_eval_env(agent.cfg), []
        utils.evaluate(agent, env.make, 1, 2_000_000, frames, every=max(1, round(env.fps / rate)))
        strips.append(frames[round(rate) :][: round(seconds * rate)])
    length = min(map(len, strips))
    beside = [np.concatenate(row, axis=1) for row in zip(*(strip[:length] for strip in strips))]
    with logger.atomic_write(path) as part:
        plotting.write_gif(part, beside, rate, width=200 * len(names))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="+", help="a run folder, or its checkpoint; with --animate names in the zoo")
    parser.add_argument("--name", help="of the new checkpoint")
    parser.add_argument("--animate", type=Path, help="write this .gif of agents that are in the zoo")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--full_precision", action="store_true", help="keep float32, where float16 costs score")
    args = parser.parse_args()
    with utils.errors_as_sentences():
        if args.animate:
            plotting.set_mujoco_gl()
            animate(args.animate, args.run)
            return 0
        if not args.name or len(args.run) > 1:
            raise ValueError("give one run, and its --name in the zoo")
        ckpt = zoo.for_acting(checkpoint.read_checkpoint(args.run[0]), not args.full_precision)
        zoo.ZOO.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=zoo.ZOO) as folder:  # nothing is kept that cannot be evaluated
            path = Path(folder) / f"{args.name}.pt"
            checkpoint.write(path, ckpt)
            entry = entry_of(args.name, path, args.episodes)
            others = [p.stat().st_size for p in zoo.ZOO.glob("*.pt") if p.name != path.name]
            if sum(others) + path.stat().st_size > LARGEST:
                raise ValueError(f"the zoo would be larger than {LARGEST / 1e6:.0f} MB")
            entry |= {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            path.rename(zoo.ZOO / path.name)
        known = [e for e in zoo.entries() if e["name"] != args.name] if (zoo.ZOO / "manifest.json").exists() else []
        entry["evaluated_with"] = {k: v for k, v in facts().items() if k != "command"}
        manifest = {"agents": sorted([*known, entry], key=lambda e: e["name"])}
        with logger.atomic_write(zoo.ZOO / "manifest.json") as part:
            part.write_text(json.dumps(manifest, indent=1) + "\n")
    print(zoo.table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
