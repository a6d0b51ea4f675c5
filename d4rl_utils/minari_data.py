"""Minari's data sets (https://minari.farama.org), through the `minari` package: their rows, environments and scores.

They lie where Minari keeps them (MINARI_DATASETS_PATH, else ~/.minari/datasets), not in `dataset_dir`. One that is not
there is downloaded beside its place and moved in when it is whole.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from d4rl_utils.names import MAX_EPISODE_STEPS, suggest
from d4rl_utils.reader import Dataset, DatasetInfo, Transitions, episode_returns

DOWNLOAD = "import sys, minari; minari.download_dataset(sys.argv[1])"


def open_minari(name: str):
    """The `minari.MinariDataset` `name` (mujoco/hopper/medium-v0), downloaded if it is not here.

    Raises ImportError if minari is missing; ValueError for a malformed name, for data that are neither here nor to be
    had, that bring no environment, or whose states or actions are not flat vectors.
    """
    try:
        import minari
        from minari.dataset.minari_dataset import parse_dataset_id
        from minari.storage.datasets_root_dir import get_dataset_path
    except ImportError as error:
        raise ImportError(f'minari:{name} needs the package minari ({error}): pip install "minari[hdf5,hf]"') from error
    try:
        parse_dataset_id(name)
    except (ValueError, TypeError) as error:  # TypeError: no version
        raise ValueError(
            f"minari:{name} is no name of Minari's; they look like mujoco/hopper/medium-v0, with the version."
        ) from error
    folder = get_dataset_path(name)
    if not (folder / "data").is_dir():
        _download(name, folder)
    try:
        found = minari.load_dataset(name)
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"{folder} is damaged ({error}). Remove it and try again.") from error
    if found.env_spec is None:
        raise ValueError(f"minari:{name} does not say which environment recorded it, so no agent could be evaluated.")
    _check_flat(name, found)
    return found


def read_minari(name: str) -> Dataset:
    """Its transitions and identity. ValueError as above, and for rows that are missing, NaN or infinite."""
    found = open_minari(name)
    parts, ends = [], []
    for episode in found.iterate_episodes():
        steps = len(episode.rewards)
        if not steps:
            continue
        states = np.asarray(episode.observations, np.float32)
        actions, rewards = np.asarray(episode.actions, np.float32), np.asarray(episode.rewards, np.float32)
        if len(states) != steps + 1 or len(actions) != steps:
            raise ValueError(
                f"minari:{name}: episode {episode.id} has {len(states)} states and {len(actions)} actions for {steps} "
                f"rewards, not {steps + 1} and {steps}."
            )
        parts.append((states[:-1], actions, rewards, states[1:], np.asarray(episode.terminations, bool)))
        ends.append(np.arange(steps) == steps - 1)
    columns = [np.concatenate(column) for column in zip(*parts)]
    rows = len(columns[2]) if columns else 0
    if rows != found.total_steps or not rows:
        raise ValueError(f"minari:{name} promises {found.total_steps} steps and holds {rows}. Remove it and try again.")
    for key, values in zip(Transitions._fields, columns):
        if not np.isfinite(values).all():
            bad = np.flatnonzero(~np.isfinite(values).reshape(rows, -1).all(1))
            raise ValueError(f"minari:{name}: {key} hold NaN or infinity, first in row {bad[0]}, in {len(bad)} rows.")
    ends = np.concatenate(ends)
    stops = np.flatnonzero(ends) + 1
    starts = np.concatenate(([0], stops[:-1]))
    transitions = Transitions(*columns, ends, np.repeat(starts, stops - starts))
    returns = episode_returns(transitions)
    sha = sha256_of_folder(Path(found.storage.data_path))
    identity = DatasetInfo(f"minari:{name}", "minari", name, sha, rows, len(returns), float(returns.mean()))
    return Dataset(transitions, identity)


def environment(found, render_mode: str | None = None):
    """The environment that recorded the data, fresh. Minari's remarks about versions are passed on."""
    from d4rl_utils.sound_env import SoundEnv

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*out of date.*", category=DeprecationWarning)
        return SoundEnv(found.recover_environment(render_mode=render_mode), MAX_EPISODE_STEPS)


def scale_of(found) -> tuple[Callable[[float], float] | None, str]:
    """Minari's normalised score in hundredths, as D4RL's is (return -> score), and its name; (None, "") without one."""
    import minari

    facts = found.storage.metadata
    if facts.get("ref_min_score") is None or facts.get("ref_max_score") is None:
        return None, ""
    return lambda value: 100 * float(minari.get_normalized_score(found, value)), "Minari's scale × 100"


def _check_flat(name: str, found) -> None:
    from gymnasium.spaces import Box

    for what, space in (("observations", found.observation_space), ("actions", found.action_space)):
        if not isinstance(space, Box) or len(space.shape) != 1:
            raise ValueError(
                f"minari:{name} has {what} from {space}; agents here learn from flat vectors of numbers (a Box of one "
                "dimension)."
            )


def _download(name: str, folder: Path) -> None:
    """Download in another process, whose failures, of whatever network library, come back as its last words."""
    import minari

    root = Path(str(folder).removesuffix(name))
    print(f"minari:{name} is not in {root}, downloading it", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix=".downloading-", dir=root) as aside:
        child = subprocess.run(
            [sys.executable, "-c", DOWNLOAD, name],
            env={**os.environ, "MINARI_DATASETS_PATH": aside},
            capture_output=True,
            text=True,
        )
        came = Path(aside) / name
        if child.returncode or not (came / "data").is_dir():
            words = [line for line in (child.stderr or child.stdout).splitlines() if line.strip()]
            here = sorted(minari.list_local_datasets())
            raise ValueError(
                f"minari:{name} is not in {root} and could not be downloaded:\n"
                f"  {words[-1] if words else 'no reason given'}\n"
                f"There: {', '.join(here) or 'nothing'}{suggest(name, here) or '.'} All names: https://minari.farama.org\n"
                f"By hand, on a machine with a network: minari download {name}; then copy its folder to {folder}"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        os.replace(came, folder)


def sha256_of_folder(folder: Path) -> str:
    """Of the names and bytes of all files in it."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder).as_posix()}\n".encode())
        with open(path, "rb") as f:
            total.update(hashlib.file_digest(f, "sha256").digest())
    return total.hexdigest()
