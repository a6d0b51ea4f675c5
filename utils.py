"""Judge any checkpoint, and what surrounds an agent: saving, waking, evaluating it.

    python utils.py --checkpoint outputs/best_checkpoint.pt
    python utils.py --checkpoint outputs/hopper-medium-bamba-s42-.../last_checkpoint.pt --episodes 100 --json score.json

A judge is the agent in float64 without dropout. In float64 the actions that reach the simulator (rounded to its
float32) do not depend on how many episodes share a forward pass, so one seed means one score, whatever the batch.
"""

import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import tyro
from torch.utils import _pytree as pytree

import pictures
from checkpoints import FORMAT, SYSTEMS, config_of, load, read_checkpoint, save, system_of
from d4rl_utils import SCORE_NAMES as D4RL_NAMES
from machine import pick_device, versions
from ogbench_utils import SCORE_NAMES as OGBENCH_NAMES
from ogbench_utils import name_of, split_name
from records import replacing

__all__ = ["FORMAT", "SYSTEMS", "config_of", "read_checkpoint", "save", "system_of"]  # so that `utils` is all one needs


# -- evaluation ----------------------------------------------------------------------------------


class Episodes(NamedTuple):
    """One entry an episode, in the order of their seeds."""

    returns: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,)
    outcomes: dict[str, np.ndarray]  # how they ended, each (n,); empty if the world does not say
    actions: np.ndarray | None  # (A,) how often each was taken; None where they are not discrete
    tasks: dict[str, np.ndarray]  # returns by task, each (episodes,); empty where there is one alone


def judge_of(agent: torch.nn.Module) -> torch.nn.Module:
    """A float64 copy of the agent in evaluation mode; the agent itself, and every random stream, stay as they are."""
    device = "cpu" if agent.device.type == "mps" else agent.device  # MPS has no float64
    with torch.random.fork_rng(devices=[]):
        twin = type(agent)(replace(agent.cfg, compile=False, cuda_graphs=False, precision="fp32"), agent.spec, device)
    twin.load_state_dict(agent.state_dict())
    return twin.double().eval()


def evaluate(
    agent: torch.nn.Module,
    make_env: Callable,
    episodes: int,
    seed: int,
    frames: list | None = None,
    goal=None,
    outcome: Callable | None = None,
    tasks: tuple[str, ...] = (),
) -> Episodes:
    """Play `episodes` episodes (of every task) side by side, one environment each; each counts exactly once.

    Episode i (of a task) begins from seed + i. Deterministic actions; one batched forward a step, over the episodes
    that still run. frames: filled with the pictures of the first episode. goal: what the agent is asked for, if not
    what it is used to; an environment whose reset says `info["goal"]` asks for that.
    outcome, tasks: as in `agent.World`.
    """
    if episodes < 1:
        raise ValueError(f"{episodes} episodes cannot be averaged: take 1 or more")
    judge = judge_of(agent)
    first = "rgb_array" if frames is not None else None  # the pictures are of one episode
    kinds = [(task,) for task in tasks] or [()]
    envs = [make_env(None if i else first, *kind) for kind in kinds for i in range(episodes)]
    n = len(envs)
    as_tensor = lambda x: torch.as_tensor(x, dtype=torch.float64, device=judge.device)  # noqa: E731
    state, infos = zip(*(env.reset(seed=seed + i % episodes) for i, env in enumerate(envs)))
    state = np.stack(state)
    if "goal" in infos[0]:
        goal = as_tensor(np.stack([info["goal"] for info in infos]))
    returns, lengths = np.zeros(n), np.zeros(n, dtype=np.int64)
    live, reward, memory = np.arange(n), np.zeros(n), judge.reset(n, goal)
    ends, chosen = [{}] * n, []
    while len(live):
        action, memory = judge.act(as_tensor(state), as_tensor(reward), memory)
        action = action.cpu().numpy()
        if action.dtype.kind == "f":
            action = action.astype(np.float32)
        else:
            chosen.append(action)
        if frames is not None and live[0] == 0:
            frames.append(envs[0].render())
        over = np.zeros(len(live), dtype=bool)
        for j, i in enumerate(live):
            state[j], reward[j], terminated, truncated, info = envs[i].step(action[j])
            over[j] = terminated or truncated
            if over[j] and outcome:
                ends[i] = outcome(info, reward[j])
        returns[live] += reward
        lengths[live] += 1
        if over.any():
            rest = np.flatnonzero(~over)
            live, state, reward = live[rest], state[rest], reward[rest]
            rest = torch.as_tensor(rest, device=judge.device)
            memory = pytree.tree_map(lambda x: x.index_select(0, rest), memory)  # noqa: B023  used at once
    for env in envs:
        env.close()
    outcomes = {k: np.array([end[k] for end in ends], dtype=float) for k in ends[0]}
    counts = np.bincount(np.concatenate(chosen), minlength=agent.spec.actions) if chosen else None
    return Episodes(returns, lengths, outcomes, counts, dict(zip(tasks, returns.reshape(-1, episodes))))


def summary(result: Episodes, score: Callable[[float], float] | None) -> dict[str, float]:
    """What is reported of an evaluation; without `score` returns alone.

    Scores are linear, so the score of the mean is the mean of the scores.
    """
    r = result.returns
    more = {f"eval/{k}": float(v.mean()) for k, v in result.outcomes.items()}
    more |= {f"eval/{k}": score(float(v.mean())) if score else float(v.mean()) for k, v in result.tasks.items()}
    if result.actions is not None:
        more |= {f"eval/action_{i}": float(n / result.actions.sum()) for i, n in enumerate(result.actions)}
    scores = (
        {"eval/score": score(float(r.mean())), "eval/score_std": float(np.std([score(x) for x in r]))} if score else {}
    )
    return (
        scores
        | {
            "eval/return_mean": float(r.mean()),
            "eval/return_std": float(r.std()),
            "eval/return_min": float(r.min()),
            "eval/return_max": float(r.max()),
            "eval/length_mean": float(result.lengths.mean()),
            "eval/episodes": len(r),
        }
        | more
    )


def words_of(result: Episodes, world) -> list[tuple[str, str]]:
    """How the episodes ended and what was done in them, labels and words; nothing where that has no meaning."""
    lines = []
    if result.tasks:
        mean = world.score or float
        lines.append(("tasks", ", ".join(f"{k} {mean(float(v.mean())):.1f}" for k, v in result.tasks.items())))
    if result.outcomes:
        lines.append(("ends", ", ".join(f"{k} {v.mean():.0%}" for k, v in result.outcomes.items())))
    if result.actions is not None:
        names = world.actions or [str(i) for i in range(len(result.actions))]
        shares = result.actions / result.actions.sum()
        lines.append(("actions", ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares))))
    return lines


def words_of_trivial(returns: dict[str, float] | None) -> list[tuple[str, str]]:
    """What policies earn that look at nothing, in the same form."""
    return [("trivial", ", ".join(f"{k} {v:.1f}" for k, v in returns.items()))] if returns else []


def headline(row: dict[str, float]) -> float:
    """The one number of an evaluation's row: its score, or the mean return where there is no reference."""
    return row.get("eval/score", row["eval/return_mean"])


def headline_name(world, source: str) -> str:
    """What that number is called after learning from data of this source: only D4RL's own give a "D4RL score"."""
    return (D4RL_NAMES | OGBENCH_NAMES)[source] if world.score else "return"


def source_of(data: dict) -> str:
    """Where what an agent learned from came from; of one that went on from another's training, that one's."""
    return data.get("before", data)["source"]


# -- the verb ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judge:
    """Play episodes with a trained agent and print what they earned."""

    checkpoint: str
    """a .pt file that trainer.py wrote, or a run folder (its last checkpoint)"""
    env: str = ""
    """a dataset name such as hopper-medium-v2, or a body, to make sure: the checkpoint knows its environment"""
    episodes: Annotated[int, tyro.conf.arg(aliases=["--num_eval_episodes"])] = 10
    """how many, all at once"""
    seed: int = 2_000_000
    """of the first episode; the next ones count on. Training looks at 1,000,000 and up"""
    video: str = ""
    """write the first episode to this .mp4, headless"""
    json: str = ""
    """write everything that is printed, and every episode, to this file"""
    env_version: str = ""
    """another version of the body, e.g. v5; the default is the one of the training"""
    device: str = "auto"
    """auto, cpu, cuda, mps"""
    target_return: tuple[float, ...] = ()
    """what to ask of a return-conditioned agent; several: each in turn, and the headline is the first's"""
    picture: str = ""
    """draw what was got against what was asked for, as a .png"""
    inference: str = ""
    """another way for a return-conditioned agent to look back: window, recurrent, staggered"""


def check_env(wanted: str, cfg, data: dict) -> None:
    """`wanted` must be what the checkpoint was trained for.

    That is its data's name or environment; with D4RL's names also hopper, hopper-medium, hopper-medium-v2 and -local.
    """
    own = {data["name"]} | (set() if data["source"] == "minari" else {cfg.env})
    if source_of(data).startswith("ogbench"):
        base = split_name(name_of(cfg)).base
        own |= {cfg.dataset, base, f"{base}-v0", f"{base}-local"}
    if data["source"] in ("d4rl", "local"):
        base = data["name"].removesuffix("-v2").removesuffix("-local")
        own |= {base, f"{base}-v2", f"{base}-local", base.partition("-")[0]}
    if wanted and wanted not in own:
        raise ValueError(
            f"this checkpoint was trained on {data['name']}, not on {wanted}: "
            "leave --env away, or give its own checkpoint"
        )


def judge(options: Judge) -> dict:
    """Evaluate a checkpoint; returns and prints the result."""
    changes = {"compile": False, "cuda_graphs": False}
    if options.env_version:
        changes["env_version"] = options.env_version
    if options.inference:
        changes["inference"] = options.inference
    agent, part = load(options.checkpoint, pick_device(options.device), **changes)
    cfg, data = agent.cfg, part["run"]["data"]
    check_env(options.env, cfg, data)
    if options.video:
        pictures.headless_rendering()
    world = system_of(cfg.agent)[0].world(cfg)
    if world.spec != agent.spec:
        raise ValueError(f"the agent was made for {agent.spec}, but {world.name} has {world.spec}")
    if options.env_version and options.env_version not in world.name:
        raise ValueError(f"--env_version {options.env_version} is for D4RL's bodies: this agent lives in {world.name}")
    frames = [] if options.video else None
    goals = options.target_return or (None,)
    start = time.time()
    result = evaluate(agent, world.make, options.episodes, options.seed, frames, goals[0], world.outcome, world.tasks)
    seconds = time.time() - start
    row = summary(result, world.score)
    name = headline_name(world, source_of(data))
    using = ", ".join(f"{k} {v}" for k, v in versions().items())
    low, high = row["eval/return_min"], row["eval/return_max"]
    print(f"agent   {cfg.agent}, {part['updates']:,} updates")
    if data["source"] == "online":
        print(f"learned in {data['name']}, {part['steps']:,} environment steps")
        if "before" in data:
            before = data["before"]
            print(f"after   {before['name']} ({before['source']}), {before['transitions']:,} transitions")
    else:
        known = f"{data['transitions']:,} transitions, SHA-256 {data['sha256'][:12]}"
        print(f"data    {data['name']} ({data['source']}), {known}")
    print(f"return  {row['eval/return_mean']:.1f} ± {row['eval/return_std']:.1f}, from {low:.1f} to {high:.1f}")
    print(f"length  {row['eval/length_mean']:.1f}, from {result.lengths.min()} to {result.lengths.max()}")
    if world.score:
        print(f"score   {row['eval/score']:.2f} ± {row['eval/score_std']:.2f}, {name}, on {world.scale}")
    else:
        print(f"score   none: there are no reference returns for {world.name}")
    for label, text in words_of(result, world) + words_of_trivial(part["run"].get("trivial")):
        print(f"{label:<8}{text}")
    print(f"judged  in {world.name}, {options.episodes} episodes from seed {options.seed}, {seconds:.1f} s; {using}")
    asked = [result, *(evaluate(agent, world.make, options.episodes, options.seed, goal=g) for g in goals[1:])]
    for goal, one in zip(options.target_return, asked):
        mean = float(one.returns.mean())
        print(f"asked   {goal:g}: return {mean:.1f}" + (f", {name} {world.score(mean):.2f}" if world.score else ""))
    if options.picture:
        if not options.target_return:
            raise ValueError("--picture draws what was got against what was asked for: give --target_return too")
        with replacing(Path(options.picture)) as file:
            pictures.draw_sweep(goals, [one.returns for one in asked], f"{cfg.agent}, {data['name']}", file)
    if options.video:
        with replacing(Path(options.video)) as file:
            pictures.write_video(file, frames, world.fps)
        print(f"video   {options.video}: first episode, return {result.returns[0]:.1f}")
    if options.json:
        record = {
            "checkpoint": str(options.checkpoint),
            "agent": cfg.agent,
            "updates": part["updates"],
            "data": data,
            "seed": options.seed,
        }
        record |= {
            "env": world.name,
            "score_name": name,
            "scale": world.scale,
            "versions": versions(),
            **row,
            "returns": result.returns.tolist(),
            "tasks": {k: v.tolist() for k, v in result.tasks.items()},
            "lengths": result.lengths.tolist(),
            "trivial": part["run"].get("trivial"),
        }
        if options.target_return:
            record["asked"] = {f"{g:g}": one.returns.tolist() for g, one in zip(goals, asked)}
        with replacing(Path(options.json)) as file:
            file.write_text(json.dumps(record, indent=1) + "\n")
    return row


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """A user's mistake ends the program with its sentence and exit code 2, not with a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    options = tyro.cli(Judge, args=argv, prog="utils.py", use_underscores=True)
    with errors_as_sentences():
        judge(options)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
