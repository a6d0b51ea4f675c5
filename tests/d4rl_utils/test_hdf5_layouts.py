"""d3rlpy's HDF5 files, of its versions 1 and 2, against the same episodes in D4RL's layout."""

import h5py
import numpy as np
import pytest
from test_reader import write

from d4rl_utils.reader import read_hdf5

EPISODES = [(5, True), (3, False), (4, True)]


def write_second(path, episodes=EPISODES, change=lambda file: None):
    """As ReplayBuffer.dump lays it out (checked against a file that d3rlpy 2.8 wrote): rewards (T, 1), a flag each."""
    columns = write(path.with_name("columns.hdf5"), episodes)
    stops = np.cumsum([length for length, _ in episodes])
    with h5py.File(path, "w") as f:
        f["columns"] = ["observations", "actions", "rewards", "terminated"]
        f["num_episodes"], f["version"] = len(episodes), "2.1"
        for i, (stop, (length, falls)) in enumerate(zip(stops, episodes)):
            for key in ("observations", "actions"):
                f[f"{key}_{i}"] = columns[key][stop - length : stop]
            f[f"rewards_{i}"] = columns["rewards"][stop - length : stop, None]
            f[f"terminated_{i}"] = falls
        change(f)
    return path


def test_both_versions_hold_what_d4rls_layout_holds(tmp_path, caplog):
    write(tmp_path / "d4rl.hdf5", EPISODES, without=("next_observations",))
    wanted, _ = read_hdf5(tmp_path / "d4rl.hdf5")
    caplog.clear()
    second, identity = read_hdf5(write_second(tmp_path / "second.h5"))
    assert (identity.source, identity.name, identity.episodes) == ("custom", "second", 3)
    assert "is read as" not in caplog.text  # d3rlpy's rewards always have two dimensions: nothing to remark
    columns = write(tmp_path / "first.h5", EPISODES, without=("next_observations", "timeouts"))
    with h5py.File(tmp_path / "first.h5", "a") as f:
        f["episode_terminals"] = (columns["terminals"] | (np.arange(12) == 7)).astype(np.float32)
        f["discrete_action"], f["version"] = False, "1.0"
    first, _ = read_hdf5(tmp_path / "first.h5")
    for name in wanted._fields:
        for other in (first, second):
            assert np.array_equal(getattr(wanted, name), getattr(other, name)), name


def drop(key):
    return lambda f: f.pop(key)


def put(key, values):
    def change(f):
        del f[key]
        f[key] = values

    return change


def in_a_tuple(f):
    f["observations_1_0"] = f.pop("observations_1")


def elsewhere(f):
    del f["actions_2"]
    f["actions_2"] = h5py.ExternalLink("columns.hdf5", "actions")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("rewards_1"), "to hold 3 episodes and has no 'rewards_1'"),
        (in_a_tuple, r"no 'observations_1' \(but several in a tuple"),
        (elsewhere, "'actions_2' does not lie in this file"),
        (put("num_episodes", 0), "'num_episodes' is 0"),
        (put("num_episodes", 10**9), "has no 'observations_3'"),
        (put("actions_1", np.zeros((3, 4), np.float32)), "'actions' has shapes"),
        (put("actions_1", np.zeros((2, 2), np.float32)), r"of episode 1 have \(3, 2, 3\) rows"),
        (put("rewards_1", np.full((3, 1), np.nan)), "'rewards' holds NaN or infinity, first in row 5"),
        (put("terminated_1", 3), "'terminals' holds a value that is neither 0 nor 1, first in row 7"),
        (put("observations_1", 1.0), r"'observations' has shapes \[\(\), \(3,\)\]"),
        (put("num_episodes", "three"), "is damaged or only part"),
        (put("terminated_1", [True, False]), "'terminated' has shapes"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, change, words):
    path = write_second(tmp_path / "second.h5", change=change)
    with pytest.raises(ValueError, match=words):
        read_hdf5(path)


def test_no_memory_is_taken_for_what_the_file_cannot_hold(tmp_path):
    def change(f):
        del f["observations_1"]
        f.create_dataset("observations_1", shape=(10**9, 3), dtype="f4", chunks=(1000, 3), compression="gzip")

    with pytest.raises(ValueError, match="12 GB and is"):
        read_hdf5(write_second(tmp_path / "second.h5", change=change))
