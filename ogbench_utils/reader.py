"""OGBench's .npz files as they are: states, actions and episodes, mapped from disk, with what they are.

A file holds T + 1 states an episode, one episode after another, and `terminals`, true in the last row of each. That is
the end of the recording and says nothing about success: rewards and goals are chosen when a batch is drawn.

The archive is unpacked once into `<folder of the file>/.cache/` (its own CRC-32 is checked on the way) and mapped from
there as long as the file's size and date stay. Where no cache can be kept it is read into memory.
"""

import errno
import json
import logging
import lzma
import os
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import file_lock, sha256_of
from d4rl_utils.reader import DatasetInfo, Unusable
from ogbench_utils.generate.rollout import made_of
from ogbench_utils.names import DIMS, TOLERANCE, split_name

log = logging.getLogger(__name__)

KEYS = ("observations", "actions", "terminals")
LARGEST_RATIO = 2000  # of a column's size to the archive's: deflate makes at most 1032 bytes of one
NPZ_ERRORS = (  # what zip, zlib and NumPy say of a damaged or foreign archive
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    RuntimeError,  # encrypted
    NotImplementedError,  # another compression, or a later zip
    ValueError,
    IndexError,
    OverflowError,
    struct.error,
    MemoryError,
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of a disk that is written to: not the file's fault


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
    with _said_plainly(path):
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
    if terminals.ndim != 1 or not len(states) == len(actions) == len(terminals):
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
    """The file's arrays and its SHA-256. ValueError for a damaged or foreign file."""
    stat = path.stat()
    folder = path.parent / ".cache" / f"{path.name}-{stat.st_size:x}-{stat.st_mtime_ns:x}"
    try:
        with file_lock(path):
            found = _from_cache(folder)
            if found is None:
                _fill_cache(path, folder)
                found = _from_cache(folder)
                if found:
                    _check_numbers(path, found[0])
    except OSError as error:
        log.warning("%s: no cache can be kept beside it (%s); every start reads it anew.", path, error)
        with _said_plainly(path), np.load(path) as file:
            found = {k: file[k] for k in KEYS}, sha256_of(path)
        _check_numbers(path, found[0])
    if found is None:
        raise ValueError(f"{path} is damaged: its arrays are shorter than they say. Remove it and get it again.")
    return found


def _check_numbers(path: Path, arrays: dict[str, np.ndarray]) -> None:
    for key, values in arrays.items():
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{path}: '{key}' holds {values.dtype}, not numbers.")
        if not np.isfinite(values).all():
            raise ValueError(f"{path}: '{key}' holds NaN or infinity. Leave these episodes out of the file.")


def _from_cache(folder: Path) -> tuple[dict[str, np.ndarray], str] | None:
    try:
        digest = json.loads((folder / "facts.json").read_text())["sha256"]
        return {k: np.load(folder / f"{k}.npy", mmap_mode="c") for k in KEYS}, digest
    except FileNotFoundError:
        return None
    except (ValueError, EOFError) as error:  # shorter than its header says, after a power cut
        log.warning("%s is damaged (%s) and is made anew.", folder, error)
        shutil.rmtree(folder)
        return None


def _fill_cache(path: Path, folder: Path) -> None:
    """Unpack the archive into its folder. ValueError if it is damaged or foreign, OSError if nothing can be written."""
    before = {}
    for old in folder.parent.iterdir():  # of earlier versions of the file, or of a process killed while writing
        if re.fullmatch(re.escape(path.name) + r"-[0-9a-f]+-[0-9a-f]+(\.part)?", old.name):
            before |= {old.name.split("-")[-2]: _digest_of(old)}
            shutil.rmtree(old)
    part = folder.with_name(folder.name + ".part")
    part.mkdir()
    try:
        for key in KEYS:
            with open(part / f"{key}.npy", "wb") as plain, _said_plainly(path), zipfile.ZipFile(path) as archive:
                _unpack(path, archive, key, plain)
        digest = sha256_of(path)
        (part / "facts.json").write_text(json.dumps({"sha256": digest}))
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    known = before.get(f"{path.stat().st_size:x}")
    if known not in (None, digest):
        log.warning(
            "%s has other content than when it was last read (SHA-256 %.12s, then %.12s), though its name and size are "
            "the same. If nobody wrote it anew, it is damaged.",
            path,
            digest,
            known,
        )


def _unpack(path: Path, archive: zipfile.ZipFile, key: str, plain) -> None:
    """One array of the archive into an open file; zip checks its sum on the way."""
    names = archive.namelist()
    if f"{key}.npy" not in names:
        raise Unusable(f"{path} is not in OGBench's layout: it has no {key}. It holds {', '.join(names) or 'nothing'}.")
    entry = archive.getinfo(f"{key}.npy")
    if entry.file_size > LARGEST_RATIO * path.stat().st_size:  # before anything is written
        raise Unusable(
            f"{path}: '{key}' says that it holds {entry.file_size / 1e9:,.0f} GB, and the archive is "
            f"{path.stat().st_size:,} bytes long, which no compression does. Remove it and get it again."
        )
    with archive.open(entry) as packed:
        head = packed.peek(16)
        if not head.startswith(b"\x93NUMPY"):
            raise Unusable(f"{path}: '{key}' is no NumPy array. Remove it and get it again.")
        shutil.copyfileobj(packed, plain, 1 << 20)


@contextmanager
def _said_plainly(path: Path) -> Iterator[None]:
    """Whatever zip and NumPy say of a damaged archive becomes one sentence."""
    try:
        yield
    except Unusable:
        raise
    except NPZ_ERRORS as error:
        if isinstance(error, OSError) and error.errno in FULL:
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged, or no plain .npz ({reason}). Remove it and get it again.") from error


def _digest_of(folder: Path) -> str | None:
    """The SHA-256 of an earlier version of a file; None if its cache is damaged."""
    try:
        return json.loads((folder / "facts.json").read_text())["sha256"]
    except (OSError, ValueError, KeyError):
        return None
