"""Several processes train as one would with all their batches."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, as_flags

import agent as bamba
import decision_transformer
import trainer
from common import distributed
from common.checkpoint import read_checkpoint
from common.interface import EnvSpec
from common.windows import SegmentSampler, SequenceSampler, WindowSampler
from config import CONFIGS
from d4rl_utils import read_hdf5

SPEC = EnvSpec(11, 3, (-1.0,) * 3, (1.0,) * 3)
KINDS = {
    "bamba": dict(agent="bamba", action_noise=0.0),
    "segments": dict(agent="bamba", action_noise=0.0, train_on="segments", objective="rebrac", trust="explained"),
    "dt": dict(agent="dt"),
    "dm": dict(agent="dm", refresh_every=2),
}


def make(kind: str, file):
    """An agent without noise, and eight rows for each of six updates: (agent, how to take rows out of its sampler)."""
    changes = dict(KINDS[kind])
    config = CONFIGS[changes.pop("agent")]
    names = set(config.__dataclass_fields__)
    sizes = {k: v for k, v in (TINY | {"context_length": 4}).items() if k in names}
    cfg = config(**{**sizes, "drop_p": 0.0, "dataset": str(file), "device": "cpu", **changes})
    torch.manual_seed(0)
    data = read_hdf5(file).transitions
    if config is CONFIGS["bamba"]:
        agent = bamba.Bamba(cfg, SPEC)
        sampler = (SegmentSampler if cfg.train_on == "segments" else WindowSampler)(data, agent.k, "cpu", 0, gamma=0.9)
    else:
        agent = decision_transformer.DecisionAgent(cfg, SPEC)
        sampler = SequenceSampler(data, cfg.context_length, "cpu", 0)
    agent.fit_normalizer(sampler)
    rows = torch.randint(400, (6, 8), generator=torch.Generator().manual_seed(1))
    return agent.train(), [sampler.at(r) for r in rows]


def part(batch, rank: int):
    """This process's half."""
    return type(batch)(*(x[4 * rank : 4 * rank + 4] if torch.is_tensor(x) else x for x in batch))


def train_half(rank: int, kind: str, file, place, out) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
    agent, batches = make(kind, file)
    for batch in batches:
        agent.update(part(batch, rank))
    torch.save(agent.state_dict(), f"{out}.{rank}")
    distributed.leave()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_are_one_with_both_batches(kind, hopper_file, tmp_path):
    agent, batches = make(kind, hopper_file)
    born = {k: v.clone() for k, v in agent.state_dict().items()}
    for batch in batches:
        agent.update(batch)
    out = tmp_path / "weights"
    torch.multiprocessing.spawn(train_half, (kind, hopper_file, tmp_path / "meet", out), nprocs=2)
    first, second = (torch.load(f"{out}.{rank}") for rank in (0, 1))
    for name, one in agent.state_dict().items():
        if not name.endswith("pool.score.2.bias"):  # a softmax does not feel it: its gradient is rounding, which Adam
            torch.testing.assert_close(first[name], one, rtol=1e-5, atol=1e-5, msg=name)  # blows up to whole steps
        assert torch.equal(first[name], second[name]), name
    assert any(not torch.allclose(v, born[k], atol=1e-4) for k, v in agent.state_dict().items())


def torchrun(*argv: str, **popen) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "trainer.py"]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, *argv], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **popen
    )


@pytest.mark.slow
def test_a_run_by_torchrun_has_one_folder_and_resumes(hopper_file, tmp_path):
    """Stopped in the middle and resumed, it ends with the weights of one that was not; and by python it is refused."""
    sizes = as_flags(TINY) + ["--threads=1", "--no_tensorboard", "--eval_freq=0"]
    flags = ["--env", "hopper", "--dataset", str(hopper_file), "--updates_per_epoch=20", *sizes]
    whole = torchrun(*flags, "--num_epochs=3", f"--output_dir={tmp_path / 'whole'}")
    short = torchrun(*flags, "--num_epochs=2", f"--output_dir={tmp_path / 'parts'}")
    assert whole.wait(120) == 0, whole.stdout.read()
    assert short.wait(120) == 0, short.stdout.read()
    folder = next(p for p in (tmp_path / "parts").iterdir() if p.is_dir())
    assert len([p for p in (tmp_path / "parts").iterdir() if p.is_dir()]) == 1
    again = torchrun("--resume", str(folder), "--num_epochs=3")
    assert again.wait(120) == 0, again.stdout.read()
    one, two = (read_checkpoint(tmp_path / name / "best_checkpoint.pt") for name in ("whole", "parts"))
    assert one["updates"] == two["updates"] == 60
    assert all(torch.equal(one["agent"][k], two["agent"][k]) for k in one["agent"])
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [r["update"] for r in rows] == [0, 20, 40, 60]
    assert trainer_says(["--resume", str(folder), "--num_epochs=4"], "torchrun --nproc_per_node 2")


def trainer_says(argv: list[str], words: str) -> bool:
    ran = subprocess.run([sys.executable, "trainer.py", *argv], cwd=ROOT, capture_output=True, text=True)
    return ran.returncode != 0 and words in ran.stderr and "Traceback" not in ran.stderr


@pytest.mark.slow
def test_a_signal_stops_all_processes_after_the_same_update(hopper_file, tmp_path):
    sizes = as_flags(TINY) + ["--threads=1", "--no_tensorboard", "--eval_freq=0"]
    flags = ["--env", "hopper", "--dataset", str(hopper_file), "--updates_per_epoch=20", *sizes]
    run = torchrun(*flags, f"--output_dir={tmp_path}")
    until, log = time.time() + 60, None
    while not log and time.time() < until:
        time.sleep(0.2)
        log = next((p for p in tmp_path.glob("*/log.jsonl") if len(p.read_text().splitlines()) > 1), None)
    run.send_signal(signal.SIGTERM)
    run.wait(60)
    saved = read_checkpoint(log.parent)
    assert saved["updates"] % trainer.STOP_CHECK == 0 and len(saved["run"]["processes"]) == 2


def test_what_several_processes_cannot_do_is_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(distributed, "is_launched", lambda: True)
    for argv in (["--agent", "dqn"], ["--agent", "opso"]):
        with pytest.raises(SystemExit) as end:
            trainer.main([*argv, "--output_dir", str(tmp_path)])
        assert end.value.code != 0
        said = capsys.readouterr().err + str(end.value)
        assert "bamba, dt, dmamba and dm can take several" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one device"):
        distributed.join("cuda:1")


def test_alone_it_does_nothing(hopper_file):
    agent, batches = make("bamba", hopper_file)
    agent.update(batches[0])
    before = [p.grad.clone() for p in agent.critic.parameters()]
    distributed.average_gradients([agent.critic])
    assert all(torch.equal(a, p.grad) for a, p in zip(before, agent.critic.parameters()))
    assert distributed.mean_metrics({"a": 1.5}, torch.device("cpu")) == {"a": 1.5}
    assert distributed.join("cpu") == "cpu" and distributed.rank() == 0 and distributed.size() == 1
