"""What PPO computes with: densities, divergence, advantages, discounted returns, the clipped loss."""

import math

import torch
from torch import Tensor


def gaussian_log_prob(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Of a Gaussian with independent dims. (B, A), (B, A), (A,) -> (B,)"""
    return (-0.5 * ((x - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def gaussian_kl(mean: Tensor, log_std: Tensor, mean_o: Tensor, log_std_o: Tensor) -> Tensor:
    """KL(N(mean, std) || N(mean_o, std_o)), closed form. Means (B, A), logs (A,) -> (B,)"""
    spread = (2 * log_std).exp() + (mean - mean_o) ** 2
    return (log_std_o - log_std + spread / (2 * (2 * log_std_o).exp()) - 0.5).sum(-1)


def gae(reward: Tensor, value: Tensor, done: Tensor, bootstrap_value: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (Schulman et al. 2016, arXiv 1506.02438). All (T, n).

    bootstrap_value: the value of what follows, read where an episode is over (0 for a death) and in the last row.
    """
    next_value = torch.where(done, bootstrap_value, torch.cat([value[1:], bootstrap_value[-1:]]))
    delta = reward + gamma * next_value - value
    keep = gamma * lam * (~done).to(value.dtype)
    running, out = torch.zeros_like(value[0]), torch.empty_like(value)
    for i in reversed(range(len(value))):
        running = delta[i] + keep[i] * running
        out[i] = running
    return out


def discounted_returns(reward: Tensor, done: Tensor, start: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """Sums of discounted rewards of the past (T, n), whose spread is the scale of rewards; and the next start (n,)."""
    out = torch.empty_like(reward)
    for i, gained in enumerate(reward):
        out[i] = gained + gamma * start
        start = torch.where(done[i], 0.0, out[i])
    return out, start


def ppo_clip_loss(ratio: Tensor, advantage: Tensor, clip_eps: float) -> Tensor:
    """-min(r A, clip(r) A), A standardised over the minibatch (Schulman et al. 2017, eq. 7). (B,), (B,) -> scalar"""
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    clipped = ratio.clamp(1 - clip_eps, 1 + clip_eps)
    return -torch.minimum(ratio * advantage, clipped * advantage).mean()
