"""What every update says: targets, weights of losses, descent, slow copies, and the means of what was measured."""

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def td_target(reward: Tensor, alive: Tensor, next_q: Tensor, gamma: float) -> Tensor:
    """One-step target r + γ·alive·Q'. All (B,)."""
    return reward + gamma * alive * next_q


def weigh(losses: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """The weighted sum. A loss without a weight, or a weight without a loss, is a KeyError."""
    lonely = losses.keys() ^ weights.keys()
    if lonely:
        raise KeyError(f"a loss without a weight, or a weight without a loss: {sorted(lonely)}")
    return sum(weights[k] * v for k, v in losses.items())


def detach(metrics: dict[str, Tensor], group: str) -> dict[str, Tensor]:
    """Names as `group/name`, tensors out of the graph."""
    return {f"{group}/{k}": v.detach() for k, v in metrics.items()}


class Frozen(nn.Module):
    """A copy that never trains: no gradient, no dropout, whatever its parent is told."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)

    def forward(self, *inputs):
        return self.net(*inputs)

    @torch.no_grad()
    def follow(self, online: nn.Module, tau: float) -> None:
        """Polyak average: mine ← (1 − τ)·mine + τ·online, all parameters in one call."""
        torch._foreach_lerp_(list(self.net.parameters()), [p.detach() for p in online.parameters()], tau)


class Moments(nn.Module):
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
    rate = torch.zeros((), device=device)  # a tensor, so that a graph reads today's value; `set_rate` writes it
    fused, capturable = device.type in ("cpu", "cuda"), device.type == "cuda"
    return torch.optim.AdamW(groups, lr=rate, fused=fused, capturable=capturable, amsgrad=amsgrad)


def set_rate(optimiser: torch.optim.Optimizer, peak: float, update: int, warmup: int) -> None:
    """Linear warm-up: the first update already learns, the `warmup`-th is the first at the peak."""
    for group in optimiser.param_groups:
        group["lr"].fill_(peak * min(1.0, (update + 1) / max(warmup, 1)))


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


def due(before: int, now: int, every: int) -> int:
    """How many multiples of `every` lie in (before, now]; none if every is 0."""
    return now // every - before // every if every else 0


class Meter:
    """Means of metrics over an interval, summed on the device; the host reads them once, in `means`."""

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.bad: Tensor | None = None  # the first update with a metric off the real line, or -1

    @torch.no_grad()
    def add(self, metrics: dict[str, Tensor], update: int) -> None:
        values = [v.float() for v in metrics.values()]
        new = {k: torch.zeros_like(v) for k, v in zip(metrics, values) if k not in self.sums}
        self.sums |= new
        self.counts |= dict.fromkeys(new, 0)
        torch._foreach_add_([self.sums[k] for k in metrics], values)
        for k in metrics:
            self.counts[k] += 1
        ok = torch.stack(values).isfinite().all()
        bad = self.bad if self.bad is not None else torch.full_like(ok, -1, dtype=torch.long)
        self.bad = torch.where(ok | (bad >= 0), bad, update)

    def means(self) -> dict[str, float]:
        """The averages since the last call, each over the updates in which it appeared. Raises what `check` does."""
        self.check()
        names = list(self.sums)
        values = torch.stack([self.sums[k] for k in names]).tolist() if names else []
        means = {k: v / self.counts[k] for k, v in zip(names, values)}
        self.sums, self.counts, self.bad = {}, {}, None
        return means

    def check(self) -> None:
        """FloatingPointError, with the update and the metrics, if one has left the real line since the last `means`."""
        if self.bad is not None and self.bad.item() >= 0:
            off = [k for k, v in self.sums.items() if not v.isfinite()]
            raise FloatingPointError(f"update {self.bad.item()}: {', '.join(off)} left the real line")

    def state_dict(self) -> dict:
        return {"sums": dict(self.sums), "counts": dict(self.counts), "bad": self.bad}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.counts = {k: v.clone() for k, v in state["sums"].items()}, dict(state["counts"])
        self.bad = state["bad"]


class CaptureError(RuntimeError):
    """CUDA refused to capture an update; the process cannot go on on this device."""


class Graphed:
    """A CUDA graph of `fn(batch, variant) -> dict of tensors` for each variant, replayed on new batches.

    The first calls run eagerly (they are real updates; libraries make their workspaces in them), the next one captures.
    What comes back is overwritten by the next replay. A capture that CUDA refuses leaves its stream and the generator
    broken, so there is no way back to eager updates in the same process: CaptureError says how to start without graphs.
    """

    WARMUP = 3

    def __init__(self, fn: Callable):
        self.fn = fn
        self.calls: dict = {}
        self.graphs: dict = {}
        self.inputs = None
        self.stream = self.pool = None  # one of each, whatever the number of graphs and of calls before them

    def __call__(self, batch, variant):
        self.calls[variant] = self.calls.get(variant, 0) + 1
        if self.calls[variant] <= self.WARMUP:
            return self.aside(batch, variant)
        if self.inputs is None:
            self.inputs = pytree.tree_map(torch.empty_like, batch)
        torch._foreach_copy_(pytree.tree_leaves(self.inputs), pytree.tree_leaves(batch))
        if variant not in self.graphs:
            self.capture(variant)
        graph, out = self.graphs[variant]
        graph.replay()
        return out

    def aside(self, batch, variant):
        """Run on a side stream, as capture wants of the calls before it."""
        if self.stream is None:
            self.stream = torch.cuda.Stream()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            out = self.fn(batch, variant)
        torch.cuda.current_stream().wait_stream(self.stream)
        return out

    def capture(self, variant) -> None:
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                out = self.fn(self.inputs, variant)
        except RuntimeError as error:  # what CUDA raises when something in the update cannot be captured
            raise CaptureError(
                f"CUDA cannot capture this update ({str(error).splitlines()[0]}): start again with --no_cuda_graphs"
            ) from error
        self.graphs[variant] = graph, out
