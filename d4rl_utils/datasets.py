"""Settings -> their data: D4RL's file if it is here or can be had, else local data, and never one in the other's place;
or Minari's or LeRobot's data, or a file of one's own."""

import logging
import sys
from pathlib import Path

from common.download import DownloadError, fetch
from d4rl_utils.environment import time_limit
from d4rl_utils.filters import best_episodes, check_share
from d4rl_utils.generate.rollout import local_file, local_levels, local_names, make_local
from d4rl_utils.names import DIMS, ENVS, REGISTRY, check_name, split_name, usual_transitions
from d4rl_utils.observe import parse_observe, partly
from d4rl_utils.reader import Dataset, read_hdf5
from d4rl_utils.resolve import SOURCES, body_of, resolve_dataset

log = logging.getLogger(__name__)


def open_data(cfg) -> Dataset:
    """The data that the settings `cfg` ask for (`resolve_dataset`, `best_episodes`, `partly`), with their identity.

    Raises what `open_dataset`, `read_hdf5`, `read_minari` and `read_lerobot` raise, and ValueError for a file that is
    known to be of another body.
    """
    check_share(cfg.pct_traj)  # before a download
    parse_observe(cfg.observe)
    return partly(best_episodes(_whole(cfg), cfg.pct_traj), cfg.observe, body_of(resolve_dataset(cfg)))


def _whole(cfg) -> Dataset:
    want = resolve_dataset(cfg)
    if want.kind == "minari":
        from d4rl_utils.minari_data import read_minari

        return read_minari(want.place)
    if want.kind == "lerobot":
        from d4rl_utils.lerobot_data import read_lerobot

        return read_lerobot(want.place, drop_contacts=cfg.ant_contacts == "drop")
    if want.kind == "d4rl":
        return open_dataset(want.env, want.dataset_type, want.data, cfg.dataset_dir, cfg.local_transitions)
    dataset = read_hdf5(want.place, time_limit(want.env), drop_contacts=cfg.ant_contacts == "drop")
    if dataset.identity.source in ("d4rl", "local") and want.env in ENVS:
        # walker2d and halfcheetah have the same dims, so nothing else would notice
        body, _ = split_name(dataset.identity.name)
        if body != want.env:
            raise ValueError(f"{want.place} is {dataset.identity.name}: evaluate it with --env {body}, not {want.env}.")
    return dataset


def open_dataset(
    env: str,
    dataset_type: str,
    data: str = "auto",
    dataset_dir: str | Path = "./datasets",
    local_transitions: int = 0,
) -> Dataset:
    """The data set of a body (hopper, walker2d, halfcheetah, ant) and a type (random, medium, ...), with its identity.

    data: `d4rl` takes D4RL's file, downloading it if need be; `local` takes data rolled out on this machine, making
    them if need be; `auto` is `d4rl`, and `local` with a notice on stderr where D4RL's file cannot be had.
    local_transitions: how many local data have; 0: `usual_transitions`.
    Raises ValueError (unknown name; a file that is not what its name says; LocalDataError for local data that cannot be
    made), DownloadError, OSError (disk full).
    """
    base = check_name(env, dataset_type)
    if data not in SOURCES:
        raise ValueError(f"unknown data '{data}': choose one of {', '.join(SOURCES)}.")
    if data == "local":
        dataset = _local(env, dataset_type, Path(dataset_dir), local_transitions)
    else:
        try:
            dataset = _d4rl(f"{base}-v2", Path(dataset_dir))
        except DownloadError as error:
            if data == "d4rl":
                raise
            if not local_levels(env, dataset_type):
                raise DownloadError(
                    f"{error}\nLocal data cannot stand in: they exist for {', '.join(local_names())}."
                ) from error
            print(_notice(f"{base}-v2", Path(dataset_dir), error), file=sys.stderr, flush=True)
            dataset = _local(env, dataset_type, Path(dataset_dir), local_transitions)
    transitions, identity = dataset
    dims = transitions.states.shape[1], transitions.actions.shape[1]
    if dims != DIMS[env]:
        raise ValueError(f"{identity.file} has {dims} state and action dims; {env} has {DIMS[env]}.")
    log.debug("data: %s", identity)
    return dataset


def download(name: str, dataset_dir: str | Path = "./datasets", **patience) -> Path:
    """Bring D4RL's file `name` (`hopper-medium-v2`) into `dataset_dir` unless it is there; see `downloads.fetch`."""
    return fetch(name, REGISTRY[name], dataset_dir, **patience)


def _d4rl(name: str, dataset_dir: Path) -> Dataset:
    """D4RL's own file and no other. The reader's cache remembers its checksum, so it is computed once."""
    entry = REGISTRY[name]
    path = dataset_dir / entry.file
    if not path.exists():
        download(name, dataset_dir)
    advice = (
        f"Remove or rename it to have D4RL's file downloaded, or choose local data (--data local) instead of {name}."
    )
    if path.stat().st_size != entry.size:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, D4RL's {name} has {entry.size}. {advice}")
    dataset = read_hdf5(path)
    if dataset.identity.name != name:
        raise ValueError(f"{path} has SHA-256 {dataset.identity.sha256}, D4RL's {name} has {entry.sha256}. {advice}")
    return dataset


def _local(env: str, dataset_type: str, dataset_dir: Path, transitions: int) -> Dataset:
    transitions = transitions or usual_transitions(env, dataset_type)
    path = dataset_dir / local_file(env, dataset_type, transitions)
    if not path.exists():
        make_local(env, dataset_type, transitions, dataset_dir=dataset_dir)
    dataset = read_hdf5(path)
    name = f"{env}-{dataset_type}-local"
    if (dataset.identity.name, dataset.identity.source) != (name, "local"):
        raise ValueError(
            f"{path} is not {name} as this project makes it but '{dataset.identity.name}'. Rename or remove it."
        )
    return dataset


def _notice(name: str, dataset_dir: Path, error: DownloadError) -> str:
    """The framed block that nobody can overlook."""
    text = f"""LOCAL DATA
{name} is not in {dataset_dir} and could not be downloaded.
Going on with data rolled out on this machine. Every score of this run is a score on LOCAL data and
must not be compared with published ones.

{error}"""
    lines = text.splitlines()
    width = max(map(len, lines))
    edge = "+" + "-" * (width + 2) + "+"
    return "\n".join([edge, *(f"| {line:<{width}} |" for line in lines), edge])
