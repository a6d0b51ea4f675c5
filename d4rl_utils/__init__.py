"""D4RL: names, scores, downloads, files -> transitions, environments, and local data where no download is to be had.

Minari's data and files of one's own come through the same doors: `open_data` and `make_eval_env`.
"""

from d4rl_utils.datasets import open_data, open_dataset
from d4rl_utils.environment import check_recorded, eval_env_of, frames_per_second, make_env, make_eval_env, spec_of
from d4rl_utils.filters import delayed
from d4rl_utils.names import DATASET_TYPES, ENVS, SCORE_NAMES, d4rl_score
from d4rl_utils.reader import Dataset, DatasetInfo, Transitions, read_hdf5
from d4rl_utils.resolve import body_and_type, resolve_dataset

__all__ = [
    "DATASET_TYPES",
    "ENVS",
    "SCORE_NAMES",
    "Dataset",
    "DatasetInfo",
    "Transitions",
    "body_and_type",
    "check_recorded",
    "d4rl_score",
    "delayed",
    "eval_env_of",
    "frames_per_second",
    "make_env",
    "make_eval_env",
    "open_data",
    "open_dataset",
    "read_hdf5",
    "resolve_dataset",
    "spec_of",
]
