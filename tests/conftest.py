"""Small worlds and small data for every test."""

import contextlib
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell's background job; its children would be deaf too
    signal.signal(signal.SIGINT, signal.default_int_handler)

with contextlib.suppress(
    ImportError
):  # before absl: it sets up logging anew, which closes the stream of an absl handler
    import submitit  # noqa: F401

from config import PRESETS, BambaConfig  # noqa: E402

SIZES = dict(
    d_model=16, d_state=8, headdim=8, n_layers=2, hidden_dim=16, context_length=3, batch_size=8, warmup_steps=2
)
TINY = {**PRESETS["bamba"]["upstream"], **SIZES}  # as published: what a test wants of the newer settings, it says


def as_flags(settings: dict) -> list[str]:
    """Settings as a command line has them."""
    flags = {k: ("--" if v else "--no_") + k if isinstance(v, bool) else f"--{k}={v}" for k, v in settings.items()}
    return list(flags.values())


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def tiny():
    return lambda **changes: BambaConfig(**{**TINY, **changes})


@pytest.fixture(scope="session")
def hopper_file(tmp_path_factory) -> Path:
    """400 steps of noise in hopper's shapes and D4RL's layout: episodes of 40, every second one ends in a fall."""
    import h5py

    rng = np.random.default_rng(0)
    states = rng.normal(size=(401, 11)).astype(np.float32)
    ends = np.arange(1, 401) % 40 == 0
    falls = ends & (np.arange(400) // 40 % 2 == 0)
    path = tmp_path_factory.mktemp("data") / "walk.hdf5"
    with h5py.File(path, "w") as f:
        f["observations"], f["next_observations"] = states[:-1], states[1:]
        f["actions"] = np.tanh(states[:-1, :3])
        f["rewards"] = rng.normal(1, 0.1, size=400).astype(np.float32)
        f["terminals"], f["timeouts"] = falls, ends & ~falls
    return path


def write_npz(path: Path, lengths, states: int = 2, actions: int = 2) -> Path:
    """A random walk in OGBench's layout: episodes of so many rows, in a maze's sizes."""
    rng, rows = np.random.default_rng(len(lengths)), sum(lengths)
    moves = rng.uniform(-1, 1, (rows, actions)).astype(np.float32)
    walk = rng.normal(size=(rows, states)).astype(np.float32)
    walk[:, :2] = 0.3 * np.cumsum(moves[:, :2] * 1.0, 0)
    ends = np.zeros(rows, bool)
    ends[np.cumsum(lengths) - 1] = True
    place = {"qpos": walk[:, : (states + 1) // 2], "qvel": walk[:, (states + 1) // 2 :]}
    np.savez_compressed(path, observations=walk, actions=moves, terminals=ends, **place)
    return path


@pytest.fixture(scope="session")
def maze_file(tmp_path_factory) -> Path:
    """Six short episodes of a point's random walk."""
    return write_npz(tmp_path_factory.mktemp("maze") / "walk.npz", [12, 13, 14, 15, 16, 17])


def starting(data, rows: torch.Tensor):
    """Segments of a goal data set that start in these rows."""
    return data.at(data.draw(len(rows), data.generator, rows))


class Clock:
    """Emits its step number, pays 1 a step, ends after `length` steps. What an agent saw of it, and for how long, is
    plain.

    length 0: the episode lasts 3 steps and one more for each unit of the seed.
    """

    def __init__(self, length: int = 7, width: int = 3):
        self.length, self.width = length, width

    def reset(self, seed):
        self.t, self.end = 0, self.length or 3 + seed % 100
        return np.zeros(self.width), {}

    def step(self, action):
        assert action.dtype == np.float32
        self.t += 1
        return np.full(self.width, float(self.t)), 1.0, False, self.t == self.end, {}

    def close(self):
        pass
