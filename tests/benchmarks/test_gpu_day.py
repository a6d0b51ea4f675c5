"""The measurements of a card, rehearsed on a CPU: no stage is missing, a failed one is told and the others run."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import model
from networks.last_step_mixers import MIXERS


@pytest.fixture
def day(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("gpu_day"), importlib.import_module("gpu_stages")
    for name in ("gpu_day", "gpu_stages", "harness"):
        sys.modules.pop(name, None)


def run(tmp_path, *flags) -> tuple[subprocess.CompletedProcess, dict]:
    out = tmp_path / "day.json"
    command = [sys.executable, "benchmarks/gpu_day.py", "--out", str(out), *flags]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=180, env={**os.environ})
    return ran, json.loads(out.read_text())


def test_every_stage_is_written_and_rehearsed(day):
    runner, stages = day
    assert runner.STAGES.keys() == stages.STAGES.keys()
    args = runner.arguments(["--rehearse"])
    assert args.device == "cpu" and args.stages is None
    batches = runner.batches(list(runner.STAGES))
    assert [name for batch in batches for name in batch] == list(runner.STAGES)
    assert all(len(batch) == 1 or not any(runner.STAGES[n].alone for n in batch) for batch in batches)


def test_every_agent_layer_and_mode_is_measured(day):
    _, stages = day
    named = " ".join(stages.layers(tiny=True))
    assert all(f"mixer {m}" in named for m in MIXERS)
    assert all(m in named for m in model.MIXERS)
    keys = stages.speed_keys()
    assert len(keys) == len(set(keys)) == len(stages.TIMED) * 3 * len(stages.MODES) - len(stages.MODES)  # dqn: no bf16
    assert keys[0] == ("bamba", "tf32", "compile+graph")


@pytest.mark.slow
def test_cheap_stages_in_miniature(tmp_path):
    ran, record = run(tmp_path, "--rehearse", "--stages", "layers_agree", "agents_agree", "many_seeds", "acting")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = record["stages"]
    assert list(found) == ["layers_agree", "agents_agree", "many_seeds", "acting"]
    assert all(s["status"] == "ok" and s["result"] for s in found.values())
    rows = [row for name in ("layers_agree", "agents_agree") for row in found[name]["result"].values()]
    # some processors have no LSTM in bfloat16: oneDNN says so
    assert all(row["ok"] or "could not create a primitive" in row.get("error", "") for row in rows)
    assert "layers_agree [ok" in ran.stdout and len(ran.stdout) < 12_000


@pytest.mark.slow
def test_a_stage_that_fails_is_told_and_the_next_one_runs(tmp_path):
    lost = str(tmp_path / "lost.hdf5")
    ran, record = run(tmp_path, "--rehearse", "--stages", "train", "layers_agree", "--train_dataset", lost)
    assert ran.returncode == 1 and "there is no such file" in ran.stdout
    assert record["stages"]["train"]["status"] == "failed" and lost in record["stages"]["train"]["error"]
    assert record["stages"]["layers_agree"]["status"] == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a card")
def test_without_a_card_the_stages_say_so(tmp_path):
    ran, record = run(tmp_path, "--stages", "facts", "--budget", "60")
    assert ran.returncode == 1 and "--rehearse needs none" in record["stages"]["facts"]["error"]


def test_a_row_that_ends_its_process_is_told_and_the_stage_goes_on_behind_it(day, tmp_path):
    runner, stages = day
    args = runner.arguments(["--rehearse"])
    first = stages.Table(tmp_path / "t.json", args, 100)
    for key in first.todo(["a", "b", "c"]):
        if key == "b":
            break  # as if the process had died here
        first.rows[key] = {"x": 1}
    assert json.loads((tmp_path / "t.json").read_text())["b"] == {"error": "did not end"}
    stage = object.__new__(runner.Running)
    stage.part = tmp_path / "t.json"
    assert stage.blame("CUDA error: an illegal memory access")
    second = stages.Table(tmp_path / "t.json", args, 100)
    for key in second.todo(["a", "b", "c"]):
        second.rows[key] = {"x": 2}
    assert second.rows["a"]["x"] == 1 and "illegal" in second.rows["b"]["error"] and second.rows["c"]["x"] == 2
