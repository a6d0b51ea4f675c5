"""Mamba-1's selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t ; y_t = h_t . C_t, in every channel.

The decay differs in every channel and state, so the map has no matrix form as Mamba-2's has. What costs time is memory:
(B, L, E, N) numbers, written and read again by each operation, twice more in the backward. So here

  1. rows are taken in blocks and time in chunks, small enough that what one operation writes the next one finds in the
     processor's cache; between chunks only the state is handed on
  2. inside a chunk all decays and writes are made at once, and the recurrence is one multiply-add a token
  3. the backward is written by hand: it remembers the state at each chunk's start and computes the rest again

`selective_scan_loop` is the definition, and the tests hold the two equal; letters as in mamba.py. On a CPU exp2 takes a
third of exp's time, so decays are 2^(dt A log2 e).
"""

import math

import torch
from torch import Tensor

CHUNK = 20  # tokens of a chunk: the backward makes that many states again
BLOCK = 2**19  # numbers of one (tokens, rows, N, E) array on a CPU; four of them are in use at a time


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
    kind = torch.promote_types(dt.dtype, torch.float32)
    return _scan(*(t.to(kind) for t in (x, dt, A, B, C)))[0].to(x.dtype)


def selective_scan_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`selective_scan` by mamba-ssm, which keeps time last."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, dt, B, C = (t.mT.contiguous() for t in (x, dt.to(x.dtype), B, C))  # (B, E, L), (B, E, L), (B, N, L), (B, N, L)
    return selective_scan_fn(x, dt, A, B, C).mT


@torch.library.custom_op("bamba::selective_scan", mutates_args=())
def _scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """y (B, L, E), and the state at the start of every chunk (chunks, B, N, E). For the compiler, one operation."""
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
def _scan_backward(
    gy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C. With g_t that of h_t: g_t = gy_t C_t + exp(dt_{t+1} A) g_{t+1}, from the last t."""
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
