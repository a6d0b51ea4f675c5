"""What an actor and its critics minimise: cloning, TD3+BC, ReBRAC and IQL, beside each other.

  td3bc    Fujimoto & Gu 2021, arXiv 2106.06860, eq. 5
  rebrac   Tarasov et al. 2023, arXiv 2305.09836: separate penalties on actor and critic, LayerNorm in the critics
  iql      Kostrikov et al. 2022, arXiv 2110.06169: an expectile value, and cloning weighted by the advantage
  bc       cloning alone

Shapes: N rows, A action dims. mask (N,): 1 for rows that count; None: all do.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from common import distributed

# beta of actor and critic by data set, the authors' own; any flag goes before them
REBRAC = {
    "hopper": {
        "random": (0.001, 0.01),
        "medium": (0.01, 0.01),
        "expert": (0.1, 0.1),
        "medium-replay": (0.05, 0.5),
        "medium-expert": (0.1, 0.01),
        "full-replay": (0.01, 0.01),
    },
    "halfcheetah": {
        "random": (0.001, 0.1),
        "medium": (0.001, 0.01),
        "expert": (0.01, 0.01),
        "medium-replay": (0.01, 0.001),
        "medium-expert": (0.01, 0.1),
        "full-replay": (0.001, 0.1),
    },
    "walker2d": {
        "random": (0.01, 0.0),
        "medium": (0.05, 0.1),
        "expert": (0.01, 0.5),
        "medium-replay": (0.05, 0.01),
        "medium-expert": (0.01, 0.01),
        "full-replay": (0.01, 0.01),
    },
}
REBRAC_ELSEWHERE = (0.01, 0.01)
MAX_WEIGHT = 100.0  # of one action in advantage-weighted cloning, as published


def rebrac_betas(env: str, dataset_type: str) -> tuple[float, float]:
    """The published weights of the actor's and the critic's penalty for a data set; the commonest for one of yours."""
    return REBRAC.get(env, {}).get(dataset_type, REBRAC_ELSEWHERE)


def average(x: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over the rows that count, x (N,); of several processes, this one's part in the mean of them all."""
    return x.mean() if mask is None else (x * mask).sum() / distributed.mean(mask.sum()).clamp_min(1.0)


def mse(x: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Mean squared error over the rows that count. x, y: (N,) or (N, X)"""
    if mask is None:
        return F.mse_loss(x, y)
    error = (x - y).square()
    return average(error.mean(-1) if error.dim() > 1 else error, mask)


def bc_q_loss(
    pi: Tensor, action: Tensor, q: Tensor, alpha: float | Tensor, mask: Tensor | None = None
) -> tuple[Tensor, dict]:
    """TD3+BC's actor objective (eq. 5): BC − λ·Q with λ = α / mean|Q|. pi, action: (N, A); q: (N,), a critic on pi."""
    lmbda = alpha / distributed.mean(average(q.abs(), mask)).clamp_min(1e-6).detach()
    bc_loss, q = mse(pi, action, mask), average(q, mask)
    return bc_loss - lmbda * q, {"bc_loss": bc_loss, "q_pi": q, "lmbda": lmbda}


def rebrac_actor_loss(
    pi: Tensor, action: Tensor, q: Tensor, beta: float, weight: float | Tensor = 1.0, mask: Tensor | None = None
) -> tuple[Tensor, dict]:
    """β·Σ_dims (pi − a)² − Q / mean|Q|, q (N,) the lesser of the critics on pi. weight: of Q, 1 as published."""
    lmbda = weight / distributed.mean(average(q.abs(), mask)).clamp_min(1e-6).detach()
    bc_loss, q = average((pi - action).square().sum(-1), mask), average(q, mask)
    return beta * bc_loss - lmbda * q, {"bc_loss": bc_loss, "q_pi": q, "lmbda": lmbda}


def expectile_loss(value: Tensor, target: Tensor, expectile: float, mask: Tensor | None = None) -> Tensor:
    """|expectile − 1(target < value)| (target − value)² (IQL, eq. 5). An expectile above 1/2 leans to high targets."""
    error = target - value
    weight = torch.where(error < 0, 1 - expectile, expectile)
    return average(weight * error.square(), mask)


def awr_loss(
    pi: Tensor, action: Tensor, advantage: Tensor, temperature: float, mask: Tensor | None = None
) -> tuple[Tensor, dict]:
    """Squared error weighted by exp(temperature · advantage), at most MAX_WEIGHT (IQL, eq. 7, of a Gaussian with fixed
    sigma). advantage (N,): without gradient."""
    weight = (temperature * advantage).exp().clamp_max(MAX_WEIGHT)
    error = (pi - action).square().sum(-1)
    return average(weight * error, mask), {"bc_loss": average(error, mask), "weight": average(weight, mask)}


def explained_variance(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """1 − var(target − prediction) / var(target): 1 is perfect, 0 or less no better than the mean. (N,), (N,) -> ()"""
    return 1 - variance(target - prediction, mask) / variance(target, mask).clamp_min(1e-8)


def variance(x: Tensor, mask: Tensor | None) -> Tensor:
    """Of the rows that count, of all processes. (N,) -> ()"""
    mean = distributed.mean(average(x, mask))
    return distributed.mean(average((x - mean).square(), mask))
