"""Exported policies act as the agents that they were, for any number of environments, and say what they want."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils import _pytree as pytree

import export
import utils

onnx = pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
CHECKPOINTS = ROOT / "tests" / "checkpoints"
pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's exporter


def exported(name: str, tmp_path, **changes) -> export.Exported:
    out = tmp_path / "policy.onnx"
    worst, steps = export.export(str(CHECKPOINTS / f"format1-{name}.pt"), out, **changes)
    assert worst <= export.TOLERANCE and steps > 1
    return export.Exported(out, runtime)


CASES = [("bamba", {}), ("dmamba", {"inference": "recurrent"}), ("dt", {"target_return": 50.0}), ("dqn-mamba", {})]


def check_beside_torch(policy: export.Exported, checkpoint, **changes) -> None:
    """Three walks at once by the file, against PyTorch's agent one by one; memories are handed on."""
    agent, ckpt = utils.load(checkpoint, compile=False, cuda_graphs=False, **changes)
    agent.eval()
    rng, width = np.random.default_rng(0), agent.spec.state
    states, rewards = rng.normal(size=(8, 3, width)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    memory, alone = policy.reset(3), [agent.reset(1) for _ in range(3)]
    for state, reward in zip(states, rewards):
        action, memory = policy.act(state, reward, memory)
        for i in range(3):
            wanted, alone[i] = agent.act(torch.tensor(state[i : i + 1]), torch.tensor(reward[i : i + 1]), alone[i])
            np.testing.assert_allclose(action[i], wanted[0].detach().numpy(), atol=1e-5)
    about = policy.about
    assert about["agent"] == agent.cfg.agent and about["updates"] == ckpt["updates"]
    assert about["data"]["name"] == ckpt["run"]["data"]["name"]
    assert {x.name for x in policy.session.get_inputs()} - {"state", "reward"} <= set(about["memory"])
    leaves = pytree.tree_leaves(agent.reset(1))
    assert [leaf["shape"][1:] for leaf in about["memory"].values()] == [list(leaf.shape[1:]) for leaf in leaves]


@pytest.mark.slow
@pytest.mark.parametrize("name, changes", CASES)
def test_several_environments_are_each_as_alone(tmp_path, name, changes):
    check_beside_torch(exported(name, tmp_path, **changes), CHECKPOINTS / f"format1-{name}.pt", **changes)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--burn_in=2", "--state_delta", "--encoder=lstm"], ["--encoder=none"]])
def test_todays_bamba_on_segments(tmp_path, hopper_file, more):
    """As it is trained by default: segments, and a mean of its nets that acts."""
    sizes = ["--d_model=16", "--d_state=8", "--headdim=8", "--hidden_dim=16", "--batch_size=8", "--eval_ema=0.5"]
    argv = ["--dataset", str(hopper_file), "--env=hopper", "--updates_per_epoch=5", "--num_epochs=1", "--eval_freq=0"]
    argv += [*sizes, "--critic_pretrain=2", "--no_tensorboard", "--output_dir", str(tmp_path / "runs"), *more]
    run = subprocess.run([sys.executable, "trainer.py", *argv], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (checkpoint,) = (tmp_path / "runs").glob("*/last_checkpoint.pt")
    out = tmp_path / "policy.onnx"
    export.export(str(checkpoint), out)
    check_beside_torch(export.Exported(out, runtime), checkpoint)


@pytest.mark.slow
def test_a_goal_is_an_input(tmp_path):
    policy = exported("opso", tmp_path)
    assert "goal" in policy.about["inputs"] and "goal" in {x.name for x in policy.session.get_inputs()}
    state = np.random.default_rng(0).normal(size=(2, policy.session.get_inputs()[0].shape[1]))
    near, _ = policy.act(state, np.zeros(2), policy.reset(2), state)
    far, _ = policy.act(state, np.zeros(2), policy.reset(2), state + 3)
    assert np.abs(near - far).max() > 1e-4


@pytest.mark.slow
def test_the_example_needs_neither_torch_nor_us(tmp_path):
    exported("bamba", tmp_path)
    wall = "import sys; sys.modules['torch'] = None; import runpy; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0])"
    script = str(ROOT / "examples" / "act_with_onnx.py")
    env = json.loads(
        runtime.InferenceSession(str(tmp_path / "policy.onnx")).get_modelmeta().custom_metadata_map["policy"]
    )
    argv = [sys.executable, "-c", wall, script, str(tmp_path / "policy.onnx"), "Hopper-v4"]
    run = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert f"acts in {env['environment']}" in run.stdout and "return " in run.stdout


@pytest.mark.slow
def test_what_acts_otherwise_is_not_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    out = tmp_path / "policy.onnx"
    with pytest.raises(SystemExit):
        export.main(["--checkpoint", str(CHECKPOINTS / "format1-bamba.pt"), "--out", str(out)])
    assert "differ from PyTorch's" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_what_cannot_be_exported_is_a_sentence(tmp_path, monkeypatch, capsys):
    checkpoint = str(CHECKPOINTS / "format1-bamba.pt")
    (tmp_path / "cut.pt").write_bytes((CHECKPOINTS / "format1-bamba.pt").read_bytes()[:5000])
    for argv, words in (
        (["--checkpoint", "lost.pt", "--out", "a.onnx"], "lost.pt"),
        (["--checkpoint", str(tmp_path / "cut.pt"), "--out", "a.onnx"], "cut.pt"),
        (["--checkpoint", checkpoint, "--out", "no/such/folder/a.onnx"], "folder"),
        (["--checkpoint", checkpoint, "--out", "a.onnx", "--inference", "window"], "knows no inference"),
    ):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            export.main(argv)
        assert words in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SystemExit):
        export.main(["--checkpoint", checkpoint, "--out", "a.onnx"])
    assert 'pip install "onnx>=1.17"' in capsys.readouterr().err and not (tmp_path / "a.onnx").exists()
