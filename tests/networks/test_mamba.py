"""The state-space layers: every fast face against its slow twin, and the whole against code that we did not write."""

import copy
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from networks import mamba, selective_scan
from networks.mamba import Mamba1, Mamba2, describe_backend, resolve_backend

LENGTHS = [1, 2, 3, 4, 5, 20, 64, 257]  # W - 1, W and W + 1 are 3, 4 and 5
LAYERS = [lambda **k: Mamba2(16, d_state=8, headdim=8, **k), lambda **k: Mamba1(16, d_state=4, **k)]


def needs_kernels(backend):
    missing = not torch.cuda.is_available() or bool(mamba.kernels_missing(backend))
    return pytest.mark.skipif(missing, reason=f"needs a GPU and {backend}")


both = pytest.mark.parametrize("make", LAYERS, ids=["mamba2", "mamba1"])


def ssd_inputs(length, dtype=torch.float32):
    """x, dt, A, B, C of 2 rows, 3 heads of width 4, 6 states."""
    x, B, C = (torch.randn(2, length, *s, dtype=dtype) for s in ((3, 4), (6,), (6,)))
    return x, torch.rand(2, length, 3, dtype=dtype), -4 * torch.rand(3, dtype=dtype) - 0.1, B, C


def unroll(layer, u):
    """`step` over all of u (n, L, D), and the last state."""
    state, ys = layer.init_state(len(u)), []
    for u_t in u.unbind(1):
        y, state = layer.step(u_t, state)
        ys.append(y)
    return torch.stack(ys, 1), state


def plain_mamba2(p, u, headdim):
    """The paper's equations in scalars' order: a loop over rows, time and heads. p: a state dict, u (B, L, D)."""
    H, E, channels = len(p["D"]), len(p["norm.weight"]), len(p["conv1d.bias"])
    z, xBC, dt = (u @ p["in_proj.weight"].T).split([E, channels, H], -1)
    xBC = F.conv1d(xBC.mT, p["conv1d.weight"], p["conv1d.bias"], padding=3, groups=channels)[..., : u.shape[1]].mT
    xBC = xBC * xBC.sigmoid()
    dt = (1 + (dt + p["dt_bias"]).exp()).log()
    rows = []
    for b in range(len(u)):
        S, ys = [0.0] * H, []
        for t in range(u.shape[1]):
            x, B, C = xBC[b, t].split([E, (channels - E) // 2, (channels - E) // 2])
            x, y = x.view(H, headdim), []
            for h in range(H):
                S[h] = torch.exp(-dt[b, t, h] * p["A_log"][h].exp()) * S[h] + dt[b, t, h] * torch.outer(x[h], B)
                y.append(S[h] @ C + p["D"][h] * x[h])
            y = torch.cat(y) * z[b, t] * z[b, t].sigmoid()
            ys.append(p["out_proj.weight"] @ (y / (y.square().mean() + 1e-5).sqrt() * p["norm.weight"]))
        rows.append(torch.stack(ys))
    return torch.stack(rows)


def plain_mamba1(p, u, _):
    E, N = p["A_log"].shape
    x, z = (u @ p["in_proj.weight"].T).chunk(2, -1)
    x = F.conv1d(x.mT, p["conv1d.weight"], p["conv1d.bias"], padding=3, groups=E)[..., : u.shape[1]].mT
    x = x * x.sigmoid()
    dt, B, C = (x @ p["x_proj.weight"].T).split([p["dt_proj.weight"].shape[1], N, N], -1)
    dt = (1 + (dt @ p["dt_proj.weight"].T + p["dt_proj.bias"]).exp()).log()
    rows = []
    for b in range(len(u)):
        h, ys = 0.0, []
        for t in range(u.shape[1]):
            h = torch.exp(-dt[b, t, :, None] * p["A_log"].exp()) * h + torch.outer(dt[b, t] * x[b, t], B[b, t])
            ys.append(p["out_proj.weight"] @ ((h @ C[b, t] + p["D"] * x[b, t]) * z[b, t] * z[b, t].sigmoid()))
        rows.append(torch.stack(ys))
    return torch.stack(rows)


# -- the faces agree --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", LENGTHS)
def test_dual_and_chunked_are_the_recurrence(length):
    inputs = ssd_inputs(length)
    slow = mamba.ssd_recurrent(*inputs)
    torch.testing.assert_close(mamba.ssd_dual(*inputs), slow, rtol=1e-4, atol=3e-4)
    for chunk_size in (1, 7, 64):
        torch.testing.assert_close(mamba.ssd_chunked(*inputs, chunk_size), slow, rtol=1e-4, atol=1e-4)


@both
@pytest.mark.parametrize("length", LENGTHS)
def test_step_by_step_is_the_parallel_forward(make, length):
    layer, u = make(), torch.randn(2, length, 16)
    torch.testing.assert_close(unroll(layer, u)[0], layer(u), rtol=1e-4, atol=1e-5)


def test_forward_changes_from_dual_to_chunked_where_it_says(monkeypatch):
    calls = []
    for name in ("ssd_dual", "ssd_chunked"):
        face = getattr(mamba, name)
        monkeypatch.setattr(mamba, name, lambda *a, face=face, name=name: calls.append(name) or face(*a))
    layer = LAYERS[0](chunk_size=8)
    layer(torch.randn(1, mamba.DUAL_MAX, 16))
    assert calls == ["ssd_dual"]
    layer(torch.randn(1, mamba.DUAL_MAX + 1, 16))
    assert calls == ["ssd_dual", "ssd_chunked", "ssd_dual"]


@both
@pytest.mark.parametrize("length", [1, 3, 4, 5, 20, 130])
def test_values_and_gradients_are_those_of_a_plain_loop_in_float64(make, length):
    """float64: the two are the same map. float32: to rounding. 130 is past DUAL_MAX: the chunked face."""
    layer = make().double()
    plain, u = plain_mamba2 if isinstance(layer, Mamba2) else plain_mamba1, torch.randn(2, length, 16).double()
    weights = {k: v.detach().clone().requires_grad_() for k, v in layer.state_dict().items()}
    out, pull = plain(weights, u, 8), torch.randn(2, length, 16).double()
    truth = torch.autograd.grad((out * pull).sum(), list(weights.values()))
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        layer = layer.to(dtype)
        layer.zero_grad()
        y = layer(u.to(dtype))
        assert y.dtype == dtype
        (y * pull.to(dtype)).sum().backward()
        torch.testing.assert_close(y.double(), out, rtol=tolerance, atol=tolerance)
        gradients = {k: v.grad for k, v in layer.named_parameters()}
        for name, expected in zip(weights, truth):
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                gradients[name].double(), expected, rtol=tolerance, atol=tolerance * scale, msg=lambda m, n=name: n + m
            )


@pytest.mark.parametrize("chunk, block", [(1, 1), (4, 300), (20, 10**9), (50, 10**9)])
def test_the_fast_scan_is_the_loop_and_so_are_its_gradients(monkeypatch, chunk, block):
    """E2: whatever the chunks of time and the blocks of rows; strided inputs as `split` leaves them."""
    monkeypatch.setattr(selective_scan, "CHUNK", chunk), monkeypatch.setattr(selective_scan, "BLOCK", block)
    for length in (1, 3, 20, 23):
        x, BC = torch.randn(5, length, 8), torch.randn(5, length, 8)
        given = [x, torch.rand(5, length, 8), -3 * torch.rand(8, 4), *BC.split([4, 4], -1)]
        for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4)):
            inputs, results = [t.to(dtype).requires_grad_() for t in given], []
            pull = torch.randn(5, length, 8).to(dtype)
            for face in (selective_scan.selective_scan, selective_scan.selective_scan_loop):
                y = face(*inputs)
                results.append([y, *torch.autograd.grad(y, inputs, pull)])
            for a, b in zip(*results):
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_the_fast_scan_is_what_autograd_and_the_compiler_take_it_for():
    given = [torch.randn(2, 5, 3), torch.rand(2, 5, 3), -torch.rand(3, 2), torch.randn(2, 5, 2), torch.randn(2, 5, 2)]
    given = tuple(t.double().requires_grad_() for t in given)
    assert torch.autograd.gradcheck(selective_scan.selective_scan, given)
    torch.library.opcheck(selective_scan._scan, given, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("scan", [selective_scan.selective_scan, selective_scan.selective_scan_last])
def test_autocast_does_not_reach_inside_a_scan(scan):
    """It rounded the inputs of the products in there to bfloat16: an error of 3e-3 instead of 1e-7."""
    given, results = [torch.randn(2, 30, 8), torch.rand(2, 30, 8), -torch.rand(8, 4)], []
    given += [
        torch.randn(2, 30, 4),
        torch.randn(2, 30, 4) if scan is selective_scan.selective_scan else torch.randn(2, 4),
    ]
    for enabled in (False, True):
        inputs = [t.clone().requires_grad_() for t in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = scan(*inputs)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results))


@pytest.mark.parametrize("cuts", [[5], [1, 4], [2, 2, 1], [3, 2]])
def test_a_few_tokens_at_a_time_are_all_at_once(cuts):
    layer, u = LAYERS[1](), torch.randn(2, 5, 16)
    state, ys = layer.init_state(2), []
    for part in u.split(cuts, 1):
        y, state = layer.step_tokens(part, state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), layer(u), rtol=1e-4, atol=1e-5)
    unreal = torch.tensor([[0.0, 1.0, 1.0]]).expand(2, 3)  # a first token that leaves no trace
    y, one = layer.step_tokens(torch.cat([torch.randn(2, 1, 16), u[:, :2]], 1), layer.init_state(2), unreal)
    two, other = layer.step_tokens(u[:, :2], layer.init_state(2))
    torch.testing.assert_close(y[:, 1:], two)
    torch.testing.assert_close(one, other)


# -- against code that we did not write -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("length", [3, 20, 130])
def test_mamba2_is_transformers_mamba2(length):
    pytest.importorskip("transformers")
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    config = Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=8, n_groups=1, expand=2, conv_kernel=4, chunk_size=16
    )
    theirs, ours, u = Mamba2Mixer(config, 0).eval(), LAYERS[0](chunk_size=16), torch.randn(2, length, 16)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(u), theirs(u), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("length", [3, 20])
def test_mamba1_is_transformers_mamba(length):
    pytest.importorskip("transformers")
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    config = MambaConfig(hidden_size=16, state_size=4, expand=2, conv_kernel=4, time_step_rank=1, use_mambapy=False)
    theirs, ours, u = MambaMixer(config, 0).eval(), LAYERS[1](), torch.randn(2, length, 16)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours(u), theirs(u), rtol=1e-3, atol=1e-6)


@pytest.mark.cuda
@needs_kernels("fla")
@pytest.mark.parametrize("length", [20, 300])
def test_fla_is_ours(length):
    ours, theirs = Mamba2(64, backend="torch").cuda(), Mamba2(64, backend="fla").cuda()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    u, found = torch.randn(2, length, 64, device="cuda"), []
    for layer in (ours, theirs):
        y = layer(u)
        y.square().sum().backward()
        found.append((y, layer.in_proj.weight.grad, layer.A_log.grad))
    for a, b in zip(*found):
        assert (a - b).norm() < 1e-2 * a.norm()  # its products are tf32


def test_fla_is_asked_for_the_same_map(monkeypatch):
    """Without the package: in its place stands what its documentation says that it computes."""

    def chunk_simple_gla(q, k, v, g, scale):
        state, out = torch.zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3], dtype=v.dtype), []
        for t in range(q.shape[1]):
            state = g[:, t].exp()[..., None, None] * state + k[:, t][..., None] * v[:, t][..., None, :]
            out.append(scale * (q[:, t][..., None] * state).sum(-2))
        return torch.stack(out, 1), None

    module = types.ModuleType("fla.ops.simple_gla")
    module.chunk_simple_gla = chunk_simple_gla
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "fla.ops.simple_gla", module)
    x, dt, A = torch.randn(2, 30, 3, 4).double(), torch.rand(2, 30, 3).double(), -torch.rand(3).double()
    B, C = torch.randn(2, 2, 30, 5).double()
    torch.testing.assert_close(mamba.ssd_fla(x, dt, A, B, C), mamba.ssd_dual(x, dt, A, B, C))


@pytest.mark.cuda
@needs_kernels("mamba_ssm")
@pytest.mark.parametrize("make", [lambda b: Mamba2(64, backend=b), lambda b: Mamba1(64, backend=b)])
@pytest.mark.parametrize("autocast", [False, True])
def test_kernels_are_ours(make, autocast):
    ours, theirs = make("torch").cuda(), make("mamba_ssm").cuda()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    u, gradients = torch.randn(2, 300, 64, device="cuda"), []
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        outputs = ours(u), theirs(u)
    for layer, y in zip((ours, theirs), outputs):
        y.float().square().sum().backward()
        gradients.append(layer.in_proj.weight.grad)
    for a, b in (outputs, gradients):
        assert (a - b).norm() < 2e-2 * a.norm()


# -- what a sequence layer owes its user ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("length", [5, 40, 130])
def test_the_future_does_not_change_the_past(make, length):
    layer, u = make(), torch.randn(2, length, 16)
    for t in (1, length // 2, length - 1):
        changed = u.clone()
        changed[:, t:] += 1.0
        assert torch.equal(layer(changed)[:, :t], layer(u)[:, :t])
        assert not torch.equal(layer(changed)[:, t], layer(u)[:, t])


@both
@pytest.mark.parametrize("length", [5, 64, 130])
def test_bfloat16_autocast_is_close(make, length):
    layer, u = make(), torch.randn(4, length, 16)
    y = layer(u)
    with torch.autocast("cpu", torch.bfloat16):
        short, (stepped, state) = layer(u), unroll(layer, u)
    assert short.dtype == torch.bfloat16 and state.ssm.dtype == torch.float32
    assert (short - y).norm() < 1e-2 * y.norm()
    assert (stepped - y).norm() < 1e-2 * y.norm()


@both
@pytest.mark.parametrize("length", [5, 90, 130])
def test_a_module_in_bfloat16_still_sums_in_float32(make, length):
    layer, u = make().bfloat16(), torch.randn(4, length, 16).bfloat16()
    with torch.no_grad():  # long sums of large numbers, and no skip to hide them
        (layer.dt_bias if isinstance(layer, Mamba2) else layer.dt_proj.bias).zero_()
        layer.D.zero_()
    truth = copy.deepcopy(layer).double()(u.double())
    y, (stepped, state) = layer(u), unroll(layer, u)
    assert y.dtype == stepped.dtype == torch.bfloat16 and state.ssm.dtype == state.conv.dtype == torch.float32
    assert (y - truth).norm() < 1e-2 * truth.norm() and (stepped - truth).norm() < 1e-2 * truth.norm()


@both
@pytest.mark.parametrize("size", [-1e30, -1e4, 1e4, 1e30])
def test_huge_delta_is_finite(make, size):
    layer, u = make(), torch.randn(2, 130, 16)
    bias = layer.dt_bias if isinstance(layer, Mamba2) else layer.dt_proj.bias
    for length in (5, 130):
        with torch.no_grad():
            bias.fill_(size)
        layer.zero_grad()
        y = layer(u[:, :length])
        (y.sum() if size < 1e5 else y.sum() * 0).backward()
        assert y.isfinite().all() and all(p.grad.isfinite().all() for p in layer.parameters() if size < 1e5)


def test_a_reset_costs_no_precision_afterwards():
    x, dt, A, B, C = ssd_inputs(20)
    dt[:, 5] = 1e6  # forget everything
    torch.testing.assert_close(
        mamba.ssd_dual(x, dt, A, B, C)[:, 6:], mamba.ssd_recurrent(x, dt, A, B, C)[:, 6:], rtol=1e-3, atol=1e-3
    )


@both
def test_step_leaves_its_input_alone(make):
    layer, u = make(), torch.randn(3, 2, 16)
    start = layer.init_state(3)
    assert start.conv.shape[-1] == 4 and not start.conv.any() and not start.ssm.any()
    _, first = layer.step(u[:, 0], start)
    kept = [t.detach().clone() for t in first]
    y, second = layer.step(u[:, 1], first)
    again, _ = layer.step(u[:, 1], first)
    assert torch.equal(y, again) and not start.conv.any() and not start.ssm.any()
    assert all(torch.equal(a, b) for a, b in zip(first, kept)) and not torch.equal(first.ssm, second.ssm)
    assert (
        make().double().init_state(1).ssm.dtype == torch.float64
        and make().bfloat16().init_state(1).ssm.dtype == torch.float32
    )


@pytest.mark.slow
def test_compiled_is_eager():
    """At this length compiling also changes the dual form to sums. The backward is checked without code generation."""
    layer, u, results = LAYERS[0](), torch.randn(2, 5, 16), []
    for f in (layer, torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")):
        layer.zero_grad()
        y = f(u)
        y.square().sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters())])
    with torch.no_grad():
        results[0].append(layer(u))
        results[1].append(torch.compile(layer, fullgraph=True, dynamic=False)(u))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@both
def test_forward_and_step_are_one_graph(make):
    """108 is past DUAL_MAX: the chunked face, and no multiple of its chunks."""
    layer, u = make(), torch.randn(2, 108, 16)
    whole = dict(fullgraph=True, dynamic=False, backend="eager")
    length = 108 if make is LAYERS[0] else 5
    torch.compile(layer, **whole)(u[:, :length])
    torch.compile(layer.step, **whole)(u[:, 0], layer.init_state(2))


def test_looking_for_kernels_does_not_break_the_graph():
    f = torch.compile(lambda x: x - 1 if mamba.kernels_missing("mamba_ssm") else x + 1, fullgraph=True, backend="eager")
    assert f(torch.zeros(())).item() == (-1 if mamba.kernels_missing("mamba_ssm") else 1)


# -- birth ------------------------------------------------------------------------------------------------------------


def shapes(layer):
    return {k: tuple(v.shape) for k, v in layer.state_dict().items()}


def test_names_and_shapes_are_mamba_ssm_s_and_running_keeps_them():
    d2 = {
        "in_proj.weight": (84, 16), "conv1d.weight": (48, 1, 4), "conv1d.bias": (48,), "dt_bias": (4,), "A_log": (4,),
        "D": (4,), "norm.weight": (32,), "out_proj.weight": (16, 32),
    }  # fmt: skip
    d1 = {
        "in_proj.weight": (64, 16), "conv1d.weight": (32, 1, 4), "conv1d.bias": (32,), "x_proj.weight": (9, 32),
        "dt_proj.weight": (32, 1), "dt_proj.bias": (32,), "A_log": (32, 4), "D": (32,), "out_proj.weight": (16, 32),
    }  # fmt: skip
    for make, expected in zip(LAYERS, (d2, d1)):
        layer = make()
        assert shapes(layer) == expected
        before = copy.deepcopy(layer.state_dict())
        unroll(layer, torch.randn(2, 5, 16))
        layer(torch.randn(2, 5, 16)).sum().backward()
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items()) and shapes(layer) == expected


def test_initial_values():
    two, one = Mamba2(256, headdim=4), Mamba1(256)
    for bias in (two.dt_bias, one.dt_proj.bias):
        dt = F.softplus(bias.detach().double())
        assert dt.min() > 0.99e-3 and dt.max() < 1.01e-1
        assert abs(dt.log().mean() - math.log(1e-2)) < 0.3  # log-uniform: its middle is the geometric one
    assert two.A_log.exp().min() >= 1 and two.A_log.exp().max() <= 16 and 7 < two.A_log.exp().mean() < 10
    torch.testing.assert_close(one.A_log[3].exp(), torch.arange(1.0, 17))
    assert one.dt_proj.weight.shape == (512, 16) and 0.24 < one.dt_proj.weight.abs().max() <= 0.25
    assert (two.D == 1).all() and (one.D == 1).all() and (two.norm.weight == 1).all() and two.norm.eps == 1e-5
    for layer, names in ((two, {"A_log", "D", "dt_bias"}), (one, {"A_log", "D", "dt_proj.bias"})):
        assert {k for k, p in layer.named_parameters() if getattr(p, "_no_weight_decay", False)} == names
    assert all(p.isfinite().all() for layer in (two, one) for p in layer.parameters())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Mamba2(100), r"2 \* 100 = 200 .* headdim = 64: .*d_model: 96 or 128; .*headdim: 50 or 100"),
        (lambda: Mamba2(8), r"nearest d_model: 32; the nearest headdim: 16"),
        (lambda: Mamba2(64, d_state=0), "d_state must be a whole number of at least 1, not 0"),
        (lambda: Mamba2(64, chunk_size=0), "chunk_size"),
        (lambda: Mamba1(64, d_conv=2.5), "d_conv .* not 2.5"),
        (lambda: Mamba1(64, dt_rank=0), "dt_rank"),
        (lambda: Mamba1(64, backend="cuda"), "one of auto, torch, mamba_ssm, fla, not 'cuda'"),
        (lambda: Mamba1(64, backend="fla"), "fla is for Mamba-2"),
        (lambda: resolve_backend("fla", "cpu", 512), "on cpu, not on CUDA.*pip install flash-linear-attention"),
        (lambda: resolve_backend("mamba_ssm", "cpu", 512), "on cpu, not on CUDA.*pip install mamba-ssm causal-conv1d"),
        (lambda: Mamba2(64, backend="mamba_ssm")(torch.zeros(1, 2, 64)), "requirements.txt"),
    ],
)
def test_refusals_say_why_and_what_instead(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_who_computes(monkeypatch):
    assert resolve_backend("auto", "cpu", 10**6) == resolve_backend("torch", torch.device("cuda"), 10**6) == "torch"
    assert "PyTorch" in describe_backend("auto", "cpu", 5) and "\n" not in describe_backend("auto", "cpu", 5)
    monkeypatch.setattr(mamba, "kernels_missing", lambda backend: "")
    assert resolve_backend("auto", "cuda", mamba.KERNEL_MIN) == "torch"
    assert (
        resolve_backend("auto", "cuda", mamba.KERNEL_MIN + 1) == resolve_backend("mamba_ssm", "cuda", 5) == "mamba_ssm"
    )
    monkeypatch.setattr(mamba, "kernels_missing", lambda backend: "ImportError: no such thing")
    assert resolve_backend("auto", "cuda", 10**6) == "torch"
    with pytest.raises(ValueError, match="no such thing"):
        resolve_backend("mamba_ssm", "cuda", 5)
