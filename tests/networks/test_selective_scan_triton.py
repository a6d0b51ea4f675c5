"""The scan's Triton kernels against its definition in float64: on a GPU, or in Triton's interpreter on a CPU."""

import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from networks import selective_scan

ROOT = Path(__file__).parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
LENGTHS = [1, 19, 20, 21, 60, 61]  # around one chunk of 20 tokens, and around three
on_gpu = pytest.mark.skipif(not (torch.cuda.is_available() and HAS_TRITON), reason="needs a GPU and Triton")


def make_inputs(rows, length, channels, states, device):
    """x, dt, A, B, C and a gradient of y, none of them contiguous: B and C as `split` leaves them, x time first."""
    BC = torch.randn(rows, length, 2 * states + 3, device=device)[..., 3:]
    x, dt = torch.randn(length, rows, channels, device=device).transpose(0, 1), torch.rand(rows, length, channels + 1)
    A = -3 * torch.rand(states, channels, device=device).T
    gy = torch.randn(rows, length, 1, device=device).expand(rows, length, channels)
    return [x, dt.to(device)[..., 1:], A, *BC.split([states, states], -1)], gy


def scan_and_gradients(scan, inputs, gy):
    inputs = [t.detach().requires_grad_() for t in inputs]
    y = scan(*inputs)
    return [y, *torch.autograd.grad(y, inputs, gy)]


def assert_is_the_loop(results, inputs, gy):
    """To 1e-5 of the largest number of each: y and the gradients of x, dt, A, B, C."""
    truth = scan_and_gradients(selective_scan.selective_scan_loop, [t.double() for t in inputs], gy.double())
    for name, found, expected in zip(("y", "x", "dt", "A", "B", "C"), results, truth):
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            found.double(), expected, rtol=0, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}, {tuple(gy.shape)}: {m}"
        )


@pytest.fixture
def calls(monkeypatch):
    """The names of the kernels' functions, in the order in which the operations call them."""
    from networks import selective_scan_triton

    names = []
    for name in ("scan", "scan_backward"):
        function = getattr(selective_scan_triton, name)
        monkeypatch.setattr(selective_scan_triton, name, lambda *a, f=function, n=name: names.append(n) or f(*a))
    return names


@pytest.mark.cuda
@on_gpu
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels", [5, 64, 300])
def test_the_kernels_are_the_loop(calls, length, channels):
    for states, rows in itertools.product((1, 4, 6, 16, 64), (1, 3)):
        inputs, gy = make_inputs(rows, length, channels, states, "cuda")
        for given in (inputs, [t.contiguous() for t in inputs]):
            assert_is_the_loop(scan_and_gradients(selective_scan.selective_scan, given, gy), given, gy)
    assert calls == ["scan", "scan_backward"] * 20


@pytest.mark.cuda
@on_gpu
def test_a_cuda_graph_records_the_kernels(calls):
    inputs, gy = make_inputs(3, 47, 40, 16, "cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles
        scan_and_gradients(selective_scan.selective_scan, inputs, gy)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = scan_and_gradients(selective_scan.selective_scan, inputs, gy)
    for new in (make_inputs(3, 47, 40, 16, "cuda")[0] for _ in range(2)):
        for t, values in zip(inputs, new):
            t.copy_(values)
        graph.replay()
        assert_is_the_loop(results, inputs, gy)
        again = [t.clone() for t in results]
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, again))  # sums in a fixed order
    assert calls == ["scan", "scan_backward"] * 2


@pytest.mark.cuda
@on_gpu
def test_autocast_does_not_reach_them_and_float64_is_not_theirs(calls):
    inputs, gy = make_inputs(2, 23, 8, 4, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        assert_is_the_loop(scan_and_gradients(selective_scan.selective_scan, inputs, gy), inputs, gy)
    assert calls == ["scan", "scan_backward"]
    doubles = [t.double() for t in inputs]
    assert_is_the_loop(scan_and_gradients(selective_scan.selective_scan, doubles, gy.double()), doubles, gy)
    assert len(calls) == 2


@pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
@pytest.mark.skipif(np.lib.NumpyVersion(np.__version__) >= "2.4.0", reason="Triton 3.6's interpreter needs numpy < 2.4")
def test_the_interpreted_kernels_are_the_loop():
    """In a process of its own: whether kernels are compiled or interpreted is settled when they are imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.run([sys.executable, __file__], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_cpu_does_without_them():
    assert not selective_scan.on_triton(torch.zeros(1))


if __name__ == "__main__":
    selective_scan.on_triton = lambda x: x.dtype == torch.float32  # on a CPU too
    for rows, length, channels, states in [(1, 1, 5, 4), (3, 21, 40, 6), (1, 61, 33, 16), (2, 40, 8, 1)]:
        inputs, gy = make_inputs(rows, length, channels, states, "cpu")
        assert_is_the_loop(scan_and_gradients(selective_scan.selective_scan, inputs, gy), inputs, gy)
