"""`--num_seeds`: each of several seeds in one process is the run that it would have been alone."""

import json
from dataclasses import fields

import pytest
import torch
from conftest import TINY, as_flags

import trainer
import utils
from common import logger
from common import run as runs
from config import CONFIGS

TINY_FLAGS = as_flags({**TINY, "n_layers": 1, "threads": 1, "device": "cpu"})


def flags(file, out, *more: str) -> list[str]:
    given = ["--dataset", str(file), "--output_dir", str(out), "--updates_per_epoch", "5", "--num_epochs", "4"]
    return [*TINY_FLAGS, *given, "--eval_freq", "2", "--num_eval_episodes", "2", "--no_tensorboard", *more]


def folders(out) -> list:
    return sorted(path.parent for path in out.rglob("last_checkpoint.pt"))


def together(file, out, *more: str):
    assert trainer.main(flags(file, out, "--num_seeds", "3", *more)) == 0
    (group,) = [p for p in out.iterdir() if p.is_dir()]
    return group


def assert_same_run(one, other, exact: bool = False) -> None:
    """Weights, moments, rows of the log and scores; the streams of data and noise are the same to the bit."""
    mine, theirs = utils.read_checkpoint(one), utils.read_checkpoint(other)
    close = dict(rtol=0, atol=0) if exact else dict(rtol=1e-3, atol=1e-5)
    for key in mine["agent"]:
        if not key.endswith("pool.score.2.bias"):  # a softmax does not feel it: its gradient is rounding
            torch.testing.assert_close(mine["agent"][key], theirs["agent"][key], **close, msg=key)
    assert mine["updates"] == theirs["updates"]
    for key in ("rng", "cuda_rng"):
        assert mine["run"][key] is theirs["run"][key] is None or torch.equal(mine["run"][key], theirs["run"][key])
    streams = [part["run"]["sampler"]["generator"] for part in (mine, theirs)]
    assert torch.equal(*streams)
    rows = [[r for r in logger.read_log(f / "log.jsonl") if r["update"]] for f in (one, other)]
    assert [r["update"] for r in rows[0]] == [r["update"] for r in rows[1]]
    for a, b in zip(*rows):
        assert a.keys() == b.keys()
        for k in a.keys() - {"seconds", "updates_per_s"}:
            assert a[k] == pytest.approx(b[k], rel=0 if exact else 1e-3, abs=0 if exact else 1e-4), k


@pytest.mark.slow
@pytest.mark.parametrize("agent", [[], ["--agent", "dt", "--n_heads", "2", "--drop_p", "0"]], ids=["bamba", "dt"])
def test_each_seed_is_the_run_it_would_have_been_alone(agent, hopper_file, tmp_path, capsys):
    known = {f.name for f in fields(CONFIGS[agent[1] if agent else "bamba"])}
    sizes = [f for f in TINY_FLAGS if f.removeprefix("--").removeprefix("no_").split("=")[0] in known]
    more = [f for f in flags(hopper_file, tmp_path / "alone") if f not in TINY_FLAGS or f in sizes]
    assert trainer.main([*more, *agent, "--seed", "8"]) == 0
    (alone,) = folders(tmp_path / "alone")
    argv = [f for f in flags(hopper_file, tmp_path / "seeds") if f not in TINY_FLAGS or f in sizes]
    assert trainer.main([*argv, *agent, "--seed", "7", "--num_seeds", "3"]) == 0
    group = folders(tmp_path / "seeds")
    assert [json.loads((f / "config.json").read_text())["config"]["seed"] for f in group] == [7, 8, 9]
    assert_same_run(group[1], alone)
    assert "mean of 3 seeds" in capsys.readouterr().out
    assert (tmp_path / "seeds" / "best_checkpoint.pt").exists()
    # and what is left evaluates like any other checkpoint
    assert utils.main(["--checkpoint", str(group[0]), "--episodes", "1"]) == 0


@pytest.mark.slow
def test_stopped_they_go_on_as_if_nothing_had_happened_together_or_alone(hopper_file, tmp_path, monkeypatch):
    calm = folders(together(hopper_file, tmp_path / "calm"))

    def stopping(self):
        update(self)
        if self.agent.updates == 7:
            raise KeyboardInterrupt

    update = runs.SeedsRun.update
    monkeypatch.setattr(runs.SeedsRun, "update", stopping)
    with pytest.raises(KeyboardInterrupt):
        together(hopper_file, tmp_path / "rough", "--save_freq", "1")
    monkeypatch.undo()
    (group,) = [p for p in (tmp_path / "rough").iterdir() if p.is_dir()]
    rough = folders(group)
    assert [utils.read_checkpoint(f)["updates"] for f in rough] == [5, 5, 5]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in rough[1].iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert trainer.main(["--resume", str(group)]) == 0
    for one, other in zip(rough, calm):
        assert_same_run(one, other, exact=True)
    assert trainer.main(["--resume", str(copy)]) == 0  # one of them goes on as a run of its own
    assert_same_run(copy, calm[1])
    # a longer run of all of them; but not after one went on alone
    assert trainer.main(["--resume", str(copy), "--num_epochs", "5"]) == 0
    (rough[1] / "last_checkpoint.pt").write_bytes((copy / "last_checkpoint.pt").read_bytes())
    with pytest.raises(SystemExit):
        trainer.main(["--resume", str(group), "--num_epochs", "6"])


@pytest.mark.parametrize(
    "more, words",
    [
        (["--trust", "explained"], "--trust explained"),
        (["--num_seeds", "0"], "num_seeds"),
        (["--agent", "dqn", "--env", "CartPole-v1"], "dqn takes one device and one seed"),
        (["--wandb"], "--wandb"),
    ],
)
def test_what_cannot_learn_together_says_so(more, words, hopper_file, tmp_path, capsys):
    argv = ["--num_seeds", "2", *more] if "--agent" in more else flags(hopper_file, tmp_path, "--num_seeds", "2", *more)
    with pytest.raises(SystemExit):
        trainer.main([*argv, "--output_dir", str(tmp_path)])
    assert words in capsys.readouterr().err and not list(tmp_path.iterdir())
