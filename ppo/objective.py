"""What PPO computes with: densities, divergence, advantages; what an iteration is remembered as, and learned in."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from memory import Rollout, Span, Spans, Window, Windows


def log_density(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Of a Gaussian with independent dims. (B, A), (B, A), (A,) -> (B,)"""
    return (-0.5 * ((x - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean: Tensor, log_std: Tensor, mean_o: Tensor, log_std_o: Tensor) -> Tensor:
    """KL(N(mean, std) || N(mean_o, std_o)), closed form. Means (B, A), logs (A,) -> (B,)"""
    spread = (2 * log_std).exp() + (mean - mean_o) ** 2
    return (log_std_o - log_std + spread / (2 * (2 * log_std_o).exp()) - 0.5).sum(-1)


def advantages(reward: Tensor, value: Tensor, over: Tensor, after: Tensor, gamma: float, lam: float) -> Tensor:
    """GAE (Schulman et al. 2016, arXiv 1506.02438). All (T, n).

    after: the value of what follows, read where an episode is over (0 for a death) and in the last row.
    """
    follows = torch.where(over, after, torch.cat([value[1:], after[-1:]]))
    delta, keep = reward + gamma * follows - value, gamma * lam * (~over).to(value.dtype)
    running, out = torch.zeros_like(value[0]), torch.empty_like(value)
    for i in reversed(range(len(value))):
        running = delta[i] + keep[i] * running
        out[i] = running
    return out


def discounted(reward: Tensor, over: Tensor, start: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Sums of discounted rewards of the past (T, n), whose spread is the scale of rewards; and the next start (n,)."""
    out = torch.empty_like(reward)
    for i, gained in enumerate(reward):
        out[i] = gained + gamma * start
        start = torch.where(over[i], 0.0, out[i])
    return out, start


class Lesson(NamedTuple):
    """A minibatch of an iteration. B batch."""

    view: tuple[Tensor, ...]  # each (B, K, ...)  the windows that were acted on
    t: Tensor  # (B,) long
    seen: Tensor  # (B, D + S, or one more)  what the value sees, with the embedding of the policy that acted
    choice: Tensor  # (B, A)
    logp: Tensor  # (B,)  of that choice, when it was made
    advantage: Tensor  # (B,)
    target: Tensor  # (B,)  of the value
    offline: Tensor | tuple  # (B, A)  the offline policy's action; () without an anchor
    data: Span | Window | tuple  # what to clone; () if nothing


class Experience:
    """What is remembered: the rollout, discounted returns so far, the order of cloned data."""

    def __init__(self, rollout: Rollout, data: Windows | Spans | None):
        self.rollout, self.data = rollout, data
        self.t = torch.zeros_like(rollout.turns.t[0])  # (n,) steps of the episodes
        self.discounted = torch.zeros_like(rollout.turns.reward[0])  # (n,) what `discounted` begins the rollout with

    def state_dict(self) -> dict:
        own = {"rollout": self.rollout.state_dict(), "t": self.t, "discounted": self.discounted}
        return own | {"data": self.data.state_dict() if self.data else None}

    def load_state_dict(self, state: dict) -> None:
        self.rollout.load_state_dict(state["rollout"])
        self.t.copy_(state["t"])
        self.discounted.copy_(state["discounted"])
        if self.data:
            self.data.load_state_dict(state["data"])
