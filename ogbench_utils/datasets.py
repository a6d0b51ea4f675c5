"""Settings -> their data: OGBench's file if it is here or can be had, else local data, and never one in the other's
place; or a file of one's own in its layout."""

import sys
from pathlib import Path

from common.download import DownloadError, Entry, fetch
from ogbench_utils.generate.rollout import can_generate, local_file, make_local, usual_episodes
from ogbench_utils.names import DATASETS, SERVERS, split_name
from ogbench_utils.reader import Dataset, read_npz

SOURCES = ("auto", "ogbench", "local")


def name_of(cfg) -> str:
    """Which of OGBench's data sets the settings `cfg` mean: antmaze-medium-navigate-v0. ValueError for none."""
    if Path(cfg.dataset).suffix == ".npz":
        if not cfg.env:
            raise ValueError(f"{cfg.dataset} is a file: say what it is like with --env, one of {', '.join(DATASETS)}.")
        return f"{split_name(cfg.env).base}-v0"
    if cfg.env and split_name(cfg.env) != split_name(cfg.dataset):
        raise ValueError(f"--env {cfg.env} contradicts --dataset {cfg.dataset}: leave --env away.")
    return f"{split_name(cfg.dataset).base}-v0"


def open_data(cfg) -> Dataset:
    """The data that the settings `cfg` ask for, with their identity.

    Raises ValueError (unknown name; a file that is not what it should be; local data that cannot be made),
    FileNotFoundError, DownloadError, OSError (disk full).
    """
    name = name_of(cfg)
    if Path(cfg.dataset).suffix == ".npz":
        path = Path(cfg.dataset)
        if not path.exists() and (Path(cfg.dataset_dir) / path).is_file():
            path = Path(cfg.dataset_dir) / path
        return read_npz(path, name, cfg.max_trajectories)
    if cfg.data not in SOURCES:
        raise ValueError(f"unknown data '{cfg.data}': choose one of {', '.join(SOURCES)}.")
    wants_local = cfg.dataset.endswith("-local")
    if (wants_local and cfg.data == "ogbench") or (cfg.dataset.endswith("-v0") and cfg.data == "local"):
        raise ValueError(
            f"--dataset {cfg.dataset} and --data {cfg.data} contradict each other: -v0 is OGBench's own file, -local "
            f"what is rolled out here. Say {split_name(name).base}, or leave --data away."
        )
    folder = Path(cfg.dataset_dir)
    if wants_local or cfg.data == "local":
        return _local(name, folder, cfg.max_trajectories)
    try:
        return read_npz(download(name, folder), name, cfg.max_trajectories)
    except DownloadError as error:
        if cfg.data == "ogbench" or not can_generate(name):
            raise DownloadError(f"{error}\n{_instead(name)}") from error
        print(f"{_NOTICE.format(name=name, folder=folder)}\n\n{error}\n", file=sys.stderr, flush=True)
        return _local(name, folder, cfg.max_trajectories)


_NOTICE = """
==== LOCAL DATA ====
{name} is not in {folder} and could not be downloaded. Going on with data rolled out on this machine. Every score of
this run is a score on LOCAL data and must not be compared with published ones."""


def download(name: str, dataset_dir: str | Path = "./datasets", part: str = "", **patience) -> Path:
    """Bring OGBench's own file into `dataset_dir` unless it is there; part: "-val" for the validation episodes.

    Its checksum is not published, so what is checked is its length and the archive's own CRC when it is opened.
    """
    file = f"{split_name(name).base}-v0{part}.npz"
    entry = Entry(0, "", file, tuple(server + file for server in SERVERS), "OGBench")
    return fetch(Path(file).stem, entry, dataset_dir, **patience)


def _local(name: str, folder: Path, max_trajectories: int) -> Dataset:
    """Local data of full size, or, if only the first episodes are wanted, of that many."""
    whole = usual_episodes(name)
    count = whole if max_trajectories == -1 else min(max_trajectories, whole)
    here = folder / local_file(name, whole)
    path = here if here.exists() else make_local(name, max(count, 1), dataset_dir=folder)
    return read_npz(path, name, max_trajectories)


def _instead(name: str) -> str:
    if can_generate(name):
        return (
            f"Data of the same kind can be rolled out here: --data local, or --dataset {split_name(name).base}-local."
        )
    return (
        "Local data cannot stand in: "
        + ", ".join(k for k in DATASETS if can_generate(k))
        + " are all that is made here."
    )
