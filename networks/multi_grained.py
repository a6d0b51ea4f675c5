"""Multi-grained state-space layers: one scan over all tokens, and a finer one over each step's group of three.

From Decision Mamba (Lv et al. 2024, arXiv 2406.05427). Tokens come as (R_t, s_t, a_t), step after step; the group of
step t is (a_{t-1}, R_t, s_t): everything the action a_t may depend on, and not a_t. Both layers keep mamba.py's faces,
forward over all tokens and `init_state` / `step_tokens` over the three tokens (a_{t-1}, R_t, s_t) of a step.

  MultiGrained   as the paper draws it: two branches share the projections and the gate. Without the fine branch it is
                 exactly Mamba-1, so the ablation is clean
  Dual           as the authors' code has it, two whole Mamba-1 layers, with its two errors repaired: the code groups
                 (R_t, s_t, a_t) and tiles the groups' outputs end to end instead of repeating each for its own step,
                 which shows 19 of 20 action labels to the network that predicts them (tests/test_decision.py has the
                 leaking form as a fixture)

Letters as in mamba.py; T = L / 3 steps.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.mamba import (
    Mamba1,
    SelectiveSSM,
    State,
    at_least_fp32,
    causal_conv,
    check_sizes,
    conv_step,
    depthwise,
)

GROUP = 3  # tokens of a step


class MultiGrainedState(NamedTuple):
    """What a multi-grained layer remembers, for n rows. Fields of a kind that a layer does not have are ()."""

    coarse: State
    fine: Tensor | State  # (n, E, N) MultiGrained; Dual: its second layer's
    last: Tensor  # the fine branch's latest output, for the action token to come: (n, E) MultiGrained, (n, D) Dual


def groups(x: Tensor) -> Tensor:
    """Tokens (B, 3T, ·) -> (B, T, 3, ·): (a_{t-1}, R_t, s_t) for every step, nothing before the first."""
    return F.pad(x, (0, 0, 1, -1)).unflatten(1, (-1, GROUP))


class MultiGrained(nn.Module):
    """u (B, 3T, D) -> (B, 3T, D). c, f, z = in(u); out((scan over c + scan over f's groups) silu(z))"""

    def __init__(self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, backend: str = "auto"):
        super().__init__()
        check_sizes(d_model=d_model, d_state=d_state, d_conv=d_conv, expand=expand)
        inner, rank = expand * d_model, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 3 * inner, bias=False)
        self.conv1d, self.group = depthwise(inner, d_conv), depthwise(inner, GROUP)
        self.coarse, self.fine = (SelectiveSSM(inner, rank, d_state, backend) for _ in range(2))
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        c, f, z = self.in_proj(u).chunk(3, -1)  # (B, 3T, E) each
        c = F.silu(causal_conv(at_least_fp32(c), self.conv1d.weight, self.conv1d.bias)).to(u.dtype)
        fine = self.fine.scan(self.gather(groups(f)))  # (B, T, E)
        y = self.coarse.scan(c) + fine.repeat_interleave(GROUP, 1)
        return self.out_proj((y * F.silu(at_least_fp32(z))).to(z.dtype))

    def gather(self, group: Tensor) -> Tensor:
        """The convolution of width 3 and stride 3: a step's group (..., 3, E) -> (..., E)"""
        taps, bias = at_least_fp32(self.group.weight[:, 0]).T, self.group.bias
        return F.silu((group * taps).sum(-2) + bias).to(group.dtype)

    def init_state(self, n: int) -> MultiGrainedState:
        zeros = torch.zeros((), device=self.in_proj.weight.device, dtype=at_least_fp32(self.in_proj.weight[0, 0]).dtype)
        inner, _, W = self.conv1d.weight.shape
        ssm = zeros.new_zeros(n, *self.coarse.A_log.shape)
        return MultiGrainedState(State(zeros.new_zeros(n, inner, W), ssm), ssm, zeros.new_zeros(n, inner))

    def step_tokens(self, u: Tensor, state: MultiGrainedState, real: Tensor) -> tuple[Tensor, MultiGrainedState]:
        """The tokens (a_{t-1}, R_t, s_t) (n, 3, D) of a step; real (n, 3) -> (n, 3, D), the next state"""
        c, f, z = self.in_proj(u).chunk(3, -1)
        c, conv = conv_step(at_least_fp32(c), state.coarse.conv, self.conv1d.weight, self.conv1d.bias, real)
        coarse, ssm = self.coarse.step_ssm(F.silu(c).to(u.dtype), state.coarse.ssm, real)
        fine, fine_ssm = self.fine.step_ssm(self.gather(f * real[..., None])[:, None], state.fine)
        y = coarse + torch.cat([state.last[:, None], fine, fine], 1)  # the action belongs to the step before
        y = self.out_proj((y * F.silu(at_least_fp32(z))).to(z.dtype))
        return y, MultiGrainedState(State(conv, ssm), fine_ssm, fine[:, 0])


class DualMamba(nn.Module):
    """u (B, 3T, D) -> (B, 3T, D). Mamba-1 over tokens, plus LayerNorm(Mamba-1 over the groups), repeated in place."""

    def __init__(self, d_model: int, **sizes):
        super().__init__()
        self.coarse, self.fine = Mamba1(d_model, **sizes), Mamba1(d_model, **sizes)
        self.group = nn.Linear(GROUP * d_model, d_model)
        self.norm = nn.LayerNorm(d_model)

    def forward(self, u: Tensor) -> Tensor:
        q = self.fine(self.group(groups(u).flatten(2)))  # (B, T, D)
        return self.coarse(u) + self.norm(q).repeat_interleave(GROUP, 1)

    def init_state(self, n: int) -> MultiGrainedState:
        fine = self.fine.init_state(n)
        return MultiGrainedState(self.coarse.init_state(n), fine, fine.ssm.new_zeros(n, self.group.out_features))

    def step_tokens(self, u: Tensor, state: MultiGrainedState, real: Tensor) -> tuple[Tensor, MultiGrainedState]:
        """As `MultiGrained.step_tokens`."""
        y, coarse = self.coarse.step_tokens(u, state.coarse, real)
        q, fine = self.fine.step(self.group((u * real[..., None]).flatten(1)), state.fine)
        q = q.to(state.last.dtype)
        return y + self.norm(torch.stack([state.last, q, q], 1)), MultiGrainedState(coarse, fine, q)
