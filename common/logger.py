"""What a run leaves behind: its folder, files that are whole or absent, and its log."""

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A path to write to; it becomes `path` when the block ends well. A killed writer leaves the old file whole."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        with open(part, "rb+") as f:
            os.fsync(f.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def put_into_page(command: str, text: str, page: Path) -> None:
    """Replace what stands between a command's markers in a Markdown page. ValueError if they are not there."""
    first, last = f"<!-- {command} writes from here -->", "<!-- to here -->"
    before, begin, rest = page.read_text().partition(first)
    _, end, after = rest.partition(last)
    if not (begin and end):
        raise ValueError(f"{page} has no lines '{first}' and '{last}' to write between")
    with atomic_write(page) as part:
        part.write_text(f"{before}{first}\n{text}\n{last}{after}")


def keep_previous(path: Path) -> None:
    """What stands at `path`, if anything, stays as NAME.prev.SUFFIX when `path` is written anew."""
    if not path.exists():
        return
    previous = path.with_suffix(".prev" + path.suffix)
    part = previous.with_name(previous.name + ".part")
    part.unlink(missing_ok=True)
    if previous.exists() and os.path.samefile(path, previous):  # kept before a write that failed
        return
    try:
        os.link(path, part)
    except OSError:  # a file system without links
        shutil.copyfile(path, part)
    os.replace(part, previous)


def new_folder(path: Path) -> Path:
    """Make `path`, or `path`-2, -3, ... if another run was faster; returns what was made."""
    for tail in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        folder = path.with_name(path.name + tail)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue


def link_latest(path: Path, link: Path) -> None:
    """Make `link` mean `path`: a relative symbolic link, or a copy where links are not to be had."""
    new = link.with_name(f"{link.name}.{os.getpid()}.part")  # other runs publish here too
    new.unlink(missing_ok=True)
    try:
        new.symlink_to(os.path.relpath(path, link.parent))
    except OSError:  # Windows without the right to link
        shutil.copyfile(path, new)
    os.replace(new, link)


class Logger:
    """One JSON object a line in `log.jsonl`, as it happens, and the same numbers to TensorBoard and W&B if wanted.

    after: on a resume, the checkpoint's update; rows behind it belong to updates that will be made again, and go.
    unit: what rows are numbered in, "update" or "env_step".
    """

    def __init__(
        self,
        folder: Path,
        tensorboard: bool = False,
        wandb: bool = False,
        after: int | None = None,
        unit: str = "update",
    ):
        self.path, self.unit = folder / "log.jsonl", unit
        self.start, self.writer, self.wandb = time.time(), None, None
        self.callbacks: list[Callable[[dict], None]] = []  # each is told every row
        if after is not None:
            rows = [r for r in read_log(self.path) if r[unit] <= after]
            self.start -= rows[-1]["seconds"] if rows else 0.0
            with atomic_write(self.path) as part:
                part.write_text("".join(json.dumps(r) + "\n" for r in rows))
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=None if after is None else after + 1)
        if wandb:
            import wandb as service

            self.wandb = service.init(project="bamba", name=folder.name, id=folder.name, resume="allow", dir=folder)

    def __call__(self, update: int, row: dict) -> None:
        with open(self.path, "a") as f:
            f.write(json.dumps({self.unit: update, "seconds": round(time.time() - self.start, 1), **row}) + "\n")
        for callback in self.callbacks:
            callback({"kind": kind_of(row), self.unit: update, **row})
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float))}
        if self.writer:
            for key, value in numbers.items():
                self.writer.add_scalar(key, value, update)
        if self.wandb:
            self.wandb.log(numbers, step=update)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
        if self.wandb:
            self.wandb.finish()


def kind_of(row: dict) -> str:
    """What a row is about: begin, evaluation, episode or losses."""
    if "config" in row:
        return "begin"
    return "evaluation" if "eval/return_mean" in row else "episode" if "episode/return" in row else "losses"


class NoLog:
    """Takes rows and keeps none."""

    def __call__(self, update: int, row: dict) -> None:
        pass

    def close(self) -> None:
        pass


def read_log(path: Path) -> list[dict]:
    """The rows of a log; a last line that a kill cut short is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    with suppress(json.JSONDecodeError):  # all at once: reports read thousands of rows
        rows = json.loads(f"[{','.join(lines)}]")
        if len(rows) == len(lines):
            return rows
    rows = [json.loads(line) for line in lines[:-1]]
    with suppress(json.JSONDecodeError):
        rows.append(json.loads(lines[-1]))
    return rows
