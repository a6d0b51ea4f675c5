"""Seeds, checkpoints, logs, curves; and evaluation that counts every episode once and sees every step."""

import io
import json
import platform
import subprocess
import sys
import zipfile
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import ROOT, Clock
from PIL import Image
from test_agent import batch_of

import utils
from agent import Bamba
from common import device as devices
from common import evaluation, logger, plotting
from common.checkpoint import FORMAT, write
from common.interface import EnvSpec, EvalEnv

SPEC = EnvSpec(state=3, action=2, low=(-1.0, -1.0), high=(1.0, 1.0))
DATA = {"name": "walk", "source": "custom", "sha256": "0" * 64, "transitions": 10}


class Watcher(Bamba):
    """Remembers every window that it was asked to act on."""

    seen: ClassVar[list] = []

    def policy(self, z, actor=None):
        return super().policy(z, actor)

    def act(self, state, reward, memory, explore=False):
        action, memory = super().act(state, reward, memory, explore)
        Watcher.seen.append((state.clone(), reward.clone(), self.training))
        return action, memory


# -- evaluation ----------------------------------------------------------------------------------


def test_every_step_of_the_clock_is_seen_and_counted(tiny):
    Watcher.seen = []
    agent = Watcher(tiny(drop_p=0.5), SPEC).train()
    result = utils.evaluate(agent, lambda mode: Clock(7), episodes=2, seed=100)
    assert result.returns.tolist() == [7.0, 7.0] and result.lengths.tolist() == [7, 7]
    assert [s[0, 0].item() for s, _, _ in Watcher.seen] == [0, 1, 2, 3, 4, 5, 6]  # the present, from the first state on
    assert [r[0].item() for _, r, _ in Watcher.seen] == [0, 1, 1, 1, 1, 1, 1]  # the reward of the step before
    assert not any(training for _, _, training in Watcher.seen)  # dropout off ...
    assert agent.training  # ... and on again


def test_short_episodes_are_not_counted_twice(tiny):
    result = utils.evaluate(Bamba(tiny(), SPEC), lambda mode: Clock(0), episodes=6, seed=100)
    assert result.lengths.tolist() == [3, 4, 5, 6, 7, 8] and result.returns.tolist() == [3, 4, 5, 6, 7, 8]


def test_evaluation_touches_no_random_stream_and_no_weight(tiny):
    agent = Bamba(tiny(), SPEC).train()
    stream, weights = torch.get_rng_state(), {k: v.clone() for k, v in agent.state_dict().items()}
    utils.evaluate(agent, lambda mode: Clock(3), episodes=2, seed=0)
    assert torch.equal(stream, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in agent.state_dict().items())


def test_together_or_alone_the_episodes_are_the_same(tiny):
    """On the real hopper, whose contacts amplify every difference: 6 episodes at once against one by one."""
    import d4rl_utils

    spec = EnvSpec(11, 3, (-1.0,) * 3, (1.0,) * 3)
    agent = Bamba(tiny(), spec)
    make = lambda mode: d4rl_utils.make_env("hopper")  # noqa: E731
    together = utils.evaluate(agent, make, episodes=6, seed=5)
    alone = [utils.evaluate(agent, make, episodes=1, seed=5 + i) for i in range(6)]
    assert together.returns.tolist() == [a.returns[0] for a in alone]
    assert len(set(together.returns)) == 6


def test_no_episode_is_an_error(tiny):
    with pytest.raises(ValueError, match="take 1 or more"):
        utils.evaluate(Bamba(tiny(), SPEC), lambda mode: Clock(), episodes=0, seed=0)


def test_summary_is_linear_and_not_clipped():
    row = utils.summary(utils.Episodes(np.array([0.0, 400.0]), np.array([10, 20]), {}, None, {}), lambda r: r / 2 - 50)
    assert row["eval/score"] == 50 and row["eval/score_std"] == 100 and row["eval/return_max"] == 400
    assert row["eval/length_mean"] == 15


def test_without_a_reference_returns_are_all_there_is():
    row = utils.summary(utils.Episodes(np.array([0.0, 400.0]), np.array([10, 20]), {}, None, {}), None)
    assert "eval/score" not in row and utils.headline(row) == row["eval/return_mean"] == 200
    assert utils.headline({**row, "eval/score": 7.0}) == 7.0


def test_only_d4rls_own_data_give_a_d4rl_score():
    stage = EvalEnv(None, SPEC, lambda r: r, 50, "hopper v4", "D4RL's scale")
    names = {source: utils.headline_name(stage, source) for source in ("d4rl", "local", "minari", "custom")}
    assert names["d4rl"] == "D4RL score" and names["local"] == "local score"
    assert not any("D4RL" in name for source, name in names.items() if source != "d4rl")
    assert utils.headline_name(stage._replace(score=None, scale=""), "custom") == "return"


# -- seeds and devices ---------------------------------------------------------------------------


def test_streams_are_stable_when_names_are_added():
    assert devices.spawn_seeds(0, "data", "init")["data"] == devices.spawn_seeds(0, "data", "init", "env")["data"]
    assert len(set(devices.spawn_seeds(0, "a", "b", "c").values())) == 3 and devices.spawn_seeds(
        0, "a"
    ) != devices.spawn_seeds(1, "a")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep memory")
def test_held_memory_lies_in_the_heap_and_stays_there():
    """By default glibc maps a block of 20 MB apart from the heap, and unmaps it when it is freed."""
    code = """
import re, sys, torch
from common import device as devices
if sys.argv[1] == "held": devices.keep_freed_memory()
def heap():
    found = re.search(r"^(\\w+)-(\\w+) .*\\[heap\\]$", open("/proc/self/maps").read(), re.M)
    return range(int(found[1], 16), int(found[2], 16))
block = torch.ones(5_000_000)
inside, before = block.data_ptr() in heap(), len(heap())
del block
print(inside, inside and len(heap()) == before)
"""
    run = lambda how: subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True)  # noqa: E731
    assert run("held").stdout.split() == ["True", "True"] and run("as usual").stdout.split() == ["False", "False"]


def test_a_missing_device_is_refused_with_what_is_there():
    with pytest.raises(ValueError, match="on this machine: auto, cpu"):
        devices.pick_device("tpu")


# -- checkpoints ---------------------------------------------------------------------------------


@pytest.fixture
def saved(tiny, tmp_path):
    spec = EnvSpec(state=4, action=2, low=(-1.0, -2.0), high=(1.0, 0.0))
    agent = Bamba(tiny(target_encoder="ema"), spec).train()
    for seed in range(3):
        agent.update(batch_of(seed=seed))
    path = tmp_path / "last_checkpoint.pt"
    utils.save(path, agent, {"data": DATA})
    return agent, path


def test_the_next_update_of_a_woken_agent_is_identical(saved):
    agent, path = saved
    twin, part = utils.load(path)
    twin.train()
    assert (
        twin.updates == part["updates"] == 3
        and replace(twin.cfg, device="auto") == agent.cfg
        and twin.spec == agent.spec
    )
    for seed in range(3, 6):
        states = []
        for each in (agent, twin):
            torch.manual_seed(seed)
            states.append(each.update(batch_of(seed=seed)))
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in agent.state_dict().items())


def test_a_killed_writer_leaves_the_old_checkpoint(saved, monkeypatch):
    agent, path = saved
    before = path.read_bytes()

    def dies(part, file):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", dies)
    with pytest.raises(OSError, match="No space"):
        utils.save(path, agent, {"data": DATA})
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


EMPTY = {"format": FORMAT, "system": "bamba", "config": {}, "agent": {}, "run": {}}


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("hello.txt", "no checkpoint")


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda p: p.unlink(), "no checkpoint at"),
        (lambda p: p.write_bytes(p.read_bytes()[:2000]), "not a whole checkpoint"),
        (lambda p: p.write_bytes(b""), "not a whole checkpoint"),
        (lambda p: p.write_text("hello"), "not a whole checkpoint"),
        (foreign_zip, "not a whole checkpoint"),
        (lambda p: torch.save({"state_dict": {}}, p), "not written by this project"),
        (lambda p: torch.save([1, 2], p), "not written by this project"),
        (lambda p: torch.save(EMPTY | {"format": 0}, p), "of format 0"),
        (lambda p: write(p, EMPTY | {"system": "sac"}), "holds a 'sac'"),
        (lambda p: torch.save(io.BytesIO, p), "not a whole checkpoint"),  # code, not data: weights_only refuses it
    ],
)
def test_spoiled_checkpoints_are_refused_in_a_sentence(saved, spoil, words, capsys):
    _, path = saved
    spoil(path)
    with pytest.raises(ValueError, match=words):
        utils.read_checkpoint(path)
    with pytest.raises(SystemExit) as stop:
        utils.main(["--checkpoint", str(path)])
    assert stop.value.code == 2 and words in capsys.readouterr().err


def test_settings_of_another_version_are_named(saved):
    _, path = saved
    part = utils.read_checkpoint(path)
    part["config"]["mystery"] = 1
    write(path, part)
    with pytest.raises(ValueError, match="does not know: mystery"):
        utils.load(path)


def test_settings_younger_than_a_checkpoint_take_their_defaults_and_are_named(saved, caplog):
    agent, path = saved
    part = utils.read_checkpoint(path)
    del part["config"]["alpha"], part["config"]["tau"]
    write(path, part)
    with caplog.at_level("INFO"):
        twin, _ = utils.load(path)
    assert twin.cfg.alpha == 2.5 and twin.cfg.tau == 0.005 and twin.cfg.d_model == agent.cfg.d_model
    assert "alpha, tau" in caplog.text


@pytest.mark.parametrize("name", ["hopper", "hopper-medium", "hopper-medium-v2", "hopper-medium-local", ""])
def test_own_names_of_the_environment_are_accepted(tiny, name):
    for own in ("hopper-medium-v2", "hopper-medium-local"):
        utils.check_env(name, tiny(), {"name": own, "source": "local" if own.endswith("local") else "d4rl"})


def test_names_of_other_data(tiny):
    minari = {"name": "minari:mujoco/hopper/medium-v0", "source": "minari"}
    utils.check_env(minari["name"], tiny(), minari)
    utils.check_env("Pendulum-v1", tiny(env="Pendulum-v1"), DATA)
    for name, data in [("hopper", minari), ("hopper-medium-v2", DATA)]:
        with pytest.raises(ValueError, match="trained on (minari:|walk)"):
            utils.check_env(name, tiny(), data)


@pytest.mark.parametrize("name", ["walker2d", "hopper-expert-v2", "hopper-medium-v3", "hopper-medium-replay-v2"])
def test_another_environment_is_an_error(tiny, name):
    with pytest.raises(ValueError, match="trained on hopper-medium-v2, not on"):
        utils.check_env(name, tiny(), {"name": "hopper-medium-v2", "source": "d4rl"})


# -- logs and pictures ---------------------------------------------------------------------------


def test_log_rows_may_differ_and_a_resume_drops_what_will_come_again(tmp_path):
    log = logger.Logger(tmp_path)
    log(0, {"config": {"env": "hopper"}, "behavior_score": 40.0})
    for update in (10, 20, 30):
        log(update, {"loss/critic": update / 10})
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"update": 40, "los')  # a kill in the middle of a line
    log = logger.Logger(tmp_path, after=20)
    log(30, {"eval/score": 1.0})
    rows = logger.read_log(tmp_path / "log.jsonl")
    assert [r["update"] for r in rows] == [0, 10, 20, 30] and "loss/critic" not in rows[-1]
    assert rows[0]["config"] == {"env": "hopper"}


def test_a_broken_line_inside_a_log_is_not_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"update": 1, "seconds": 0}\nbroken\n{"update": 2, "seconds": 1}\n')
    with pytest.raises(json.JSONDecodeError):
        logger.read_log(tmp_path / "log.jsonl")


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = logger.Logger(tmp_path, tensorboard=True)
    log(5, {"loss/critic": 2.0, "text": "no number"})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss/critic")] == [(5, 2.0)]


def test_curves_are_drawn_with_and_without_evaluations(tmp_path):
    log = logger.Logger(tmp_path)
    log(0, {"behavior_score": 40.0, "levels": {"critic/q": 1.5}})
    log(10, {"loss/critic": 1.0, "critic/q": 2.0, "actor/bc_loss": 0.5})
    picture = tmp_path / "curves.png"
    plotting.draw_curves(logger.read_log(tmp_path / "log.jsonl"), "no score yet", Bamba.panels, picture)
    first = picture.stat().st_size
    assert first > 10_000
    log(10, {"eval/score": 30.0, "eval/score_std": 3.0})
    log(20, {"loss/critic": 0.5, "eval/score": 35.0, "eval/score_std": 2.0})
    plotting.draw_curves(logger.read_log(tmp_path / "log.jsonl"), "two scores", Bamba.panels, picture)
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and picture.stat().st_size > first > 10_000


def test_publishing_that_is_killed_leaves_no_folder_that_could_pass_for_a_run(tmp_path):
    code = "import os, pathlib, sys; from common import logger; os.replace = lambda *_: os._exit(9)\n"
    code += "logger.link_latest(*map(pathlib.Path, sys.argv[1:]))"
    paths = [str(tmp_path / name) for name in ("last_checkpoint.pt", "best_checkpoint.pt")]
    assert subprocess.run([sys.executable, "-c", code, *paths], cwd=ROOT).returncode == 9
    (left,) = tmp_path.iterdir()
    assert not left.is_dir()


def test_publishing_points_to_the_latest_run(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "best_checkpoint.pt").write_text(name)
        logger.link_latest(tmp_path / name / "best_checkpoint.pt", tmp_path / "best_checkpoint.pt")
        assert (tmp_path / "best_checkpoint.pt").read_text() == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "best_checkpoint.pt"]


def test_a_video_is_an_mp4_or_a_gif(tmp_path):
    frames = [np.full((64, 48, 3), 4 * i, np.uint8) for i in range(20)]
    plotting.write_video(tmp_path / "out.mp4", frames, fps=20)
    assert (tmp_path / "out.mp4").read_bytes()[4:8] == b"ftyp" and len(list(tmp_path.iterdir())) == 1
    plotting.write_video(tmp_path / "out.gif", frames, 20, ".gif")
    with Image.open(tmp_path / "out.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (20, (240, 320), 50)


def test_a_video_has_a_picture_every_so_many_steps(tiny):
    class Shown(Clock):
        def render(self):
            return self.t

    frames = []
    utils.evaluate(Bamba(tiny(), SPEC), lambda mode: Shown(10), 2, 0, frames, every=4)
    assert frames == [0, 4, 8]


def test_a_missing_renderer_is_said(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(ValueError, match="libegl1"):
        plotting.set_mujoco_gl()


# -- when memory is full -----------------------------------------------------------------------------


def test_a_full_memory_is_a_sentence_and_any_other_fault_is_not(capsys):
    told = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
    for fault in (MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), told):
        with pytest.raises(SystemExit) as end, utils.errors_as_sentences():
            raise fault
        assert end.value.code == 2 and "the memory is full" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="a bug"), utils.errors_as_sentences():
        raise RuntimeError("a bug")


def test_many_episodes_are_played_in_parts_and_are_the_same(monkeypatch, tiny):
    gymnasium = pytest.importorskip("gymnasium")
    agent, made = Bamba(tiny(), EnvSpec(3, 1, (-2.0,), (2.0,))), []

    def make(render_mode=None):
        env = gymnasium.make("Pendulum-v1", max_episode_steps=20)
        made.append(env)
        return env

    whole = evaluation.evaluate(agent, make, 7, seed=5)
    monkeypatch.setattr(evaluation, "SIDE_BY_SIDE", 3)
    parts = evaluation.evaluate(agent, make, 7, seed=5)
    np.testing.assert_allclose(whole.returns, parts.returns, rtol=1e-12)
    assert len(made) == 14 and whole.lengths.tolist() == parts.lengths.tolist() == [20] * 7
