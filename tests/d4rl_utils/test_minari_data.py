"""Minari's data sets, made here by minari itself."""

import subprocess
import sys

import gymnasium
import numpy as np
import pytest
from test_trainer import flags, only_run

import trainer
import utils
from common import logger
from config import BambaConfig
from d4rl_utils import make_eval_env, minari_data, open_data
from d4rl_utils.__main__ import main
from d4rl_utils.minari_data import open_minari, read_minari

minari = pytest.importorskip("minari")
NAME = "test/pendulum/random-v0"
# minari's advice to authors of data sets
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari")


@pytest.fixture(autouse=True)
def shelf(tmp_path, monkeypatch):
    """Where minari keeps its data; nothing is downloaded."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    monkeypatch.setattr(minari_data, "DOWNLOAD", "raise SystemExit('OfflineError: nobody is there')")
    return tmp_path / "minari"


def record(name=NAME, env="Pendulum-v1", episodes=3, **facts):
    """Random episodes of 30 steps, as Minari's DataCollector writes them."""
    collector = minari.DataCollector(gymnasium.make(env, max_episode_steps=30))
    collector.action_space.seed(0)
    for seed in range(episodes):
        collector.reset(seed=seed)
        over = False
        while not over:
            *_, dead, late, _ = collector.step(collector.action_space.sample())
            over = dead or late
    return collector.create_dataset(dataset_id=name, algorithm_name="random", **facts)


def test_rows_are_minaris():
    made = record()
    t, identity = read_minari(NAME)
    episodes = list(made.iterate_episodes())
    assert (identity.name, identity.source, identity.transitions) == (f"minari:{NAME}", "minari", 90)
    assert identity.return_mean == pytest.approx(np.mean([e.rewards.sum() for e in episodes]))
    assert np.flatnonzero(t.ends).tolist() == [29, 59, 89] and not t.terminals.any()
    assert t.episode_start.tolist() == [0] * 30 + [30] * 30 + [60] * 30
    for i, e in enumerate(episodes):
        rows = slice(30 * i, 30 * i + 30)
        np.testing.assert_array_equal(t.states[rows], e.observations[:-1])
        np.testing.assert_array_equal(t.next_states[rows], e.observations[1:])
        np.testing.assert_array_equal(t.actions[rows], e.actions)
        np.testing.assert_array_equal(t.rewards[rows], e.rewards.astype(np.float32))
    assert {a.dtype for a in (t.states, t.actions, t.rewards, t.next_states)} == {np.dtype(np.float32)}
    assert read_minari(NAME).identity.sha256 == identity.sha256  # reading changes nothing


def test_the_environment_and_the_scale_are_the_data_sets():
    record(ref_min_score=-1000.0, ref_max_score=-500.0)
    stage = make_eval_env(BambaConfig(dataset=f"minari:{NAME}"))
    assert (stage.name, stage.scale) == ("Pendulum-v1", "Minari's scale × 100")
    assert stage.score(-750.0) == pytest.approx(50.0)
    env = stage.make()
    assert env.spec.max_episode_steps == 30 and env.action_space.high.tolist() == [2.0]
    record("test/plain-v0")
    stage = make_eval_env(BambaConfig(dataset="minari:test/plain-v0"))
    assert (stage.score, stage.scale) == (None, "")


@pytest.mark.parametrize("scored", [True, False])
def test_a_run_and_its_evaluation(tmp_path, capsys, scored):
    record(**({"ref_min_score": -1000.0, "ref_max_score": -500.0} if scored else {}))
    out = tmp_path / "out"
    assert trainer.main(flags(f"minari:{NAME}", out, num_epochs=1, eval_freq=1)) == 0
    folder = only_run(out)
    assert folder.name.startswith("minari-test-pendulum-random-v0-bamba-s42-")
    rows = logger.read_log(folder / "log.jsonl")
    assert rows[0]["score_name"] == ("Minari score" if scored else "return")
    said = capsys.readouterr().out
    assert ("Minari score " if scored else "return      ") in said and "D4RL" not in said
    utils.main(["--checkpoint", str(folder), "--episodes", "2", "--device", "cpu", "--env", f"minari:{NAME}"])
    said = capsys.readouterr().out
    assert "eval    in Pendulum-v1" in said and "D4RL" not in said
    assert ("Minari score, on Minari's scale × 100" in said) == scored and ("score   none" in said) != scored


def test_info(tmp_path, capsys):
    record()
    assert main(["info", f"minari:{NAME}", "--plot", str(tmp_path / "out.png")]) == 0
    said = capsys.readouterr().out
    assert "Minari's data, not D4RL's file" in said and "episodes     3, 30 to 30" in said
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"


# -- what can go wrong ------------------------------------------------------------------------------------------------


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r'minari:a/b-v0 needs the package minari .*pip install "minari'):
        open_data(BambaConfig(dataset="minari:a/b-v0"))


@pytest.mark.parametrize("name", ["hopper", "", "a b-v0", "hopper-v0/"])
def test_malformed_names(name):
    with pytest.raises(ValueError, match="is no name of Minari's.*mujoco/hopper/medium-v0"):
        open_minari(name)


def test_what_is_not_here_and_cannot_be_had(shelf):
    record()
    with pytest.raises(ValueError) as error:
        open_minari("test/pendulum/randon-v0")
    words = str(error.value)
    for part in (str(shelf), "nobody is there", f"Did you mean {NAME}?", "minari download test/pendulum/randon-v0"):
        assert part in words, words
    assert not list(shelf.glob(".downloading*")) and not (shelf / "test/pendulum/randon-v0").exists()


def test_a_download_is_moved_in_when_it_is_whole(shelf, tmp_path, monkeypatch):
    """A stand-in for minari's own download writes into the folder that it is given, and may die half-way."""
    record()
    whole = tmp_path / "whole"
    (shelf / NAME).rename(whole)
    copy = "import os, shutil, sys; place = os.environ['MINARI_DATASETS_PATH'] + '/' + sys.argv[1]; "
    copy += f"shutil.copytree({str(whole)!r}, place)"
    monkeypatch.setattr(minari_data, "DOWNLOAD", copy + "; os.abort()")
    with pytest.raises(ValueError, match="could not be downloaded"):
        open_minari(NAME)
    assert not (shelf / NAME).exists()
    monkeypatch.setattr(minari_data, "DOWNLOAD", copy)
    assert open_minari(NAME).total_steps == 90


def test_a_damaged_one_is_said(shelf):
    record()
    (shelf / NAME / "data" / "metadata.json").unlink()
    (shelf / NAME / "data" / "main_data.hdf5").write_bytes(b"half")
    with pytest.raises(ValueError, match="is damaged .*Remove it and try again"):
        open_minari(NAME)


def test_missing_rows_and_nan_are_refused(monkeypatch):
    made = record()
    episodes = list(made.iterate_episodes())
    monkeypatch.setattr(type(made), "iterate_episodes", lambda self: iter(episodes[:2]))
    with pytest.raises(ValueError, match="promises 90 steps and holds 60"):
        read_minari(NAME)
    episodes[1].rewards[4] = np.nan
    monkeypatch.setattr(type(made), "iterate_episodes", lambda self: iter(episodes))
    with pytest.raises(ValueError, match="rewards hold NaN or infinity, first in row 34, in 1 rows"):
        read_minari(NAME)


@pytest.mark.parametrize(
    "env, words", [("CartPole-v1", r"actions from Discrete\(2\)"), ("Blackjack-v1", "observations")]
)
def test_other_spaces_are_refused(env, words):
    record("test/other-v0", env)
    with pytest.raises(ValueError, match=rf"minari:test/other-v0 has {words}.*flat vectors"):
        open_data(BambaConfig(dataset="minari:test/other-v0"))


@pytest.mark.slow
def test_importing_does_not_need_minari():
    code = "import sys; sys.modules['minari'] = None; import d4rl_utils, d4rl_utils.__main__, agent"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=trainer.Path(trainer.__file__).parent)
