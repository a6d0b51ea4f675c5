"""Sweeps: what a study means, what is refused before anything runs, and that it is finished whatever stops it."""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from conftest import ROOT, TINY, as_flags

import sweep
import utils
from common import logger
from config import parse
from sweeping import executors, search, state, study, work

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
    monkeypatch.setattr(work, "TRAINER", [sys.executable, str(tmp_path / "fake.py")])
    for module in (sweep, search):
        monkeypatch.setattr(module, "prepare", lambda runs: None)
    monkeypatch.setattr(work, "LOOK", 0.05)
    monkeypatch.setattr(executors, "LOOK", 0.05)
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


def test_the_command_line_takes_some_of_the_files_agents_and_data(tmp_path):
    path = file_of(
        tmp_path,
        """
        agents: {slow: {agent: bamba, learning_rate: 0.0001}, dt: {}}
        datasets: [hopper-medium, walker2d-medium]
        overrides:
          - {agents: [dt], flags: {d_model: 8}}
          - {agents: [slow], datasets: [hopper-medium], flags: {d_model: 16}}
        """,
    )
    narrow = sweep.study_of(*sweep.arguments([path, "--agents", "slow", "--datasets", "hopper-medium"]))
    (run,) = sweep.expand(narrow)
    cfg = parse(run.argv)
    assert (run.label, cfg.agent, cfg.learning_rate, cfg.d_model) == ("slow", "bamba", 1e-4, 16)
    other = sweep.expand(sweep.study_of(*sweep.arguments([path, "--agents", "dm", "--datasets", "hopper-medium"])))
    assert [run.flags["agent"] for run in other] == ["dm"]  # none of the file's, so one of trainer.py's


def test_a_word_alone_is_a_list_of_one(tmp_path):
    (run,) = sweep.expand(
        sweep.read_study(file_of(tmp_path, "{agents: dt, datasets: hopper-medium, seeds: 3, flags: }"))
    )
    assert run.name == "dt-hopper-medium-s3"


def test_what_a_search_maximises_stands_in_the_file_too(tmp_path, capsys):
    pytest.importorskip("optuna")
    path = file_of(tmp_path, "agents: bamba\nmetric: scoore\nsearch: {gamma: [0.9, 0.99]}")
    with pytest.raises(SystemExit):
        sweep.main([path, "--trials", "1", "--output_dir", str(tmp_path / "out")])
    assert re.search("line 2: metric: scoore is none of last_score, mean_of_last_5", capsys.readouterr().err)
    study = sweep.study_of(*sweep.arguments([path, "--metric", "best_score"]))
    assert study["metric"] == "best_score"  # the command line goes before the file


def test_a_seed_stands_in_what_a_run_goes_on_from(tmp_path):
    path = file_of(
        tmp_path, "{agents: [bamba], datasets: [hopper-medium], seeds: 3-4, flags: {dataset_dir: 'x-{seed}'}}"
    )
    assert [parse(run.argv).dataset_dir for run in sweep.expand(sweep.read_study(path))] == ["x-3", "x-4"]


@pytest.mark.parametrize("text, seeds", [("3", [3]), ("0-2", [0, 1, 2]), ("0,2,5-6", [0, 2, 5, 6]), ([4, 1], [4, 1])])
def test_seeds(text, seeds):
    assert study.seeds_of(text) == seeds


@pytest.mark.parametrize(
    "text, words",
    [
        ("agents: [bamba\nseeds: 1", "line 2: this cannot be read as YAML"),
        ("agents: [bamba]\ndataset: [hopper-medium]", "line 2: dataset is none of agents, datasets"),
        ("- 1", "holds no settings"),
        ("# bambo\nagents:\n- bamba\n- bambo", "study.yaml, line 4: run bambo-s42: there is no agent bambo"),
        ("agents: {agents: {agent: bambo}}", "line 1: run agents-s42: there is no agent bambo"),
        ("agents: {bamba: 3}", "line 1: bamba wants settings, or {}, and has 3"),
        ("agents: [3]", "line 1: 3 is no name"),
        ("agents: 3", "line 1: agents wants a list of names, or names with settings, and is 3"),
        (
            "datasets:\n- hopper-medium\n- hoper-medium",
            "line 3: run bamba-hoper-medium-s42: .*Did you mean hopper-medium",
        ),
        ("flags:\n  gamma: 0.9\n  learning_rte: 1", "line 3: run bamba-s42: .*learning_rte"),
        ("flags:\n  gamma: 0.9\n  gamma: 0.8", r"line 3: .*\(gamma stands here twice\)"),
        ("flags: [gamma]", "line 1: flags wants settings"),
        ("\nflags: {gamma: 2}", "line 2: run bamba-s42: gamma = 2.0 is out of range"),
        ("flags: {gamma: 0.5}\ngrid: {gamma: [0.9]}", "line 1: grid: gamma stands in flags, too"),
        ("overrides: [{agents: bamba, flags: gamma}]", "wants flags"),
        ("flags: {seed: 3}", "seed cannot be set here"),
        ("seeds: a-b", "seeds a-b are none"),
        ("overrides: [{flags: {gamma: 0.5}, agents: [dt]}]", "line 1: overrides: dt is named, which is none of"),
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


def test_a_finished_run_is_evaluated_and_has_a_name_that_stays(fake, tmp_path, monkeypatch):
    script = tmp_path / "evaluate.py"
    code = "import os, sys, pathlib; threads = os.environ.get('OMP_NUM_THREADS', 'all');"
    script.write_text(code + "pathlib.Path(sys.argv[sys.argv.index('--json') + 1]).write_text(threads)")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep, "cores", lambda: 3)  # one run: it has them all, and so has its evaluation
    monkeypatch.setattr(work, "EVALUATOR", [sys.executable, str(script)])
    assert sweep.main([*fake, "--agents", "bamba", "--seeds", "1", "--episodes", "7"]) == 0
    place = tmp_path / "out" / "sweep" / "bamba-hopper-medium-s1"
    (found,) = place.glob("*/eval-7.json")
    assert found.read_text() == "3" and (place / "last_checkpoint.pt").read_text() == "10"
    script.write_text("raise SystemExit('error: it cannot be played')")
    command = [*fake, "--agents", "bamba", "--seeds", "2", "--episodes", "7", "--retries", "0"]
    assert sweep.main(command) == 1
    assert "cannot be played" in (place.with_name("bamba-hopper-medium-s2") / "failed.json").read_text()


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
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
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
    from sweeping import executors, work
    work.TRAINER, sweep.prepare = [sys.executable, {str(tmp_path / "fake.py")!r}], lambda runs: None
    work.LOOK = executors.LOOK = 0.05
    sys.exit(sweep.main(sys.argv[1:]))
    """
    argv = [sys.executable, "-c", textwrap.dedent(program), *fake, *more]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def until(condition, seconds: float = 120.0) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "it did not happen"
        time.sleep(0.02)


def pace(tmp_path, seconds: float) -> None:
    """Of the fake trainer's steps, of those that begin from now on."""
    path = tmp_path / "fake.py"
    path.write_text(re.sub(r"or [\d.]+\)", f"or {seconds})", path.read_text()))


@pytest.mark.slow
def test_killed_it_is_finished_by_the_same_command_and_nothing_is_trained_twice(fake, tmp_path):
    pace(tmp_path, 0.3)
    first = launch(tmp_path, fake, "--seeds", "1,2", "--jobs", "2")
    places = [tmp_path / "out" / "sweep" / f"bamba-hopper-medium-s{seed}" for seed in (1, 2)]
    until(lambda: all(state.run_folder(place) for place in places))
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert state.state_of(places[0]).word == "running"  # the trainers outlive it
    assert sweep.main([*fake, "--seeds", "1,2", "--jobs", "2"]) == 0
    for place in places:  # whoever made them: ten updates, in one folder, each once
        (log,) = place.glob("*/log.jsonl")
        assert [row["update"] for row in logger.read_log(log)] == list(range(1, 11))


@pytest.mark.slow
def test_told_to_stop_it_saves_and_a_second_sweep_of_it_is_refused(fake, tmp_path, capsys):
    pace(tmp_path, 1.0)
    first = launch(tmp_path, fake, "--seeds", "1-4", "--jobs", "2")
    place = tmp_path / "out" / "sweep" / "bamba-hopper-medium-s1"
    until(lambda: state.run_folder(place))
    with pytest.raises(SystemExit):
        sweep.main([*fake, "--seeds", "1-4"])
    assert "is running" in capsys.readouterr().err
    assert sweep.main([*fake, "--seeds", "1-4", "--status"]) == 0
    assert "running" in capsys.readouterr().out
    assert sweep.main([*fake, "--stop"]) == 0
    out, _ = first.communicate(timeout=60)
    assert first.returncode == 128 + signal.SIGTERM and "the same command goes on" in out
    assert state.state_of(place).word == "waiting" and not (place / "done.json").exists()
    assert sweep.main([*fake, "--stop"]) == 1
    pace(tmp_path, 0.01)
    assert sweep.main([*fake, "--seeds", "1-4", "--jobs", "4"]) == 0
    assert calls_of(tmp_path, place.name) == ["begin", "resume"]


# -- elsewhere ---------------------------------------------------------------------------------------


def test_what_a_cluster_lacks_is_said_before_anything_runs(fake, tmp_path, monkeypatch, capsys):
    for argv, words in (
        (["--on", "slurm"], "there is no sbatch here"),
        (["--time", "soon"], "--time soon is none"),
        (["--trials", "3", "--on", "ray"], "leave --on away"),
        (["--trials", "3"], "wants ranges in the study's file"),
    ):
        if argv[:2] == ["--on", "slurm"]:
            pytest.importorskip("submitit")
        with pytest.raises(SystemExit):
            sweep.main([*fake, "--seeds", "1", *argv])
        assert words in capsys.readouterr().err
    for name in ("ray", "submitit"):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(SystemExit):
            sweep.main([*fake, "--seeds", "1", "--on", {"submitit": "slurm"}.get(name, name)])
        assert f'pip install "{name}' in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("journal.jsonl"))


def test_a_cluster_that_does_not_answer(fake, tmp_path, capsys):
    pytest.importorskip("ray")
    with pytest.raises(SystemExit):
        sweep.main([*fake, "--seeds", "1", "--on", "ray", "--address", "127.0.0.1:9"])
    assert "no Ray cluster answers at 127.0.0.1:9" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("journal.jsonl"))


@pytest.mark.parametrize("text, minutes", [("", 0), ("90", 90), ("4:00:00", 240), ("0:30:01", 31)])
def test_time_of_a_job(text, minutes):
    assert sweep.minutes_of(text) == minutes


ELSEWHERE = """
import importlib.util, sys

class Patch:
    def find_spec(self, name, path=None, target=None):
        if name != "sweeping.work":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.TRAINER = [sys.executable, FAKE]
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Patch())
sys.path.append(ROOT)
"""


def reach_other_processes(tmp_path, monkeypatch) -> None:
    """The fake trainer is used in every Python process that begins from now on."""
    text = ELSEWHERE.replace("FAKE", repr(str(tmp_path / "fake.py"))).replace("ROOT", repr(str(ROOT)))
    (tmp_path / "sitecustomize.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.slow
def test_a_lost_node_loses_no_run(fake, tmp_path, monkeypatch, capsys):
    """Two Ray nodes on this machine, one of which goes in the middle."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    reach_other_processes(tmp_path, monkeypatch)
    pace(tmp_path, 0.5)
    names = [f"bamba-hopper-medium-s{seed}" for seed in (1, 2, 3)]
    places, told = [tmp_path / "out" / "sweep" / name for name in names], []
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)

    def lose_a_node(*args) -> None:
        until(lambda: sum(state.run_folder(place) is not None for place in places) >= 2)
        cluster.remove_node(node, allow_graceful=False)
        told.append(True)

    thread = threading.Thread(target=lose_a_node)
    try:
        thread.start()
        argv = [*fake, "--seeds", "1-3", "--on", "ray", "--address", cluster.address]
        assert sweep.main(argv) == 0
    finally:
        thread.join()
        cluster.shutdown()
    assert told and "3 done" in capsys.readouterr().out
    for place in places:
        (log,) = place.glob("*/log.jsonl")
        assert [row["update"] for row in logger.read_log(log)] == list(range(1, 11))


@pytest.mark.slow
def test_slurm_jobs_train_each_run_once(fake, tmp_path, monkeypatch):
    """By submitit's local executor: the same calls, in processes on this machine."""
    pytest.importorskip("submitit")
    monkeypatch.setattr(sweep, "train_on_slurm", lambda *args: executors.train_on_slurm(*args, cluster="local"))
    reach_other_processes(tmp_path, monkeypatch)
    assert sweep.main([*fake, "--seeds", "1,2,13", "--retries", "0", "--on", "slurm", "--time", "5"]) == 1
    for seed in (1, 2):
        assert calls_of(tmp_path, f"bamba-hopper-medium-s{seed}") == ["begin"]
    failed = tmp_path / "out" / "sweep" / "bamba-hopper-medium-s13" / "failed.json"
    assert "thirteen" in json.loads(failed.read_text())["sentence"]


def test_the_batch_script_says_what_was_asked_for(fake, tmp_path, monkeypatch):
    """A stand-in for sbatch keeps the script; it is an array of all runs, two at a time."""
    submitit = pytest.importorskip("submitit")
    monkeypatch.setattr(submitit.Job, "_results_timeout_s", 0)  # nothing runs, so no result comes
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, lines in {
        "sbatch": f'cp "$1" {tmp_path}/script.sh; echo "Submitted batch job 77"',
        "sacct": 'echo "JobID|State|NodeList"; for i in 0 1 2; do echo "77_$i|COMPLETED|node"; done',
        "scancel": f'echo "$@" >> {tmp_path}/cancelled',
        "srun": "true",
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{lines}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    argv = [*fake, "--seeds", "1-3", "--jobs", "2", "--on", "slurm", "--partition", "gpu", "--time", "4:00:00"]
    worker = work.Worker(tmp_path, 2, 1)
    args, flags = sweep.arguments([*argv, "--gpus", "1", "--cpus", "4"])
    runs = study.expand(sweep.study_of(args, flags))
    want = executors.Resources(args.cpus, args.gpus, "", args.partition, args.minutes)
    for _ in range(2):  # the second time cancels what the first left in the queue
        executors.train_on_slurm(runs, worker, args.jobs, lambda: True, want)
    script = (tmp_path / "script.sh").read_text()
    for line in ("--array=0-2%2", "--partition=gpu", "--time=240", "--cpus-per-task=4", "--gpus-per-node=1"):
        assert f"#SBATCH {line}\n" in script
    assert "--state=PENDING 77_0 77_1 77_2" in (tmp_path / "cancelled").read_text()


def test_a_job_that_runs_out_of_time_saves_and_comes_again(fake, tmp_path):
    submitit = pytest.importorskip("submitit")
    pace(tmp_path, 0.2)
    args, flags = sweep.arguments([*fake, "--seeds", "1"])
    (run,) = study.expand(sweep.study_of(args, flags))
    folder = tmp_path / "out" / "sweep"
    study.settle([run], folder)
    job = executors.Job(str(folder), 0, 1)
    thread = threading.Thread(target=job, args=(run,))
    thread.start()
    until(lambda: state.run_folder(folder / run.name))
    again = job.checkpoint(run)
    thread.join()
    assert isinstance(again, submitit.helpers.DelayedSubmission) and not state.is_over(folder / run.name)
    pace(tmp_path, 0.01)
    pickle.loads(pickle.dumps(job))(run)
    assert calls_of(tmp_path, run.name) == ["begin", "resume"] and (folder / run.name / "done.json").exists()


# -- search ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_search_finds_prunes_and_goes_on(fake, tmp_path, capsys):
    """The score falls with the distance of gamma from 0.9. A trial that was cut off is tried again, none twice."""
    pytest.importorskip("optuna")
    path = tmp_path / "fake.py"
    path.write_text(path.read_text().replace("10.0 * update", "update - 50 * abs(float(flags['gamma']) - 0.9)"))
    file = file_of(tmp_path, "{name: tuned, datasets: [hopper-medium], seeds: 1-2, search: {gamma: [0.5, 0.99]}}")
    argv = [file, "--output_dir", str(tmp_path / "out"), "--num_epochs=1", "--jobs", "2"]
    assert sweep.main([*argv, "--trials", "4"]) == 0
    capsys.readouterr()
    import optuna

    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "out" / "tuned" / "optuna.log"))
    book = optuna.load_study(study_name="tuned", storage=optuna.storages.JournalStorage(backend))
    assert len(book.trials) == 4
    cut_off = book.ask({"gamma": optuna.distributions.FloatDistribution(0.5, 0.99)}).params["gamma"]
    assert sweep.main([*argv, "--trials", "12"]) == 0
    best = capsys.readouterr().out.splitlines()[-11:]
    gammas = [float(re.search(r"gamma ([\d.]+)", line)[1]) for line in best if "gamma" in line]
    assert abs(gammas[0] - 0.9) < 0.06
    places = [p for p in (tmp_path / "out" / "tuned").iterdir() if p.name.startswith("trial")]
    assert all((p / "calls").read_text().split() == ["begin"] for p in places if (p / "calls").exists())
    assert 12 <= len(places) <= 24
    by_state = {word: [t for t in book.trials if t.state.name == word] for word in ("COMPLETE", "PRUNED", "FAIL")}
    assert len(by_state["FAIL"]) == 1 and len(by_state["COMPLETE"]) + len(by_state["PRUNED"]) == 12
    assert cut_off in [t.params["gamma"] for t in by_state["COMPLETE"] + by_state["PRUNED"]]


@pytest.mark.parametrize(
    "what, words",
    [
        ("{gamma: [0.9, 0.5]}", "is no range"),
        ("{gamma: [0, 0.5, log]}", "is no range"),
        ("{gamma: 0.5}", "is no range"),
        ("{gamma: [0.5, 7.0]}", ""),
        ("{gama: [0.5, 0.7]}", "gama"),
    ],
)
def test_what_cannot_be_searched_is_a_sentence(fake, tmp_path, what, words, capsys):
    pytest.importorskip("optuna")
    file = file_of(tmp_path, f"{{datasets: [hopper-medium], seeds: 1, search: {what}}}")
    argv = [file, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        sweep.main(argv)  # ranges, and nobody says how many trials
    assert "--trials" in capsys.readouterr().err
    if words:
        with pytest.raises(SystemExit):
            sweep.main([*argv, "--trials", "2"])
        assert words in capsys.readouterr().err


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
