"""OGBench's .npz files as they are: states, actions and episodes, mapped from disk, with what they are.

A file holds T + 1 states an episode, one episode after another, and `terminals`, true in the last row of each. That is
the end of the recording and says nothing about success: rewards and goals are chosen when a batch is drawn.

The archive is unpacked once into `<folder of the file>/.cache/` (its own CRC-32 is checked on the way) and mapped from
there as long as the file's size and date stay. Where no cache can be kept it is read into memory.
"""

import json
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import file_lock, sha256_of
from d4rl_utils.reader import DatasetInfo
from ogbench_utils.generate.rollout import made_of
from ogbench_utils.names import DIMS, TOLERANCE, split_name

log = logging.getLogger(__name__)

KEYS = ("observations", "actions", "terminals")


class Episodes(NamedTuple):
    """Rows of all episodes, one after another. R rows, E episodes. Raw units."""

    states: np.ndarray  # (R, S) float32
    actions: np.ndarray  # (R, A) float32; the last one of an episode led to a state that was not kept
    ends: np.ndarray  # (E,) int64  the last row of each episode


class Dataset(NamedTuple):
    """Episodes and whose they are."""

    episodes: Episodes
    identity: DatasetInfo


def read_npz(path: str | Path, name: str, max_trajectories: int = -1) -> Dataset:
    """A file in OGBench's layout, recorded in the maze of the data set `name`; -1: all its episodes, else the first.

    Local data are known by what their maker wrote into them; any other file counts as OGBench's own if it bears the
    name of one. Raises FileNotFoundError, and ValueError for a file that is damaged, foreign, or of another body.
    """
    path, words = Path(path), split_name(name)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    if max_trajectories != -1 and max_trajectories < 1:
        raise ValueError(f"max_trajectories = {max_trajectories} leaves nothing to learn from: take 1 or more, or -1.")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is no whole .npz archive. Was it cut, or a web page saved in its place? Remove it.")
    arrays, digest = _mapped(path)
    states, actions, terminals = (arrays[k] for k in KEYS)
    made = made_of(path)
    found = made.get("name", path.stem)
    source = "ogbench-local" if made else "ogbench" if path.stem == f"{words.base}-v0" else "ogbench-custom"
    dims = DIMS[words.body]
    if states.ndim != 2 or actions.ndim != 2 or (states.shape[1], actions.shape[1]) != dims:
        raise ValueError(
            f"{path} has states {states.shape[1:]} and actions {actions.shape[1:]}; {words.body} has {dims[0]} state "
            f"and {dims[1]} action dims: --dataset must name the maze that recorded the file."
        )
    if made and not made["name"].startswith(words.base):
        raise ValueError(f"{path} is {made['name']}, not {words.base}.")
    if not len(states) == len(actions) == len(terminals):
        raise ValueError(f"{path}: {len(states)} states, {len(actions)} actions, {len(terminals)} terminals.")
    ends = np.flatnonzero(terminals)
    if not len(ends) or ends[-1] != len(states) - 1 or not (np.diff(ends, prepend=-1) > 1).all():
        raise ValueError(
            f"{path}: `terminals` must be true in the last row of every episode, each of two rows or more; is this the "
            "raw file, not OGBench's loaded form?"
        )
    if 0 < max_trajectories < len(ends):
        ends = ends[:max_trajectories]
    elif max_trajectories > len(ends):
        log.warning("%s has %d episodes, fewer than --max_trajectories %d", path, len(ends), max_trajectories)
    rows = int(ends[-1]) + 1
    transitions = rows - len(ends)
    episodes = Episodes(states[:rows], actions[:rows], ends.astype(np.int64))
    return Dataset(episodes, DatasetInfo(found, source, path.name, digest, transitions, len(ends), None))


def tolerance_of(name: str) -> float:
    """How near to a goal counts as there."""
    return TOLERANCE[split_name(name).body]


def _mapped(path: Path) -> tuple[dict[str, np.ndarray], str]:
    """The file's arrays and its SHA-256."""
    stat = path.stat()
    folder = path.parent / ".cache" / f"{path.name}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    try:
        with file_lock(path):
            return _from_cache(folder) or _fill_cache(path, folder)
    except OSError as error:
        log.warning("%s: no cache can be kept beside it (%s); every start reads it anew.", path, error)
        with np.load(path) as file:
            return {k: file[k] for k in KEYS}, sha256_of(path)


def _from_cache(folder: Path) -> tuple[dict[str, np.ndarray], str] | None:
    try:
        digest = json.loads((folder / "facts.json").read_text())["sha256"]
        return {k: np.load(folder / f"{k}.npy", mmap_mode="c") for k in KEYS}, digest
    except FileNotFoundError:
        return None
    except ValueError as error:  # shorter than its header says, after a power cut
        log.warning("%s is damaged (%s) and is made anew.", folder, error)
        shutil.rmtree(folder)
        return None


def _fill_cache(path: Path, folder: Path) -> tuple[dict[str, np.ndarray], str]:
    for old in folder.parent.iterdir():  # of earlier versions of the file, or of a process killed while writing
        if re.fullmatch(re.escape(path.name) + r"-[0-9a-f]+-[0-9a-f]+(\.part)?", old.name):
            shutil.rmtree(old)
    part = folder.with_name(folder.name + ".part")
    part.mkdir()
    try:
        with zipfile.ZipFile(path) as archive:
            for key in KEYS:
                with archive.open(f"{key}.npy") as packed, open(part / f"{key}.npy", "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
        (part / "facts.json").write_text(json.dumps({"sha256": sha256_of(path)}))
        os.replace(part, folder)
    except KeyError as error:
        raise ValueError(
            f"{path} is not in OGBench's layout: {error}. It holds {', '.join(archive.namelist())}"
        ) from error
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}). Remove it and get it again.") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return _from_cache(folder)
