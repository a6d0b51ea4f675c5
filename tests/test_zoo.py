"""The zoo: every checkpoint is what its manifest says, and small; stripping leaves what acts as it did."""

import pytest
import torch
from test_utils import SPEC

import trainer
import utils
from agent import Bamba
from common import checkpoint, zoo
from common.files import sha256_of

ENTRIES = zoo.entries()


def test_the_zoo_is_whole_and_small():
    assert {e["file"] for e in ENTRIES} == {p.name for p in zoo.ZOO.glob("*.pt")}
    assert all(sha256_of(zoo.ZOO / e["file"]) == e["sha256"] for e in ENTRIES)
    assert sum(p.stat().st_size for p in zoo.ZOO.iterdir()) < 20_000_000


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda e: e["name"])
def test_an_agent_does_what_its_manifest_says(entry):
    """Three episodes of the hundred; simulators and processors differ a little."""
    pytest.importorskip("mujoco")
    path = str(zoo.ZOO / entry["file"])
    report = utils.evaluate_checkpoint(utils.EvalArgs(checkpoint=path, episodes=3, seed=entry["first_episode_seed"]))
    assert (report.ckpt["system"], report.ckpt["updates"]) == (entry["agent"], entry["updates"])
    assert report.row["eval/score"] > entry["score"] - 3 * entry["score_std"] - 5


def test_what_is_stripped_acts_as_before_and_cannot_be_resumed(tmp_path, tiny, capsys):
    agent = Bamba(tiny(eval_ema=0.9), SPEC)
    agent.obs_normalizer.fit(torch.randn(50, SPEC.state))
    whole, small = tmp_path / "last_checkpoint.pt", tmp_path / "zoo.pt"
    utils.save(whole, agent, {"data": {"name": "walk"}, "scores": [(1, 2.0)], "sampler": {"generator": 1}})
    state = torch.randn(4, SPEC.state)
    expected = agent.act(state, torch.zeros(4), agent.reset(4))[0]
    for half, tolerance in ((False, 0.0), (True, 5e-3)):
        checkpoint.write(small, zoo.for_acting(utils.read_checkpoint(whole), half))
        again, ckpt = utils.load(small)
        action = again.act(state, torch.zeros(4), again.reset(4))[0]
        torch.testing.assert_close(action, expected, rtol=0, atol=tolerance)
        assert ckpt["run"] == {"data": {"name": "walk"}, "scores": [(1, 2.0)]}
        assert again.actor[0].weight.dtype == torch.float32
    assert small.stat().st_size < whole.stat().st_size
    with pytest.raises(SystemExit):
        trainer.main(["--resume", str(zoo.ZOO / ENTRIES[0]["file"])])
    assert "was kept to act" in capsys.readouterr().err


def test_the_list(capsys, monkeypatch, tmp_path):
    assert utils.main(["--zoo"]) == 0
    said = capsys.readouterr().out
    assert all(f"zoo/{e['file']}" in said and f"{e['score']:.1f}" in said for e in ENTRIES)
    with pytest.raises(SystemExit):
        utils.main([])
    assert "give --checkpoint" in capsys.readouterr().err
    with pytest.raises(ValueError, match="there is no zoo at"):
        zoo.table(tmp_path)
