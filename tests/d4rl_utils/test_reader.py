"""D4RL's HDF5 layout -> transitions: round trips, gaps in the layout, refusals, and the cache."""

import importlib
import json
import logging
import os
import random
from dataclasses import replace

import h5py
import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from common.files import sha256_of
from config import BambaConfig
from d4rl_utils import open_data, reader
from d4rl_utils.reader import episode_returns, read_hdf5


def stops_of(episodes):
    return np.cumsum([length for length, _ in episodes]) - 1


def write(path, episodes, unfinished=False, dims=(3, 2), without=(), dtype=np.float32, **options):
    """A file of episodes [(length, falls)]; states count upwards, so that every row and successor is known."""
    n = sum(length for length, _ in episodes)
    stops = stops_of(episodes)
    terminals, timeouts = np.zeros(n, bool), np.zeros(n, bool)
    terminals[stops] = [falls for _, falls in episodes]
    timeouts[stops] = ~terminals[stops]
    if unfinished:
        timeouts[-1] = False
    serial = np.arange(n) + np.repeat(np.arange(len(episodes)), [length for length, _ in episodes])
    columns = {
        "observations": np.repeat(serial[:, None], dims[0], 1).astype(dtype),
        "actions": np.tanh(np.random.default_rng(0).normal(size=(n, dims[1]))).astype(dtype),
        "rewards": (serial % 7).astype(dtype),
        "terminals": terminals,
        "timeouts": timeouts,
        "next_observations": np.repeat(serial[:, None] + 1, dims[0], 1).astype(dtype),
    }
    with h5py.File(path, "w") as f:
        for key, values in columns.items():
            if key not in without:
                f.create_dataset(key, data=values, **options)
    return {key: values for key, values in columns.items() if key not in without}


def change(path, key, values):
    """Put another column into a file; None removes it."""
    with h5py.File(path, "a") as f:
        if key in f:
            del f[key]
        if values is not None:
            f[key] = values


def check_episodes(t):
    """What must hold whatever was read."""
    n = len(t.ends)
    assert all(len(column) == n for column in t) and t.ends[-1] and (t.ends | ~t.terminals).all()
    starts = np.flatnonzero(np.concatenate(([True], t.ends[:-1])))
    np.testing.assert_array_equal(t.episode_start, starts[np.cumsum(np.concatenate(([0], t.ends[:-1])))])
    assert t.states.dtype == t.actions.dtype == t.rewards.dtype == t.next_states.dtype == np.float32
    assert t.terminals.dtype == t.ends.dtype == bool and t.episode_start.dtype == np.int64


layouts = st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=8)


@settings(max_examples=40, deadline=None)
@given(episodes=layouts, unfinished=st.booleans(), dtype=st.sampled_from([np.float32, np.float64]))
def test_round_trip_of_any_layout(tmp_path_factory, episodes, unfinished, dtype):
    path = tmp_path_factory.mktemp("trip") / "x.hdf5"
    columns = write(path, episodes, unfinished, dtype=dtype)
    t, identity = read_hdf5(path, cache=False)
    check_episodes(t)
    for key, ours in zip(("observations", "actions", "rewards", "next_observations", "terminals"), t, strict=False):
        np.testing.assert_array_equal(ours, columns[key].astype(ours.dtype))
    assert np.flatnonzero(t.ends).tolist() == stops_of(episodes).tolist()
    assert (identity.transitions, identity.episodes) == (len(t.ends), len(episodes))
    assert identity.return_mean == pytest.approx(columns["rewards"].sum() / len(episodes))
    assert all(type(v) in (str, int, float) for v in vars(identity).values())


@settings(max_examples=40, deadline=None)
@given(episodes=layouts.filter(lambda e: any(falls or length > 1 for length, falls in e)), unfinished=st.booleans())
def test_without_next_observations_every_kept_row_knows_its_successor(tmp_path_factory, episodes, unfinished):
    path = tmp_path_factory.mktemp("trip") / "x.hdf5"
    columns = write(path, episodes, unfinished, without=["next_observations"])
    t, identity = read_hdf5(path, cache=False)
    check_episodes(t)
    step = (t.next_states - t.states)[:, 0]
    assert (step == np.where(t.terminals, 0, 1)).all()  # a terminal row keeps its own state
    keep = columns["terminals"].copy()
    keep |= ~np.isin(np.arange(len(keep)), stops_of(episodes))
    np.testing.assert_array_equal(t.states, columns["observations"][keep])
    assert identity.episodes == sum(falls or length > 1 for length, falls in episodes)


@settings(max_examples=30, deadline=None)
@given(episodes=layouts, limit=st.integers(1, 4))
def test_without_timeouts_episodes_end_at_terminals_or_the_limit(tmp_path_factory, episodes, limit):
    path = tmp_path_factory.mktemp("trip") / "x.hdf5"
    columns = write(path, episodes, without=["timeouts"])
    t, _ = read_hdf5(path, max_episode_steps=limit, cache=False)
    check_episodes(t)
    steps, expected = 0, []
    for falls in columns["terminals"]:  # the definition, row by row
        steps += 1
        expected.append(bool(falls or steps == limit))
        steps = 0 if expected[-1] else steps
    expected[-1] = True
    assert t.ends.tolist() == expected


def test_the_log_says_what_was_cut_and_why(tmp_path, caplog):
    write(tmp_path / "a.hdf5", [(4, False), (3, False)], unfinished=True)
    write(tmp_path / "b.hdf5", [(4, False), (3, False)], unfinished=True, without=["next_observations"])
    write(tmp_path / "c.hdf5", [(4, False), (3, True)], without=["timeouts"])
    for name, words in {
        "a": ["rows 4 to 6", "kept as cut by time."],
        "b": ["without its last row", "1 rows that end by a time limit"],
        "c": ["no 'timeouts'", "1000 steps"],
    }.items():
        for _ in range(2):  # from the file, then from the cache
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                read_hdf5(tmp_path / f"{name}.hdf5")
            assert all(w in caplog.text for w in [f"{name}.hdf5", *words]), caplog.text


@pytest.mark.parametrize("compression", ["gzip", "lzf"])
def test_compressed_and_float64_files(tmp_path, compression):
    columns = write(tmp_path / "x.hdf5", [(50, True), (70, False)], dtype=np.float64, compression=compression)
    t, _ = read_hdf5(tmp_path / "x.hdf5")
    np.testing.assert_array_equal(t.actions, columns["actions"].astype(np.float32))


def test_flags_may_be_numbers(tmp_path):
    columns = write(tmp_path / "x.hdf5", [(3, True), (2, False)])
    change(tmp_path / "x.hdf5", "terminals", columns["terminals"].astype(np.float64))
    change(tmp_path / "x.hdf5", "timeouts", columns["timeouts"].astype(np.uint8))
    t, _ = read_hdf5(tmp_path / "x.hdf5")
    assert np.flatnonzero(t.terminals).tolist() == [2] and np.flatnonzero(t.ends).tolist() == [2, 4]


# -- Ant --------------------------------------------------------------------------------------------------------------


def test_ant_keeps_the_27_dims_that_carry_information(tmp_path, caplog):
    columns = write(tmp_path / "ant.hdf5", [(5, True), (4, False)], dims=(111, 8))
    for key in ("observations", "next_observations"):
        columns[key][:, 27:] = 0
        change(tmp_path / "ant.hdf5", key, columns[key])
    t, _ = read_hdf5(tmp_path / "ant.hdf5")
    np.testing.assert_array_equal(t.states, columns["observations"][:, :27])
    np.testing.assert_array_equal(t.next_states, columns["next_observations"][:, :27])
    columns["next_observations"][6, 110] = 1e-9
    change(tmp_path / "ant.hdf5", "next_observations", columns["next_observations"])
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match="'next_observations', first in row 6, in 1 of 9.*ant_contacts drop"):
            read_hdf5(tmp_path / "ant.hdf5")
        caplog.clear()
        t, _ = read_hdf5(tmp_path / "ant.hdf5", drop_contacts=True)
        np.testing.assert_array_equal(t.next_states, columns["next_observations"][:, :27])
        assert "They are left out (--ant_contacts drop)" in caplog.text
    cfg = BambaConfig(env="ant", dataset=str(tmp_path / "ant.hdf5"))
    with pytest.raises(ValueError, match="ant_contacts drop"):
        open_data(cfg)
    assert open_data(replace(cfg, ant_contacts="drop")).transitions.states.shape == (9, 27)


# -- refusals ---------------------------------------------------------------------------------------------------------

ROWS = 9


@pytest.mark.parametrize(
    "key, values, words",
    [
        ("observations", None, "has no dataset 'observations'; it holds actions"),
        ("rewards", None, "has no dataset 'rewards'"),
        ("actions", np.zeros((ROWS - 1, 2)), r"'actions' has shape \(8, 2\); expected 2 dim.*9 rows"),
        ("timeouts", np.zeros(ROWS + 1), r"'timeouts' has shape \(10,\)"),
        ("rewards", np.zeros((ROWS, 2)), r"'rewards' has shape \(9, 2\); expected 1 dim"),
        ("observations", np.zeros(ROWS), r"'observations' has shape \(9,\); expected 2"),
        ("next_observations", np.zeros((ROWS, 4)), r"'next_observations' has shape \(9, 4\).*must be the same"),
        ("actions", np.zeros((ROWS, 0)), "no transition"),
        ("actions", np.array([[b"a", b"b"]] * ROWS), "'actions' holds .*not numbers"),
        ("rewards", np.where(np.arange(ROWS) > 4, np.nan, 1), "'rewards' holds NaN.*first in row 5, in 4 of 9 rows"),
        ("observations", np.full((ROWS, 3), np.inf), "'observations' holds NaN or inf.*first in row 0"),
        ("actions", np.full((ROWS, 2), 1e300), "'actions' holds NaN or inf"),
        (
            "rewards",
            np.where(np.arange(ROWS) > 4, -1e20, 1),
            r"'rewards' reaches from -1e\+20 to 1, and nothing can be",
        ),
        ("terminals", np.arange(ROWS) * 0.5, "'terminals' holds a value that is neither 0 nor 1, first in row 1"),
    ],
)
def test_what_cannot_be_trained_on_is_refused_by_name(tmp_path, key, values, words):
    write(tmp_path / "bad.hdf5", [(5, True), (4, False)])
    change(tmp_path / "bad.hdf5", key, values)
    with pytest.raises(ValueError, match=rf"bad\.hdf5.*{words}"):
        read_hdf5(tmp_path / "bad.hdf5")
    assert not list(tmp_path.glob(".cache/bad.hdf5-*"))


def test_files_that_are_none(tmp_path):
    path = tmp_path / "x.hdf5"
    with pytest.raises(FileNotFoundError, match="x.hdf5 is not a file"):
        read_hdf5(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty file"):
        read_hdf5(path)
    path.write_text("<html>please log in</html>")
    with pytest.raises(ValueError, match="not an HDF5 file.*web page"):
        read_hdf5(path)
    write(path, [(500, True)])
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match="damaged or only part of a file.*get it again"):
        read_hdf5(path)
    with h5py.File(path, "w") as f:
        for key, dims in {"observations": (3,), "actions": (2,), "rewards": (), "terminals": ()}.items():
            f[key] = np.zeros((0, *dims))
    with pytest.raises(ValueError, match="no transition"):
        read_hdf5(path)
    write(path, [(1, False)], without=["next_observations"])
    with pytest.raises(ValueError, match="nothing is left"):
        read_hdf5(path)


def test_what_lies_in_another_file_is_refused(tmp_path):
    path, other = tmp_path / "x.hdf5", tmp_path / "other.hdf5"
    columns = write(other, [(5, True), (4, False)])

    def begun(without: str):
        write(path, [(5, True), (4, False)], without=[without])
        return h5py.File(path, "a")

    with begun("rewards") as f:
        f["rewards"] = h5py.ExternalLink("other.hdf5", "/rewards")
    with pytest.raises(ValueError, match="'rewards' does not lie in this file but in other.hdf5"):
        read_hdf5(path)
    with begun("rewards") as f:
        f["rewards"] = h5py.ExternalLink("gone.hdf5", "/rewards")  # it need not be there to be told
    with pytest.raises(ValueError, match="in gone.hdf5"):
        read_hdf5(path)
    with begun("rewards") as f:
        f["door"], f["rewards"] = h5py.ExternalLink("other.hdf5", "/"), h5py.SoftLink("/door/rewards")
    with pytest.raises(ValueError, match=r"'rewards' .* in .*other\.hdf5"):
        read_hdf5(path)
    with begun("rewards") as f:
        layout = h5py.VirtualLayout(shape=(ROWS,), dtype=np.float32)
        layout[:] = h5py.VirtualSource("other.hdf5", "rewards", shape=(ROWS,))
        f.create_virtual_dataset("rewards", layout)
    with pytest.raises(ValueError, match="'rewards' .* as a virtual data set"):
        read_hdf5(path)
    with begun("rewards") as f:
        f.create_dataset("rewards", (ROWS,), np.float32, external=[("raw.bin", 0, ROWS * 4)])
    with pytest.raises(ValueError, match="'rewards' .* in raw.bin"):
        read_hdf5(path)
    with begun("rewards") as f:  # a link within the file is as good as the column
        f["kept/rewards"], f["rewards"] = columns["rewards"], h5py.SoftLink("/kept/rewards")
    np.testing.assert_array_equal(read_hdf5(path)[0].rewards, columns["rewards"])


def test_a_claim_beyond_any_compression_takes_no_memory(tmp_path):
    path = tmp_path / "x.hdf5"
    with h5py.File(path, "w") as f:
        for key, dims in {"observations": (11,), "actions": (3,), "rewards": (), "terminals": ()}.items():
            f.create_dataset(
                key, (10**10, *dims), np.float32, chunks=(1000, *dims), compression="gzip"
            )  # never written
    with pytest.raises(ValueError, match="says that it holds 640 GB and is .* bytes long"):
        read_hdf5(path)
    zeros = np.zeros((200_000, 11), np.float32)
    with h5py.File(path, "w") as f:
        for key, column in {"observations": zeros, "actions": zeros[:, :3], "rewards": zeros[:, 0]}.items():
            f.create_dataset(key, data=column, compression="gzip", compression_opts=9)
        f.create_dataset("terminals", data=zeros[:, 0], compression="gzip", compression_opts=9)
    assert len(read_hdf5(path)[0].rewards) == 199_800  # as compressible as can be; 200 rows end by the time limit


@pytest.mark.parametrize("part", ["hdf5", "npz"])
def test_no_damage_is_a_traceback(part, tmp_path, monkeypatch):
    pytest.importorskip("resource")  # the harness bounds memory, which Windows cannot
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    faults = importlib.import_module("faults")
    for path in faults.PARTS[part][0](tmp_path).values():
        whole, data, seen = faults.PARTS[part][1](path), path.read_bytes(), []
        bad = tmp_path / f"bad{path.suffix}"
        for seed in range(60):
            bad.write_bytes(faults.damaged(data, random.Random(seed)))
            seen.append(faults.attempt(part, bad, whole)[0])
        assert {"refused"} <= set(seen) <= {"refused", "same", "other"}


def test_a_damaged_chunk_is_a_damaged_file(tmp_path):
    path = tmp_path / "x.hdf5"
    write(path, [(3000, True)], compression="gzip", chunks=None)
    with h5py.File(path) as f:
        chunk = f["actions"].id.get_chunk_info(0)
    with open(path, "r+b") as f:
        f.seek(chunk.byte_offset)
        f.write(b"\xff" * chunk.size)
    with pytest.raises(ValueError, match="damaged"):
        read_hdf5(path)


# -- the cache --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch):
    """How often a file itself was read."""
    count, real = [], reader._read
    monkeypatch.setattr(reader, "_read", lambda *args: count.append(args) or real(*args))
    return count


def caches(tmp_path):
    return sorted(p.name for p in (tmp_path / ".cache").iterdir() if not p.name.endswith(".lock"))


def test_the_second_time_comes_from_the_cache(tmp_path, reads):
    path = tmp_path / "x.hdf5"
    write(path, [(5, True), (4, False)])
    for first, second in zip(read_hdf5(path).transitions, read_hdf5(path).transitions):
        np.testing.assert_array_equal(first, second)
        assert type(first) is type(second) is np.memmap and first.flags.writeable
    assert len(reads) == 1 and len(caches(tmp_path)) == 1
    assert read_hdf5(path).identity == read_hdf5(path, cache=False).identity
    assert read_hdf5(path).identity.sha256 == sha256_of(path)


def test_writing_to_the_arrays_changes_no_file(tmp_path):
    path = tmp_path / "x.hdf5"
    write(path, [(5, True)])
    read_hdf5(path).transitions.states[:] = 99
    assert read_hdf5(path).transitions.states.max() < 99


def test_a_changed_file_is_read_anew_and_the_old_cache_goes(tmp_path, reads, caplog):
    path = tmp_path / "x.hdf5"
    write(path, [(5, True), (4, False)])
    before = read_hdf5(path).identity
    old = caches(tmp_path)
    write(path, [(5, True), (4, True)])  # the same size
    os.utime(path, ns=(1, 1))
    after = read_hdf5(path).identity
    assert f"when it was last read (SHA-256 {after.sha256[:12]}, then {before.sha256[:12]})" in caplog.text
    assert len(reads) == 2 and before.sha256 != after.sha256
    assert len(caches(tmp_path)) == 1 and caches(tmp_path) != old


def test_a_half_written_cache_is_never_taken_for_a_whole_one(tmp_path, reads, monkeypatch, caplog):
    path = tmp_path / "x.hdf5"
    write(path, [(5, True), (4, False)])

    def killed(source, target):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(reader.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            read_hdf5(path)
    assert [name.endswith(".part") for name in caches(tmp_path)] == [True]
    read_hdf5(path)
    assert len(reads) == 2 and [name.endswith(".part") for name in caches(tmp_path)] == [False]
    # a cache folder with a short array, as a power cut may leave it
    array = next(tmp_path.glob(".cache/*/rewards.npy"))
    os.truncate(array, array.stat().st_size - 4)
    read_hdf5(path)
    assert len(reads) == 3 and "is damaged" in caplog.text
    (array.parent / "facts.json").write_text("{")
    read_hdf5(path)
    array.unlink()
    read_hdf5(path)
    assert len(reads) == 5


@pytest.mark.parametrize("how", ["no folder", "full disk"])
def test_without_a_cache_it_works_and_says_so(tmp_path, reads, monkeypatch, caplog, how):
    path = tmp_path / "x.hdf5"
    write(path, [(5, True), (4, False)])
    if how == "no folder":  # a file where the folder should be: permissions do not stop root
        (tmp_path / ".cache").write_text("")
    else:
        monkeypatch.setattr(reader.np, "save", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for _ in range(2):
        caplog.clear()
        assert read_hdf5(path).identity.transitions == 9
        assert "cache" in caplog.text and "anew" in caplog.text
    assert len(reads) == 2
    if how == "full disk":
        assert caches(tmp_path) == []


def test_the_facts_of_the_cache(tmp_path):
    path = tmp_path / "x.hdf5"
    write(path, [(5, True)])
    read_hdf5(path)
    facts = json.loads(next(tmp_path.glob(".cache/*/facts.json")).read_text())
    assert facts["sha256"] == sha256_of(path) and facts["size"] == path.stat().st_size
    assert facts["mtime_ns"] == path.stat().st_mtime_ns and facts["format"] == reader.CACHE_FORMAT


def test_returns_by_hand(tmp_path):
    write(tmp_path / "x.hdf5", [(2, True), (3, False)])
    t, identity = read_hdf5(tmp_path / "x.hdf5")
    assert episode_returns(t).tolist() == [0 + 1, 3 + 4 + 5] and identity.return_mean == 6.5
    assert (identity.name, identity.source, identity.file) == ("x", "custom", "x.hdf5")
