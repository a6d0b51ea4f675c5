"""One gradient step, the same for every agent: losses, clipping, optimizer, target networks, counters."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from common import distributed
from common.cuda_graph import CudaGraph
from common.optim import TargetNetwork, clip, detach


class Compilable(nn.Module):
    """A module some of whose methods are compiled in place. Copies of it do without, as after `nn.Module.compile`: a
    compiled method that came along would go on with the original's weights."""

    compiled: tuple[str, ...] = ()

    def compile_methods(self, *names: str) -> None:
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), dynamic=False))
        self.compiled = (*self.compiled, *names)

    def __getstate__(self) -> dict:
        return {k: v for k, v in super().__getstate__().items() if k not in (*self.compiled, "compiled")}


def reported(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without those that an update keeps to itself."""
    return {k: v for k, v in metrics.items() if not k.startswith("_")}


class TrainStep(Compilable):
    """A module that learns by `update`: `losses` and the hooks below say what and how.

    Everything in `train_step` has fixed shapes and never waits for the device, so that a CUDA graph can replay it.
    `cfg.grad_clip` is the largest norm of each group of `clip_groups`.
    """

    learned_buffers: ClassVar[tuple[str, ...]] = ()  # those that `next_buffers` may name
    optimizer: torch.optim.Optimizer
    updates = 0  # made so far

    def draw_noise(self, batch, generator: torch.Generator | None = None):
        """All that is random in `losses`, drawn before them. generator: if not torch's own"""
        return None

    def losses(self, batch, variant, noise) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimised in one update, and what to report of it; names with a _ are for `next_buffers` alone."""
        raise NotImplementedError

    def next_buffers(self, batch, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """What buffers become after an update, by name, if it changes any."""
        return {}

    def begin_update(self):
        """Set what moves with time, such as the learning rate; the variant that is due. Each has a graph of its own."""
        return None

    def clip_groups(self, variant) -> dict[str, list[nn.Module]]:
        """The nets that learn in this variant, by whose gradients are clipped together."""
        raise NotImplementedError

    def targets_before(self, variant) -> list[tuple[TargetNetwork, nn.Module, float]]:
        """Before an update, which target network follows which net, and how far."""
        return []

    def targets_after(self, variant) -> list[tuple[TargetNetwork, nn.Module, float]]:
        """The same after it."""
        return []

    def train_step(self, batch, variant) -> dict[str, Tensor]:
        """One gradient step; what a CUDA graph captures."""
        for target, net, tau in self.targets_before(variant):
            target.polyak_update(net, tau)
        self.optimizer.zero_grad()
        loss, metrics = self.losses(batch, variant, self.draw_noise(batch))
        loss.backward()
        groups = self.clip_groups(variant)
        distributed.average_gradients([net for nets in groups.values() for net in nets])
        norms = {name: clip(nets, self.cfg.grad_clip) for name, nets in groups.items()}
        self.optimizer.step()
        for target, net, tau in self.targets_after(variant):
            target.polyak_update(net, tau)
        with torch.no_grad():
            for name, value in self.next_buffers(batch, metrics).items():
                self.get_buffer(name).copy_(value)
        return reported(metrics) | detach(norms, "gradient")

    def update(self, batch) -> dict[str, Tensor]:
        """Learn from one batch; metrics on the device."""
        metrics = self.train_step(batch, self.begin_update())
        self.updates += 1
        return metrics

    def capture_updates(self) -> None:
        """Let a CUDA graph replay `train_step`, where there is CUDA and it is wanted."""
        if self.cfg.cuda_graphs and self.device.type == "cuda":
            self.train_step = CudaGraph(self.train_step)
