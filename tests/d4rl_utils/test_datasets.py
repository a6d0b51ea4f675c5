"""Which data `open_dataset` takes, that nothing stands in for anything else unsaid, and the command line."""

import hashlib
import json
import shutil
from dataclasses import asdict

import h5py
import numpy as np
import pytest
from test_generate import ship_policies
from test_reader import write

from common.download import DownloadError
from config import BambaConfig, parse
from d4rl_utils import DatasetInfo, datasets, open_data, open_dataset
from d4rl_utils.__main__ import main
from d4rl_utils.generate.rollout import LocalDataError, local_levels
from d4rl_utils.names import REGISTRY
from d4rl_utils.resolve import resolve_dataset
from d4rl_utils.summary import histogram

pytest.importorskip("mujoco")


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A small file that the registry takes for D4RL's hopper-medium-v2, outside the data folder."""
    path = tmp_path / "theirs.hdf5"
    write(path, [(30, True), (20, False)], dims=(11, 3))
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(
        REGISTRY,
        "hopper-medium-v2",
        REGISTRY["hopper-medium-v2"]._replace(size=path.stat().st_size, sha256=sha),
    )
    return path


@pytest.fixture
def policies(tmp_path, monkeypatch):
    return ship_policies(tmp_path / "policies", monkeypatch)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "datasets"
    folder.mkdir()
    return folder


@pytest.fixture
def network(monkeypatch, theirs):
    """What the servers do: network.up; and how often they were asked."""

    class Network:
        up, asked = False, 0

    def download(name, dataset_dir):
        Network.asked += 1
        if not Network.up:
            raise DownloadError(f"{name} could not be downloaded:\n  nobody there\nBy hand: --dataset_dir")
        shutil.copy(theirs, dataset_dir / REGISTRY[name].file)

    monkeypatch.setattr(datasets, "download", download)
    return Network


def test_a_file_of_d4rl_that_is_there_is_taken(folder, theirs, network, capsys):
    shutil.copy(theirs, folder / "hopper_medium-v2.hdf5")
    for data in ("auto", "d4rl"):
        t, identity = open_dataset("hopper", "medium", data, folder)
        assert identity == DatasetInfo(
            "hopper-medium-v2",
            "d4rl",
            "hopper_medium-v2.hdf5",
            REGISTRY["hopper-medium-v2"].sha256,
            50,
            2,
            pytest.approx(t.rewards.sum() / 2),
        )
    assert network.asked == 0 and capsys.readouterr().err == ""
    assert json.loads(json.dumps(asdict(identity))) == asdict(identity)


def test_else_it_is_downloaded(folder, network):
    network.up = True
    for _ in range(2):
        assert open_dataset("hopper", "medium", dataset_dir=folder).identity.source == "d4rl"
    assert network.asked == 1


def test_else_local_data_stand_in_and_nobody_can_miss_it(folder, network, policies, capsys):
    for _ in range(2):
        identity = open_dataset("hopper", "medium", dataset_dir=folder, local_transitions=300).identity
        assert (identity.name, identity.source) == ("hopper-medium-local", "local")
        notice = capsys.readouterr().err
        for words in (
            "LOCAL DATA",
            "hopper-medium-v2",
            "must\n",
            "not be compared with published",
            "By hand",
            "nobody",
        ):
            assert words.strip() in notice
        block = [line for line in notice.splitlines() if line[:1] in "+|"]
        assert len(block) > 6 and len({len(line) for line in block}) == 1
    assert network.asked == 2


def test_d4rl_means_d4rl(folder, network, policies):
    with pytest.raises(DownloadError, match="nobody there"):
        open_dataset("hopper", "medium", "d4rl", folder)
    assert not list(folder.glob("*.hdf5"))


def test_no_local_data_for_it_either(folder, network, policies):
    with pytest.raises(DownloadError, match="(?s)nobody there.*cannot stand in.*hopper-random, hopper-medium"):
        open_dataset("walker2d", "medium-replay", dataset_dir=folder)


def test_local_means_local_even_beside_d4rls_file(folder, theirs, network, policies, capsys):
    shutil.copy(theirs, folder / "hopper_medium-v2.hdf5")
    local = open_dataset("hopper", "medium", "local", folder, local_transitions=200)
    assert local.identity.name == "hopper-medium-local" and len(local.transitions.ends) == 200
    assert open_dataset("hopper", "medium", "auto", folder).identity.name == "hopper-medium-v2"
    assert network.asked == 0 and "LOCAL" not in capsys.readouterr().err
    with pytest.raises(LocalDataError, match="walker2d-expert"):
        open_dataset("walker2d", "expert", "local", folder)


@pytest.mark.parametrize("data", ["auto", "d4rl"])
def test_a_file_that_only_has_the_name_is_refused(folder, theirs, network, data):
    path = folder / "hopper_medium-v2.hdf5"
    write(path, [(31, True), (20, False)], dims=(11, 3))
    with pytest.raises(ValueError, match="bytes, D4RL's hopper-medium-v2 has.*Remove or rename it"):
        open_dataset("hopper", "medium", data, folder)
    content = bytearray(theirs.read_bytes())
    with h5py.File(theirs) as f:
        content[f["rewards"].id.get_offset()] ^= 1
    path.write_bytes(content)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(ValueError, match="has SHA-256 .*Remove or rename it"):
            open_dataset("hopper", "medium", data, folder)


def test_a_file_under_a_local_name_is_refused(folder, network, policies):
    write(folder / "hopper-medium-local-300.hdf5", [(300, False)], dims=(11, 3))
    with pytest.raises(ValueError, match="is not hopper-medium-local as this project makes it"):
        open_dataset("hopper", "medium", "local", folder, local_transitions=300)


def test_wrong_dims_are_refused(folder, theirs, network, monkeypatch):
    shutil.copy(theirs, folder / "hopper_medium-v2.hdf5")
    monkeypatch.setitem(datasets.DIMS, "hopper", (12, 3))
    with pytest.raises(ValueError, match=r"\(11, 3\) state and action dims; hopper has \(12, 3\)"):
        open_dataset("hopper", "medium", dataset_dir=folder)


def test_unknown_names(folder):
    for arguments, words in [
        (("humanoid", "medium"), "'humanoid'"),
        (("hopper", "best"), "'best'"),
        (("hopper", "medium", "cloud"), "'cloud'.*auto, d4rl, local"),
    ]:
        with pytest.raises(ValueError, match=words):
            open_dataset(*arguments, dataset_dir=folder)


@pytest.mark.slow
def test_the_quick_preset_needs_no_network(folder, network, tmp_path, monkeypatch):
    """Also where D4RL's data are a replay buffer: the ladder stands for it."""
    ship_policies(tmp_path / "policies", monkeypatch, ("ladder",), "walker2d")
    argv = ["--env", "walker2d", "--dataset_type", "medium-replay", "--preset", "quick"]
    assert parse(argv).local_transitions == 200_000 and resolve_dataset(parse(argv)).data == "local"
    cfg = parse([*argv, "--local_transitions", "300", "--dataset_dir", str(folder)])
    assert open_data(cfg).identity.name == "walker2d-medium-replay-local" and network.asked == 0


def test_sizes_are_d4rls_by_default(folder, network, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "make_local", lambda *a, **k: asked.append(a))
    for changes in ({}, {"dataset": "walker2d-medium-replay-local"}, {"local_transitions": 77}):
        with pytest.raises(FileNotFoundError):  # nothing was made
            open_data(BambaConfig(data="auto" if "dataset" in changes else "local", dataset_dir=str(folder), **changes))
    assert asked == [("hopper", "medium", 1_000_000), ("walker2d", "medium-replay", 302_000), ("hopper", "medium", 77)]


# -- the command line -------------------------------------------------------------------------------------------------


def test_list(folder, theirs, policies, capsys):
    shutil.copy(theirs, folder / "hopper_medium-v2.hdf5")
    assert main(["make", "hopper-random", "--transitions", "100", "--dataset_dir", str(folder)]) == 0
    capsys.readouterr()
    assert main(["list", "--dataset_dir", str(folder)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    row = {r.split()[0]: " ".join(r.split()[2:]) for r in rows}
    assert len(rows) == 24 and "D4RL file" in head
    assert row["hopper-random-v2"] == "- hopper-random-local-100.hdf5"
    assert row["hopper-medium-v2"] == "present can be made"
    assert row["walker2d-medium-v2"] == "- -"


def test_make_and_info(folder, policies, capsys):
    arguments = ["--transitions", "400", "--seed", "3", "--workers", "1", "--dataset_dir", str(folder)]
    assert main(["make", "hopper-medium", *arguments]) == 0
    path = folder / "hopper-medium-local-400.hdf5"
    assert str(path) in capsys.readouterr().out
    for file in (str(path), path.name):
        assert main(["info", file, "--dataset_dir", str(folder)]) == 0
        out = capsys.readouterr().out
        sha = hashlib.sha256(path.read_bytes()).hexdigest()
        for words in ("hopper-medium-local, LOCAL data", sha, "400, of which", "11 state, 3 action", "local score"):
            assert words in out


def test_info_knows_d4rls_own_file(theirs, tmp_path, capsys):
    picture = tmp_path / "out.png"
    assert main(["info", str(theirs), "--plot", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "hopper-medium-v2, D4RL's own file" in out and "20 to 30 steps long, mean 25.0" in out
    assert "which is D4RL's for hopper-medium-v2" in out and "D4RL score " in out
    assert picture.read_bytes()[:4] == b"\x89PNG" and str(picture) in out


def test_info_tells_a_file_that_only_has_the_name(tmp_path, capsys):
    path = tmp_path / "hopper_medium-v2.hdf5"
    write(path, [(31, True), (20, False)], dims=(11, 3))
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"NOT D4RL's, whose hopper-medium-v2 has {REGISTRY['hopper-medium-v2'].sha256}" in out and "score" not in out


def test_histograms_count_every_episode():
    returns = np.array([0.0, 1, 1, 2, 2, 2, 1200])
    lines = histogram(returns).splitlines()[1:]
    assert len(lines) == 12 and lines[0].endswith("# 6") and lines[-1].endswith(" 1")
    assert lines[0].split()[:3] == ["0", "to", "100"] and lines[-1].split()[:3] == ["1,100", "to", "1,200"]
    (line,) = histogram(np.array([5.0, 5.0])).splitlines()[1:]
    assert line.endswith("# 2")


def test_failures_are_a_sentence_and_a_status(folder, policies, capsys, monkeypatch):
    monkeypatch.setattr(
        "d4rl_utils.__main__.download", lambda *a: (_ for _ in ()).throw(DownloadError("nobody is there"))
    )
    for arguments, words in [
        (["get", "hopper-medium"], "nobody is there"),
        (["get", "hopper-medum-v2"], "unknown dataset_type 'medum'"),
        (["make", "ant-expert"], "no behaviour policy for ant-expert"),
        (["make", "hoper-random"], "unknown env 'hoper': D4RL's bodies are hopper"),
        (["make", "hopper-medium-rePlay"], "Did you mean medium-replay or"),
        (["info", "nothing.hdf5"], "nothing.hdf5 is not a file"),
    ]:
        assert main([*arguments, "--dataset_dir", str(folder)]) == 1
        captured = capsys.readouterr()
        assert words in captured.err and captured.out == ""
    with pytest.raises(SystemExit):  # no abbreviations
        main(["make", "hopper-random", "--transition", "5", "--dataset_dir", str(folder)])


def test_make_all_makes_what_it_can_and_tells_the_rest(folder, policies, capsys, monkeypatch):
    """Nothing is rolled here: what matters is which names are tried, and what becomes of their troubles."""
    tried = []

    def make(env, kind, *arguments):
        tried.append(f"{env}-{kind}")
        if not local_levels(env, kind):
            raise LocalDataError(f"no behaviour policy for {env}-{kind}. Local data exist for: many.")

    monkeypatch.setattr("d4rl_utils.__main__.make_local", make)
    assert main(["make", "all", "--dataset_dir", str(folder)]) == 1
    said = capsys.readouterr()
    assert len(tried) == len(set(tried)) == 20 and "7 are in" in said.out and "13 could not be made" in said.out
    assert said.err.count("no behaviour policy for") == 13 and "many" not in said.err

    def full(env, kind, *arguments):
        tried.append(f"{env}-{kind}")
        raise OSError("the disk is full")

    tried.clear()
    monkeypatch.setattr("d4rl_utils.__main__.make_local", full)
    assert main(["make", "all", "--dataset_dir", str(folder)]) == 1  # the others would fail in the same way
    assert len(tried) == 1 and "the disk is full" in capsys.readouterr().err


def test_make_all_leaves_what_is_there(folder, policies, monkeypatch, capsys):
    monkeypatch.setattr("d4rl_utils.__main__.RECIPES", {"random": ("random",)})
    monkeypatch.setattr("d4rl_utils.__main__.ENVS", ("hopper", "ant"))
    arguments = ["make", "all", "--transitions", "60", "--workers", "1", "--dataset_dir", str(folder)]
    for _ in range(2):
        assert main(arguments) == 0
        assert "2 are in" in capsys.readouterr().out
    assert sorted(p.name for p in folder.glob("*")) == [
        ".cache",
        "ant-random-local-60.hdf5",
        "hopper-random-local-60.hdf5",
    ]
