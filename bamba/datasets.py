"""Data sets as NumPy arrays, and data sets from NumPy arrays."""

from pathlib import Path

import numpy as np

from bamba.common.logger import atomic_write
from bamba.config import BambaConfig
from bamba.d4rl_utils import open_data
from bamba.d4rl_utils.reader import Dataset, read_hdf5

__all__ = ["Dataset", "from_arrays", "open"]


def open(name: str, **settings) -> Dataset:
    """`hopper-medium`, `hopper-medium-local`, `minari:mujoco/hopper/medium-v0`, or a file in D4RL's layout.

    Returns (transitions, identity). settings: those of trainer.py's group `data`, such as `dataset_dir`, `observe`; a
    file may want `env`. Raises what trainer.py says: ValueError, OSError.
    """
    return open_data(BambaConfig(dataset=name, **settings))


def from_arrays(
    path: str | Path,
    observations: np.ndarray,
    actions: np.ndarray,
    rewards: np.ndarray,
    terminals: np.ndarray,
    timeouts: np.ndarray | None = None,
    next_observations: np.ndarray | None = None,
) -> Path:
    """Write a data set of one's own in D4RL's layout; returns the path, for `train(dataset=path, env="My-v0")`.

    observations (N, S), actions (N, A), rewards (N,), in recorded order. terminals (N,): the task ended there, by
    success or failure; timeouts (N,): the episode was cut there. next_observations (N, S): needed to use the last step
    of a cut episode. ValueError for arrays that cannot be trained on; nothing is left at `path` then.
    """
    import h5py

    columns = {"observations": observations, "actions": actions, "rewards": rewards, "terminals": terminals}
    columns |= {"timeouts": timeouts, "next_observations": next_observations}
    path = Path(path)
    if path.suffix not in (".hdf5", ".h5"):
        raise ValueError(f"{path} should end in .hdf5, as trainer.py knows its files by that")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as part:
        with h5py.File(part, "w") as file:
            for name, values in columns.items():
                if values is not None:
                    values = np.asarray(values)
                    file[name] = values.astype(np.float32) if values.dtype.kind == "f" else values
        try:
            read_hdf5(part, cache=False)
        except ValueError as error:
            raise ValueError(str(error).replace(part.name, path.name)) from error
    return path
