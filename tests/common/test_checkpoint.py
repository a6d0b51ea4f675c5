"""Checkpoints of format 1, written before names changed, act as they did; fixtures: tiny runs of then."""

import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils import _pytree as pytree

from agent import Bamba
from common import logger
from common.checkpoint import FORMAT, load, read_checkpoint, save
from common.evaluation import eval_copy
from common.interface import EnvSpec

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


# -- damaged ones ----------------------------------------------------------------------------------


@pytest.fixture
def written(tiny, tmp_path):
    path = tmp_path / "last_checkpoint.pt"
    save(path, Bamba(tiny(n_layers=1), EnvSpec(3, 1, (-1.0,), (1.0,))), {"data": {"name": "walk"}})
    return path


def damaged(whole: bytes, rng) -> bytes:
    """One of: a flipped bit, a zeroed, repeated, removed or swapped block, a cut head or tail."""
    data, kind = bytearray(whole), rng.integers(7)
    at, n = int(rng.integers(len(data) - 64)), int(rng.integers(1, 64))
    if kind == 0:
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        data[at : at + n] = bytes(n)
    elif kind == 2:
        data[at:at] = data[at : at + n]
    elif kind == 3:
        del data[at : at + n]
    elif kind == 4:
        data[at : at + n], data[:n] = data[:n], data[at : at + n]
    elif kind == 5:
        del data[:at]
    else:
        del data[at:]
    return bytes(data)


def same(one, other) -> bool:
    a, b = (pytree.tree_leaves(part) for part in (one, other))
    return len(a) == len(b) and all(torch.equal(x, y) if torch.is_tensor(x) else x == y for x, y in zip(a, b))


@pytest.mark.parametrize("fixture", [None, "format1-dt", "format1-dqn-mamba"])
def test_a_damaged_checkpoint_is_refused_with_a_sentence_or_says_what_it_said(fixture, written):
    if fixture:
        written.write_bytes((FIXTURES / f"{fixture}.pt").read_bytes())
    whole, rng, refused = written.read_bytes(), np.random.default_rng(0), 0
    before = read_checkpoint(written)
    for _ in range(150):
        written.write_bytes(damaged(whole, rng))
        try:
            assert same(read_checkpoint(written), before)
        except ValueError as error:
            refused += 1
            assert str(written) in str(error) and "\n" not in str(error)
    # of format 1 some bytes are in no sum: but what they say is not believed to be something else
    assert refused >= (149 if fixture is None else 120)


def test_a_part_that_seems_to_be_a_folder_is_not_read_as_empty(written):
    """PyTorch reads nothing of such a part and leaves its memory as it was; no sum tells."""
    written.write_bytes((FIXTURES / "format1-dt.pt").read_bytes())
    whole = bytearray(written.read_bytes())
    entry = whole.rindex(b"PK\x01\x02")  # the last one of the archive's directory
    whole[entry + 38] |= 0x10
    written.write_bytes(whole)
    with pytest.raises(ValueError, match="is not as PyTorch writes it"):
        read_checkpoint(written)


def test_a_seal_that_was_cut_off_is_missed(written):
    whole = written.read_bytes()
    written.write_bytes(whole[: whole.rindex(b"\nsha256 of the above")])
    with pytest.raises(ValueError, match="damaged: its end is missing"):
        read_checkpoint(written)


def test_weights_that_are_not_finite_are_refused_and_what_else_there_is_is_named(written, tiny):
    agent = Bamba(tiny(n_layers=1), EnvSpec(3, 1, (-1.0,), (1.0,)))
    logger.keep_previous(written)
    with torch.no_grad():
        agent.actor[0].weight[0, 0] = torch.nan
    save(written, agent, {"data": {"name": "walk"}})
    with pytest.raises(ValueError, match=r"not finite \(actor.0.weight\).*Beside it: last_checkpoint.prev.pt"):
        read_checkpoint(written)
    assert read_checkpoint(written.with_name("last_checkpoint.prev.pt"))["updates"] == 0


def test_the_one_before_is_kept(tmp_path):
    path = tmp_path / "a.pt"
    logger.keep_previous(path)  # there is none
    for text in ("one", "two", "three"):
        logger.keep_previous(path)
        with logger.atomic_write(path) as part:
            part.write_text(text)
    assert path.read_text() == "three" and (tmp_path / "a.prev.pt").read_text() == "two"
    logger.keep_previous(path)
    logger.keep_previous(path)  # again, as the write between the two failed
    assert {p.name for p in tmp_path.iterdir()} == {"a.pt", "a.prev.pt"}
    assert (tmp_path / "a.prev.pt").read_text() == "three"


def test_a_checkpoint_that_finds_no_room_leaves_the_old_one(tmp_path, tiny):
    if sys.platform == "win32":
        pytest.skip("limits are POSIX's")
    import resource

    path, agent = tmp_path / "last_checkpoint.pt", Bamba(tiny(), EnvSpec(4, 2, (-1.0,) * 2, (1.0,) * 2))
    save(path, agent, {})
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in (0, 1000, len(before) // 2, len(before) - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError):
                save(path, agent, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == [path.name]
