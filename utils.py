"""Evaluate any checkpoint, and what surrounds an agent: saving, loading, evaluating it.

    python utils.py --checkpoint outputs/best_checkpoint.pt
    python utils.py --checkpoint outputs/hopper-medium-bamba-s42-.../last_checkpoint.pt --episodes 100 --json score.json

How episodes are played is in `common/evaluation.py`, what a checkpoint holds in `common/checkpoint.py`.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import tyro

from common import plotting, zoo
from common.checkpoint import AGENTS, FORMAT, agent_of, config_of, load, read_checkpoint, save
from common.device import pick_device, versions
from common.evaluation import (
    Episodes,
    baseline_lines,
    evaluate,
    headline,
    headline_name,
    report_lines,
    source_of,
    summary,
)
from common.files import check_file_path
from common.interface import EvalEnv
from common.logger import atomic_write
from ogbench_utils import name_of, split_name

__all__ = ["AGENTS", "FORMAT", "agent_of", "config_of", "load", "read_checkpoint", "save"]
__all__ += ["Episodes", "evaluate", "headline", "summary"]  # so that `utils` is all one needs


VIDEO_FPS = 30  # pictures a second of a video, about: drawing takes most of its time


@dataclass(frozen=True)
class EvalArgs:
    """Play episodes with a trained agent and print what they earned."""

    checkpoint: str = ""
    """a .pt file that trainer.py wrote, or a run folder (its last checkpoint)"""
    zoo: bool = False
    """list the trained checkpoints that come with the project"""
    doctor: bool = False
    """say what this machine can do and what is missing, to be pasted into a bug report"""
    env: str = ""
    """a dataset name such as hopper-medium-v2, or a body, to make sure: the checkpoint knows its environment"""
    episodes: Annotated[int, tyro.conf.arg(aliases=["--num_eval_episodes"])] = 10
    """how many, all at once"""
    seed: int = 2_000_000
    """of the first episode; the next ones count on. Training looks at 1,000,000 and up"""
    video: str = ""
    """write the first episode to this .mp4 or .gif, headless"""
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


class EvalReport(NamedTuple):
    """What an evaluation found."""

    args: EvalArgs
    ckpt: dict
    env: EvalEnv
    score_name: str
    episodes: Episodes
    by_return: dict[float, Episodes]  # of each return that was asked for
    frames: list  # pictures of the first episode, if a video is wanted
    fps: float  # of these
    seconds: float  # of the first evaluation

    @property
    def row(self) -> dict[str, float]:
        """The numbers, by name."""
        return summary(self.episodes, self.env.score)


def evaluate_checkpoint(args: EvalArgs) -> EvalReport:
    """Play the episodes. ValueError for what cannot be evaluated, before any is played."""
    for flag, path in (("video", args.video), ("json", args.json), ("picture", args.picture)):
        check_file_path(flag, path)
    if args.picture and not args.target_return:
        raise ValueError("--picture draws what was got against what was asked for: give --target_return too")
    if args.video:
        plotting.set_mujoco_gl()
    changes = {"compile": False, "cuda_graphs": False}
    if args.env_version:
        changes["env_version"] = args.env_version
    if args.inference:
        changes["inference"] = args.inference
    agent, ckpt = load(args.checkpoint, pick_device(args.device), **changes)
    data = ckpt["run"]["data"]
    check_env(args.env, agent.cfg, data)
    env = agent_of(agent.cfg.agent).make_eval_env(agent.cfg)
    if env.spec != agent.spec:
        raise ValueError(f"the agent was made for {agent.spec}, but {env.name} has {env.spec}")
    if args.env_version and args.env_version not in env.name:
        raise ValueError(f"--env_version {args.env_version} is for D4RL's bodies: this agent acts in {env.name}")

    goals, frames = args.target_return or (None,), []
    start = time.time()
    pictures = frames if args.video else None
    every = max(1, round(env.fps / VIDEO_FPS))
    first = evaluate(agent, env.make, args.episodes, args.seed, pictures, goals[0], env.outcome, env.tasks, every)
    seconds = time.time() - start
    by_return = {goals[0]: first} if args.target_return else {}
    for goal in goals[1:]:
        by_return[goal] = evaluate(agent, env.make, args.episodes, args.seed, goal=goal)
    return EvalReport(
        args, ckpt, env, headline_name(env, source_of(data)), first, by_return, frames, env.fps / every, seconds
    )


def text_of(report: EvalReport) -> str:
    """The report for people."""
    args, ckpt, env, row = report.args, report.ckpt, report.env, report.row
    data, run = ckpt["run"]["data"], ckpt["run"]
    lines = [("agent", f"{ckpt['system']}, {ckpt['updates']:,} updates")]
    if data["source"] == "online":
        lines.append(("learned", f"in {data['name']}, {ckpt['steps']:,} environment steps"))
        if "before" in data:
            before = data["before"]
            lines.append(("after", f"{before['name']} ({before['source']}), {before['transitions']:,} transitions"))
    else:
        known = f"{data['transitions']:,} transitions, SHA-256 {data['sha256'][:12]}"
        lines.append(("data", f"{data['name']} ({data['source']}), {known}"))
    low, high, lengths = row["eval/return_min"], row["eval/return_max"], report.episodes.lengths
    spread = f"± {row['eval/return_std']:.1f}, from {low:.1f} to {high:.1f}"
    lines.append(("return", f"{row['eval/return_mean']:.1f} {spread}"))
    lines.append(("length", f"{row['eval/length_mean']:.1f}, from {lengths.min()} to {lengths.max()}"))
    if env.score:
        score = f"{row['eval/score']:.2f} ± {row['eval/score_std']:.2f}"
        lines.append(("score", f"{score}, {report.score_name}, on {env.scale}"))
    else:
        lines.append(("score", f"none: there are no reference returns for {env.name}"))
    lines += report_lines(report.episodes, env)
    lines += baseline_lines(run.get("baseline_returns"))
    using = ", ".join(f"{k} {v}" for k, v in versions().items())
    played = f"{args.episodes} episodes from seed {args.seed}, {report.seconds:.1f} s"
    lines.append(("eval", f"in {env.name}, {played}; {using}"))
    for goal, episodes in report.by_return.items():
        mean = float(episodes.returns.mean())
        score = f", {report.score_name} {env.score(mean):.2f}" if env.score else ""
        lines.append(("asked", f"{goal:g}: return {mean:.1f}{score}"))
    if args.video:
        lines.append(("video", f"{args.video}: first episode, return {report.episodes.returns[0]:.1f}"))
    return "\n".join(f"{label:<8}{text}" for label, text in lines)


def record_of(report: EvalReport) -> dict:
    """The report for programs: all that is printed, and every episode."""
    args, ckpt, env = report.args, report.ckpt, report.env
    record = {
        "checkpoint": str(args.checkpoint),
        "agent": ckpt["system"],
        "updates": ckpt["updates"],
        "data": ckpt["run"]["data"],
        "seed": args.seed,
        "env": env.name,
        "score_name": report.score_name,
        "scale": env.scale,
        "versions": versions(),
        **report.row,
        "returns": report.episodes.returns.tolist(),
        "tasks": {k: v.tolist() for k, v in report.episodes.tasks.items()},
        "lengths": report.episodes.lengths.tolist(),
        "baseline_returns": ckpt["run"].get("baseline_returns"),
    }
    if report.by_return:
        record["asked"] = {f"{goal:g}": episodes.returns.tolist() for goal, episodes in report.by_return.items()}
    return record


def write_files(report: EvalReport) -> None:
    """The files that were asked for."""
    args = report.args
    if args.picture:
        title = f"{report.ckpt['system']}, {report.ckpt['run']['data']['name']}"
        with atomic_write(Path(args.picture)) as file:
            returns = [episodes.returns for episodes in report.by_return.values()]
            plotting.plot_target_returns(list(report.by_return), returns, title, file)
    if args.video:
        with atomic_write(Path(args.video)) as file:
            plotting.write_video(file, report.frames, report.fps, Path(args.video).suffix)
    if args.json:
        with atomic_write(Path(args.json)) as file:
            file.write_text(json.dumps(record_of(report), indent=1) + "\n")


@contextmanager
def errors_as_sentences() -> Iterator[None]:
    """A user's mistake ends the program with its sentence and exit code 2, not with a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
    except (MemoryError, RuntimeError) as error:  # PyTorch has no kind of its own for a CPU whose memory is full
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "allocate memory" not in str(error):
            raise
        reason = (str(error) or "no more is to be had").splitlines()[0]
        print(
            f"error: the memory is full ({reason}). Take a smaller network or --batch_size, or fewer seeds at once",
            file=sys.stderr,
        )
        raise SystemExit(2) from error


def print_examination() -> int:
    """What common/doctor.py finds; exit status 1 if something is broken."""
    from common import doctor

    broken = False
    for verdict, about, words in doctor.examine():
        print(f"{verdict:<4}{about:<11}{words}", flush=True)
        broken |= verdict == "BAD"
    return int(broken)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    args = tyro.cli(EvalArgs, args=argv, prog="utils.py", use_underscores=True)
    with errors_as_sentences():
        if args.zoo:
            print(zoo.table())
            return 0
        if args.doctor:
            return print_examination()
        if not args.checkpoint:
            raise ValueError(
                "give --checkpoint: a .pt file that trainer.py wrote, or a run folder; or --zoo for a list"
            )
        report = evaluate_checkpoint(args)
        write_files(report)
        print(text_of(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
