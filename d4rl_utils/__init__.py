"""D4RL: names, scores, downloads, files -> transitions, environments, and local data where no download is to be had.

Minari's data and files of one's own come through the same doors: `open_data` and `open_environment`.
"""

from d4rl_utils.choose import delayed
from d4rl_utils.datasets import open_data, open_dataset
from d4rl_utils.environment import Stage, boxes_of, frames_per_second, make_env, open_environment, open_stage
from d4rl_utils.names import BODIES, DATASET_TYPES, SCORE_NAMES, d4rl_score
from d4rl_utils.reader import Dataset, Identity, Transitions, read_hdf5
from d4rl_utils.wanted import wanted

__all__ = [
    "BODIES",
    "DATASET_TYPES",
    "SCORE_NAMES",
    "Dataset",
    "Identity",
    "Stage",
    "Transitions",
    "boxes_of",
    "d4rl_score",
    "delayed",
    "frames_per_second",
    "make_env",
    "open_data",
    "open_dataset",
    "open_environment",
    "open_stage",
    "read_hdf5",
    "wanted",
]
