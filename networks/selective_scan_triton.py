"""Mamba-1's selective scan on a GPU: one kernel forward, one backward, in Triton.

In torch operations the scan launches a handful of kernels a token. Here one program takes a row and BLOCK channels and
walks through time with their state, (N, BLOCK) numbers, in registers. A thread holds one channel with all its states:
the sum over states stays inside the thread, and neighbouring threads read neighbouring channels. (A is copied to (N, E)
for that: read as it is, it would make the compiler spread the states of a channel over threads.)

The backward takes the chunks of tokens from the last to the first. It computes a chunk's states again from the one
that the forward kept at the chunk's start, writes them into a scratch tensor, and walks back over them. All channels
share B and C, and all rows A: every program writes its share of their gradients, and torch.sum adds the shares, always
in the same order, which atomic additions would not do.

Both functions are the bodies of the operations in selective_scan.py, which holds the definition and the autograd. They
take float32 with any strides, and wait for nothing on the host, so a CUDA graph can record them after a first call.
Importing this file needs Triton, which comes with torch for CUDA. Letters as in selective_scan.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 32  # channels of a program: a warp's threads
STATES = 16  # states of a thread at most; a program of more states gets more warps

# Sizes and strides change with the batch and the window. Left alone, the compiler makes another kernel whenever one of
# them becomes 1 or a multiple of 16; there is nothing to win, since a warp reads 128 bytes in a row as it is.
SIZES = ["rows", "length", "channels"]
SIZES += [f"{name}_{d}" for name in ("x", "dt", "y", "gy", "gx", "gdt") for d in "bte"]
SIZES += [f"{name}_{d}" for name in "BC" for d in "btn"]


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """x and dt (B, L, E), A (E, N), B and C (B, L, N), all float32 on one device
    -> y (B, L, E), and the state at the start of every `chunk` tokens (chunks, B, N, E)
    """
    (rows, length, channels), states = x.shape, A.shape[1]
    y, starts = torch.empty_like(x), x.new_empty(-(-length // chunk), rows, states, channels)
    with torch.cuda.device_of(x):  # Triton launches on the current device, wherever the tensors are
        _forward[grid(rows, channels)](
            *(x, dt, A.T.contiguous(), B, C, y, starts, rows, length, channels),
            *(stride for t in (x, dt, B, C, y) for stride in t.stride()),
            **constants(states, chunk),
        )
    return y, starts


def scan_backward(
    gy: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C. gy (B, L, E), starts and `chunk` as in `scan`"""
    (rows, length, channels), states = x.shape, A.shape[1]
    gx, gdt, gA, gB, gC = (torch.empty_like(t) for t in (x, dt, A, B, C))
    shares_A = x.new_empty(rows, states, channels)
    shares_B, shares_C = (x.new_empty(triton.cdiv(channels, BLOCK), rows, length, states) for _ in range(2))
    scratch = x.new_empty(rows, chunk, states, channels)
    with torch.cuda.device_of(x):
        _backward[grid(rows, channels)](
            *(gy, x, dt, A.T.contiguous(), B, C, starts, scratch, gx, gdt, shares_A, shares_B, shares_C),
            *(rows, length, channels),
            *(stride for t in (gy, x, dt, B, C, gx, gdt) for stride in t.stride()),
            **constants(states, chunk),
        )
    torch.sum(shares_A, 0, out=gA.mT)
    torch.sum(shares_B, 0, out=gB)
    torch.sum(shares_C, 0, out=gC)
    return gx, gdt, gA, gB, gC


def grid(rows: int, channels: int) -> tuple[int, int]:
    return rows, triton.cdiv(channels, BLOCK)


def constants(states: int, chunk: int) -> dict:
    """What the kernels are compiled for. Triton's tensors have powers of two: N_PAD is N rounded up."""
    padded = triton.next_power_of_2(states)
    warps = min(16, max(1, padded // STATES))
    return dict(N=states, N_PAD=padded, CHUNK=chunk, BLOCK_E=BLOCK, num_warps=warps, num_stages=1)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def _forward(
    x, dt, A, B, C, y, starts, rows, length, channels,
    x_b, x_t, x_e, dt_b, dt_t, dt_e, B_b, B_t, B_n, C_b, C_t, C_n, y_b, y_t, y_e,
    N: tl.constexpr, N_PAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):
    # fmt: on
    row = tl.program_id(0).to(tl.int64)  # tensors may have more than 2^31 numbers
    e, n = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, N_PAD)
    e_in, n_in = e < channels, n < N
    inside, cell = n_in[:, None] & e_in[None, :], n[:, None] * channels + e[None, :]  # of an (N, E) matrix
    x, dt, y = x + row * x_b + e * x_e, dt + row * dt_b + e * dt_e, y + row * y_b + e * y_e
    B, C = B + row * B_b + n * B_n, C + row * C_b + n * C_n
    rate = tl.load(A + cell, inside, 0.0) * 1.4426950408889634  # exp(v) is 2^(v log2 e)
    state = tl.zeros((N_PAD, BLOCK_E), tl.float32)
    for k in range(0, tl.cdiv(length, CHUNK)):
        tl.store(starts + (k * rows + row) * (N * channels) + cell, state, inside)
        for t in range(k * CHUNK, tl.minimum(k * CHUNK + CHUNK, length)):
            x_now, dt_now = tl.load(x + t * x_t, e_in, 0.0), tl.load(dt + t * dt_t, e_in, 0.0)
            B_now, C_now = tl.load(B + t * B_t, n_in, 0.0), tl.load(C + t * C_t, n_in, 0.0)
            state = tl.exp2(dt_now[None, :] * rate) * state + (dt_now * x_now)[None, :] * B_now[:, None]
            tl.store(y + t * y_t, tl.sum(state * C_now[:, None], 0), e_in)


# fmt: off
@triton.jit(do_not_specialize=SIZES)
def _backward(
    gy, x, dt, A, B, C, starts, scratch, gx, gdt, shares_A, shares_B, shares_C, rows, length, channels,
    gy_b, gy_t, gy_e, x_b, x_t, x_e, dt_b, dt_t, dt_e, B_b, B_t, B_n, C_b, C_t, C_n,
    gx_b, gx_t, gx_e, gdt_b, gdt_t, gdt_e,
    N: tl.constexpr, N_PAD: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr,
):
    # fmt: on
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e, n = block * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, N_PAD)
    e_in, n_in = e < channels, n < N
    inside, cell = n_in[:, None] & e_in[None, :], n[:, None] * channels + e[None, :]
    matrix = N * channels
    x, dt, gy = x + row * x_b + e * x_e, dt + row * dt_b + e * dt_e, gy + row * gy_b + e * gy_e
    gx, gdt = gx + row * gx_b + e * gx_e, gdt + row * gdt_b + e * gdt_e
    B, C = B + row * B_b + n * B_n, C + row * C_b + n * C_n
    share = (block * rows + row) * length * N + n
    scratch += row * CHUNK * matrix + cell
    rate = tl.load(A + cell, inside, 0.0) * 1.4426950408889634
    later = tl.zeros((N_PAD, BLOCK_E), tl.float32)  # what the next token wants of this one's state
    gA = tl.zeros((N_PAD, BLOCK_E), tl.float32)
    chunks = tl.cdiv(length, CHUNK)
    for c in range(0, chunks):
        first = (chunks - 1 - c) * CHUNK
        tokens = tl.minimum(CHUNK, length - first)
        state = tl.load(starts + ((chunks - 1 - c) * rows + row) * matrix + cell, inside, 0.0)
        tl.debug_barrier()  # the chunk before has been read from the scratch by every thread
        for i in range(0, tokens):
            t = first + i
            tl.store(scratch + i * matrix, state, inside)  # the state before token t
            x_now, dt_now = tl.load(x + t * x_t, e_in, 0.0), tl.load(dt + t * dt_t, e_in, 0.0)
            B_now = tl.load(B + t * B_t, n_in, 0.0)
            state = tl.exp2(dt_now[None, :] * rate) * state + (dt_now * x_now)[None, :] * B_now[:, None]
        tl.debug_barrier()  # what one thread wrote, another may read
        for j in range(0, tokens):
            i = tokens - 1 - j
            t = first + i
            before = tl.load(scratch + i * matrix, inside, 0.0)
            x_now, dt_now = tl.load(x + t * x_t, e_in, 0.0), tl.load(dt + t * dt_t, e_in, 0.0)
            B_now, C_now = tl.load(B + t * B_t, n_in, 0.0), tl.load(C + t * C_t, n_in, 0.0)
            gy_now = tl.load(gy + t * gy_t, e_in, 0.0)
            g = gy_now[None, :] * C_now[:, None] + later  # the gradient of the state after token t
            tl.store(shares_B + share + t * N, tl.sum(g * (dt_now * x_now)[None, :], 1), n_in)
            tl.store(shares_C + share + t * N, tl.sum(state * gy_now[None, :], 1), n_in)
            later = tl.exp2(dt_now[None, :] * rate) * g
            exponent = later * before  # the gradient of dt A
            gA += exponent * dt_now[None, :]
            gdtx = tl.sum(g * B_now[:, None], 0)
            tl.store(gx + t * gx_t, gdtx * dt_now, e_in)
            tl.store(gdt + t * gdt_t, tl.sum(exponent * rate, 0) * 0.6931471805599453 + gdtx * x_now, e_in)
            state = before
    tl.store(shares_A + row * matrix + cell, gA, inside)
