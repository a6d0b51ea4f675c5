"""Whole runs on small data: what they leave behind, how they stop, and that a resumed run is the run that never
stopped."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import fields

import pytest
import torch
from conftest import ROOT, TINY, as_flags
from torch.utils import _pytree as pytree

import trainer
import utils
from agent import Bamba
from common import device as devices
from common import logger
from common import run as runs
from config import CONFIGS, PRESETS, BambaConfig, argv_value, parse
from decision_transformer import DecisionAgent

TINY_FLAGS = as_flags({**TINY, "n_layers": 1, "threads": 1, "device": "cpu"})


def flags(hopper_file, out, **more) -> list[str]:
    given = {"dataset": hopper_file, "output_dir": out, "updates_per_epoch": 5, "num_epochs": 4, "eval_freq": 2}
    given |= {"save_freq": 1, "num_eval_episodes": 2} | more
    return [*TINY_FLAGS, "--no_tensorboard", *(f"--{k}={v}" if v != "" else f"--{k}" for k, v in given.items())]


def only_run(out):
    (folder,) = [p for p in out.iterdir() if p.is_dir()]
    return folder


def timeless(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "updates_per_s")} for r in rows]


# -- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(hopper_file, tmp_path, capsys):
    assert trainer.main(flags(hopper_file, tmp_path)) == 0
    folder = only_run(tmp_path)
    names = {"config.json", "log.jsonl", "training_curves.png", "best_checkpoint.pt"}
    names |= {"last_checkpoint.pt", "last_checkpoint.prev.pt"}
    assert {p.name for p in folder.iterdir()} == names and folder.name.startswith("walk-bamba-s42-")
    rows = logger.read_log(folder / "log.jsonl")
    assert rows[0]["config"]["batch_size"] == 8 and rows[0]["data"]["name"] == "walk" and rows[0]["data"]["sha256"]
    assert rows[0]["machine"]["cores"] == 1 and rows[0]["machine"]["cpu"] and rows[0]["commit"]
    assert [r["update"] for r in rows if "loss/critic" in r] == [5, 10, 15, 20]
    assert [r["update"] for r in rows if "eval/score" in r] == [10, 20]
    assert (tmp_path / "best_checkpoint.pt").samefile(folder / "best_checkpoint.pt")
    part = utils.read_checkpoint(folder)
    assert part["updates"] == 20 and part["run"]["data"]["transitions"] == 400
    said = capsys.readouterr().out
    last = [r["eval/score"] for r in rows if "eval/score" in r][-1]
    assert (
        f"{last:.1f}  last, update 20" in said
        and "best of 2 evaluations (optimistic), update" in said
        and "walk" in said
    )


def test_without_git_or_a_checkout_the_commit_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "__file__", str(tmp_path / "common" / "device.py"))
    (tmp_path / "common").mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert devices.commit() == "none"
    monkeypatch.setenv("PATH", "")
    assert devices.commit() == "none"


def test_a_run_without_evaluation_still_leaves_a_checkpoint(hopper_file, tmp_path):
    assert trainer.main(flags(hopper_file, tmp_path, eval_freq=0, save_freq=0, num_epochs=1)) == 0
    folder = only_run(tmp_path)
    assert {p.name for p in folder.iterdir()} == {"config.json", "log.jsonl", "last_checkpoint.pt"}
    assert (tmp_path / "best_checkpoint.pt").samefile(folder / "last_checkpoint.pt")


def test_utils_prints_the_same_numbers_twice(hopper_file, tmp_path, capsys):
    trainer.main(flags(hopper_file, tmp_path / "out", num_epochs=1, eval_freq=1))
    checkpoint, out = tmp_path / "out" / "best_checkpoint.pt", tmp_path / "score.json"
    capsys.readouterr()
    said = []
    for env in ("hopper", ""):
        utils.main(
            ["--checkpoint", str(checkpoint), "--episodes", "3", "--json", str(out), "--device", "cpu", "--env", env]
        )
        said.append(
            [line for line in capsys.readouterr().out.splitlines() if line.startswith(("return", "length", "score"))]
        )
    assert said[0] == said[1] and len(said[0]) == 3
    record = json.loads(out.read_text())
    assert len(record["returns"]) == len(record["lengths"]) == 3 and record["data"]["name"] == "walk"
    assert record["versions"]["mujoco"] and "custom score, on D4RL's scale" in said[0][2]
    with pytest.raises(SystemExit):
        utils.main(["--checkpoint", str(checkpoint), "--env", "ant-medium-v2"])
    assert "trained on walk, not on ant-medium-v2" in capsys.readouterr().err


# -- resume --------------------------------------------------------------------------------------


def start(argv: list[str]) -> subprocess.Popen:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "trainer.py", *argv],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_update(out, update: int, child: subprocess.Popen) -> None:
    """Until a run in `out` has logged `update` or more and left a checkpoint."""
    limit = time.time() + 120
    while time.time() < limit:
        folders = [p for p in out.iterdir() if p.is_dir()] if out.exists() else []
        rows = (
            logger.read_log(folders[0] / "log.jsonl")
            if folders and (folders[0] / "last_checkpoint.pt").exists()
            else []
        )
        if rows and rows[-1]["update"] >= update:
            return
        assert child.poll() is None, child.stdout.read()
        time.sleep(0.01)
    raise AssertionError(f"no update {update} within two minutes")


@pytest.mark.slow
def test_killed_and_told_to_stop_a_run_ends_as_if_nothing_had_happened(hopper_file, tmp_path):
    """SIGTERM in mid-epoch, SIGKILL at a random moment after that: weights, log and scores are the same to the bit."""
    more = {"updates_per_epoch": 20, "num_epochs": 16, "eval_freq": 8}
    calm = tmp_path / "calm"
    quiet = start(flags(hopper_file, calm, **more))
    assert quiet.wait(timeout=180) == 0, quiet.stdout.read()

    rough = tmp_path / "rough"
    child = start(flags(hopper_file, rough, **more))
    wait_for_update(rough, 40, child)
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 128 + signal.SIGTERM and "saved" in said and "--resume" in said
    folder = only_run(rough)
    stopped = utils.read_checkpoint(folder)["updates"]
    assert f"stopped after update {stopped}" in said

    child = start(["--resume", str(folder)])
    wait_for_update(rough, stopped + 60, child)
    time.sleep(random.random() / 8)
    child.kill()
    child.wait()
    reached = utils.read_checkpoint(folder)["updates"]
    assert stopped < reached < 320

    child = start(["--resume", str(folder / "last_checkpoint.pt")])
    assert child.wait(timeout=180) == 0, child.stdout.read()
    parts = [utils.read_checkpoint(f) for f in (only_run(calm), folder)]
    assert parts[0]["updates"] == parts[1]["updates"] == 320
    for key in ("agent", "optimizer", "run"):  # weights, Adam's moments; random streams, half-filled means, scores
        calmly, roughly = (pytree.tree_leaves(part[key]) for part in parts)
        assert len(calmly) == len(roughly) > 2
        for one, other in zip(calmly, roughly):
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    logs = [timeless(logger.read_log(f / "log.jsonl")) for f in (only_run(calm), folder)]
    assert logs[0][1:] == logs[1][1:]


SEQUENCE = dict(d_model=16, n_layers=1, context_length=3, batch_size=8, warmup_steps=2, threads=1, device="cpu")


@pytest.mark.parametrize("agent", ["dt", "dmamba", "dm"])
def test_every_agent_trains_stops_resumes_and_is_evaluated(agent, hopper_file, tmp_path, monkeypatch, capsys):
    """E10 through the front door: told to stop in mid-epoch, a run ends with the bits of one that was not."""
    given = {"agent": agent, **SEQUENCE, "dataset": hopper_file, "num_epochs": 3, "updates_per_epoch": 5}
    given |= {"eval_freq": 3, "num_eval_episodes": 2, "refresh_every": 4}
    argv = ["--no_tensorboard", *(f"--{k}={v}" for k, v in given.items())]
    assert trainer.main([*argv, "--output_dir", str(tmp_path / "calm")]) == 0

    update = DecisionAgent.update

    def told(self, batch):
        if self.updates == 6:
            signal.raise_signal(signal.SIGTERM)
        return update(self, batch)

    monkeypatch.setattr(DecisionAgent, "update", told)
    assert trainer.main([*argv, "--output_dir", str(tmp_path / "rough")]) == 128 + signal.SIGTERM
    monkeypatch.setattr(DecisionAgent, "update", update)
    folder = only_run(tmp_path / "rough")
    assert trainer.main(["--resume", str(folder)]) == 0
    parts = [utils.read_checkpoint(f) for f in (only_run(tmp_path / "calm"), folder)]
    for key in ("agent", "optimizer", "run"):
        for one, other in zip(*(pytree.tree_leaves(part[key]) for part in parts), strict=True):
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other

    capsys.readouterr()
    picture, record = tmp_path / "sweep.png", tmp_path / "score.json"
    argv = ["--checkpoint", str(folder), "--episodes", "2", "--device", "cpu", "--picture", str(picture)]
    utils.main([*argv, "--json", str(record), "--target_return", "3000", "1000"])
    said = capsys.readouterr().out
    assert "asked   3000: return" in said and "asked   1000: return" in said and picture.stat().st_size > 5_000
    assert json.loads(record.read_text())["asked"].keys() == {"3000", "1000"}
    with pytest.raises(SystemExit):
        utils.main([*argv, "--target_return", "1", "--inference", "sideways"])
    assert "inference" in capsys.readouterr().err


def test_bamba_cannot_be_asked_for_a_return(hopper_file, tmp_path, capsys):
    trainer.main(flags(hopper_file, tmp_path, num_epochs=1, eval_freq=0))
    folder = str(only_run(tmp_path))
    for more, words in ((["--target_return", "9"], "cannot be asked"), (["--inference", "window"], "knows no inf")):
        with pytest.raises(SystemExit):
            utils.main(["--checkpoint", folder, "--device", "cpu", *more])
        assert words in capsys.readouterr().err


def test_the_thin_door_says_its_command(hopper_file, tmp_path):
    words = ["hopper", "medium", "0", "0.85", "--preset", "small", "--help"]
    door = subprocess.run(
        ["sh", str(ROOT / "run.sh"), *words],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert door.returncode == 0 and "--alpha_T" in door.stdout
    assert "trainer.py --agent dm --env hopper --dataset_type medium --alpha_T 0.85 --preset small" in door.stdout
    assert subprocess.run(["sh", str(ROOT / "run.sh"), "hopper"], capture_output=True).returncode == 2


def test_a_finished_run_can_be_made_longer_and_nothing_else(hopper_file, tmp_path, capsys):
    trainer.main(flags(hopper_file, tmp_path, num_epochs=1))
    folder = only_run(tmp_path)
    assert trainer.main(["--resume", str(folder), "--num_epochs", "2"]) == 0
    assert utils.read_checkpoint(folder)["updates"] == 10 and only_run(tmp_path) == folder
    with pytest.raises(SystemExit):
        trainer.main(["--resume", str(folder), "--gamma", "0.9"])
    said = capsys.readouterr().err
    assert "--gamma 0.9 would change what the run learns (it has 0.99)" in said and "--num_epochs" in said


def test_other_data_than_the_checkpoints_are_refused(hopper_file, tmp_path, capsys):
    import shutil

    import h5py

    own = tmp_path / "own.hdf5"
    shutil.copy(hopper_file, own)
    trainer.main(flags(own, tmp_path / "out", num_epochs=1))
    with h5py.File(own, "r+") as f:
        f["rewards"][7] = 99.0
    with pytest.raises(SystemExit):
        trainer.main(["--resume", str(only_run(tmp_path / "out"))])
    assert "this run learned from own" in capsys.readouterr().err


def test_runs_begun_in_the_same_second_do_not_share_a_folder(hopper_file, tmp_path, monkeypatch):
    class Stopped(runs.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(runs, "datetime", Stopped)
    for _ in range(2):
        assert trainer.main(flags(hopper_file, tmp_path, num_epochs=1, eval_freq=0)) == 0
    names = sorted(p.name for p in tmp_path.iterdir() if p.is_dir())
    assert names == ["walk-bamba-s42-20260102-030405", "walk-bamba-s42-20260102-030405-2"]


# -- bad luck and bad input ----------------------------------------------------------------------


def test_nan_stops_the_run_with_its_update_and_the_last_good_checkpoint(hopper_file, tmp_path, monkeypatch, capsys):
    update = Bamba.update

    def poisoned(self, batch):
        return update(self, batch._replace(reward=batch.reward * (float("nan") if self.updates == 12 else 1)))

    monkeypatch.setattr(Bamba, "update", poisoned)
    assert trainer.main(flags(hopper_file, tmp_path)) == 1
    said = capsys.readouterr().err
    assert "update 13: loss/critic" in said and "last good checkpoint" in said
    part = utils.read_checkpoint(only_run(tmp_path))
    assert part["updates"] == 10 and all(
        torch.isfinite(v).all() for v in part["agent"].values() if v.is_floating_point()
    )


@pytest.mark.parametrize(
    "more, words",
    [
        ({"d_model": 15}, "15"),
        ({"headdim": 5}, "headdim"),
        ({"context_length": 0}, "take at least 1"),
        ({"env": "humanoid"}, "unknown env"),
        ({"device": "tpu"}, "not there"),
        ({"batch_size": 0}, "batch_size"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"policy_freq": 0}, "policy_freq"),
        ({"dataset": "missing.hdf5"}, "missing.hdf5 is not a file"),
        ({"dataset": "."}, "--dataset . is a folder: name a file"),
        ({"dataset_dir": "trainer.py"}, "--dataset_dir trainer.py is a file: name a folder"),
        ({"output_dir": "trainer.py"}, "--output_dir trainer.py is a file: name a folder"),
        ({"output_dir": "trainer.py/runs"}, "trainer.py is a file"),
        ({"dataset": "hopper-medum"}, "Did you mean hopper-medium-v2"),
        ({"env": "Pendulam-v1"}, "Did you mean Pendulum-v1"),
        ({"env": "Pendulum-v1"}, "11 state and 3 action dims, Pendulum-v1 has 3 and 1: --env must name"),
        ({"env": "CartPole-v1"}, "CartPole-v1 wants actions from Discrete(2)"),
        ({"env": "Hopper-v2"}, "Hopper-v2 cannot be made"),
        ({"env": "nobody:Hopper-v4"}, "nobody:Hopper-v4 cannot be made: No module named"),
        ({"env": "walker2d"}, "11 state and 3 action dims, walker2d has 17 and 6"),
        ({"wandb": ""}, "pip install wandb"),
        ({"resume": "missing_folder"}, "no checkpoint at"),
    ],
)
def test_bad_settings_end_in_a_sentence_before_work_starts(hopper_file, tmp_path, capsys, more, words):
    with pytest.raises(SystemExit) as stop:
        trainer.main(flags(hopper_file, tmp_path, **more))
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not tmp_path.exists() or not list(tmp_path.iterdir())  # no empty run folder is left


# -- the command line ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [["--learning_rte", "1"], ["--preset", "huge"], ["--agent", "sac"], ["--compile", "yes"], ["--gamma", "high"]],
)
def test_unknown_flags_and_values_are_errors(argv):
    with pytest.raises(SystemExit) as stop:
        parse(argv)
    assert stop.value.code == 2


def test_flags_win_over_presets_and_presets_over_defaults():
    cfg = parse(["--preset", "quick", "--d_model=32", "--no-tensorboard", "--dataset-type", "medium-expert"])
    assert (cfg.d_model, cfg.tensorboard, cfg.dataset_type) == (32, False, "medium-expert")
    assert cfg.num_epochs == PRESETS["bamba"]["quick"]["num_epochs"] != BambaConfig().num_epochs and cfg.gamma == 0.99
    assert argv_value("--preset", ["--preset", "a", "--preset=b"]) == "b"


def test_a_long_run_says_how_long_it_takes_and_what_ends_sooner(monkeypatch):
    argv = ["--dataset", "mine.hdf5", "--env", "hopper", "--seed", "1"]
    speeds = {"none": 0.5, "small": 0.02, "quick": 0.01, "base": 1.0, "upstream": 2.0}
    monkeypatch.setattr(trainer.estimate, "seconds_per_update", lambda cfg: speeds[cfg.preset])
    said = trainer.estimate.sentence(parse(argv), trainer.presets_of(argv))
    assert "about 139 h on this CPU (2.0 updates/s)" in said
    assert "--preset small about 33 min" in said and "--preset quick about 2 min" in said
    assert "--preset base" not in said  # which takes longer
    assert "preset" not in trainer.estimate.sentence(parse(["--preset", "small", *argv]), trainer.presets_of(argv))
    assert trainer.estimate.largest_that_fits(trainer.presets_of(argv), 1.0) == "small"
    assert trainer.estimate.largest_that_fits(trainer.presets_of(argv), 200.0) == "none"
    with pytest.raises(ValueError, match="no preset ends within --hours 0.001"):
        trainer.estimate.largest_that_fits(trainer.presets_of(argv), 0.001)


def test_the_preset_auto_becomes_one_that_fits(monkeypatch, capsys):
    monkeypatch.setattr(trainer.estimate, "seconds_per_update", lambda cfg: 0.01)
    monkeypatch.setattr(trainer.estimate, "can_be_measured", lambda cfg: True)
    cfg, _ = trainer.load_config(["--preset=auto", "--env", "hopper", "--hours", "0.5"])
    assert cfg.preset == "small" and "preset      small" in capsys.readouterr().out
    with pytest.raises(ValueError, match="offline agents on a CPU"):
        trainer.load_config(["--agent", "dqn", "--preset", "auto"])


def test_an_estimate_is_measured_and_changes_nothing(hopper_file):
    cfg = BambaConfig(**{**vars(parse(flags(hopper_file, "out")))})
    stream = torch.get_rng_state()
    assert 0 < trainer.estimate.seconds_per_update(cfg) < 1
    assert torch.equal(stream, torch.get_rng_state())


def test_presets_name_real_settings():
    assert PRESETS.keys() == CONFIGS.keys()
    for agent, config in CONFIGS.items():
        names = {f.name for f in fields(config)}
        assert all(set(p) <= names for p in PRESETS[agent].values())
        assert {"quick", "small"} <= PRESETS[agent].keys()
    with pytest.raises(ValueError, match="dqn has no preset 'base'; it has quick, small"):
        parse(["--agent", "dqn", "--preset", "base"])


@pytest.mark.parametrize("agent", CONFIGS)
def test_an_agent_starts_from_its_own_defaults_and_presets(agent):
    cfg = parse(["--agent", agent])
    assert cfg == CONFIGS[agent]() and cfg.agent == agent
    small = parse(["--agent", agent, "--preset", "small", "--seed", "3"])
    assert all(getattr(small, k) == v for k, v in PRESETS[agent]["small"].items()) and small.seed == 3


def test_help_shows_every_flag_in_its_section(capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    said = capsys.readouterr().out
    assert all(f"--{f.name}" in said for f in fields(BambaConfig))
    assert all(
        f" {section} options " in said
        for section in ("main", "run", "data", "training", "eval", "compute", "encoder", "objective")
    )


SPEC_DEFAULTS = {
    **dict(
        env="hopper",
        dataset_type="medium",
        batch_size=256,
        gamma=0.99,
        tau=0.005,
        alpha=2.5,
    ),
    **dict(
        action_noise=0.2,
        action_noise_clip=0.5,
        hidden_dim=256,
        beta_s=1.0,
        beta_r=1.0,
        d_conv=4,
        expand=2,
    ),
    **dict(
        warmup_steps=1000,
        policy_freq=2,
        num_epochs=1000,
        eval_freq=10,
        save_freq=50,
        seed=42,
        device="auto",
    ),
    **dict(output_dir="./outputs", dataset_dir="./datasets", updates_per_epoch=1000, num_eval_episodes=10),
}


def test_users_defaults_are_kept():
    cfg = BambaConfig()
    assert {k: getattr(cfg, k) for k in SPEC_DEFAULTS} == SPEC_DEFAULTS
