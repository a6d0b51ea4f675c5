"""The words of an update, each on a few numbers."""

import copy
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import nn

from learn import CaptureError, Frozen, Graphed, Meter, adamw, clip, load_optimizer, set_rate, td_target, weigh


def test_td_target_on_four_numbers():
    one = torch.ones(1)
    assert td_target(one, 0 * one, 10 * one, 0.9).item() == 1.0
    assert td_target(one, one, 10 * one, 0.9).item() == 10.0


def test_losses_and_weights_must_be_the_same_set():
    assert weigh({"a": torch.tensor(2.0), "b": torch.tensor(1.0)}, {"a": 0.5, "b": 3.0}).item() == 4.0
    with pytest.raises(KeyError, match="b"):
        weigh({"a": torch.tensor(2.0)}, {"a": 0.5, "b": 3.0})


def test_frozen_stays_frozen_and_follows_by_tau():
    parent = nn.ModuleDict({"net": nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))})
    parent["slow"] = Frozen(parent["net"])
    parent.train()
    assert not parent["slow"].net.training and not any(p.requires_grad for p in parent["slow"].parameters())
    before = [p.clone() for p in parent["slow"].parameters()]
    with torch.no_grad():
        for p in parent["net"].parameters():
            p.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, parent["slow"].parameters()))
    parent["slow"].follow(parent["net"], 0.25)
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
        optimiser = adamw([net], 0.0, torch.device("cpu"), amsgrad)
        set_rate(optimiser, 1e-3, 0, 0)
        for g in [100.0] + [0.1] * 5000:
            before = net.weight.item()
            net.weight.grad = torch.full_like(net.weight, g)
            optimiser.step()
        return before - net.weight.item()

    assert last_step(True) < last_step(False) / 5


def test_warm_up_rises_to_the_peak_and_zero_steps_are_allowed():
    net = nn.Linear(1, 1)
    optimiser = adamw([net], 0.0, torch.device("cpu"))
    rates = []
    for update in range(6):
        set_rate(optimiser, 1.0, update, 4)
        rates.append(float(optimiser.param_groups[0]["lr"]))
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    set_rate(optimiser, 1.0, 0, 0)
    assert float(optimiser.param_groups[1]["lr"]) == 1.0
    before = net.weight.clone()
    net(torch.ones(1, 1)).sum().backward()
    optimiser.step()
    assert not torch.equal(before, net.weight)  # the very first update already learns


def test_clip_is_joint_and_returns_the_norm():
    a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    a.weight.grad, b.weight.grad = torch.tensor([[3.0]]), torch.tensor([[4.0]])
    assert clip([a, b], 1.0).item() == pytest.approx(5.0)
    assert a.weight.grad.item() == pytest.approx(0.6) and b.weight.grad.item() == pytest.approx(0.8)


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
def test_meter_names_the_update_and_the_metric_that_left_the_real_line(bad):
    meter = Meter()
    for update, value in enumerate([1.0, 2.0, bad, 4.0], start=10):
        meter.add({"fine": torch.tensor(0.0), "loss": torch.tensor(value)}, update)
    with pytest.raises(FloatingPointError, match=r"update 12: loss left"):
        meter.means()


class FakeCuda:
    """CUDA graphs as far as `Graphed` uses them: what runs while capturing is recorded, a replay runs it again."""

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
        self.streams = []
        fakes["Stream"] = lambda: self.streams.append(stream()) or self.streams[-1]
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


def test_graphs_warm_up_capture_once_a_variant_and_read_new_batches(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    run = Graphed(cuda.step)
    for turn in range(6):
        for variant in (True, False):
            x = torch.tensor(float(turn + 1))
            assert run(Batch(x), variant)["y"].item() == (2 * x if variant else -x)
    assert cuda.log == ["eager"] * 6 + ["replay"] * 6 and len(run.graphs) == 2
    assert len(cuda.streams) == 1  # for all calls before a capture and for the captures themselves


def test_a_refused_capture_ends_the_run_with_the_flag_that_helps(monkeypatch):
    cuda = FakeCuda(monkeypatch, refuse=True)
    run = Graphed(cuda.step)
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
            set_rate(opt, 1e-2, i, 5)
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
