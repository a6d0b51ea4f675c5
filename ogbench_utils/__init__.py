"""OGBench's mazes: names, downloads, files -> segments with goals, the five tasks, and local data."""

from ogbench_utils.datasets import download, name_of, open_data
from ogbench_utils.environment import TASKS, make_maze, make_task
from ogbench_utils.generate.rollout import can_generate, make_local
from ogbench_utils.names import DATASETS, SCORE_NAMES, TOLERANCE, split_name
from ogbench_utils.reader import Dataset, Episodes, read_npz, tolerance_of

__all__ = ["DATASETS", "SCORE_NAMES", "TASKS", "TOLERANCE", "Dataset", "Episodes"]
__all__ += ["can_generate", "download", "make_local", "make_maze", "make_task", "name_of", "open_data", "read_npz"]
__all__ += ["split_name", "tolerance_of"]
