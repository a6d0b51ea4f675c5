"""LeRobot's data sets (https://github.com/huggingface/lerobot): the numbers in their Parquet files, through pyarrow.

A row is a frame: `observation.state` (S), `action` (A), `episode_index`, `frame_index`, `next.reward`, and perhaps
`next.done`. Pictures and videos are not looked at. Two things the format does not say:

  1. the state after an episode's last frame: unless `next.done` is true there, that frame is left out;
  2. whether `next.done` is the task's end or a time limit's: it is taken as the task's end, and said.

A folder is read where it is. One of the Hugging Face hub is brought into its cache by `huggingface_hub` (HF_HOME), the
Parquet files and `meta/` only.
"""

import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np

from d4rl_utils.columns import Unusable, check_contacts, sound_columns
from d4rl_utils.minari_data import sha256_of_folder
from d4rl_utils.reader import Dataset, DatasetInfo, episode_returns, transitions_of

log = logging.getLogger(__name__)

NEEDS = {"observation.state": "observations", "action": "actions", "next.reward": "rewards"}
COUNTS = ("episode_index", "frame_index")
DOWNLOAD = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download(sys.argv[1], repo_type="dataset", allow_patterns=["data/**", "meta/**"]))
"""  # in a process of its own, whose failures, of whatever network library, come back as its last words


def read_lerobot(place: str, drop_contacts: bool = False) -> Dataset:
    """Transitions and identity of a folder in LeRobot's layout (v2 or v3), or of a repository of the hub (USER/NAME).

    Raises ImportError if pyarrow is missing; ValueError for data that are neither here nor to be had, damaged files,
    missing columns or frames, and what cannot be trained on (`columns.sound_columns`).
    """
    try:
        import pyarrow.compute
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"lerobot:{place} needs pyarrow ({error}): pip install pyarrow") from error
    label = f"lerobot:{place}"
    folder = Path(place) if Path(place).is_dir() else _fetched(place)
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise ValueError(f"{label}: {folder} has no Parquet file in its folder data/, so it is not LeRobot's layout.")
    wanted = [*NEEDS, *COUNTS, "next.done"]
    tables = []
    for file in files:
        try:
            known = pyarrow.parquet.read_schema(file).names
            if missing := [name for name in (*NEEDS, *COUNTS) if name not in known]:
                advice = " Without rewards nothing but cloning is possible: write the column, zeros if need be."
                raise Unusable(
                    f"{label}: {file.relative_to(folder)} has no column {' or '.join(missing)}; it has "
                    f"{', '.join(known)}.{advice * ('next.reward' in missing)}"
                )
            tables.append(pyarrow.parquet.read_table(file, columns=[name for name in wanted if name in known]))
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} is damaged ({str(error).splitlines()[0]}). Remove it and get it again."
            ) from error
    raw = {name: [_array(label, name, table) for table in tables if name in table.column_names] for name in wanted}
    raw = {name: np.concatenate(_alike(label, name, parts)) for name, parts in raw.items() if len(parts) == len(tables)}
    order = np.lexsort((raw["frame_index"], raw["episode_index"]))
    raw = {name: values[order] for name, values in raw.items()}
    last = _last_frames(label, raw["episode_index"], raw["frame_index"])
    _check_total(label, folder, len(last))
    found = {ours: raw[name] for name, ours in NEEDS.items()} | {"timeouts": last}
    found["terminals"] = raw["next.done"] if "next.done" in raw else np.zeros(len(last), bool)
    columns, _, contacts = sound_columns(f"{label} (sorted by episode and frame)", found)
    check_contacts(label, contacts, drop_contacts)
    transitions, notes = transitions_of(label, columns)
    if done := int((columns["terminals"] & last).sum()):
        notes.append(
            f"{done} of {last.sum()} episodes end with next.done: the task's end, not a time limit's, as it is read."
        )
    for note in notes:
        log.warning("%s: %s", label, note)
    returns, sha = episode_returns(transitions), sha256_of_folder(folder / "data")
    name = Path(place).resolve().name if Path(place).is_dir() else place
    return Dataset(
        transitions,
        DatasetInfo(name, "custom", label, sha, len(transitions.ends), len(returns), float(returns.mean())),
    )


def _array(label: str, name: str, table) -> np.ndarray:
    """A column as an array (rows,) or (rows, width)."""
    import pyarrow

    column = table[name].combine_chunks()
    if column.null_count:
        raise Unusable(f"{label}: '{name}' is empty in {column.null_count} of {len(column)} rows.")
    kind, width = column.type, None
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        sizes = set(np.unique(pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)).tolist())
        if len(sizes) > 1:
            raise Unusable(f"{label}: '{name}' has {sorted(sizes)} numbers in its rows; all must have as many.")
        column, width = column.flatten(), next(iter(sizes), 0)
        if column.null_count:
            raise Unusable(f"{label}: '{name}' has {column.null_count} empty places.")
    values = column.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "fiub":
        raise Unusable(f"{label}: '{name}' holds {kind}, not numbers or vectors of numbers.")
    if width is not None:
        values = values.reshape(len(table), width)
        if name not in ("observation.state", "action"):
            values = values.squeeze(-1) if width == 1 else values
    return values


def _alike(label: str, name: str, parts: list[np.ndarray]) -> list[np.ndarray]:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise Unusable(f"{label}: '{name}' has the shapes {sorted(shapes)} in its files; they must be the same.")
    return parts


def _last_frames(label: str, episode: np.ndarray, frame: np.ndarray) -> np.ndarray:
    """Which rows (N,) bool are the last of their episode; every episode has all its frames, from 0 on."""
    if not len(episode):
        raise Unusable(f"{label} has no frame.")
    first = np.concatenate(([True], episode[1:] != episode[:-1]))
    starts = np.flatnonzero(first)
    expected = np.arange(len(frame)) - np.repeat(starts, np.diff(np.append(starts, len(frame))))
    if (wrong := np.flatnonzero(frame != expected)).size:
        row = wrong[0]
        raise Unusable(
            f"{label}: episode {episode[row]} has frame {frame[row]} where {expected[row]} should be: some are missing "
            "or there twice. Get the data again."
        )
    return np.append(first[1:], True)


def _check_total(label: str, folder: Path, frames: int) -> None:
    """As many frames as meta/info.json promises, where there is one."""
    try:
        promised = json.loads((folder / "meta" / "info.json").read_text()).get("total_frames", frames)
    except FileNotFoundError:
        return
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder / 'meta' / 'info.json'} is damaged ({error}). Get it again.") from error
    if promised != frames:
        raise Unusable(f"{label} promises {promised} frames and holds {frames}: get it again.")


def _fetched(place: str) -> Path:
    """Where the hub's repository lies on this machine, after it was brought there if need be."""
    if not all(place.split("/")) or place.count("/") != 1:
        raise ValueError(
            f"lerobot:{place} is neither a folder nor a name of the Hugging Face hub, such as lerobot/pusht."
        )
    child = subprocess.run([sys.executable, "-c", DOWNLOAD, place], capture_output=True, text=True)
    lines = [line for line in (child.stdout if child.returncode == 0 else child.stderr).splitlines() if line.strip()]
    if child.returncode:
        raise ValueError(
            f"lerobot:{place} could not be had from the Hugging Face hub (pip install huggingface_hub):\n"
            f"  {lines[-1] if lines else 'no reason given'}\n"
            f"By hand, on a machine with a network: hf download {place} --repo-type dataset --local-dir FOLDER; then "
            "--dataset lerobot:FOLDER"
        )
    return Path(lines[-1])
