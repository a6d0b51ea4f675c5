"""The harness of faults: bad flags end in a sentence, and nothing is lost. (Files: test_reader, test_checkpoint.)"""

import importlib
import sys

import pytest
from conftest import ROOT

pytest.importorskip("mujoco")


@pytest.fixture
def faults(monkeypatch):
    if sys.platform != "linux":
        pytest.skip("the harness forks, and bounds memory")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield importlib.import_module("faults")
    for name in ("faults", "harness"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_bad_flags_end_in_a_sentence_and_good_ones_train(faults, tmp_path, monkeypatch):
    counts, examples, accepted = faults.try_commands(range(1000, 1010), tmp_path)
    assert set(counts) <= {"refused", "accepted", "said"} and counts["refused"] > 3, examples
    assert len(accepted) == counts["accepted"]
    monkeypatch.setattr(faults, "bad_command", lambda seed, known: known[sorted(known)[seed]])
    for which in (0, 3):  # as they are, the commands work: bamba's, dqn's
        counts, examples, _ = faults.try_commands(range(which, which + 1), tmp_path)
        assert counts == {"accepted": 1}, examples


@pytest.mark.slow
@pytest.mark.parametrize("what", ["kill", "full"])
def test_a_training_in_trouble_ends_as_one_that_had_none(faults, tmp_path, monkeypatch, what):
    short_runs = faults.short_runs
    shorter = ["--env_steps=120", "--save_every=30", "--eval_every=60"]
    monkeypatch.setattr(faults, "short_runs", lambda folder: {"dqn": [*short_runs(folder)["dqn"], *shorter]})
    ((name, counts, examples),) = faults.try_trouble(what, 2, 0, tmp_path)
    assert name.endswith(", dqn") and counts == {"same": 2}, examples


def test_a_reader_that_dies_or_raises_is_counted(faults, tmp_path):
    path = tmp_path / "a.hdf5"
    for fault, words in ((KeyError("x"), "KeyError"), (ValueError("two\nlines"), "two")):

        def read(_, fault=fault):
            raise fault

        faults.PARTS["odd"] = (None, read)
        outcome, text = faults.attempt("odd", path, [])
        assert outcome == "traceback" and words in text
    faults.PARTS["odd"] = (None, lambda _: [1.0])
    assert faults.attempt("odd", path, [1.0])[0] == "same" and faults.attempt("odd", path, [2.0])[0] == "other"
    del faults.PARTS["odd"]
