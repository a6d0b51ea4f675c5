"""Trains a run from wherever it stands to its end, on whatever machine: the study's folder is all it needs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from common import logger
from sweeping.state import is_over, run_folder, state_of, take_lock
from sweeping.study import Planned

PROJECT = Path(__file__).resolve().parents[1]
TRAINER = [sys.executable, str(PROJECT / "trainer.py")]
EVALUATOR = [sys.executable, str(PROJECT / "utils.py")]
LOOK = 2.0  # seconds between two looks at the runs
STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)  # a trainer's exit status when it was told to save and stop


class Worker:
    """Runs of one study, each in a process of its own. stop: nothing more begins, what trains is told to save."""

    def __init__(self, folder: Path, retries: int, threads: int, echo: bool = False):
        """retries: of a failing run. threads: of a run on a CPU; 0: all. echo: the journal is printed, too"""
        self.folder, self.retries, self.threads, self.echo = Path(folder), retries, threads, echo
        self.stopping, self.processes = threading.Event(), {}
        self.journal_lock = threading.Lock()

    def tell(self, run: Planned, event: str, **more) -> None:
        """A line in the journal, and for people."""
        row = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "run": run.name, "event": event, **more}
        with self.journal_lock, open(self.folder / "journal.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        if self.echo:
            print(f"{run.name}: {event}" + "".join(f", {v}" for v in more.values()), flush=True)

    def finish(self, run: Planned, gpu: str | None = None, watch: Callable[[], bool] | None = None) -> None:
        """gpu: the card, as CUDA_VISIBLE_DEVICES names it; None: whatever this process sees. watch: asked now and then
        while it trains, whether it should."""
        place = self.folder / run.name
        with open(place / "lock", "a") as lock:
            while not take_lock(lock):  # a trainer that outlived an earlier sweep
                if self.stopping.wait(LOOK):
                    return
            for attempt in range(self.retries + 1):
                if self.stopping.is_set() or is_over(place):
                    return
                begun = run_folder(place)
                argv = ["--resume", str(begun)] if begun else [*run.argv, "--output_dir", str(place)]
                if self.threads and "threads" not in run.flags:
                    argv += ["--threads", str(self.threads)]
                self.tell(run, "goes on" if begun else "begins")
                code = self.call(run, [*TRAINER, *argv], gpu, lock, watch)
                if code == 0:
                    # under a name that does not change with the day, for what goes on from it
                    logger.link_latest(run_folder(place) / "last_checkpoint.pt", place / "last_checkpoint.pt")
                    if run.episodes:
                        code = self.call(run, [*EVALUATOR, *evaluation_of(place, run.episodes)], gpu, lock, watch)
                if self.stopping.is_set() or code in STOPPED:
                    return
                if code == 0:
                    state = state_of(place)
                    write_json(place / "done.json", {"score": state.score, "step": state.step})
                    return self.tell(run, "done", score=state.score)
                sentence = why(place / "output.txt", code)
                self.tell(run, "failed", attempt=f"attempt {attempt + 1} of {self.retries + 1}", sentence=sentence)
            write_json(place / "failed.json", {"sentence": sentence, "code": code})

    def call(self, run: Planned, argv: list[str], gpu: str | None, lock, watch: Callable[[], bool] | None) -> int:
        env = dict(os.environ) if gpu is None else {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
        env |= {"OMP_NUM_THREADS": str(self.threads)} if self.threads else {}
        with open(self.folder / run.name / "output.txt", "a") as file:
            # the trainer inherits the lock: it is free when nobody trains this run any more, killed or not
            process = subprocess.Popen(
                argv, stdout=file, stderr=file, stdin=subprocess.DEVNULL, env=env, pass_fds=[lock.fileno()]
            )
        self.processes[run.name] = process
        try:
            if self.stopping.is_set():  # a signal came in between
                process.terminate()
            while watch:
                try:
                    return process.wait(LOOK)
                except subprocess.TimeoutExpired:
                    if not watch():
                        process.terminate()
                        return process.wait()
            return process.wait()
        finally:
            if process.poll() is None:  # this thread or task was cancelled
                process.terminate()
                process.wait()
            del self.processes[run.name]

    def stop(self) -> None:
        self.stopping.set()
        for process in list(self.processes.values()):
            process.terminate()


def evaluation_of(place: Path, episodes: int) -> list[str]:
    """utils.py's flags for a run's last checkpoint; the report lies beside it, where report.py finds it."""
    folder = run_folder(place)
    where = ["--checkpoint", str(folder), "--json", str(folder / f"eval-{episodes}.json")]
    return [*where, "--episodes", str(episodes)]


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
