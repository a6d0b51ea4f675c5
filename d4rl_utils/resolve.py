"""What a command line asks for: one of D4RL's names, a data set of Minari's, or a file of one's own."""

from pathlib import Path
from typing import NamedTuple

from d4rl_utils.names import DATASET_TYPES, ENVS, check_name, split_name, suggest

SOURCES = ("auto", "d4rl", "local")


class DatasetRequest(NamedTuple):
    """The answer of `wanted`."""

    kind: str  # "d4rl", "minari", "lerobot" or "file"
    env: str  # a body of D4RL; with a file or LeRobot also any Gymnasium id; "" with Minari, whose data bring their own
    dataset_type: str  # D4RL's; "" with the others
    data: str  # where D4RL's data may come from: one of SOURCES
    place: str  # Minari's name, LeRobot's name or folder, or the file's path; "" with D4RL


def resolve_dataset(cfg) -> DatasetRequest:
    """Out of the settings `dataset`, `env`, `dataset_type`, `data`, `dataset_dir`, what they mean together.

    `dataset` is a name of D4RL (`hopper-medium-v2`; `hopper-medium-local` asks for local data), `minari:` and Minari's
    name, `lerobot:` and a name of the Hugging Face hub or a folder, or a path (sought in `dataset_dir` too); empty,
    `env` and `dataset_type` are the name.
    Raises ValueError for a name that means nothing, and for settings that contradict each other.
    """
    if cfg.data not in SOURCES:
        raise ValueError(f"unknown data '{cfg.data}': choose one of {', '.join(SOURCES)}.")
    if not cfg.dataset:
        if cfg.env not in ENVS and is_id(cfg.env):
            raise ValueError(
                f"D4RL has no data of '{cfg.env}', its bodies are {', '.join(ENVS)}. For another environment give "
                "its data too: --dataset FILE.hdf5 in D4RL's layout."
            )
        check_name(cfg.env, cfg.dataset_type)
        return DatasetRequest("d4rl", cfg.env, cfg.dataset_type, cfg.data, "")
    if cfg.dataset.startswith("minari:"):
        _agree(cfg, "env", "", "Minari's data bring their own environment")
        return DatasetRequest("minari", "", "", "", cfg.dataset.removeprefix("minari:"))
    if cfg.dataset.startswith("lerobot:"):
        _agree(cfg, "dataset_type", "", "LeRobot's data have no type")
        return DatasetRequest("lerobot", cfg.env, "", "", cfg.dataset.removeprefix("lerobot:"))
    base = cfg.dataset.removesuffix("-v2").removesuffix("-local")
    if base in [f"{body}-{kind}" for body in ENVS for kind in DATASET_TYPES]:
        return _d4rl(cfg, *split_name(base))
    path = Path(cfg.dataset)
    if not path.exists() and (Path(cfg.dataset_dir) / path).is_file():
        path = Path(cfg.dataset_dir) / path
    if path.suffix in (".hdf5", ".h5") or path.is_file():
        _agree(cfg, "dataset_type", "", "a file has no type")
        return DatasetRequest("file", cfg.env, "", "", str(path))
    names = [f"{body}-{kind}-v2" for body in ENVS for kind in DATASET_TYPES]
    raise ValueError(
        f"--dataset {cfg.dataset} is neither a name of D4RL's (hopper-medium-v2; python -m d4rl_utils list), nor "
        f"minari:NAME (minari:mujoco/hopper/medium-v0), nor lerobot:NAME, nor a file (.hdf5)"
        f"{suggest(cfg.dataset, names) or '.'}"
    )


def body_of(want: DatasetRequest) -> str:
    """D4RL's body that the data are of, or "": Minari's say it in the middle of their name."""
    named = want.place.split("/")[1:2] if want.kind == "minari" else [want.env]
    return next((name for name in named if name in ENVS), "")


def body_and_type(cfg) -> tuple[str, str]:
    """Which of D4RL's data these are, or are like: hopper, medium. A file is what `env` and `dataset_type` say."""
    if not cfg.dataset:
        return cfg.env, cfg.dataset_type
    want = resolve_dataset(cfg)
    level = want.place.rpartition("/")[2].rpartition("-v")[0] if want.kind == "minari" else cfg.dataset_type
    return body_of(want), want.dataset_type or level


def is_id(env: str) -> bool:
    """Whether `env` looks like an id of Gymnasium's (Hopper-v4, package:Name-v0), not like a body of D4RL's."""
    head, dash, version = env.rpartition("-v")
    return bool(head and dash and version.isdigit())


def _d4rl(cfg, env: str, dataset_type: str) -> DatasetRequest:
    _agree(cfg, "env", env, f"--dataset {cfg.dataset} is of {env}")
    _agree(cfg, "dataset_type", dataset_type, f"--dataset {cfg.dataset} is {dataset_type}")
    data = "local" if cfg.dataset.endswith("-local") else cfg.data
    if (cfg.dataset.endswith("-v2"), data) == (True, "local") or (data, cfg.data) == ("local", "d4rl"):
        raise ValueError(
            f"--dataset {cfg.dataset} and --data {cfg.data} contradict each other: -v2 is D4RL's own file, -local what "
            f"is rolled out here. Say {env}-{dataset_type}, or leave --data away (the quick preset sets it to local)."
        )
    return DatasetRequest("d4rl", env, dataset_type, data, "")


def _agree(cfg, setting: str, value: str, why: str) -> None:
    """A setting that the data set decides must be left at its default, or say the same."""
    if getattr(cfg, setting) not in (getattr(type(cfg), setting), value):
        raise ValueError(f"--{setting} {getattr(cfg, setting)} contradicts --dataset {cfg.dataset}: {why}.")
