"""D4RL: names, scores, downloads, files -> transitions, environments, and local data where no download is to be had."""

from d4rl_utils.datasets import open_dataset
from d4rl_utils.environment import make_env
from d4rl_utils.names import BODIES, DATASET_TYPES, d4rl_score
from d4rl_utils.reader import Dataset, Identity, Transitions, read_hdf5

__all__ = [
    "BODIES",
    "DATASET_TYPES",
    "Dataset",
    "Identity",
    "Transitions",
    "d4rl_score",
    "make_env",
    "open_dataset",
    "read_hdf5",
]
