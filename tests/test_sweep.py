"""Sweeps: what a study means, what is refused before anything runs, and that it is finished whatever stops it."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT, TINY, as_flags

import sweep
import utils
from common import logger
from config import parse

FAKE = """
import json, os, signal, sys, time
from pathlib import Path

flags = dict(w.removeprefix("--").partition("=")[::2] for w in sys.argv[1:] if "=" in w)
if "--resume" in sys.argv:
    folder = Path(sys.argv[sys.argv.index("--resume") + 1])
    flags = json.loads((folder / "config.json").read_text())
else:
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1]) / f"run-{time.time_ns()}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(flags))
stopped = []
signal.signal(signal.SIGTERM, lambda *a: stopped.append(1))
(folder.parent / "gpu").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
with open(folder.parent / "calls", "a") as calls:
    calls.write("resume\\n" if "--resume" in sys.argv else "begin\\n")
if flags["seed"] == "13":
    print("error: thirteen is not finite")
    sys.exit(2)
log = folder / "log.jsonl"
done = len(log.read_text().splitlines()) if log.exists() else 0
for update in range(done + 1, 11):
    with open(log, "a") as file:
        file.write(json.dumps({"update": update, "seconds": update, "eval/return_mean": 10.0 * update}) + "\\n")
    (folder / "last_checkpoint.pt").write_text(str(update))
    time.sleep(float(flags.get("pause", 0)) or 0.01)
    if stopped:
        sys.exit(143)
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A trainer of ten steps that knows how to stop and go on, and fails with seed 13."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(sweep, "TRAINER", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr(sweep, "prepare", lambda runs: None)
    monkeypatch.setattr(sweep, "LOOK", 0.05)
    return ["--output_dir", str(tmp_path / "out"), "--datasets", "hopper-medium", "--num_epochs=1"]


def file_of(tmp_path, text: str) -> str:
    path = tmp_path / "study.yaml"
    path.write_text(textwrap.dedent(text))
    return str(path)


# -- what is wanted --------------------------------------------------------------------------------


def test_a_study_is_every_combination(tmp_path):
    path = file_of(
        tmp_path,
        """
        agents: {bamba: {}, cloning: {agent: bamba, objective: bc, critic_pretrain: 0}, dt: {}}
        datasets: [hopper-medium, walker2d-medium]
        seeds: 0-1
        flags: {preset: small, tensorboard: false}
        grid: {learning_rate: [0.001, 0.0003]}
        overrides: [{datasets: [hopper-medium], agents: [bamba], flags: {beta_actor: 0.5}}]
        """,
    )
    runs = sweep.expand(sweep.read_study(path))
    assert len(runs) == 3 * 2 * 2 * 2 and len({run.name for run in runs}) == len(runs)
    by_name = {run.name: parse(run.argv) for run in runs}
    one, other = (by_name[f"bamba-{env}-medium-learning_rate=0.001-s1"] for env in ("hopper", "walker2d"))
    assert (one.beta_actor, other.beta_actor, one.seed, one.preset, one.tensorboard) == (0.5, None, 1, "small", False)
    assert other.dataset == "walker2d-medium"
    cloning = by_name["cloning-hopper-medium-learning_rate=0.0003-s0"]
    assert (cloning.agent, cloning.objective, cloning.learning_rate) == ("bamba", "bc", 3e-4)
    assert next(run.total for run in runs if run.name.startswith("bamba")) == 100_000
    assert {run.label for run in runs} == {
        f"{a} learning_rate={rate}" for a in ("bamba", "cloning", "dt") for rate in (0.001, 0.0003)
    }


def test_the_command_line_goes_before_the_file(tmp_path):
    path = file_of(
        tmp_path, "{agents: [dt], datasets: [hopper-medium], flags: {num_epochs: 3}, grid: {d_model: [8, 16]}}"
    )
    args, flags = sweep.arguments([path, "--seeds", "5", "--num_epochs", "7", "--no_tensorboard", "--d_model=24"])
    study = sweep.study_of(args, flags)
    (run,) = sweep.expand(study)
    cfg = parse(run.argv)
    assert (cfg.seed, cfg.num_epochs, cfg.tensorboard, cfg.d_model) == (5, 7, False, 24)
    assert study["name"] == "study" and run.name == "dt-hopper-medium-s5"


@pytest.mark.parametrize("text, seeds", [("3", [3]), ("0-2", [0, 1, 2]), ("0,2,5-6", [0, 2, 5, 6]), ([4, 1], [4, 1])])
def test_seeds(text, seeds):
    assert sweep.seeds_of(text) == seeds


@pytest.mark.parametrize(
    "text, words",
    [
        ("agents: [bamba\nseeds: 1", "line 2: this is no YAML"),
        ("agents: [bamba]\ndataset: [hopper-medium]", "line 2: dataset is none of agents, datasets"),
        ("- 1", "holds no settings"),
        ("agents: [bambo]", "run bambo-s42: there is no agent bambo"),
        ("flags: {learning_rte: 1}", "run bamba-s42: .*learning_rte"),
        ("flags: {gamma: 2}", "run bamba-s42: gamma = 2.0 is out of range"),
        ("flags: {gamma: 0.5}\ngrid: {gamma: [0.9]}", "gamma stands in flags and in grid"),
        ("flags: {seed: 3}", "seed cannot be set here"),
        ("seeds: a-b", "seeds a-b are none"),
        ("overrides: [{flags: {gamma: 0.5}, agents: [dt]}]", "an override names dt"),
        ("overrides: [{agents: [bamba]}]", "wants flags"),
        ("datasets: [a/walk.hdf5, b/walk.hdf5]", "wanted twice"),
        ("name: a/b", "cannot be a folder's name"),
    ],
)
def test_what_is_no_study_is_refused_with_a_sentence(tmp_path, text, words, capsys):
    path = tmp_path / "study.yaml"
    path.write_text(text)
    with pytest.raises(SystemExit):
        sweep.main([str(path), "--output_dir", str(tmp_path / "out")])
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--gamma", "0.9", "--gamma=0.8"], ["study.yaml", "again"], ["--jobs", "-1"]])
def test_what_is_no_command_is_refused(argv):
    with pytest.raises((ValueError, FileNotFoundError)):
        sweep.study_of(*sweep.arguments(argv))


def test_data_that_cannot_be_had_are_said_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--datasets", str(tmp_path / "lost.hdf5"), "--output_dir", str(tmp_path / "out")])
    assert "lost.hdf5" in capsys.readouterr().err and not list((tmp_path / "out").rglob("journal.jsonl"))


# -- how it is finished ----------------------------------------------------------------------------


def calls_of(tmp_path, name: str) -> list[str]:
    return (tmp_path / "out" / "sweep" / name / "calls").read_text().split()


def test_all_runs_are_trained_once_and_a_failing_one_stops_no_other(fake, tmp_path, capsys):
    assert sweep.main([*fake, "--seeds", "1,13,2", "--retries", "1", "--jobs", "2"]) == 1
    said = capsys.readouterr().out
    assert "2 done, 1 failed" in said and "thirteen is not finite" in said
    assert len(calls_of(tmp_path, "bamba-hopper-medium-s13")) == 2
    for seed in (1, 2):
        name = f"bamba-hopper-medium-s{seed}"
        assert calls_of(tmp_path, name) == ["begin"]
        assert json.loads((tmp_path / "out" / "sweep" / name / "done.json").read_text()) == {"score": 100.0, "step": 10}
    assert sweep.main([*fake, "--seeds", "1,13,2"]) == 1  # nothing is left to do
    assert len(calls_of(tmp_path, "bamba-hopper-medium-s13")) == 2 and calls_of(tmp_path, name) == ["begin"]
    assert sweep.main([*fake, "--seeds", "1,13,2", "--retry", "--retries", "0"]) == 1
    assert len(calls_of(tmp_path, "bamba-hopper-medium-s13")) == 3
    rows = [json.loads(line) for line in (tmp_path / "out" / "sweep" / "journal.jsonl").read_text().splitlines()]
    assert [row["event"] for row in rows if row["run"] == name] == ["begins", "done"]


def test_a_run_goes_on_from_its_checkpoint(fake, tmp_path):
    begun = tmp_path / "out" / "sweep" / "bamba-hopper-medium-s1" / "run-1"
    begun.mkdir(parents=True)
    (begun / "config.json").write_text('{"seed": "1"}')
    (begun / "log.jsonl").write_text('{"update": 1}\n' * 4)
    (begun / "last_checkpoint.pt").write_text("4")
    assert sweep.main([*fake, "--seeds", "1"]) == 0
    assert calls_of(tmp_path, "bamba-hopper-medium-s1") == ["resume"]
    assert len((begun / "log.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize("named, gpus", [("", {"0", "1"}), ("5,7", {"5", "7"})])
def test_every_card_has_one_run_at_a_time(fake, tmp_path, monkeypatch, named, gpus):
    monkeypatch.setattr(sweep.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert sweep.main([*fake, "--seeds", "1-2"]) == 0
    used = {(tmp_path / "out" / "sweep" / f"bamba-hopper-medium-s{seed}" / "gpu").read_text() for seed in (1, 2)}
    assert used == gpus


def test_a_name_stands_for_one_setting(fake, capsys):
    assert sweep.main([*fake, "--seeds", "1"]) == 0
    with pytest.raises(SystemExit):
        sweep.main([*fake, "--seeds", "1", "--gamma", "0.9"])
    assert "begun with other settings (gamma)" in capsys.readouterr().err


def launch(tmp_path, fake, *more: str) -> subprocess.Popen:
    """sweep.py in a process of its own, with the fake trainer."""
    program = f"""
    import sys
    sys.path.insert(0, {str(ROOT)!r})
    import sweep
    sweep.TRAINER, sweep.prepare, sweep.LOOK = [sys.executable, {str(tmp_path / "fake.py")!r}], lambda runs: None, 0.05
    sys.exit(sweep.main(sys.argv[1:]))
    """
    argv = [sys.executable, "-c", textwrap.dedent(program), *fake, *more]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition, seconds: float = 60.0) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(0.02)


def slow_fake(tmp_path) -> None:
    path = tmp_path / "fake.py"
    path.write_text(path.read_text().replace("or 0.01", "or 0.15"))


@pytest.mark.slow
def test_killed_it_is_finished_by_the_same_command_and_nothing_is_trained_twice(fake, tmp_path):
    slow_fake(tmp_path)
    first = launch(tmp_path, fake, "--seeds", "1,2", "--jobs", "2")
    places = [tmp_path / "out" / "sweep" / f"bamba-hopper-medium-s{seed}" for seed in (1, 2)]
    until(lambda: all(sweep.run_folder(place) for place in places))
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert sweep.state_of(places[0]).word == "running"  # the trainers outlive it
    assert sweep.main([*fake, "--seeds", "1,2", "--jobs", "2"]) == 0
    for place in places:  # whoever made them: ten updates, in one folder, each once
        (log,) = place.glob("*/log.jsonl")
        assert [row["update"] for row in logger.read_log(log)] == list(range(1, 11))


@pytest.mark.slow
def test_told_to_stop_it_saves_and_a_second_sweep_of_it_is_refused(fake, tmp_path, capsys):
    slow_fake(tmp_path)
    first = launch(tmp_path, fake, "--seeds", "1-4", "--jobs", "2")
    place = tmp_path / "out" / "sweep" / "bamba-hopper-medium-s1"
    until(lambda: sweep.run_folder(place))
    with pytest.raises(SystemExit):
        sweep.main([*fake, "--seeds", "1-4"])
    assert "is running" in capsys.readouterr().err
    assert sweep.main([*fake, "--seeds", "1-4", "--status"]) == 0
    assert "running" in capsys.readouterr().out
    assert sweep.main([*fake, "--stop"]) == 0
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM and "the same command goes on" in out
    assert sweep.state_of(place).word == "waiting" and not (place / "done.json").exists()
    assert sweep.main([*fake, "--stop"]) == 1
    assert sweep.main([*fake, "--seeds", "1-4", "--jobs", "4"]) == 0
    assert calls_of(tmp_path, place.name) == ["begin", "resume"]


@pytest.mark.slow
def test_a_swept_run_is_the_run_alone(hopper_file, tmp_path):
    sizes = as_flags({**TINY, "n_layers": 1, "device": "cpu", "threads": 1})
    more = ["--updates_per_epoch=5", "--num_epochs=2", "--eval_freq=2", "--num_eval_episodes=1", "--no_tensorboard"]
    argv = ["--datasets", str(hopper_file), "--seeds", "3-4", "--output_dir", str(tmp_path / "out"), *sizes, *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "sweep.py", *argv], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0 and "2 done" in run.stdout, run.stdout + run.stderr
    alone = ["--dataset", str(hopper_file), "--seed", "4", "--output_dir", str(tmp_path / "alone"), *sizes, *more]
    subprocess.run([sys.executable, "trainer.py", *alone], cwd=ROOT, env=env, check=True, capture_output=True)
    (mine,) = (tmp_path / "out" / "sweep" / "bamba-walk-s4").glob("*/last_checkpoint.pt")
    (theirs,) = (tmp_path / "alone").glob("*/last_checkpoint.pt")
    mine, theirs = utils.read_checkpoint(mine)["agent"], utils.read_checkpoint(theirs)["agent"]
    assert all((mine[k] == theirs[k]).all() for k in theirs)
