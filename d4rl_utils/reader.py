"""From a file in D4RL's HDF5 layout to transitions, vectorised, checked, and quick to open a second time.

The layout: `observations` (N, S), `actions` (N, A), `rewards` (N), `terminals` (N), and, where the recorder wrote them,
`timeouts` (N) and `next_observations` (N, S); d3rlpy's files are brought into it (`hdf5_layouts`). What is done where
something is missing:

  1. no `timeouts`: an episode ends at a terminal, or after `max_episode_steps`;
  2. no `next_observations`: the next state is the following row's state. A row that ends by a time limit has no
     following row in its episode, so it is dropped; a terminal row keeps its own state as next state, which nothing
     ever looks at, because a terminal cuts the bootstrap;
  3. the last episode has no end: it is kept as cut by time (without `next_observations` its last row falls under 2).

D4RL's ant files have 111 state dims, the last 84 of them zero throughout (contact forces that were never computed);
they are checked and left out, which makes the states those of Gymnasium's Ant-v4. Where they are not zero, only
who says `drop_contacts` gets the rest.

What was read is kept as plain .npy files in `<folder of the file>/.cache/`, and memory-mapped from there as long as the
file's size and modification time stay the same.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import file_lock, sha256_of
from d4rl_utils.columns import Unusable, check_contacts, sound_columns
from d4rl_utils.hdf5_layouts import found_columns
from d4rl_utils.names import MADE_BY, REGISTRY

log = logging.getLogger(__name__)

CACHE_FORMAT = 1  # raise it when the meaning of the cached arrays changes
H5PY_ERRORS = (  # what h5py says of a damaged file, whichever part of it is damaged
    OSError,
    RuntimeError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    NotImplementedError,
    OverflowError,
    MemoryError,
)


class Transitions(NamedTuple):
    """NumPy arrays over N transitions in recorded order, perhaps memory-mapped (copy-on-write: files never change)."""

    states: np.ndarray  # (N, S) float32
    actions: np.ndarray  # (N, A) float32
    rewards: np.ndarray  # (N,) float32
    next_states: np.ndarray  # (N, S) float32
    terminals: np.ndarray  # (N,) bool   the MDP ended here (cuts the bootstrap); a time limit is not a death
    ends: np.ndarray  # (N,) bool   last transition of its episode: terminal, timeout or cut
    episode_start: np.ndarray  # (N,) int64  row at which this row's episode begins


@dataclass(frozen=True)
class DatasetInfo:
    """What was trained on, in plain types: it goes into checkpoints and logs."""

    name: str  # "hopper-medium-v2", "hopper-medium-local", "minari:mujoco/hopper/medium-v0", or a custom file's stem
    source: str  # "d4rl", "local", "minari" or "custom"
    file: str  # base name; of Minari's data their name
    sha256: str  # of the file, or of Minari's files
    transitions: int
    episodes: int  # cut ones included
    return_mean: float | None  # over these episodes; None where no reward was recorded


class Dataset(NamedTuple):
    """Transitions and whose they are."""

    transitions: Transitions
    identity: DatasetInfo


def episode_returns(transitions: Transitions) -> np.ndarray:
    """Sum of rewards (E,) float64 of every episode, in order."""
    starts = np.flatnonzero(np.concatenate(([True], transitions.ends[:-1])))
    return np.add.reduceat(transitions.rewards, starts, dtype=np.float64)


def read_hdf5(
    path: str | Path, max_episode_steps: int = 1000, cache: bool = True, drop_contacts: bool = False
) -> Dataset:
    """Read a file in D4RL's layout. `max_episode_steps` matters only where the file has no `timeouts`.

    drop_contacts: leave ant's contact forces out though they are not zero; else such a file is refused.
    A file whose bytes are those of D4RL gets D4RL's name, one made by `d4rl_utils.local` its own, others their stem.
    Raises FileNotFoundError, and ValueError for a file that is not HDF5, is damaged, or cannot be trained on.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file.")
    if not cache:
        return _dataset(path, *_read(path, max_episode_steps), drop_contacts)
    try:
        found = _from_cache(path, max_episode_steps)
        if found is None:
            with file_lock(path):
                found = _from_cache(path, max_episode_steps) or _fill_cache(path, max_episode_steps)
    except OSError as error:
        log.warning("%s: no cache can be kept beside it (%s); every start reads it anew.", path, error)
        found = _read(path, max_episode_steps)
    return _dataset(path, *found, drop_contacts)


def _dataset(path: Path, transitions: Transitions, facts: dict, drop_contacts: bool) -> Dataset:
    """Say what has to be said about the file, and name it."""
    check_contacts(path, facts.get("contacts", ""), drop_contacts)
    for note in facts["notes"]:
        log.warning("%s: %s", path, note)
    name, source = path.stem, "custom"
    if facts["local_name"]:
        name, source = facts["local_name"], "local"
    for known, entry in REGISTRY.items():
        if entry.sha256 == facts["sha256"]:
            name, source = known, "d4rl"
    returns = episode_returns(transitions)
    return Dataset(
        transitions,
        DatasetInfo(
            name, source, path.name, facts["sha256"], len(transitions.ends), len(returns), float(returns.mean())
        ),
    )


# -- the cache: a folder of .npy files and a small JSON, which appears whole or not at all ----------------------------


def _cache_folder(path: Path, max_episode_steps: int) -> Path:
    stat = path.stat()
    key = f"{CACHE_FORMAT} {stat.st_size} {stat.st_mtime_ns} {max_episode_steps}"
    return path.parent / ".cache" / f"{path.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _from_cache(path: Path, max_episode_steps: int) -> tuple[Transitions, dict] | None:
    folder = _cache_folder(path, max_episode_steps)
    try:
        facts = json.loads((folder / "facts.json").read_text())
        arrays = Transitions(*(np.load(folder / f"{name}.npy", mmap_mode="c") for name in Transitions._fields))
    except FileNotFoundError:
        return None
    except ValueError as error:  # a .npy shorter than its header says, after a power cut
        log.warning("%s is damaged (%s) and is made anew.", folder, error)
        shutil.rmtree(folder)
        return None
    return arrays, facts


def _facts_of(folder: Path) -> dict:
    """What is known of an earlier version of a file; nothing if its cache is damaged."""
    try:
        return json.loads((folder / "facts.json").read_text())
    except (OSError, ValueError):
        return {}


def _fill_cache(path: Path, max_episode_steps: int) -> tuple[Transitions, dict]:
    folder = _cache_folder(path, max_episode_steps)
    # what earlier versions of the file, or processes killed while writing, left behind
    before = {}
    for old in folder.parent.iterdir():
        if re.fullmatch(re.escape(path.name) + r"-\w+(\.part)?", old.name):
            before |= _facts_of(old)
            shutil.rmtree(old)
    transitions, facts = _read(path, max_episode_steps)
    if before.get("size") == facts["size"] and before.get("sha256") != facts["sha256"]:
        log.warning(
            "%s has other content than when it was last read (SHA-256 %.12s, then %.12s), though its name and size are "
            "the same. If nobody wrote it anew, it is damaged.",
            path,
            facts["sha256"],
            before.get("sha256"),
        )
    part = folder.with_name(folder.name + ".part")
    try:
        part.mkdir()
        for name, array in transitions._asdict().items():
            np.save(part / f"{name}.npy", array)
        (part / "facts.json").write_text(json.dumps(facts, indent=1))
        os.replace(part, folder)
    except OSError as error:
        log.warning("%s: the cache could not be written (%s); every start reads the file anew.", path, error)
        shutil.rmtree(part, ignore_errors=True)
        return transitions, facts
    return _from_cache(path, max_episode_steps) or (transitions, facts)


# -- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path, max_episode_steps: int) -> tuple[Transitions, dict]:
    """Transitions of the file, and the facts about it that cannot be told from them."""
    import h5py

    if not path.stat().st_size:
        raise ValueError(f"{path} is an empty file. Remove it and get it again.")
    if not h5py.is_hdf5(path):
        raise ValueError(f"{path} is not an HDF5 file. Was a web page saved in its place? Remove it and get it again.")
    try:
        with h5py.File(path, "r") as file:
            columns, shapes, contacts = sound_columns(path, found_columns(path, file))
            local_name = str(file.attrs["name"]) if file.attrs.get("made_by") == MADE_BY else None
    except Unusable:
        raise
    except H5PY_ERRORS as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"{path} is damaged or only part of a file ({reason}). Remove it and get it again.") from error
    transitions, notes = transitions_of(path, columns, max_episode_steps)
    return transitions, {
        "file": path.name,
        "size": path.stat().st_size,
        "mtime_ns": path.stat().st_mtime_ns,
        "sha256": sha256_of(path),
        "format": CACHE_FORMAT,
        "max_episode_steps": max_episode_steps,
        "local_name": local_name,
        "notes": [*shapes, *notes],
        "contacts": contacts,
    }


def transitions_of(
    path: str | Path, columns: dict[str, np.ndarray], max_episode_steps: int = 1000
) -> tuple[Transitions, list[str]]:
    """Find the episodes, and the next states where the file has none. Also what the reader of the log should know."""
    states, terminals, notes = columns["observations"], columns["terminals"], []
    n, row = len(terminals), np.arange(len(terminals))
    if "timeouts" in columns:
        ends = terminals | columns["timeouts"]
    else:
        since = row - _episode_starts(np.concatenate((terminals[:-1], [True])))
        ends = terminals | ((since + 1) % max_episode_steps == 0)
        notes.append(f"no 'timeouts': episodes are taken to end at terminals or after {max_episode_steps} steps.")
    unfinished = not ends[-1]
    ends[-1] = True
    episode_start = _episode_starts(ends)
    if unfinished:
        fate = "" if "next_observations" in columns else ", without its last row, whose next state is unknown"
        notes.append(
            f"the last episode (rows {episode_start[-1]} to {n - 1}) has no end in the file: kept as cut by time{fate}."
        )

    if "next_observations" in columns:
        next_states, keep = columns["next_observations"], slice(None)
    else:
        next_states = np.concatenate((states[1:], states[-1:]))
        next_states[terminals] = states[terminals]
        keep = terminals | ~ends
        dropped = n - int(keep.sum()) - unfinished
        if dropped:
            notes.append(
                f"no 'next_observations': {dropped} rows that end by a time limit are dropped: next state unknown."
            )
        if not keep.any():
            raise ValueError(f"{path}: without 'next_observations' no row's next state is known, so nothing is left.")
        # a row now ends its episode if the next row that is left belongs to another one
        states, next_states, terminals, episode_start = (
            states[keep],
            next_states[keep],
            terminals[keep],
            episode_start[keep],
        )
        ends = np.concatenate((episode_start[1:] != episode_start[:-1], [True]))
        episode_start = _episode_starts(ends)
    actions, rewards = columns["actions"][keep], columns["rewards"][keep]
    return Transitions(states, actions, rewards, next_states, terminals, ends, episode_start), notes


def _episode_starts(ends: np.ndarray) -> np.ndarray:
    """For every row the row at which its episode begins. (N,) bool with ends[-1] True -> (N,) int64"""
    stops = np.flatnonzero(ends) + 1
    starts = np.concatenate(([0], stops[:-1]))
    return np.repeat(starts, stops - starts)
