"""The words of an update, each on a few numbers."""

import copy
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import nn

from common.cuda_graph import CaptureError, CudaGraph, SideStream, draw_by_graph
from common.meter import Meter
from common.optim import TargetNetwork, adamw, clip, load_optimizer, set_lr, td_target, weighted_sum


def test_td_target_on_four_numbers():
    one = torch.ones(1)
    assert td_target(one, 0 * one, 10 * one, 0.9).item() == 1.0
    assert td_target(one, one, 10 * one, 0.9).item() == 10.0


def test_losses_and_weights_must_be_the_same_set():
    assert weighted_sum({"a": torch.tensor(2.0), "b": torch.tensor(1.0)}, {"a": 0.5, "b": 3.0}).item() == 4.0
    with pytest.raises(KeyError, match="b"):
        weighted_sum({"a": torch.tensor(2.0)}, {"a": 0.5, "b": 3.0})


def test_frozen_stays_frozen_and_follows_by_tau():
    parent = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))})
    parent["slow"] = TargetNetwork(parent["net"])
    parent.train()
    assert not parent["slow"].net.training and not any(p.requires_grad for p in parent["slow"].parameters())
    before = [p.clone() for p in parent["slow"].parameters()]
    with torch.no_grad():
        for p in parent["net"].parameters():
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, parent["slow"].parameters()))
    parent["slow"].polyak_update(parent["net"], 0.25)
    for a, b in zip(before, parent["slow"].parameters()):
        torch.testing.assert_close(a + 0.25, b)


def test_only_matrices_decay():
    net = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    net[0].weight._no_weight_decay = False
    special = nn.Linear(2, 2, bias=False)
    special.weight._no_weight_decay = True
    decay, rest = adamw([net, special], 0.1, torch.device("cpu")).param_groups
    assert [p.shape for p in decay["params"]] == [(3, 3)] and decay["weight_decay"] == 0.1
    assert len(rest["params"]) == 4 and rest["weight_decay"] == 0.0


def test_amsgrad_remembers_the_greatest_gradient():
    def last_step(amsgrad):
        net = nn.Linear(1, 1, bias=False)
        optimizer = adamw([net], 0.0, torch.device("cpu"), amsgrad)
        set_lr(optimizer, 1e-3, 0, 0)
        for g in [100.0] + [0.1] * 5000:
            before = net.weight.item()
            net.weight.grad = torch.full_like(net.weight, g)
            optimizer.step()
        return before - net.weight.item()

    assert last_step(True) < last_step(False) / 5


def test_warm_up_rises_to_the_peak_and_zero_steps_are_allowed():
    net = nn.Linear(1, 1)
    optimizer = adamw([net], 0.0, torch.device("cpu"))
    rates = []
    for update in range(6):
        set_lr(optimizer, 1.0, update, 4)
        rates.append(float(optimizer.param_groups[0]["lr"]))
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    set_lr(optimizer, 1.0, 0, 0)
    assert float(optimizer.param_groups[1]["lr"]) == 1.0
    before = net.weight.clone()
    net(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, net.weight)  # the very first update already learns


def test_clip_is_joint_and_returns_the_norm():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    a.weight.grad, b.weight.grad = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    assert clip([a, b], 1.0).item() == pytest.approx(5.0)
    assert a.weight.grad.item() == pytest.approx(0.6) and b.weight.grad.item() == pytest.approx(0.8)


def test_a_meters_blocks_are_invisible():
    meter, small = Meter(), Meter()
    small.BLOCK = 3
    for i in range(8):
        for m in (meter, small):
            m.add({"a": torch.tensor(float(i)), **({"b": torch.tensor(2.0 * i)} if i % 2 else {})}, i)
    assert meter.means() == small.means() == {"a": 3.5, "b": 8.0}


def test_a_meter_of_an_earlier_checkpoint_is_read():
    meter = Meter()
    meter.load_state_dict({"sums": {"a": torch.tensor(4.0)}, "counts": {"a": 2}, "bad": torch.tensor(-1)})
    meter.add({"a": torch.tensor(5.0)}, 3)
    assert meter.means() == {"a": 3.0}
    meter.load_state_dict({"sums": {"a": torch.tensor(torch.nan)}, "counts": {"a": 2}, "bad": torch.tensor(7)})
    with pytest.raises(FloatingPointError, match="update 7: a"):
        meter.means()


def test_meter_averages_each_metric_over_its_own_updates():
    meter = Meter()
    meter.add({"a": torch.tensor(1.0)}, 1)
    twin = Meter()
    twin.load_state_dict(meter.state_dict())
    for m in (meter, twin):
        m.add({"a": torch.tensor(3.0), "b": torch.tensor(5.0)}, 2)
    assert meter.means() == twin.means() == {"a": 2.0, "b": 5.0}
    assert meter.means() == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_meter_names_the_update_and_the_metric_that_is_not_finite(bad):
    meter = Meter()
    for update, value in enumerate([1.0, 2.0, bad, 4.0], start=10):
        meter.add({"fine": torch.tensor(0.0), "loss": torch.tensor(value)}, update)
    with pytest.raises(FloatingPointError, match=r"update 12: loss is not"):
        meter.means()


class FakeCuda:
    """CUDA graphs as far as `CudaGraph` uses them: what runs while capturing is recorded, a replay runs it again."""

    def __init__(self, monkeypatch, refuse: bool = False):
        self.log, self.recording = [], None

        class CUDAGraph:
            def replay(graph):
                self.log.append("replay")
                graph.record()

        @contextmanager
        def graph(g, pool, stream):
            if refuse:
                raise RuntimeError("operation not permitted when stream is capturing")
            self.recording = g
            yield
            self.recording = None

        stream = type("Stream", (), {"wait_stream": lambda *_: None})
        fakes = {"CUDAGraph": CUDAGraph, "graph": graph, "current_stream": stream, "graph_pool_handle": object}
        self.spawn_seeds = []
        fakes["Stream"] = lambda: self.spawn_seeds.append(stream()) or self.spawn_seeds[-1]
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())

    def step(self, batch, variant):
        """Doubles or negates the batch's number, eagerly or into the graph under capture."""
        out = {"y": torch.empty(())}

        def work():
            out["y"].copy_(batch.x * 2 if variant else -batch.x)

        if self.recording is not None:
            self.recording.record = work
        else:
            self.log.append("eager")
            work()
        return out


class Batch(NamedTuple):
    x: torch.Tensor


def test_every_call_reads_one_place_in_one_layout(monkeypatch):
    """What the compiler saw before the capture is what it sees in it: a column of a table is one, or a copy of it."""
    FakeCuda(monkeypatch)
    seen = []
    run = CudaGraph(lambda b, _: seen.append(b.x) or {"y": b.x})
    for i in range(5):
        run(Batch(torch.full((6, 3), float(i))[:, 1]), True) if i < 3 else seen.append(run.inputs.x)
    assert all(x is seen[0] and x.is_contiguous() for x in seen)


class Drawing:
    """A sampler on a card that is not there."""

    class generator:
        device = torch.device("cuda")

    def __init__(self):
        self.count = 0

    def sample(self, b: int) -> Batch:
        self.count += 1
        return Batch(torch.arange(2 * b).view(b, 2)[:, 0] + self.count)


def test_a_drawn_batch_is_read_where_it_lies(monkeypatch):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "register_generator_state", lambda *_: None, raising=False)
    sampler, seen = Drawing(), []
    draw_by_graph(sampler)

    def update(batch, variant):
        seen.append(batch)
        return {"y": batch.x.sum()}

    run = CudaGraph(update)
    drawn = [sampler.sample(4) for _ in range(3)]
    assert all(d.x.is_contiguous() and d.x[0] == i + 1 for i, d in enumerate(drawn))
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda g: None)
    later = [sampler.sample(4) for _ in range(3)]
    assert later[0] is later[1] is later[2]
    run(drawn[0], True)
    run(later[0], True)
    assert seen[0] is not drawn[0] and seen[1] is later[0]  # copied; in place
    kept = later[0].x.clone()
    run.graphs[True] = type("Graph", (), {"replay": lambda _: None})(), {}
    run(drawn[1], True)
    assert run.inputs is later[0] and not torch.equal(kept, later[0].x)


def test_a_side_that_was_not_entered_is_not_waited_for(monkeypatch):
    waits = []
    stream = type("Stream", (), {"wait_stream": lambda self, other: waits.append(other)})
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: stream())
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda s: nullcontext())
    side = SideStream(torch.device("cuda"))
    side.join()
    assert not waits
    with side:
        assert len(waits) == 1
    side.join()
    side.join()
    assert len(waits) == 2


def test_graphs_warm_up_capture_once_a_variant_and_read_new_batches(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    run = CudaGraph(cuda.step)
    for turn in range(6):
        for variant in (True, False):
            x = torch.tensor(float(turn + 1))
            assert run(Batch(x), variant)["y"].item() == (2 * x if variant else -x)
    assert cuda.log == ["eager"] * 6 + ["replay"] * 6 and len(run.graphs) == 2
    assert len(cuda.spawn_seeds) == 1  # for all calls before a capture and for the captures themselves


def test_a_refused_capture_ends_the_run_with_the_flag_that_helps(monkeypatch):
    cuda = FakeCuda(monkeypatch, refuse=True)
    run = CudaGraph(cuda.step)
    for i in range(3):
        run(Batch(torch.tensor(float(i))), True)
    with pytest.raises(CaptureError, match=r"not permitted when stream is capturing.*--no_cuda_graphs"):
        run(Batch(torch.tensor(3.0)), True)


@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_loaded_optimizer_keeps_its_own_rate_tensor_and_flags(amsgrad):
    """A captured graph reads the rate where the optimizer made it; `load_state_dict` alone would put another there."""

    def trained(steps: int):
        torch.manual_seed(1)
        net = torch.nn.Linear(3, 2)
        opt = adamw([net], 0.1, torch.device("cpu"), amsgrad)
        for i in range(steps):
            net(torch.full((4, 3), i + 1.0)).square().sum().backward()
            set_lr(opt, 1e-2, i, 5)
            opt.step()
        return net, opt

    net, opt = trained(4)
    state = copy.deepcopy(opt.state_dict())
    for group in state["param_groups"]:
        group["capturable"], group["fused"] = True, None  # as of another device
    other, fresh = trained(0)
    other.load_state_dict(net.state_dict())
    rate = fresh.param_groups[0]["lr"]
    load_optimizer(fresh, state)
    assert all(g["lr"] is rate and not g["capturable"] and g["fused"] for g in fresh.param_groups)
    assert rate == opt.param_groups[0]["lr"] > 0
    for a, o in ((net, opt), (other, fresh)):
        o.zero_grad()
        a(torch.ones(4, 3)).square().sum().backward()
        o.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters()))
