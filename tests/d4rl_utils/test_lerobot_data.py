"""LeRobot's Parquet episodes -> transitions, in the layouts of its versions 2 and 3; and what is refused."""

import json
import logging
import os
import stat

import numpy as np
import pytest

from config import BambaConfig
from d4rl_utils import open_data
from d4rl_utils.lerobot_data import read_lerobot

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

LENGTHS = (5, 3, 4)
DONE = (True, False, True)


def rows_of(lengths=LENGTHS, done=DONE) -> dict[str, np.ndarray]:
    """Columns of episodes whose states count upwards."""
    n = sum(lengths)
    last = np.cumsum(lengths) - 1
    ends = np.zeros(n, bool)
    ends[last] = done
    serial = np.arange(n, dtype=np.float32) + np.repeat(np.arange(len(lengths)), lengths)
    return {
        "observation.state": np.repeat(serial[:, None], 3, 1),
        "action": np.tanh(np.random.default_rng(0).normal(size=(n, 2))).astype(np.float32),
        "episode_index": np.repeat(np.arange(len(lengths)), lengths),
        "frame_index": np.concatenate([np.arange(k) for k in lengths]),
        "timestamp": serial / 10,
        "next.reward": serial % 7,
        "next.done": ends,
    }


def write(folder, rows, version=2, fixed=False):
    """As LeRobot lays it out: a file an episode (2), or all in one (3)."""
    (folder / "meta").mkdir(parents=True)
    facts = {"codebase_version": f"v{version}.0", "total_frames": len(rows["action"]), "fps": 10}
    (folder / "meta" / "info.json").write_text(json.dumps(facts))
    episodes = np.unique(rows["episode_index"])
    files = {f"episode_{i:06d}.parquet": rows["episode_index"] == i for i in episodes}
    if version == 3:
        files = {"file-000.parquet": np.ones(len(rows["action"]), bool)}
    (folder / "data" / "chunk-000").mkdir(parents=True)
    for name, chosen in files.items():
        columns = {}
        for key, values in rows.items():
            part = values[chosen]
            if part.ndim == 2 and fixed:
                columns[key] = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), part.shape[1])
            else:
                columns[key] = pa.array(part.tolist() if part.ndim == 2 else part)
        pq.write_table(pa.table(columns), folder / "data" / "chunk-000" / name)
    return folder


@pytest.mark.parametrize(("version", "fixed"), [(2, False), (3, True)])
def test_episodes_come_out_as_they_went_in(tmp_path, caplog, version, fixed):
    rows = rows_of()
    with caplog.at_level(logging.WARNING):
        t, identity = read_lerobot(str(write(tmp_path / "mine", rows, version, fixed)))
    kept = np.delete(np.arange(12), 7)  # the last frame of the cut episode has no next state
    assert np.array_equal(t.states, rows["observation.state"][kept])
    assert np.array_equal(t.actions, rows["action"][kept])
    assert np.array_equal(t.rewards, rows["next.reward"][kept])
    assert np.flatnonzero(t.ends).tolist() == [4, 6, 10]
    assert np.flatnonzero(t.terminals).tolist() == [4, 10]
    assert np.array_equal(t.next_states[~t.terminals], t.states[~t.terminals] + 1)
    assert (identity.name, identity.source, identity.transitions, identity.episodes) == ("mine", "custom", 11, 3)
    assert "2 of 3 episodes end with next.done" in caplog.text
    assert "1 rows that end by a time limit are dropped" in caplog.text


def test_frames_are_sorted_whatever_the_files_order(tmp_path):
    rows = rows_of()
    mixed = np.random.default_rng(1).permutation(12)
    straight, _ = read_lerobot(str(write(tmp_path / "a", rows, 3)))
    shuffled, _ = read_lerobot(str(write(tmp_path / "b", {k: v[mixed] for k, v in rows.items()}, 3)))
    for one, other in zip(straight, shuffled):
        assert np.array_equal(one, other)


def test_without_next_done_every_episode_is_cut(tmp_path):
    rows = rows_of()
    del rows["next.done"]
    t, _ = read_lerobot(str(write(tmp_path / "mine", rows)))
    assert not t.terminals.any()
    assert len(t.ends) == 12 - 3


def test_through_the_settings_with_a_part_of_the_states(tmp_path):
    folder = write(tmp_path / "mine", {**rows_of(), "observation.state": np.zeros((12, 11), np.float32)})
    cfg = BambaConfig(dataset=f"lerobot:{folder}", env="hopper", observe="positions")
    assert open_data(cfg).transitions.states.shape == (11, 5)
    with pytest.raises(ValueError, match="dataset_type expert contradicts"):
        open_data(BambaConfig(dataset=f"lerobot:{folder}", dataset_type="expert"))


def without(key):
    return lambda rows: {k: v for k, v in rows.items() if k != key}


def put(key, row, value):
    def change(rows):
        values = rows[key].copy()
        values[row] = value
        return {**rows, key: values}

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("next.reward"), "no column next.reward; it has .*zeros if need be"),
        (without("observation.state"), "no column observation.state"),
        (put("observation.state", 3, np.nan), "'observations' holds NaN or infinity, first in row 3"),
        (put("action", 3, 1e20), "'actions' reaches from"),
        (put("frame_index", 3, 4), "episode 0 has frame 4 where 3 should be"),
        (lambda rows: {k: np.delete(v, 2, 0) for k, v in rows.items()}, "episode 0 has frame 3 where 2 should be"),
        (lambda rows: {**rows, "action": np.array(["left"] * 12)}, "'action' holds string, not numbers"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, change, words):
    folder = write(tmp_path / "mine", change(rows_of()))
    with pytest.raises(ValueError, match=words):
        read_lerobot(str(folder))


def test_rows_of_unequal_length_and_empty_places(tmp_path):
    folder = write(tmp_path / "mine", rows_of(), 3)
    file = folder / "data" / "chunk-000" / "file-000.parquet"
    whole = pq.read_table(file)
    for values, words in (
        ([[0.0] * (3 - (i == 5)) for i in range(12)], r"has \[2, 3\] numbers in its rows"),
        ([[0.0, None, 0.0]] * 12, "12 empty places"),
        ([None] + [[0.0] * 3] * 11, "empty in 1 of 12 rows"),
    ):
        at = whole.column_names.index("observation.state")
        pq.write_table(whole.set_column(at, "observation.state", pa.array(values, pa.list_(pa.float32()))), file)
        with pytest.raises(ValueError, match=words):
            read_lerobot(str(folder))


def test_a_missing_or_damaged_file_is_said(tmp_path):
    folder = write(tmp_path / "mine", rows_of())
    file = folder / "data" / "chunk-000" / "episode_000001.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"episode_000001.parquet is damaged \(.*Remove it"):
        read_lerobot(str(folder))
    file.unlink()
    with pytest.raises(ValueError, match="promises 12 frames and holds 9"):
        read_lerobot(str(folder))
    (folder / "meta" / "info.json").write_text("{")
    with pytest.raises(ValueError, match="info.json is damaged"):
        read_lerobot(str(folder))
    with pytest.raises(ValueError, match="has no Parquet file"):
        read_lerobot(str(tmp_path))


def test_what_the_hub_answers_is_a_sentence(tmp_path, monkeypatch):
    for name in ("no/folder/here", "nothing"):
        with pytest.raises(ValueError, match="neither a folder nor a name"):
            read_lerobot(name)
    pytest.importorskip("huggingface_hub")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="could not be had from the Hugging Face hub.*\n.*\nBy hand"):
        read_lerobot("lerobot/pusht")


def test_what_the_hub_brought_is_read(tmp_path, monkeypatch):
    """Another process brings it: here a stand-in that prints where it lies."""
    folder = write(tmp_path / "snapshot", rows_of())
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\necho something else\necho {folder}\n")
    os.chmod(fake, os.stat(fake).st_mode | stat.S_IEXEC)
    monkeypatch.setattr("sys.executable", str(fake))
    t, identity = read_lerobot("somebody/something")
    assert len(t.ends) == 11
    assert identity.name == "somebody/something"
