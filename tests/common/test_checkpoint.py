"""Checkpoints of format 1, written before names changed, act as they did; fixtures: tiny runs of then."""

import json

import pytest
import torch
from conftest import ROOT

from common.checkpoint import FORMAT, load, read_checkpoint
from common.evaluation import eval_copy

FIXTURES = ROOT / "tests" / "checkpoints"
ACTIONS = json.loads((FIXTURES / "actions.json").read_text())  # of the version that wrote the checkpoints


@pytest.mark.parametrize("name", ACTIONS)
def test_format_1_loads_and_acts_as_it_did(name):
    agent, part = load(FIXTURES / f"{name}.pt")
    assert torch.load(FIXTURES / f"{name}.pt", weights_only=True)["format"] == 1 and part["format"] == FORMAT
    assert agent.updates == ACTIONS[name]["updates"]
    agent_copy, generator = eval_copy(agent), torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, agent.spec.state, generator=generator, dtype=torch.float64)  # noqa: E731
    memory = agent_copy.reset(2, draw() if part["system"].startswith("opso") else None)
    for expected in ACTIONS[name]["actions"]:
        action, memory = agent_copy.act(draw(), torch.ones(2, dtype=torch.float64), memory)
        torch.testing.assert_close(action, torch.tensor(expected, dtype=action.dtype), rtol=0, atol=1e-12)


def test_every_fixture_has_its_actions():
    assert {path.stem for path in FIXTURES.glob("*.pt")} == set(ACTIONS)
    assert all(path.stat().st_size < 200_000 for path in FIXTURES.glob("*.pt"))


def test_what_is_learned_from_moves_too():
    part = read_checkpoint(FIXTURES / "format1-dqn-mamba.pt")
    assert "buffer" in part["run"] and "experience" not in part["run"] and part["optimizer"]["state"]
