"""The toolkit as one importable name, beside modules of a user's own that are called like its scripts."""

import os
import re
import subprocess
import sys
import tomllib

import numpy as np
import pytest
from conftest import ROOT

import bamba
from bamba.api import flags_of
from bamba.flat_modules import FLAT


def run_elsewhere(folder, program: str, *words: str) -> subprocess.CompletedProcess:
    """A program in a folder with its own utils.py and model.py; only `bamba` of the project can be imported there."""
    site = folder / "site"
    site.mkdir()
    (site / "bamba").symlink_to(ROOT / "bamba")
    for name in ("utils", "model", "common", "config"):
        (folder / f"{name}.py").write_text(f"MINE = 'the {name} of another project'\n")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, "-c", program, *words]
    return subprocess.run(argv, cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_every_script_and_folder_is_a_submodule_and_is_installed():
    packages = {p.parent.name for p in ROOT.glob("*/__init__.py")} - {"bamba"}
    assert {p.stem for p in ROOT.glob("*.py")} | packages == FLAT
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    below = {
        ".".join(p.parent.relative_to(ROOT).parts) for p in ROOT.glob("*/**/__init__.py") if ".venv" not in p.parts
    }
    assert set(told) == {"bamba", "bamba.flat"} | {
        f"bamba.flat.{name}" for name in below if name.split(".")[0] in packages
    }


def test_it_lives_beside_modules_of_the_same_names(tmp_path):
    program = """
import sys, utils, model
import bamba, bamba.d4rl_utils.reader, bamba.opso
import common
assert utils.MINE == "the utils of another project" and common.MINE.startswith("the common")
assert bamba.utils is not utils and bamba.trainer.utils is bamba.utils
assert bamba.opso.Opso is bamba.utils.agent_of("opso")  # imported by a name that is only known when it runs
from bamba.gym_utils import make_discrete
make_discrete("CartPole-v1", False).reset(seed=0)  # an import in a function
assert not {"agent", "trainer", "d4rl_utils", "dqn"} & set(sys.modules)
print("fine")
"""
    done = run_elsewhere(tmp_path, program)
    assert done.stdout.endswith("fine\n"), done.stderr[-2000:]


@pytest.mark.slow
def test_the_example_trains_evaluates_and_exports_in_a_few_lines(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = ROOT / "examples" / "my_experiment.py"
    done = run_elsewhere(tmp_path, path.read_text())
    assert done.returncode == 0, done.stderr[-2000:]
    (said,) = re.findall(r"mean return: recorded (\S+), learned (\S+)", done.stdout)
    assert float(said[1]) > float(said[0]) and (tmp_path / "line.onnx").exists()
    assert {"losses", "evaluation", "end"} <= set(done.stdout.split())
    body = [
        line
        for line in path.read_text().splitlines()
        if line.strip() and not line.startswith(('"""', "import", "from"))
    ]
    assert len(body) < 40


def test_a_training_tells_its_callbacks_and_gives_its_policy(hopper_file, tmp_path, capsys):
    pytest.importorskip("mujoco")
    rows = []
    sizes = dict(d_model=16, d_state=8, headdim=8, hidden_dim=16, n_layers=1, batch_size=4, num_eval_episodes=1)
    short = dict(num_epochs=2, updates_per_epoch=3, eval_freq=2, tensorboard=False, threads=1, device="cpu")
    run = bamba.train("bamba", [rows.append], dataset=str(hopper_file), output_dir=str(tmp_path), **sizes, **short)
    assert [row["kind"] for row in rows] == ["losses", "losses", "evaluation", "end"] and run.finished
    assert [row["update"] for row in rows] == [3, 6, 6, 6] and rows[-1]["folder"] == run.folder
    assert rows[2]["eval/score"] == pytest.approx(run.scores[-1][1])
    policy = run.policy()
    with pytest.raises(ValueError, match="call reset"):
        policy.act(np.zeros(11))
    policy.reset()
    one = policy.act(np.ones(11))
    policy.reset(2)
    two = policy.act(np.ones((2, 11)))
    assert one.shape == (3,) and two.shape == (2, 3) and np.array_equal(two[0], one)
    with pytest.raises(ValueError, match="reset\\(\\) was told 2, and a state has 11"):
        policy.act(np.ones(11))
    assert len(bamba.evaluate(policy, episodes=2)) == 2


def test_settings_that_do_not_exist_are_named():
    with pytest.raises(ValueError, match="no setting 'learning_rte': did you mean 'learning_rate'"):
        bamba.train(learning_rte=1)
    with pytest.raises(ValueError, match="no agent 'bmba'"):
        bamba.train("bmba")
    assert flags_of({"agent": "dt", "compile": True, "tensorboard": False}) == [
        "--agent=dt",
        "--compile",
        "--no_tensorboard",
    ]


def test_data_from_arrays_are_checked_and_read_back(tmp_path):
    rng = np.random.default_rng(0)
    states, actions = rng.normal(size=(20, 3)), np.tanh(rng.normal(size=(20, 1)))
    ends = np.arange(1, 21) % 10 == 0
    path = bamba.datasets.from_arrays(tmp_path / "mine.hdf5", states, actions, np.ones(20), ends)
    transitions, info = bamba.datasets.open(str(path), env="Pendulum-v1")
    np.testing.assert_array_equal(transitions.states, states.astype(np.float32))
    assert (info.name, info.episodes, info.return_mean) == ("mine", 2, 10.0)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"mine.hdf5: 'rewards' has shape \(3,\)"):
        bamba.datasets.from_arrays(path, states, actions, np.ones(3), ends)
    with pytest.raises(ValueError, match="should end in .hdf5"):
        bamba.datasets.from_arrays(tmp_path / "mine.npz", states, actions, np.ones(20), ends)
    assert path.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {"mine.hdf5", ".cache"}


@pytest.mark.parametrize(
    "words, status, said",
    [
        (["train", "--agent", "dt", "--target_return", "nan"], 2, "target_return = nan cannot be asked for"),
        (["data", "list"], 0, "hopper-medium-v2"),
        (["walk"], 2, "usage: bamba"),
        ([], 2, "usage: bamba {train,evaluate,"),
    ],
)
def test_the_verbs_are_the_scripts(tmp_path, words, status, said):
    program = "import runpy; runpy.run_module('bamba', run_name='__main__', alter_sys=True)"
    done = run_elsewhere(tmp_path, program, *words)
    assert done.returncode == status and said in done.stdout + done.stderr
