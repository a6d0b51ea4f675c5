"""What every update says: targets, weights of losses, descent, slow copies, running moments."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn


def td_target(reward: Tensor, not_done: Tensor, next_q: Tensor, gamma: float | Tensor) -> Tensor:
    """Target r + γ·not_done·Q'. All (B,); gamma, too, where it is of several steps."""
    return reward + gamma * not_done * next_q


def weighted_sum(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum. A loss without a weight, or a weight without a loss, is a KeyError."""
    lonely = losses.keys() ^ weights.keys()
    if lonely:
        raise KeyError(f"a loss without a weight, or a weight without a loss: {sorted(lonely)}")
    return sum(weights[k] * v for k, v in losses.items())


def detach(metrics: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Names as `group/name`, tensors out of the graph."""
    return {f"{group}/{k}": v.detach() for k, v in metrics.items()}


class TargetNetwork(nn.Module):
    """A copy that never trains: no gradient, no dropout, whatever its parent is told."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "TargetNetwork":
        return super().train(False)

    def forward(self, *inputs):
        return self.net(*inputs)

    @torch.no_grad()
    def polyak_update(self, online: nn.Module, tau: float) -> None:
        """Polyak average: mine ← (1 − τ)·mine + τ·online, all parameters in one call."""
        if mine := list(self.net.parameters()):  # no encoder has none
            torch._foreach_lerp_(mine, [p.detach() for p in online.parameters()], tau)


class RunningMeanStd(nn.Module):
    """Running mean and variance of rows (N, *shape), exact over all that were added (Chan et al. 1979)."""

    def __init__(self, *shape: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("var", torch.zeros(shape))
        self.register_buffer("count", torch.zeros(()))

    @torch.no_grad()
    def add(self, rows: Tensor) -> None:
        n = len(rows)
        total = self.count + n
        far = rows.mean(0) - self.mean
        self.var.copy_(
            (self.var * self.count + rows.var(0, correction=0) * n + far**2 * self.count * n / total) / total
        )
        self.mean.add_(far * n / total)
        self.count.copy_(total)


def adamw(
    nets: Iterable[nn.Module], weight_decay: float, device: torch.device, amsgrad: bool = False
) -> torch.optim.AdamW:
    """AdamW that a CUDA graph can replay. Only matrices decay, and not what a module marks `_no_weight_decay`.

    amsgrad: divide by the greatest second moment so far (Reddi et al. 2018).
    """
    params = [p for net in nets for p in net.parameters()]
    matrix = [p.ndim >= 2 and not getattr(p, "_no_weight_decay", False) for p in params]
    groups = [
        {"params": [p for p, m in zip(params, matrix) if m], "weight_decay": weight_decay},
        {"params": [p for p, m in zip(params, matrix) if not m], "weight_decay": 0.0},
    ]
    rate = torch.zeros((), device=device)  # a tensor, so that a graph reads today's value; `set_lr` writes it
    fused, capturable = device.type in ("cpu", "cuda"), device.type == "cuda"
    return torch.optim.AdamW(groups, lr=rate, fused=fused, capturable=capturable, amsgrad=amsgrad)


def set_lr(optimizer: torch.optim.Optimizer, peak: float, update: int, warmup: int) -> None:
    """Linear warm-up: the first update already learns, the `warmup`-th is the first at the peak."""
    for group in optimizer.param_groups:
        group["lr"].fill_(peak * min(1.0, (update + 1) / max(warmup, 1)))


def fallen(learning_rate: float, done: float, share: float) -> float:
    """The rate when this share of a run is done: it falls linearly to 0 in the last `share` of it. share 0: it stays"""
    return learning_rate * min(1.0, max(0.0, 1.0 - done) / share) if share else learning_rate


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict) -> None:
    """Take over moments and rates from `state`, and keep what belongs to this device.

    A plain `load_state_dict` would leave the rate on the CPU, where a captured graph bakes it in as a constant, and
    bring the other device's `fused` and `capturable`.
    """
    kept = ("fused", "capturable", "foreach")
    own = [{k: group[k] for k in ("lr", *kept) if k in group} for group in optimizer.param_groups]
    groups = [theirs | {k: mine[k] for k in kept if k in mine} for theirs, mine in zip(state["param_groups"], own)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, mine in zip(optimizer.param_groups, own):
        group["lr"] = mine["lr"].copy_(group["lr"]) if torch.is_tensor(mine["lr"]) else group["lr"]


def clip(nets: Iterable[nn.Module], norm: float) -> Tensor:
    """Scale the gradients of `nets` together to at most `norm`; returns the norm they had. No host synchronisation."""
    # foreach None: one kernel for many tensors where the device can do that; MPS cannot, and raises when told to
    return nn.utils.clip_grad_norm_([p for net in nets for p in net.parameters()], norm, foreach=None)


def count_due(before: int, now: int, every: int) -> int:
    """How many multiples of `every` lie in (before, now]; none if every is 0."""
    return now // every - before // every if every else 0
