"""Transitions per second of `python -m d4rl_utils make` on all cores, beside the plain loop over one environment.

    python benchmarks/make_speed.py [--transitions 400000] [--rounds 3]

Both roll the same policy (medium where it is shipped, else an untrained one of its size) and both write a file in
D4RL's layout; ours is timed with the start of its processes. They take turns, and the best of the rounds counts: other
work on the machine can only slow them. Rates are per second on the clock and per second of CPU time, which other work
disturbs less; `ratio_by_cpu_time` is what the ratio is on cores that nobody else uses. The limit is MuJoCo's own steps
on all cores, with nothing around them, from states that the policy visits.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from harness import write

from common import parallel
from d4rl_utils.environment import make_env
from d4rl_utils.generate import behavior_policy as behaviour
from d4rl_utils.generate import rollout as local
from d4rl_utils.generate.behavior_policy import Policy
from d4rl_utils.generate.vector_env import BatchedMujoco
from d4rl_utils.names import DIMS, ENVS


def untrained(env: str) -> dict[str, np.ndarray]:
    """Weights of a policy of the shipped ones' size that stands for one that is not shipped yet."""
    rng, (states, actions) = np.random.default_rng(0), DIMS[env]
    shapes = {"fc0": (256, states), "fc1": (256, 256), "last_fc": (actions, 256), "last_fc_log_std": (actions, 256)}
    return {
        f"{layer}.{part}": (rng.normal(size=shape if part == "weight" else shape[:1]) / 16).astype(np.float16)
        for layer, shape in shapes.items()
        for part in ("weight", "bias")
    }


def plain(env: str, policy: Policy, transitions: int, path: Path) -> None:
    """The usual way: one environment, one step, one call of the policy, lists, a file."""
    rng, world = np.random.default_rng(0), make_env(env)  # gymnasium.make
    columns = {key: [] for key, *_ in local._columns(*DIMS[env])}
    state, _ = world.reset(seed=0)
    for _ in range(transitions):
        action = policy(state[None].astype(np.float32), rng.standard_normal((1, DIMS[env][1]), np.float32))[0]
        following, reward, terminal, timeout, _ = world.step(action)
        for column, value in zip(columns.values(), (state, action, reward, following, terminal, timeout)):
            column.append(value)
        state = world.reset()[0] if terminal or timeout else following
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            file[key] = np.array(values, bool if key in ("terminals", "timeouts") else np.float32)


def seconds(fn: Callable[[], object]) -> tuple[float, float]:
    """Of the clock, and of CPU time, this process's and its finished children's."""
    cpu = lambda: sum(sum(os.times()[i] for i in pair) for pair in ((0, 1), (2, 3)))  # noqa: E731
    clock, before = time.perf_counter(), cpu()
    fn()
    return time.perf_counter() - clock, cpu() - before


def physics(env: str, policy: Policy, steps: int = 400) -> float:
    """MuJoCo alone, transitions per second of CPU time."""
    lanes, rng, n = BatchedMujoco(env, np.arange(local.LANES)), np.random.default_rng(0), local.LANES
    spent, who = 0.0, np.arange(n)
    move = lanes.move

    def timed(model, data, skip):
        nonlocal spent
        start = time.thread_time()
        move(model, data, skip)
        spent += time.thread_time() - start

    lanes.move = timed
    for _ in range(steps):
        _, terminal = lanes.step(who, policy(lanes.states, rng.standard_normal((n, DIMS[env][1]), np.float32)))
        for lane in np.flatnonzero(terminal):
            lanes.reset(lane)
    lanes.close()
    return steps * n / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transitions", type=int, default=400_000, help="of ours; the plain loop makes a tenth")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows, load = {}, os.getloadavg()[0]
    for env in ENVS:
        shipped = behaviour.MANIFEST.with_name(f"{env}-medium.npz")
        weights = dict(np.load(shipped)) if shipped.exists() else untrained(env)
        policy = Policy(weights)
        shards = local._shards(env, [policy], args.transitions, seed=0)
        attributes = {"name": f"{env}-speed", "transitions": args.transitions}
        n, few, best = args.transitions, args.transitions // 10, {}
        for _ in range(args.rounds):
            with tempfile.TemporaryDirectory() as folder:
                one = seconds(lambda: plain(env, policy, few, Path(folder) / "plain.hdf5"))  # noqa: B023
                ours = seconds(lambda: local._make(Path(folder) / "ours.hdf5", attributes, shards, None))  # noqa: B023
            round_ = {
                "plain_per_s": few / one[0],
                "plain_per_cpu_s": few / one[1],
                "ours_per_s": n / ours[0],
                "ours_per_cpu_s": n / ours[1],
                "mujoco_alone_per_cpu_s": physics(env, policy),
            }
            best = {k: max(v, best.get(k, 0.0)) for k, v in round_.items()}
        rows[env] = {"policy": "medium" if shipped.exists() else "untrained", **{k: round(v) for k, v in best.items()}}
        rows[env] |= {
            "ratio": round(best["ours_per_s"] / best["plain_per_s"], 2),
            "ratio_by_cpu_time": round(parallel.cores() * best["ours_per_cpu_s"] / best["plain_per_cpu_s"], 2),
            "share_of_mujoco_alone": round(best["ours_per_cpu_s"] / best["mujoco_alone_per_cpu_s"], 2),
        }
        print(env, rows[env], flush=True)
    print(
        write(
            "make_speed",
            {
                "transitions": args.transitions,
                "cores": parallel.cores(),
                "rounds": args.rounds,
                "load_before": load,
                "bodies": rows,
            },
        )
    )


if __name__ == "__main__":
    main()
