"""Train many runs:

    python sweep.py --agents bamba dt --datasets hopper-medium walker2d-medium --seeds 0-4 --preset small
    python sweep.py study.yaml                        the same as a file; what the command line says goes before it

A file holds what is wanted:

    name: objectives
    agents: {bamba: {}, cloning: {agent: bamba, objective: bc, critic_pretrain: 0}, dt: {}}   # or a list of names
    datasets: [hopper-medium, walker2d-medium]       # what trainer.py takes as --dataset; of dqn as --env
    seeds: 0-4
    flags: {preset: small, num_epochs: 30}           # of every run
    grid: {learning_rate: [0.001, 0.0003]}           # every combination
    overrides: [{datasets: [hopper-medium], agents: [bamba], flags: {beta_actor: 0.05}}]
    episodes: 100                                    # in which utils.py evaluates each last checkpoint

A study is the folder `outputs/NAME/`, with a folder for each run. It is finished by calling the command again, whatever
stopped it: runs that are done stay, others go on from their last checkpoint, and a run that still trains is waited for.
A run that fails leaves its sentence; the others go on. `--status` shows a table, `--stop` stops the sweep and saves,
`--retry` tries failed runs again. Further flags are trainer.py's.

    python sweep.py study.yaml --on ray               on a Ray cluster: pip install "ray>=2.9"
    python sweep.py study.yaml --on slurm --partition gpu --time 4:00:00 --gpus 1       pip install "submitit>=1.5"
    python sweep.py study.yaml --trials 40            search: {learning_rate: [1e-4, 1e-2, log]} in the file; Optuna
"""

import argparse
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch

import utils
from common.parallel import cores
from sweeping import search, work
from sweeping.executors import Resources, package_for, train_here, train_on_ray, train_on_slurm
from sweeping.state import is_locked, is_over, state_of, table_of, take_lock
from sweeping.study import Planned, check, expand, prepare, read_study, settle
from sweeping.work import Worker
from trainer import catch_signals

PLACES = ("here", "ray", "slurm")


def arguments(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """What sweep.py is told, and the flags that are trainer.py's."""
    parser = argparse.ArgumentParser(
        prog="sweep.py",
        usage="sweep.py [study.yaml] [options] [trainer.py's flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--name", help="the study's folder in --output_dir (default: the file's name, or 'sweep')")
    parser.add_argument("--agents", nargs="+", help="names of the file's, or of trainer.py's")
    parser.add_argument("--datasets", nargs="+", help="what trainer.py takes as --dataset; of dqn as --env")
    parser.add_argument("--seeds", help="3, 0-4 or 0,2,5-7")
    parser.add_argument("--episodes", type=int, help="let utils.py evaluate each last checkpoint over so many")
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side (default: one a core, or one a GPU)")
    parser.add_argument("--retries", type=int, default=2, help="how often a failing run is tried again")
    parser.add_argument("--output_dir", default="./outputs")
    parser.add_argument("--status", action="store_true", help="show where the runs stand, and end")
    parser.add_argument("--stop", action="store_true", help="stop the sweep of this study; it saves first")
    parser.add_argument("--retry", action="store_true", help="try failed runs again")
    parser.add_argument("--on", choices=PLACES, default="here", help="this machine, a Ray cluster, SLURM's queue")
    parser.add_argument(
        "--address", default="auto", help="of the Ray cluster, HOST:PORT (default: the one of this node)"
    )
    parser.add_argument("--cpus", type=int, default=1, help="of a run on a cluster")
    parser.add_argument("--gpus", type=float, default=0.0, help="of a run on a cluster; on Ray a fraction, too")
    parser.add_argument("--partition", default="", help="of SLURM")
    parser.add_argument(
        "--time", default="", help="of a SLURM job, H:MM:SS or minutes; a run that needs longer comes again"
    )
    parser.add_argument("--trials", type=int, default=0, help="search the file's ranges by that many trials of Optuna")
    parser.add_argument("--metric", choices=search.METRICS, help="what a search maximises (default: last_score)")
    # the file is taken by hand: to argparse, an unknown flag's value would be it
    study = argv[0] if argv and not argv[0].startswith("-") else None
    args, rest = parser.parse_known_args(argv[bool(study) :])
    args.study, flags, words = study, {}, list(rest)
    while words:
        word = words.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            raise ValueError(f"{word} is no flag: a study's file comes first, trainer.py's flags begin with --")
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("--") else True
        if name in flags:
            raise ValueError(f"--{name} is given twice")
        off = name.startswith("no_") and value is True
        flags[name.removeprefix("no_") if off else name] = False if off else value
    if min(args.jobs, args.retries, args.cpus, args.gpus, args.trials) < 0:
        raise ValueError("--jobs, --retries, --cpus, --gpus and --trials count from 0 on")
    if args.trials and args.on != "here":
        raise ValueError("--trials searches on this machine: leave --on away")
    args.minutes = minutes_of(args.time)
    return args, flags


def minutes_of(text: str) -> int:
    """`4:00:00`, `90` (minutes) or nothing. ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d\d):(\d\d)", text)
    if match:
        hours, minutes, seconds = map(int, match.groups())
        return 60 * hours + minutes + (seconds > 0)
    if text and not text.isdigit():
        raise ValueError(f"--time {text} is none: write 4:00:00, or minutes")
    return int(text or 0)


def study_of(args: argparse.Namespace, flags: dict) -> dict:
    """The file's study, and before it what the command line says."""
    file = read_study(args.study) if args.study else {}
    study = {"name": "sweep", **file}
    for key in ("name", "agents", "datasets", "seeds", "episodes", "metric"):
        if getattr(args, key) is not None:
            study[key] = getattr(args, key)
    known = file.get("agents")
    if isinstance(known, dict) and args.agents and set(args.agents) <= set(known):  # the file says what they are
        study["agents"] = {name: known[name] for name in args.agents}
    for key in ("agents", "datasets"):
        if getattr(args, key) is not None:  # what is not wanted now needs no override
            rules = study.get("overrides") or []
            narrow = [
                {**rule, key: [x for x in rule[key] if x in study[key]]} if key in rule else rule for rule in rules
            ]
            study["overrides"] = [rule for rule in narrow if rule.get(key, True)]
    study["flags"] = {**(study.get("flags") or {}), **flags}
    study["grid"] = {k: v for k, v in (study.get("grid") or {}).items() if k not in flags}
    if not re.fullmatch(r"[\w.+-]+", str(study["name"])):
        raise ValueError(f"{study['name']} cannot be a folder's name: take letters, digits, . + - _")
    return study


def stop_other(folder: Path) -> int:
    if not is_locked(folder / "lock"):
        print(f"no sweep of {folder} is running")
        return 1
    pid = int((folder / "pid").read_text())
    os.kill(pid, signal.SIGTERM)
    print(f"told process {pid} to save and stop")
    return 0


def main(argv: list[str] | None = None) -> int:
    with utils.errors_as_sentences():
        args, flags = arguments(sys.argv[1:] if argv is None else argv)
        study = study_of(args, flags)
        folder = Path(args.output_dir) / study["name"]
        if args.stop:
            return stop_other(folder)
        if args.trials:
            return with_lock(folder, lambda: search.search(study, folder, args))
        if study.get("search"):
            raise ValueError("the study has ranges to search: say how many trials, such as --trials 40")
        runs = expand(study)
        jobs = args.jobs or torch.cuda.device_count() or cores()
        if args.status:
            print("\n".join(table_of(runs, folder, jobs)))
            return 0
        if args.on != "here":
            package_for(args.on)
        check([run for run in runs if not is_over(folder / run.name)], study)
        settle(runs, folder)
        return with_lock(folder, lambda: train(runs, folder, jobs, args))


def with_lock(folder: Path, go) -> int:
    """`go()`, while no other sweep of the study can run."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as lock:
        if not take_lock(lock):
            raise ValueError(f"a sweep of {folder} is running (--status shows it, --stop stops it)")
        (folder / "pid").write_text(str(os.getpid()))
        return go()


def train(runs: list[Planned], folder: Path, jobs: int, args: argparse.Namespace) -> int:
    """What is left of the runs, until all is done, failed or stopped. Returns the exit status."""
    for run in runs if args.retry else []:
        (folder / run.name / "failed.json").unlink(missing_ok=True)
    left = [run for run in runs if not is_over(folder / run.name)]
    prepare(left)
    jobs = min(jobs, len(runs))
    with catch_signals() as signals:
        look = Progress(runs, folder, jobs, signals)
        if left and args.on == "here":
            threads = 0 if torch.cuda.device_count() else max(1, cores() // jobs)
            train_here(left, Worker(folder, args.retries, threads, echo=not sys.stdout.isatty()), jobs, look)
        elif left:
            want = Resources(args.cpus, args.gpus, args.address, args.partition, args.minutes)
            worker = Worker(folder, args.retries, 0 if args.gpus else args.cpus)
            {"ray": train_on_ray, "slurm": train_on_slurm}[args.on](left, worker, args.jobs, look, want)
    if signals:
        print("stopped; the same command goes on")
        return 128 + signals[0]
    print("\n".join(table_of(runs, folder, jobs)))
    words = [state_of(folder / run.name).word for run in runs]
    return int(any(word != "done" for word in words))


class Progress:
    """On a terminal, the table of the runs, drawn anew now and then. Called, it says whether a signal came."""

    def __init__(self, runs: list[Planned], folder: Path, jobs: int, signals: list):
        self.runs, self.folder, self.jobs, self.signals = runs, folder, jobs, signals
        self.shown, self.when = 0, 0.0

    def __call__(self) -> bool:
        if sys.stdout.isatty() and time.monotonic() - self.when > work.LOOK:
            lines, self.when = table_of(self.runs, self.folder, self.jobs), time.monotonic()
            print(f"\x1b[{self.shown}A" * bool(self.shown) + "\n".join(f"\x1b[2K{line}" for line in lines), flush=True)
            self.shown = len(lines)
        return bool(self.signals)


if __name__ == "__main__":
    raise SystemExit(main())
