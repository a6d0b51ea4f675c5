"""Where runs stand, by what their folders say."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from common import evaluation, logger
from sweeping.study import Planned


@dataclass
class State:
    """What a run's folder says of it."""

    word: str  # waiting, running, done or failed
    step: int = 0
    seconds: float = 0.0
    scores: list[float] = field(default_factory=list)  # of all evaluations
    sentence: str = ""

    @property
    def score(self) -> float | None:
        """Of the last evaluation."""
        return self.scores[-1] if self.scores else None


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
            state.scores.append(evaluation.headline(row))
    if (place / "done.json").exists():
        state.word = "done"
    elif (place / "failed.json").exists():
        state.word, state.sentence = "failed", json.loads((place / "failed.json").read_text())["sentence"]
    elif is_locked(place / "lock"):
        state.word = "running"
    return state


def is_over(place: Path) -> bool:
    """Whether there is nothing more to do."""
    return (place / "done.json").exists() or (place / "failed.json").exists()


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
