"""OPSO's losses as functions of predictions and data: tensors in, a scalar or a weight out. N rows, D latent."""

import torch
import torch.nn.functional as F
from torch import Tensor

APART = 25  # rows of the data within which two states are too alike to be told apart


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (..., N) over the rows that count. mask (N,)"""
    return (x * mask).sum() / (mask.sum() * (x.numel() // mask.numel())).clamp_min(1.0)


def expectile(target: Tensor, prediction: Tensor, tau: float) -> Tensor:
    """|τ − 1(u < 0)| u², u = target − prediction; with τ near 1 an under-estimate costs more (IQL, eq. 5)."""
    u = target - prediction
    return torch.where(u < 0, 1 - tau, tau) * u.square()


def cosine_step(z: Tensor, after: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """−cos(z' − z, z_g − z), and whether the way to the goal is long enough for one. (N, D) -> (N,), (N,)"""
    way = goal - z
    return -F.cosine_similarity(after - z, way, dim=-1, eps=1e-8), (way.norm(dim=-1) > 1e-3).to(z.dtype)


def info_nce(anchor: Tensor, positive: Tensor, rows: Tensor, positive_rows: Tensor, mask: Tensor, bank, cfg) -> Tensor:
    """Which latent comes soon after which, both ways; among those of the batch and of the bank.

    anchor, positive (N, D); rows, positive_rows (N,) of the data; bank: (latents (M, D), their rows (M,)). Neighbours
    within APART rows, and what is masked out (N,), do not count as wrong answers.
    """
    anchor, positive = F.normalize(anchor, dim=-1), F.normalize(positive, dim=-1)
    keys, key_rows = bank
    own = torch.eye(len(anchor), dtype=torch.bool, device=anchor.device)
    label = torch.arange(len(anchor), device=anchor.device)
    loss = 0.0
    for question, answer, asked, offered in (
        (anchor, positive, rows, positive_rows),
        (positive, anchor, positive_rows, rows),
    ):
        near = (asked[:, None] - offered).abs() <= APART
        dead = (near | (mask == 0)) & ~own
        dead = torch.cat([dead, ((asked[:, None] - key_rows).abs() <= APART) | (key_rows < 0)], 1)
        score = torch.cat([question @ answer.mT, question @ keys.mT], 1) / cfg.nce_temperature
        loss = loss + masked_mean(F.cross_entropy(score.masked_fill(dead, -torch.inf), label, reduction="none"), mask)
    return loss / 2


def success_loss(logit: Tensor, success: Tensor, pos_weight: Tensor, cfg) -> Tensor:
    """Cross-entropy of "the next state is at the goal", rare ones weighed up; or the focal loss. (N,) -> (N,)"""
    if not cfg.focal:
        return F.binary_cross_entropy_with_logits(logit, success, pos_weight=pos_weight, reduction="none")
    error = F.binary_cross_entropy_with_logits(logit, success, reduction="none")
    return cfg.focal_alpha * (1 - (-error).exp()).pow(cfg.focal_gamma) * error


def update_pos_weight(pos_weight: Tensor, success: Tensor, mask: Tensor) -> Tensor:
    """The running ratio of negatives to positives: 0.99 of the old, 0.01 of this batch's (1 without a positive)."""
    positive, count = (success * mask).sum(), mask.sum()
    ratio = torch.where(positive > 0, (count - positive) / positive.clamp_min(1), torch.ones_like(positive))
    return torch.lerp(pos_weight, ratio.clamp(0.1, 100.0), 0.01)
