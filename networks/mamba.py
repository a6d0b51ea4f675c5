"""The state-space layers, Mamba-1 and Mamba-2, in plain PyTorch. Each maps (B, L, D) -> (B, L, D), and the past alone
is seen.

  Mamba    arXiv 2312.00752   a linear recurrence whose decay, input and output depend on the present token
  Mamba-2  arXiv 2405.21060   one decay a head, so the recurrence over time is also a masked matrix product ("duality")

One map has several faces, and the tests hold them equal:

  ssd_recurrent              Mamba-2's definition, one token after another (Mamba-1's scans are in selective_scan.py)
  ssd_dual                   all tokens at once, quadratic in L: the fastest face for short windows
  ssd_chunked                dual inside a chunk, recurrent between chunks: linear in L
  .init_state, .step, .step_tokens   one token, or a few, after those of before, in constant memory: for acting

Letters, in shapes:
  B batch    L length    D d_model    E = expand * D, inner width    P headdim    H = E / P, heads
  N d_state  W d_conv    R dt_rank    G groups of B and C, always 1 here, so it is never written
Letters, in code: A, B, C, D and dt (the papers' Delta) are the papers' own.

Where we differ from the `mamba-ssm` package (names, shapes and initial values of parameters do not; weights move both
ways):
  1. any L is allowed: the last chunk is padded with Delta = 0, which neither decays nor writes
  2. Delta, A, sums of log-decays and the state are at least float32, whatever autocast says
  3. a step's log-decay stops at LOG_ZERO, where exp is 0: sums stay finite, and a reset costs no precision afterwards
  4. the convolution is a sum of W shifted products, which the compiler fuses with its neighbours
  5. the package's kernels replace the scan alone, so `causal-conv1d` and its rules about strides are not needed
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.selective_scan import selective_scan, selective_scan_kernel, selective_step

LOG_ZERO = -750.0  # exp(LOG_ZERO) is 0 in float64, and so in everything narrower
DUAL_MAX = 100  # up to this length the dual form is faster than the chunked one (they cross at 96 to 128 on a CPU)
FUSE_MAX = 16  # up to this length the compiled dual form is faster as sums than as matrix products
KERNEL_MIN = 256  # above this length `auto` uses mamba-ssm on CUDA; a default, to be measured again on your GPU
BACKENDS = ("auto", "torch", "mamba_ssm", "fla")
INSTALL = {
    "mamba_ssm": "`pip install mamba-ssm causal-conv1d` (which needs nvcc; see requirements.txt)",
    "fla": "`pip install flash-linear-attention` (wheels; no nvcc)",
}


# -- the maps ---------------------------------------------------------------------------------------------------------


def ssd_recurrent(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Mamba-2's definition: S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T ; y_t = S_t C_t, in every head.

    x (B, L, H, P), dt (B, L, H) > 0, A (H) < 0, B and C (B, L, N) -> y (B, L, H, P)
    """
    state, ys = dt.new_zeros(*x[:, 0].shape, B.shape[-1]), []  # (B, H, P, N)
    for t in range(x.shape[1]):
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
        ys.append(y)
    return torch.stack(ys, 1)


def ssd_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token of it. x (B, H, P), dt (B, H), B and C (B, N), state (B, H, P, N) -> y (B, H, P), the next state"""
    write = (dt[..., None] * x)[..., None] * B[:, None, None]  # (B, H, P, N)
    state = (dt * A).exp()[..., None, None] * state + write
    return (state * C[:, None, None]).sum(-1).to(x.dtype), state


def ssd_dual(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same map as one masked matrix product in every head (Mamba-2, section 3.2). Shapes as in `ssd_recurrent`.

    y = M x,  M_ij = (C_i . B_j) exp(sum_{j < k <= i} dt_k A) dt_j  for j <= i, else 0
    """
    L = x.shape[1]
    g = log_decay(dt, A).cumsum(1).mT  # (B, H, L)
    past = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
    decay = (g[..., None] - g[..., None, :]).masked_fill(~past, -torch.inf).exp()  # (B, H, i, j)
    M = (C @ B.mT)[:, None] * decay * dt.mT[:, :, None]
    if L <= FUSE_MAX and torch.compiler.is_compiling():
        M = M.permute(0, 2, 3, 1)[..., None]  # (B, i, j, H, 1)
        # the same product, fused with what comes before and after
        return (M * at_least_fp32(x)[:, None]).sum(2).to(x.dtype)
    return (M.to(x.dtype) @ x.transpose(1, 2)).transpose(1, 2)  # (B, H, L, P) -> (B, L, H, P)


def ssd_chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """The same map, linear in L: dual inside chunks of c tokens, recurrent between them (Mamba-2, section 6)."""
    batch, L, c = x.shape[0], x.shape[1], chunk_size
    x, dt, B, C = (
        F.pad(t, (0, 0) * (t.dim() - 2) + (0, -L % c)).unflatten(1, (-1, c)).flatten(0, 1) for t in (x, dt, B, C)
    )  # (B*chunks, c, ...)
    y = ssd_dual(x, dt, A, B, C)

    g = log_decay(dt, A).cumsum(1)  # (B*chunks, c, H)
    end = g[:, -1:]
    x = x * ((end - g).exp() * dt)[..., None].to(x.dtype)  # what is left of each token at its chunk's end
    writes = torch.einsum("bjhp,bjn->bhpn", x, B).unflatten(0, (batch, -1))  # (B, chunks, H, P, N)
    keep = end.exp()[:, 0, :, None, None].unflatten(0, (batch, -1))  # (B, chunks, H, 1, 1)

    state, states = dt.new_zeros(writes[:, 0].shape), []
    for k in range(writes.shape[1]):
        states.append(state)  # what a chunk inherits
        state = keep[:, k] * state + writes[:, k]
    states = torch.stack(states, 1).flatten(0, 1).to(x.dtype)  # (B*chunks, H, P, N)
    y = y + torch.einsum("bhpn,bin->bihp", states, C) * g.exp()[..., None].to(x.dtype)
    return y.unflatten(0, (batch, -1)).flatten(1, 2)[:, :L]


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise, over time, zeros before the start: y_t = bias + sum_w weight_w x_{t-W+1+w}.

    x (B, L, channels), weight (channels, 1, W), bias (channels) -> (B, L, channels)
    """
    L, W = x.shape[1], weight.shape[-1]
    taps = torch.stack(weight[:, 0].unbind(-1))  # (W, channels): contiguous, so that compiled loops are vectors
    y = torch.addcmul(bias, taps[-1], x)
    for s in range(1, min(W, L)):
        y = y + F.pad(taps[W - 1 - s] * x[:, : L - s], (0, 0, s, 0))  # s steps later
    return y


def log_decay(dt: Tensor, A: Tensor) -> Tensor:
    """log of how much of the state one step keeps, never below LOG_ZERO. (B, L, H), (H) -> (B, L, H)"""
    return (dt * A).clamp_min(LOG_ZERO)


def at_least_fp32(x: Tensor) -> Tensor:
    """At least float32: the type of everything that is summed or exponentiated."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# -- the layers -------------------------------------------------------------------------------------------------------


class State(NamedTuple):
    """All that a layer remembers while acting, for n rows. Values, not buffers: `step` returns new ones."""

    conv: Tensor  # (n, E+2N, W) Mamba-2; (n, E, W) Mamba-1   the convolution's last W inputs, the present last
    ssm: Tensor  # (n, H, P, N) Mamba-2; (n, E, N) Mamba-1


class Mamba2(nn.Module):
    """u (B, L, D) -> (B, L, D). z, x, B, C, dt = in(u); convolve x, B, C; out(RMSNorm((SSD + D x) silu(z)))"""

    def __init__(
        self,
        d_model: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: int = 2,
        headdim: int = 64,
        chunk_size: int = 64,
        backend: str = "auto",
    ):
        super().__init__()
        check_sizes(
            d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, headdim=headdim, chunk_size=chunk_size
        )
        check_backend(backend)
        inner = expand * d_model
        heads = count_heads(d_model, expand, headdim)
        self.widths = [inner, inner + 2 * d_state, heads]  # of z, xBC and dt, in in_proj's order
        self.headdim, self.d_state, self.chunk_size, self.backend = headdim, d_state, chunk_size, backend

        self.in_proj = nn.Linear(d_model, sum(self.widths), bias=False)
        self.conv1d = depthwise(self.widths[1], d_conv)
        self.dt_bias = no_weight_decay(initial_dt_bias(heads))
        self.A_log = no_weight_decay(torch.empty(heads).uniform_(1, 16).log())
        self.D = no_weight_decay(torch.ones(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """All tokens at once. u (B, L, D) -> (B, L, D)"""
        z, xBC, dt = self.in_proj(u).split(self.widths, -1)
        mixed = causal_conv(at_least_fp32(xBC), self.conv1d.weight, self.conv1d.bias)
        x, B, C = self.activate(mixed, xBC.dtype)  # (B, L, H, P), (B, L, N), (B, L, N)
        dt = F.softplus(at_least_fp32(dt) + at_least_fp32(self.dt_bias))  # (B, L, H)
        A = -at_least_fp32(self.A_log).exp()
        backend = resolve_backend(self.backend, u.device, u.shape[1])
        if backend == "mamba_ssm":
            y = ssd_kernel(x, dt, A, B, C, self.chunk_size)
        elif backend == "fla":
            y = ssd_fla(x, dt, A, B, C)
        elif u.shape[1] <= max(DUAL_MAX, self.chunk_size):
            y = ssd_dual(x, dt, A, B, C)
        else:
            y = ssd_chunked(x, dt, A, B, C, self.chunk_size)
        return self.finish(y, x, z)

    def init_state(self, n: int) -> State:
        """Nothing seen yet, for n rows."""
        zeros = torch.zeros((), device=self.D.device, dtype=torch.promote_types(self.D.dtype, torch.float32))
        channels, _, W = self.conv1d.weight.shape
        return State(zeros.new_zeros(n, channels, W), zeros.new_zeros(n, self.widths[2], self.headdim, self.d_state))

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """One token. u (n, D), state -> (n, D), the next state"""
        z, xBC, dt = self.in_proj(u).split(self.widths, -1)
        mixed, conv = conv_step(at_least_fp32(xBC)[:, None], state.conv, self.conv1d.weight, self.conv1d.bias)
        x, B, C = self.activate(mixed[:, 0], xBC.dtype)  # (n, H, P), (n, N), (n, N)
        dt = F.softplus(at_least_fp32(dt) + at_least_fp32(self.dt_bias))  # (n, H)
        y, ssm = ssd_step(x, dt, -at_least_fp32(self.A_log).exp(), B, C, state.ssm)
        return self.finish(y, x, z), State(conv, ssm)

    def activate(self, xBC: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """(..., E+2N) -> x (..., H, P), B and C (..., N)"""
        # split first, then silu: the gradients meet in one buffer before the convolution's backward reads it W times
        x, B, C = (F.silu(t).to(dtype) for t in xBC.split([self.widths[0], self.d_state, self.d_state], -1))
        return x.unflatten(-1, (-1, self.headdim)), B, C

    def finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """y and x (..., H, P), z (..., E) -> (..., D)"""
        y = (at_least_fp32(y) + self.D[:, None] * x).flatten(-2)
        y = F.rms_norm(y * F.silu(at_least_fp32(z)), y.shape[-1:], at_least_fp32(self.norm.weight), self.norm.eps)
        return self.out_proj(y.to(z.dtype))


class SelectiveSSM(nn.Module):
    """Mamba-1's core, without projections and gate: each token names its own dt, B and C. (B, L, E) -> (B, L, E)"""

    def __init__(self, inner: int, rank: int, d_state: int = 16, backend: str = "auto"):
        super().__init__()
        check_backend(backend)
        if backend == "fla":
            raise ValueError("backend fla is for Mamba-2; Mamba-1 takes auto, torch or mamba_ssm")
        self.widths, self.backend = [rank, d_state, d_state], backend  # of dt, B and C, in x_proj's order
        self.x_proj = nn.Linear(inner, sum(self.widths), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
        self.dt_proj.bias = no_weight_decay(initial_dt_bias(inner))
        self.A_log = no_weight_decay(torch.arange(1.0, d_state + 1).log().repeat(inner, 1))
        self.D = no_weight_decay(torch.ones(inner))

    def ssm_params(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dt (..., E), B and C (..., N) of tokens x (..., E)."""
        dt, B, C = self.x_proj(x).split(self.widths, -1)
        return F.softplus(at_least_fp32(F.linear(dt, self.dt_proj.weight)) + at_least_fp32(self.dt_proj.bias)), B, C

    def scan(self, x: Tensor) -> Tensor:
        """All tokens of x (B, L, E), from nothing. -> (B, L, E), at least float32"""
        dt, B, C = self.ssm_params(x)
        kernel = resolve_backend(self.backend, x.device, x.shape[1], kernel_min=0) == "mamba_ssm"
        y = (selective_scan_kernel if kernel else selective_scan)(x, dt, -at_least_fp32(self.A_log).exp(), B, C)
        return at_least_fp32(y) + self.D * x

    def step_ssm(self, x: Tensor, state: Tensor, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A few more tokens x (n, c, E) after state (n, E, N); an unreal one (n, c) neither decays nor writes."""
        (dt, B, C), A, ys = self.ssm_params(x), -at_least_fp32(self.A_log).exp(), []
        dt = dt if real is None else dt * real[..., None]
        for t in range(x.shape[1]):
            y, state = selective_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], state)
            ys.append(y)
        return at_least_fp32(torch.stack(ys, 1)) + self.D * x, state


class Mamba1(SelectiveSSM):
    """u (B, L, D) -> (B, L, D). x, z = in(u); convolve x, which names its dt, B, C; out((scan + D x) silu(z))"""

    # it is a Selective and does not hold one, because mamba-ssm's names of parameters are flat

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        backend: str = "auto",
    ):
        rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand, dt_rank=rank)
        inner = expand * d_model
        super().__init__(inner, rank, d_state, backend)
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=False)
        self.conv1d = depthwise(inner, d_conv)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """All tokens. u (B, L, D) -> (B, L, D)"""
        x, z = self.in_proj(u).chunk(2, -1)  # (B, L, E) each
        x = F.silu(causal_conv(at_least_fp32(x), self.conv1d.weight, self.conv1d.bias)).to(x.dtype)
        return self.out_proj((self.scan(x) * F.silu(at_least_fp32(z))).to(z.dtype))

    def init_state(self, n: int) -> State:
        """Nothing seen yet, for n rows."""
        zeros = torch.zeros((), device=self.D.device, dtype=torch.promote_types(self.D.dtype, torch.float32))
        channels, _, W = self.conv1d.weight.shape
        return State(zeros.new_zeros(n, channels, W), zeros.new_zeros(n, *self.A_log.shape))

    def step(self, u: Tensor, state: State) -> tuple[Tensor, State]:
        """One token. u (n, D), state -> (n, D), the next state"""
        y, state = self.step_tokens(u[:, None], state)
        return y[:, 0], state

    def step_tokens(self, u: Tensor, state: State, real: Tensor | None = None) -> tuple[Tensor, State]:
        """A few tokens. u (n, c, D), state -> (n, c, D), the next state

        real (n, c): 0 for a token that is to leave no trace; such tokens come before a row's first real one.
        """
        x, z = self.in_proj(u).chunk(2, -1)
        new, conv = conv_step(at_least_fp32(x), state.conv, self.conv1d.weight, self.conv1d.bias, real)
        y, ssm = self.step_ssm(F.silu(new).to(x.dtype), state.ssm, real)
        return self.out_proj((y * F.silu(at_least_fp32(z))).to(z.dtype)), State(conv, ssm)


def conv_step(x: Tensor, past: Tensor, weight: Tensor, bias: Tensor, real: Tensor | None = None):
    """`causal_conv` of a few tokens. x (n, c, C), past (n, C, W), real (n, c) -> (n, c, C), the next past"""
    W, x = past.shape[-1], x if real is None else x * real[..., None]
    x = torch.cat([past[..., 1:].mT, x], 1)  # (n, W-1+c, C)
    return causal_conv(x, weight, bias)[:, W - 1 :], x[:, -W:].mT


def depthwise(channels: int, width: int) -> nn.Conv1d:
    """Holds `causal_conv`'s weight (channels, 1, width) and bias under mamba-ssm's names; its forward is not used."""
    return nn.Conv1d(channels, channels, width, groups=channels)


def no_weight_decay(value: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(value)
    parameter._no_weight_decay = True
    return parameter


def initial_dt_bias(n: int, low: float = 1e-3, high: float = 1e-1, floor: float = 1e-4) -> Tensor:
    """softplus of this is log-uniform in [low, high]. -> (n)"""
    dt = torch.empty(n).uniform_(math.log(low), math.log(high)).exp().clamp_min(floor)
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus, without overflow


# -- which implementation runs ----------------------------------------------------------------------------------------


def resolve_backend(requested: str, device: torch.device | str, length: int, kernel_min: int | None = None) -> str:
    """One of BACKENDS -> who computes a scan of this length here: "torch", "mamba_ssm" or "fla".

    kernel_min: up to this length auto stays with PyTorch; Mamba-1, which has no dual form, says 0. auto never takes
    fla, which has met no card here yet.
    """
    check_backend(requested)
    kernel_min = KERNEL_MIN if kernel_min is None else kernel_min
    cuda = torch.device(device).type == "cuda"
    if requested == "auto":
        return "mamba_ssm" if cuda and length > kernel_min and not kernels_missing("mamba_ssm") else "torch"
    if requested in INSTALL and (
        problem := kernels_missing(requested) if cuda else f"the tensors are on {device}, not on CUDA"
    ):
        raise ValueError(
            f"backend {requested} cannot run: {problem}. It needs an NVIDIA GPU and, once, {INSTALL[requested]}. "
            "Backend auto or torch runs anywhere."
        )
    return requested


def describe_backend(requested: str, device: torch.device | str, length: int, kernel_min: int | None = None) -> str:
    """One line for the log: who computes the scans."""
    names = {"mamba_ssm": "mamba-ssm kernels", "fla": "flash-linear-attention", "torch": "PyTorch"}
    return f"mamba: {names[resolve_backend(requested, device, length, kernel_min)]} on {device}, L = {length}"


def kernels_missing(backend: str) -> str:
    """Why the kernels of mamba_ssm or fla cannot be imported, or nothing."""
    try:
        if backend == "fla":
            import fla.ops.simple_gla  # noqa: F401
        else:
            import mamba_ssm.ops.selective_scan_interface
            import mamba_ssm.ops.triton.ssd_combined  # noqa: F401
    except ImportError as error:
        return f"{type(error).__name__}: {error}"
    return ""


kernels_missing._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, without its import


def ssd_kernel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int) -> Tensor:
    """`ssd_chunked` by mamba-ssm."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return mamba_chunk_scan_combined(x, dt, A, B[:, :, None], C[:, :, None], chunk_size)  # B, C (B, L, G=1, N)


def ssd_fla(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """`ssd_chunked` by flash-linear-attention: linear attention with a gate, of queries C, keys B and values dt·x."""
    from fla.ops.simple_gla import chunk_simple_gla

    heads = x.shape[2]
    q, k = (t[:, :, None].expand(-1, -1, heads, -1).contiguous() for t in (C, B))
    y, _ = chunk_simple_gla(q, k, x * dt[..., None].to(x.dtype), log_decay(dt, A), scale=1.0)
    return y


# -- what is refused --------------------------------------------------------------------------------------------------


def check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, not {size!r}")


def count_heads(d_model: int, expand: int, headdim: int) -> int:
    """H = expand * d_model / headdim, or the nearest sizes for which that is a whole number."""
    inner = expand * d_model
    if inner % headdim:
        step = headdim // math.gcd(headdim, expand)
        models = [n for n in (d_model // step * step, d_model // step * step + step) if n]
        divisors = [p for p in range(1, inner + 1) if inner % p == 0]
        heads = [max(p for p in divisors if p < headdim)] + [p for p in divisors if p > headdim][:1]
        raise ValueError(
            f"expand * d_model = {expand} * {d_model} = {inner} must be a multiple of headdim = {headdim}: "
            f"the nearest d_model: {' or '.join(map(str, models))}; "
            f"the nearest headdim: {' or '.join(map(str, heads))}"
        )
    return inner // headdim
