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

A study is the folder `outputs/NAME/`, with a folder for each run. It is finished by calling the command again, whatever
stopped it: runs that are done stay, others go on from their last checkpoint, and a run that still trains is waited for.
A run that fails leaves its sentence; the others go on. `--status` shows a table, `--stop` stops the sweep and saves,
`--retry` tries failed runs again. Further flags are trainer.py's.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import yaml

import utils
from common import evaluation, logger
from common.checkpoint import AGENTS, agent_of
from common.interface import OnlineAgent
from common.parallel import cores
from config import parse
from config.shared import Data
from trainer import catch_signals

TRAINER = [sys.executable, str(Path(__file__).resolve().parent / "trainer.py")]
KEYS = {"name", "agents", "datasets", "seeds", "flags", "grid", "overrides"}
OURS = {"output_dir", "resume", "seed", "num_seeds", "agent"}  # trainer.py's flags that a sweep decides
LOOK = 2.0  # seconds between two looks at the runs


@dataclass(frozen=True)
class Planned:
    """A run that is wanted. name: the combination; of its folder too. total: updates, or environment steps. label: as
    report.py calls its agent."""

    name: str
    flags: dict
    total: int
    label: str = ""

    @property
    def argv(self) -> list[str]:
        return as_argv(self.flags)


def as_argv(flags: dict) -> list[str]:
    """Settings as trainer.py's command line has them."""
    found = []
    for name, value in flags.items():
        found.append(("--" if value else "--no_") + name if isinstance(value, bool) else f"--{name}={value}")
    return found


# -- what is wanted --------------------------------------------------------------------------------


def read_study(path: str) -> dict:
    """A study's file. ValueError, with the line, for what is not one."""
    text = Path(path).read_text()
    try:
        study = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = error.problem_mark
        raise ValueError(f"{path}, line {mark.line + 1 if mark else '?'}: this is no YAML ({error.problem})") from error
    if not isinstance(study, dict):
        raise ValueError(f"{path} holds no settings: it wants agents, datasets and seeds")
    for key in study:
        if key not in KEYS:
            raise ValueError(f"{path}, line {line_of(text, str(key))}: {key} is none of {', '.join(sorted(KEYS))}")
    return {"name": Path(path).stem, **study}


def line_of(text: str, word: str) -> int:
    """The first line that has the word, from 1 on; 1 if none has."""
    lines = (i for i, line in enumerate(text.splitlines(), 1) if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", line))
    return next(lines, 1)


def seeds_of(text) -> list[int]:
    """`3`, `0-4`, `0,2,5-7` or a list of numbers. ValueError for anything else."""
    if isinstance(text, list) and all(type(seed) is int for seed in text):
        return text
    found = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(f"seeds {text} are none: write 3, 0-4 or 0,2,5-7")
        first, last = int(match[1]), int(match[2] or match[1])
        found += range(first, last + 1)
    return found


def expand(study: dict) -> list[Planned]:
    """Every run of a study, each checked by trainer.py's own command line. ValueError with what is wrong in which."""
    agents = study.get("agents") or ["bamba"]
    agents = agents if isinstance(agents, dict) else {name: {} for name in agents}
    grid, overrides = study.get("grid") or {}, study.get("overrides") or []
    twice = set(grid) & set(study.get("flags") or {})
    if twice:
        raise ValueError(f"{', '.join(sorted(twice))} stands in flags and in grid: which is it?")
    values = [value if isinstance(value, list) else [value] for value in grid.values()]
    for rule in overrides:
        if not isinstance(rule, dict) or not set(rule) <= {"datasets", "agents", "flags"} or not rule.get("flags"):
            raise ValueError(f"the override {rule} wants flags, and datasets or agents that they are for")
        for key, known in (("agents", agents), ("datasets", study.get("datasets") or [])):
            for name in rule.get(key) or []:
                if name not in known:
                    raise ValueError(f"an override names {name}, which is none of the study's {key}")
    runs = []
    for (label, own), dataset in itertools.product(agents.items(), study.get("datasets") or [""]):
        for point, seed in itertools.product(itertools.product(*values), seeds_of(study.get("seeds", 42))):
            chosen = dict(zip(grid, point))
            flags = {"agent": label, **(study.get("flags") or {}), **(own or {}), **chosen}
            for rule in overrides:
                if dataset in (rule.get("datasets") or [dataset]) and label in (rule.get("agents") or [label]):
                    flags.update(rule["flags"])
            if bad := (OURS - {"agent"}) & set(flags):
                raise ValueError(f"{', '.join(sorted(bad))} cannot be set here: a sweep decides that itself")
            if dataset:
                flags["env" if flags["agent"] == "dqn" else "dataset"] = dataset
            words = [label, Path(str(dataset)).stem, *(f"{k}={v}" for k, v in chosen.items()), f"s{seed}"]
            name = re.sub(r"[^\w.=+-]+", "-", "-".join(word for word in words if word))
            called = " ".join([label, *(f"{k}={v}" for k, v in chosen.items())])
            runs.append(planned(name, {**flags, "seed": seed}, called))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is wanted twice")
    return runs


def planned(name: str, flags: dict, label: str = "") -> Planned:
    """A run whose flags are trainer.py's. ValueError with the sentence if they are not."""
    if flags["agent"] not in AGENTS:
        raise ValueError(f"run {name}: there is no agent {flags['agent']}; there are {', '.join(AGENTS)}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            cfg = parse(as_argv(flags))
    except SystemExit:  # tyro's: a frame with the reason in it
        words = " ".join(re.sub(r"[│╭╮╰╯─]", " ", said.getvalue()).split())
        raise ValueError(f"run {name}: {words.partition('For full helptext')[0].strip()}") from None
    except ValueError as error:
        raise ValueError(f"run {name}: {error}") from error
    online = issubclass(agent_of(cfg.agent), OnlineAgent)
    return Planned(name, flags, cfg.env_steps if online else cfg.num_epochs * cfg.updates_per_epoch, label)


def prepare(runs: list[Planned]) -> None:
    """Environments and data are found, downloaded or made once, before a run needs them. ValueError, OSError: not."""
    seen = set()
    for run in runs:
        cfg = parse(run.argv)
        agent_class = agent_of(cfg.agent)
        key = cfg.agent, *(str(run.flags.get(f.name)) for f in fields(Data)), run.flags.get("preset")
        if key in seen:
            continue
        seen.add(key)
        agent_class.make_eval_env(agent_class.resolve_config(cfg))
        if not issubclass(agent_class, OnlineAgent):
            agent_class.open_data(cfg, "cpu", 0)


# -- where a run stands ----------------------------------------------------------------------------


@dataclass
class State:
    """What a run's folder says of it."""

    word: str  # waiting, running, done or failed
    step: int = 0
    seconds: float = 0.0
    score: float | None = None
    sentence: str = ""


def run_folder(place: Path) -> Path | None:
    """trainer.py's own folder in a run's, if it has a checkpoint to go on from."""
    found = sorted(place.glob("*/last_checkpoint.pt"), key=lambda path: path.stat().st_mtime)
    return found[-1].parent if found else None


def state_of(place: Path) -> State:
    state = State("waiting")
    logs = sorted(place.glob("*/log.jsonl"), key=lambda path: path.stat().st_mtime)
    for row in logger.read_log(logs[-1]) if logs else []:
        state.step = row.get("env_step", row.get("update", 0))
        state.seconds = row.get("seconds", state.seconds)
        if "eval/return_mean" in row:
            state.score = evaluation.headline(row)
    if (place / "done.json").exists():
        state.word = "done"
    elif (place / "failed.json").exists():
        state.word, state.sentence = "failed", json.loads((place / "failed.json").read_text())["sentence"]
    elif is_locked(place / "lock"):
        state.word = "running"
    return state


def is_locked(path: Path) -> bool:
    if not path.exists():
        return False
    with open(path) as file:
        return not take_lock(file)


def take_lock(file) -> bool:
    """Whether the lock of an open file could be had; it is held until the file, and every copy of it, is closed."""
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def table_of(runs: list[Planned], folder: Path, jobs: int) -> list[str]:
    """One line a run, and one for all of them."""
    width, lines, left, counts = max(len(run.name) for run in runs), [], 0.0, {}
    states = {run.name: state_of(folder / run.name) for run in runs}
    rates = [s.seconds / s.step for s in states.values() if s.step and s.seconds]
    for run in runs:
        state = states[run.name]
        counts[state.word] = counts.get(state.word, 0) + 1
        text = f"{run.name:<{width}}  {state.word:<8}{min(1.0, state.step / run.total):>5.0%}"
        text += f"{state.score:>8.1f}" if state.score is not None else " " * 8
        if state.word in ("running", "waiting") and rates:
            rate = state.seconds / state.step if state.step and state.seconds else sum(rates) / len(rates)
            seconds = rate * max(0, run.total - state.step)
            left += seconds
            text += f"  {duration(seconds)} left" if state.word == "running" else ""
        lines.append(f"{text}  {state.sentence}".rstrip())
    words = ", ".join(f"{n} {word}" for word, n in sorted(counts.items()))
    return [*lines, f"{words}" + (f"; about {duration(left / jobs)} left" if left else "")]


def duration(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


# -- training --------------------------------------------------------------------------------------


class Sweep:
    """Trains what is left of a study. stopping: set by a signal; nothing more begins, what trains is told to save."""

    def __init__(self, runs: list[Planned], folder: Path, jobs: int, retries: int, threads: int):
        self.runs, self.folder, self.jobs, self.retries, self.threads = runs, folder, jobs, retries, threads
        self.stopping, self.processes = threading.Event(), set()
        self.gpus = visible_gpus()
        self.places = queue.SimpleQueue()  # to compute in: a GPU for each run that trains, None: the CPU
        for i in range(jobs):
            self.places.put(self.gpus[i % len(self.gpus)] if self.gpus else None)
        self.journal_lock = threading.Lock()

    def tell(self, run: Planned, event: str, **more) -> None:
        """A line in the journal, and for people."""
        row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "run": run.name, "event": event, **more}
        with self.journal_lock, open(self.folder / "journal.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if not sys.stdout.isatty():
            print(f"{run.name}: {event}" + "".join(f", {v}" for v in more.values()), flush=True)

    def train(self, run: Planned) -> None:
        """One run, from wherever it stands to its end."""
        gpu = self.places.get()
        try:
            self.finish(run, self.folder / run.name, gpu)
        finally:
            self.places.put(gpu)

    def finish(self, run: Planned, place: Path, gpu: str | None) -> None:
        with open(place / "lock", "a") as lock:
            while not take_lock(lock):  # a trainer that outlived an earlier sweep
                if self.stopping.wait(LOOK):
                    return
            for attempt in range(self.retries + 1):
                if self.stopping.is_set() or state_of_end(place):
                    return
                begun = run_folder(place)
                argv = ["--resume", str(begun)] if begun else [*run.argv, "--output_dir", str(place)]
                self.tell(run, "goes on" if begun else "begins")
                code = self.call([*argv, *self.place_flags(run)], gpu, lock, place / "output.txt")
                if self.stopping.is_set():
                    return
                if code == 0:
                    state = state_of(place)
                    write_json(place / "done.json", {"score": state.score, "step": state.step})
                    return self.tell(run, "done", score=state.score)
                sentence = why(place / "output.txt", code)
                self.tell(run, "failed", attempt=f"attempt {attempt + 1} of {self.retries + 1}", sentence=sentence)
            write_json(place / "failed.json", {"sentence": sentence, "code": code})

    def place_flags(self, run: Planned) -> list[str]:
        """Where it computes: side by side on a CPU, each run has its share of the cores."""
        return [] if self.gpus or "threads" in run.flags else ["--threads", str(self.threads)]

    def call(self, argv: list[str], gpu: str | None, lock, output: Path) -> int:
        env = dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        with open(output, "a") as file:
            # the trainer inherits the lock: it is free when nobody trains this run any more, killed or not
            process = subprocess.Popen(
                [*TRAINER, *argv], stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=env, pass_fds=[lock.fileno()]
            )
        self.processes.add(process)
        if self.stopping.is_set():  # a signal came in between
            process.terminate()
        code = process.wait()
        self.processes.discard(process)
        return code

    def stop(self) -> None:
        self.stopping.set()
        for process in list(self.processes):
            process.terminate()

    def run(self) -> int:
        """Until all is done, failed or stopped. Returns the exit status."""
        shown = 0
        with catch_signals() as signals, ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self.train, run) for run in self.runs]
            while not all(future.done() for future in futures):
                if signals and not self.stopping.is_set():
                    self.stop()
                if sys.stdout.isatty():
                    lines = table_of(self.runs, self.folder, self.jobs)
                    print(f"\x1b[{shown}A" * bool(shown) + "\n".join(f"\x1b[2K{line}" for line in lines), flush=True)
                    shown = len(lines)
                time.sleep(LOOK / 4 if not sys.stdout.isatty() else LOOK)
            for future in futures:
                future.result()
        if signals:
            print("stopped; the same command goes on")
            return 128 + signals[0]
        lines = table_of(self.runs, self.folder, self.jobs)
        print("\n".join(lines))
        return int(any(state_of(self.folder / run.name).word == "failed" for run in self.runs))


def visible_gpus() -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def state_of_end(place: Path) -> bool:
    """Whether there is nothing more to do."""
    return (place / "done.json").exists() or (place / "failed.json").exists()


def why(output: Path, code: int) -> str:
    """The sentence that a trainer ended with."""
    lines = output.read_text(errors="replace").replace("\r", "\n").splitlines() if output.exists() else []
    said = [line for line in lines if line.strip()]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    errors = [line for line in said if line.startswith("error:")]
    return (errors or said or [f"exit status {code}"])[-1]


def write_json(path: Path, what: dict) -> None:
    with logger.atomic_write(path) as part:
        part.write_text(json.dumps(what) + "\n")


# -- the command -----------------------------------------------------------------------------------


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
    parser.add_argument("--agents", nargs="+")
    parser.add_argument("--datasets", nargs="+", help="what trainer.py takes as --dataset; of dqn as --env")
    parser.add_argument("--seeds", help="3, 0-4 or 0,2,5-7")
    parser.add_argument("--jobs", type=int, default=0, help="runs side by side (default: one a core, or one a GPU)")
    parser.add_argument("--retries", type=int, default=2, help="how often a failing run is tried again")
    parser.add_argument("--output_dir", default="./outputs")
    parser.add_argument("--status", action="store_true", help="show where the runs stand, and end")
    parser.add_argument("--stop", action="store_true", help="stop the sweep of this study; it saves first")
    parser.add_argument("--retry", action="store_true", help="try failed runs again")
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
    if args.jobs < 0 or args.retries < 0:
        raise ValueError("--jobs and --retries count from 0 on")
    return args, flags


def study_of(args: argparse.Namespace, flags: dict) -> dict:
    """The file's study, and before it what the command line says."""
    study = read_study(args.study) if args.study else {"name": "sweep"}
    for key in ("name", "agents", "datasets", "seeds"):
        if getattr(args, key) is not None:
            study[key] = getattr(args, key)
    study["flags"] = {**(study.get("flags") or {}), **flags}
    study["grid"] = {k: v for k, v in (study.get("grid") or {}).items() if k not in flags}
    if not re.fullmatch(r"[\w.+-]+", str(study["name"])):
        raise ValueError(f"{study['name']} cannot be a folder's name: take letters, digits, . + - _")
    return study


def settle(runs: list[Planned], folder: Path) -> None:
    """A folder for each run. ValueError if one of that name was begun with other flags."""
    for run in runs:
        place = folder / run.name
        place.mkdir(parents=True, exist_ok=True)
        path = place / "flags.json"
        if path.exists() and (before := json.loads(path.read_text())) != run.flags:
            names = [k for k in before | run.flags if before.get(k) != run.flags.get(k)]
            raise ValueError(
                f"{place} was begun with other settings ({', '.join(names)}): give the study another --name"
            )
        if not path.exists():
            write_json(place / "label.json", {"label": run.label})
            write_json(path, run.flags)


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
        runs = expand(study)
        jobs = args.jobs or torch.cuda.device_count() or cores()
        if args.status:
            print("\n".join(table_of(runs, folder, jobs)))
            return 0
        settle(runs, folder)
        with open(folder / "lock", "a") as lock:
            if not take_lock(lock):
                raise ValueError(f"a sweep of {folder} is running (--status shows it, --stop stops it)")
            (folder / "pid").write_text(str(os.getpid()))
            for run in runs if args.retry else []:
                (folder / run.name / "failed.json").unlink(missing_ok=True)
            prepare([run for run in runs if not state_of_end(folder / run.name)])
            jobs = min(jobs, len(runs))
            threads = max(1, cores() // jobs)
            return Sweep(runs, folder, jobs, args.retries, threads).run()


if __name__ == "__main__":
    raise SystemExit(main())
