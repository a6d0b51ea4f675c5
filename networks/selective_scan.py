"""Mamba-1's selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t ; y_t = h_t . C_t, in every channel.

The decay differs in every channel and state, so the map has no matrix form as Mamba-2's has. What costs time is memory:
(B, L, E, N) numbers, written and read again by each operation, twice more in the backward. So here

  1. rows are taken in blocks and time in chunks, small enough that what one operation writes the next one finds in the
     processor's cache; between chunks only the state is handed on
  2. inside a chunk all decays and writes are made at once, and the recurrence is one multiply-add a token
  3. the backward is written by hand: it remembers the state at each chunk's start and computes the rest again

`selective_scan_loop` is the definition, and the tests hold the two equal; letters as in mamba.py. On a CPU exp2 takes a
third of exp's time, so decays are 2^(dt A log2 e). On a GPU these are many small kernels a token; where
Triton is installed, selective_scan_triton.py does the same in one.

Who needs the last output alone takes `selective_scan_last`. There the recurrence is a sum, for what token t wrote has
decayed by exp(A S_t) when it is read, S_t being the sum of the dt after t:

    y_L = sum_t dt_t x_t K_t,    K_t = sum_n B_t,n C_L,n exp(A_n S_t)    in every channel

No state is kept, each (tokens, N, E) block is in the cache from its exponential to its last use, and every exponent is
negative, so nothing overflows.
"""

import functools
import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 20  # tokens of a chunk: the backward makes that many states again
BLOCK = 2**19  # numbers of one (tokens, rows, N, E) array on a CPU; four of them are in use at a time
LAST_BLOCK = 2**17  # the same for the last output alone, which needs one array: 512 KiB
LEAST = -80 * math.log2(math.e)  # exponents stop here, at 2e-35: where exp2's result is denormal, it is slow
# 2^x for |x| <= 1/2, to 8e-8: least squares of the relative error at 200 Chebyshev points
POWERS = [0.001326697039, 0.009675459746, 0.05550742616, 0.2402212175, 0.6931469492, 1.000000071]


def selective_scan_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The definition, one token after another.

    x and dt (B, L, E), A (E, N) < 0, B and C (B, L, N) -> y (B, L, E)
    """
    state, ys = dt.new_zeros(*x[:, 0].shape, A.shape[-1]), []  # (B, E, N)
    for t in range(x.shape[1]):
        y, state = selective_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        ys.append(y)
    return torch.stack(ys, 1)


def selective_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of it. x and dt (B, E), A (E, N), B and C (B, N), state (B, E, N) -> y (B, E), the next state"""
    state = (dt[..., None] * A).exp() * state + (dt * x)[..., None] * B[:, None]
    return (state * C[:, None]).sum(-1).to(x.dtype), state


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same map, fast. Shapes as in `selective_scan_loop`; computed in dt's and A's type, at least float32."""
    if torch.compiler.is_exporting():  # a graph for others knows no operation of ours
        return selective_scan_loop(x, dt, A, B, C)
    kind = torch.promote_types(dt.dtype, torch.float32)
    scan = _scan if torch.compiler.is_compiling() else SelectiveScan.apply
    return scan(*(t.to(kind) for t in (x, dt, A, B, C)))[0].to(x.dtype)


def selective_scan_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`selective_scan` by mamba-ssm, which keeps time last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C = (t.mT.contiguous() for t in (x, dt.to(x.dtype), B, C))  # (B, E, L), (B, E, L), (B, N, L), (B, N, L)
    return selective_scan_fn(x, dt, A, B, C).mT


def in_full_precision(body: Callable) -> Callable:
    """An operation that autocast leaves alone: it would round the inputs of the products inside to 16 bits."""

    @functools.wraps(body)
    def run(first: Tensor, *rest: Tensor):
        with torch.autocast(first.device.type, enabled=False):
            return body(first, *rest)

    return run


def on_triton(x: Tensor) -> bool:
    """Whether selective_scan_triton.py computes the scan of x. Triton needs compute capability 7."""
    return (
        x.is_cuda and x.dtype == torch.float32 and has_triton() and torch.cuda.get_device_capability(x.device) >= (7,)
    )


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.library.custom_op("bamba::selective_scan", mutates_args=())
@in_full_precision
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, L, E), and the state at the start of every chunk (chunks, B, N, E). For the compiler, one operation."""
    if on_triton(x):
        from networks.selective_scan_triton import scan

        return scan(x, dt, A, B, C, CHUNK)
    decay, y, (rows, length, _) = A.T.contiguous() * math.log2(math.e), torch.empty_like(x), x.shape
    starts = x.new_zeros(-(-length // CHUNK), rows, *decay.shape)
    dt, dtx, B, C, out = (t.transpose(0, 1) for t in (dt, dt * x, B, C, y))  # time first: a token is contiguous
    for r in blocks(x, decay):
        a, h = buffers(2, r, decay)
        for k in range(0, length, CHUNK):
            t = slice(k, k + CHUNK)
            a, h = make_states(a, h, dt[t, r], dtx[t, r], decay, B[t, r], starts[k // CHUNK, r])
            out[t, r] = (C[t, r, None] @ h).squeeze(2)
            if k + CHUNK < length:
                starts[k // CHUNK + 1, r] = h[-1]
    return y, starts


@torch.library.custom_op("bamba::selective_scan_backward", mutates_args=())
@in_full_precision
def _scan_backward(
    gy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C. With g_t that of h_t: g_t = gy_t C_t + exp(dt_{t+1} A) g_{t+1}, from the last t."""
    if on_triton(x):
        from networks.selective_scan_triton import scan_backward

        return scan_backward(gy, x, dt, A, B, C, starts, CHUNK)
    A = A.T.contiguous()
    decay, length, gA = A * math.log2(math.e), x.shape[1], torch.zeros_like(A)
    into = [torch.empty_like(t) for t in (x, dt, B, C)]
    gdtx, gdt, gB, gC = (t.transpose(0, 1) for t in into)
    gy, step, dtx, B, C = (t.transpose(0, 1) for t in (gy, dt, dt * x, B, C))
    for r in blocks(x, decay):
        full = buffers(4, r, decay)
        later = None  # what the following chunk wants of this one's last state
        for k in reversed(range(0, length, CHUNK)):
            t, start = slice(k, k + CHUNK), starts[k // CHUNK, r]
            a, h = make_states(full[0], full[1], step[t, r], dtx[t, r], decay, B[t, r], start)
            g = torch.mul(gy[t, r, None], C[t, r, :, None], out=full[2][: len(a)])
            if later is not None:
                g[-1] += later
            for i in reversed(range(len(g) - 1)):
                g[i].addcmul_(a[i + 1], g[i + 1])
            later = a[0] * g[0]
            gdtx[t, r] = (B[t, r, None] @ g).squeeze(2)
            gB[t, r] = torch.mul(g, dtx[t, r, None], out=full[3][: len(a)]).sum(-1)
            gC[t, r] = torch.mul(h, gy[t, r, None], out=full[3][: len(a)]).sum(-1)
            a[0] *= start  # from here a is the gradient of the exponent dt A: g_t exp(dt_t A) h_{t-1}
            a[1:] *= h[:-1]
            a *= g
            gdt[t, r] = torch.mul(a, A, out=g).sum(2)
            gA += a.mul_(step[t, r, None]).sum((0, 1))
    gdtx, gdt, gB, gC = into
    return gdtx * dt, gdt.addcmul_(gdtx, x), gA.T.contiguous(), gB, gC


def make_states(a: Tensor, h: Tensor, dt: Tensor, dtx: Tensor, decay: Tensor, B: Tensor, start: Tensor) -> tuple:
    """Decays and states (tokens, rows, N, E) of a chunk that begins in the state `start`, written into a and h."""
    a, h = a[: len(dt)], h[: len(dt)]
    torch.mul(dt[:, :, None], decay, out=a).exp2_()
    torch.mul(dtx[:, :, None], B[..., None], out=h)
    for t in range(len(h)):
        h[t].addcmul_(a[t], h[t - 1] if t else start)
    return a, h


def blocks(x: Tensor, decay: Tensor) -> list[slice]:
    """Rows, a block of them at a time; on an accelerator all at once. x (B, L, E), decay (N, E)"""
    rows, length, _ = x.shape
    size = max(1, BLOCK // (min(CHUNK, length) * decay.numel())) if x.device.type == "cpu" else rows
    return [slice(i, min(i + size, rows)) for i in range(0, rows, size)]


def buffers(count: int, r: slice, decay: Tensor) -> list[Tensor]:
    return [decay.new_empty(CHUNK, r.stop - r.start, *decay.shape) for _ in range(count)]


@_scan.register_fake
def _(x, dt, A, B, C):
    return torch.empty_like(x), x.new_empty(-(-x.shape[1] // CHUNK), len(x), A.shape[1], A.shape[0])


@_scan_backward.register_fake
def _(gy, x, dt, A, B, C, starts):
    return tuple(torch.empty_like(t) for t in (x, dt, A, B, C))


def _remember(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.set_materialize_grads(False)


def _pull_back(ctx, gy, _):
    return (None,) * 5 if gy is None else _scan_backward(gy, *ctx.saved_tensors)


_scan.register_autograd(_pull_back, setup_context=_remember)


class SelectiveScan(torch.autograd.Function):
    """The same for `torch.func`, which maps it over seeds and cannot take the gradient of an operation."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return _scan(*inputs)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx, gy: Tensor, _) -> tuple[Tensor, ...]:
        with torch.no_grad():  # `torch.func` would ask for the gradient of the gradient, which nobody has
            return _scan_backward(gy, *ctx.saved_tensors)


def one_after_another(op):
    """How `vmap` maps an operation over an axis that it does not have: a loop."""

    def rule(info, dims: tuple, *inputs: Tensor) -> tuple:
        found = []
        for i in range(info.batch_size):
            found.append(op(*(x if d is None else x.select(d, i) for x, d in zip(inputs, dims))))
        found = tuple(torch.stack(parts) for parts in zip(*found))
        return found, (0,) * len(found)

    return rule


_scan.register_vmap(one_after_another(_scan))
_scan_backward.register_vmap(one_after_another(_scan_backward))


# -- the last output alone ---------------------------------------------------------------------------


def selective_scan_last(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What `selective_scan` says of the last token. x and dt (B, L, E), A (E, N), B (B, L, N), C (B, N) -> y (B, E)"""
    kind = torch.promote_types(dt.dtype, torch.float32)
    x, dt, A, B, C = (t.to(kind) for t in (x, dt, A, B, C))
    G, wrote = B * C[:, None], dt * x
    y = wrote[:, -1] * G[:, -1].sum(-1, keepdim=True)
    if x.shape[1] > 1:
        after = dt[:, 1:].flip(1).cumsum(1).flip(1)  # S_t, without the last one, which is 0
        if torch.compiler.is_exporting():
            decayed = decayed_plain
        else:
            decayed = Decayed.apply if torch.compiler.is_compiling() else _decayed
        kernel = decayed(after.flatten(0, 1), G[:, :-1].flatten(0, 1), A.T.contiguous())
        y = y + (wrote[:, :-1] * kernel.view_as(after)).sum(1)
    return y


def decayed_plain(S: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """The definition of `_decayed`."""
    return (G[..., None] * (S[:, None] * A).exp()).sum(1)


@torch.library.custom_op("bamba::decayed", mutates_args=())
@in_full_precision
def _decayed(S: Tensor, G: Tensor, A: Tensor) -> Tensor:
    """K = sum_n G_n exp(A_n S). S (T, E) >= 0, G (T, N), A (N, E) < 0 -> (T, E)"""
    K, rate, e = torch.empty_like(S), A * math.log2(math.e), scratch(S, A)
    for r in parts(S, e):
        torch.bmm(G[r, None], decays(S[r], rate, e), out=K[r, None])
    return K


@torch.library.custom_op("bamba::decayed_backward", mutates_args=())
@in_full_precision
def _decayed_backward(gK: Tensor, S: Tensor, G: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of S, G, A. With e = exp(A S): gK_c sum_n G A e, sum_c gK e, sum_t gK S G e."""
    gS, gG, gA, rate, e = (
        torch.empty_like(S),
        torch.empty_like(G),
        torch.zeros_like(A),
        A * math.log2(math.e),
        scratch(S, A),
    )
    gK = gK.contiguous()
    for r in parts(S, e):
        d = decays(S[r], rate, e)
        # a row times a matrix, each time: as a matrix times a column the same product takes ten times as long
        torch.bmm(gK[r, None], d.mT, out=gG[r, None])
        d *= A
        torch.bmm(G[r, None], d, out=gS[r, None])
        d *= (gK[r] * S[r])[:, None]
        gA += torch.bmm(G[r].T.contiguous()[:, None], d.transpose(0, 1))[:, 0]  # here A times the gradient
    return gS.mul_(gK), gG, gA.div_(A)


def decays(S: Tensor, rate: Tensor, e: Tensor) -> Tensor:
    """2^(rate S), written into the front of e. S (t, E), rate (N, E) -> (t, N, E)"""
    return torch.mul(S[:, None], rate, out=e[: len(S)]).clamp_min_(LEAST).exp2_()


def scratch(S: Tensor, A: Tensor) -> Tensor:
    """Where a block of tokens is computed, (tokens, N, E); on an accelerator all of them."""
    tokens = min(len(S), max(1, LAST_BLOCK // A.numel())) if S.device.type == "cpu" else len(S)
    return A.new_empty(tokens, *A.shape)


def parts(S: Tensor, e: Tensor) -> list[slice]:
    return [slice(i, i + len(e)) for i in range(0, len(S), len(e))]


@_decayed.register_fake
def _(S, G, A):
    return torch.empty_like(S)


@_decayed_backward.register_fake
def _(gK, S, G, A):
    return torch.empty_like(S), torch.empty_like(G), torch.empty_like(A)


def _remember_decayed(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _pull_back_decayed(ctx, gK):
    return _decayed_backward(gK, *ctx.saved_tensors)


_decayed.register_autograd(_pull_back_decayed, setup_context=_remember_decayed)


@torch.library.custom_op("bamba::written", mutates_args=())
def _written(x: Tensor) -> Tensor:
    """x, in memory, row by row. The compiler would work it out anew, or in another order, for each use in a sum."""
    return x.clone(memory_format=torch.contiguous_format)


@_written.register_fake
def _(x):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Decayed(torch.autograd.Function):
    """`_decayed` for the compiler, which makes one loop of each sum: nothing of size (T, N, E) exists then."""

    @staticmethod
    def forward(ctx, S: Tensor, G: Tensor, A: Tensor) -> Tensor:
        S, G, A = map(_written, (S, G, A))
        d = G[..., None] * decays_fused(S, A)
        K, slope = _written(torch.stack([d.sum(1), (d * A).sum(1)]))  # dK/dS from the same decays: not a third pass
        ctx.save_for_backward(S, G, A, slope)
        return K

    @staticmethod
    def backward(ctx, gK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        S, G, A, slope = ctx.saved_tensors
        e, gK = decays_fused(S, A), _written(gK)
        return gK * slope, (gK[:, None] * e).sum(2), (G[..., None] * (gK * S)[:, None] * e).sum(0)


def decays_fused(S: Tensor, A: Tensor) -> Tensor:
    """exp(A S), in operations that a compiler makes one vectorised loop of. S (T, E), A (N, E) -> (T, N, E)

    In float32 2^x is 2 to the whole part, put where a float has its exponent, times a polynomial of the rest: in such a
    loop that is a fifth faster than exp2.
    """
    x = (S[:, None] * (A * math.log2(math.e))).clamp_min(LEAST)
    if x.dtype != torch.float32:
        return x.exp2()
    whole = x.round()
    rest, y = x - whole, torch.full_like(x, POWERS[0])
    for power in POWERS[1:]:
        y = y * rest + power
    return y * ((whole.to(torch.int32) + 127) << 23).view(torch.float32)
