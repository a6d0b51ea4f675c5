"""Data-parallel training under `torchrun --nproc_per_node N trainer.py ...`: each process has a card, batches and noise
of its own, all have the same weights. Gradients are averaged once an update, in one message, which a CUDA graph can
hold (NCCL's calls can be captured). One process writes the run's folder.

Without torchrun there is one process, and everything here does nothing.
"""

import os
from collections.abc import Iterable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(hours=2)  # for the others, who evaluate and write meanwhile


def is_launched() -> bool:
    """Whether torchrun started this process, beside others."""
    return dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"]) > 1


def join(device: str) -> str:
    """Meet the other processes; returns the device of this one. device: what --device says.

    ValueError for a device that not every process can have for itself.
    """
    if not is_launched():
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in ("cuda", "cpu"):
        raise ValueError(f"--device {device} is one device, but torchrun started {os.environ['WORLD_SIZE']} processes")
    if device == "cuda":
        local, cards = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= cards:
            raise ValueError(f"torchrun started more processes than this machine has cards: --nproc_per_node {cards}")
        device = f"cuda:{local}"
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=PATIENCE)
    return device


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 writes."""
    return dist.get_rank() if size() > 1 else 0


@torch.no_grad()
def average_gradients(nets: Iterable[nn.Module]) -> None:
    """The mean over all processes, in place. Every process must have gradients of the same parameters."""
    if size() == 1:
        return
    grads = [p.grad for net in nets for p in net.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= size()
    parts = flat.split([g.numel() for g in grads])
    torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(parts, grads)])


def mean(x: Tensor) -> Tensor:
    """The mean over all processes of a number that every process has, without gradient: a loss's denominator, say."""
    if size() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / size()


def mean_metrics(means: dict[str, float], device: torch.device) -> dict[str, float]:
    """Of numbers for the log."""
    if size() == 1:
        return means
    return dict(zip(means, mean(torch.tensor(list(means.values()), device=device)).tolist()))


def any_process(told: bool, device: torch.device) -> bool:
    """Whether one process at least says so. The host waits for all."""
    return bool(mean(torch.tensor(float(told), device=device)) > 0)


def gather(state) -> list | None:
    """What every process has, in order, for the first one; None for the others."""
    found = [None] * size() if rank() == 0 else None
    dist.gather_object(state, found)
    return found
