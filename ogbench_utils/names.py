"""What OGBench's maze data are called, what is in them, and where they lie."""

import difflib
from typing import NamedTuple

# Distance of the place (x, y), the first two numbers of a state, within which OGBench's maze counts a goal as reached.
TOLERANCE = {"pointmaze": 1.0, "antmaze": 0.5, "humanoidmaze": 0.5}
DIMS = {"pointmaze": (2, 2), "antmaze": (29, 8), "humanoidmaze": (69, 21)}  # (state dims, action dims)
POSITIONS = {"pointmaze": (2, 2), "antmaze": (15, 14), "humanoidmaze": (28, 27)}  # MuJoCo's (qpos, qvel) dims

# What the score of an agent may be called, by the source of what it learned from. Only the first belongs in a table of
# OGBench's scores.
SCORE_NAMES = {
    "ogbench": "success rate",
    "ogbench-local": "local success rate",
    "ogbench-custom": "custom success rate",
}

SERVERS = ("https://rail.eecs.berkeley.edu/datasets/ogbench/",)


class DatasetSize(NamedTuple):
    """One of OGBench's data sets."""

    episodes: int  # for training; a tenth more are for validation
    length: int  # T, transitions of an episode: it holds T + 1 states


# fmt: off
DATASETS = {
    "pointmaze-medium-navigate-v0": DatasetSize(1000, 1000),
    "pointmaze-large-navigate-v0": DatasetSize(1000, 1000),
    "pointmaze-giant-navigate-v0": DatasetSize(500, 2000),
    "pointmaze-medium-stitch-v0": DatasetSize(5000, 200),
    "pointmaze-large-stitch-v0": DatasetSize(5000, 200),
    "antmaze-medium-navigate-v0": DatasetSize(1000, 1000),
    "antmaze-large-navigate-v0": DatasetSize(1000, 1000),
    "antmaze-medium-stitch-v0": DatasetSize(5000, 200),
    "antmaze-large-stitch-v0": DatasetSize(5000, 200),
    "antmaze-medium-explore-v0": DatasetSize(10_000, 500),
    "antmaze-large-explore-v0": DatasetSize(10_000, 500),
    "humanoidmaze-medium-navigate-v0": DatasetSize(1000, 2000),
    "humanoidmaze-large-navigate-v0": DatasetSize(1000, 2000),
    "humanoidmaze-medium-stitch-v0": DatasetSize(5000, 400),
    "humanoidmaze-large-stitch-v0": DatasetSize(5000, 400),
}
# fmt: on


class Name(NamedTuple):
    """The words of a data set's name."""

    body: str  # pointmaze, antmaze, humanoidmaze
    maze: str  # medium, large, giant
    kind: str  # navigate, stitch, explore

    @property
    def base(self) -> str:
        return "-".join(self)

    @property
    def environment(self) -> str:
        """The id of the environment, which has no word for the data."""
        return f"{self.body}-{self.maze}-v0"


def split_name(name: str) -> Name:
    """`antmaze-medium-navigate`, with or without -v0 or -local, into its words. ValueError if OGBench has none such."""
    base = name.removesuffix("-v0").removesuffix("-local")
    if f"{base}-v0" not in DATASETS:
        near = difflib.get_close_matches(f"{base}-v0".lower(), DATASETS, n=3)
        hint = f". Did you mean {' or '.join(near)}?" if near else f": it has {', '.join(DATASETS)}."
        raise ValueError(f"OGBench has no maze data called '{name}'{hint}")
    return Name(*base.split("-"))


def local_name(name: str) -> str:
    """What data made on this machine are called: pointmaze-medium-navigate-local."""
    return f"{split_name(name).base}-local"
