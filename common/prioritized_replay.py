"""Prioritised replay of windows (Schaul et al. 2016, arXiv 1511.05952): what n environments told, drawn again by error.

Frames are stored once. A transition knows its frame and its episode's first frame, and a window is gathered when it is
drawn, by the rule of common/windows.py; L + 1 frames give the window and the next one. A transition writes at most
two frames (an episode's first state is one more), so 2 capacity + L + 1 of them outlive every transition that needs
them.

Where we differ from the paper and from the published sum trees:
  1. a node has FAN children and not 2, so that 100,000 leaves are three levels: a draw is three gathers
  2. parents are recomputed and never incremented, in float64: the root is the leaves' sum after any number of updates
  3. a draw ends in the first child whose running sum exceeds it, which is never one of priority 0
"""

from typing import NamedTuple

import torch
from torch import Tensor

from common.rollout import Step

FAN = 64


class SumTree:
    """Priorities of `capacity` leaves, drawn from in proportion. No operation waits for the device."""

    def __init__(self, capacity: int, device: torch.device | str = "cpu"):
        self.levels, rows = [], capacity
        while True:
            rows = -(-rows // FAN)
            self.levels.append(torch.zeros(rows, FAN, dtype=torch.float64, device=device))
            if rows == 1:
                break

    @property
    def total(self) -> Tensor:
        return self.levels[-1].sum()

    def set(self, leaf: Tensor, priority: Tensor) -> None:
        """Leaves (B,) get priorities (B,); of one that is named twice the last counts."""
        values = priority.to(torch.float64)[last_of(leaf)]
        for level in self.levels:
            row = leaf // FAN
            level.view(-1)[leaf] = values
            values, leaf = level.index_select(0, row).sum(1), row

    def find(self, mass: Tensor) -> Tensor:
        """The leaves (B,) in which the running sum of priorities passes `mass` (B,), 0 <= mass < total."""
        node = torch.zeros_like(mass, dtype=torch.long)
        for level in reversed(self.levels):
            sums = level.index_select(0, node).cumsum(1)  # (B, FAN)
            child = torch.minimum((sums <= mass[:, None]).sum(1), (sums < sums[:, -1:]).sum(1))  # rounding: not behind
            before = sums.gather(1, (child - 1).clamp_min(0)[:, None])[:, 0]
            mass = mass - torch.where(child > 0, before, 0.0)
            node = node * FAN + child
        return node

    def get(self, leaf: Tensor) -> Tensor:
        return self.levels[0].view(-1)[leaf]


def last_of(indices: Tensor) -> Tensor:
    """For each of `indices` (B,), where in it the same place stands last. Writing that makes no order matter."""
    return ((indices[:, None] == indices) * torch.arange(1, len(indices) + 1, device=indices.device)).argmax(1)


class Sample(NamedTuple):
    """A batch. B batch, L context, S state, D latent. Raw units."""

    states: Tensor  # (B, L, S)  oldest first; the present is states[:, -1]
    action: Tensor  # (B,) long
    reward: Tensor  # (B,)  of those steps, discounted
    next_states: Tensor  # (B, L, S)  the same window `n_step` steps later, or as many as there are
    terminated: Tensor  # (B,)  1 or 0, and so below: within those steps
    truncated: Tensor  # (B,)
    weight: Tensor  # (B,)  (n P)^-beta over the batch's greatest
    slot: Tensor  # (B,) long  where it is stored
    latent: Tensor  # (B, D)  as stored; D = 0 if none are
    age: Tensor  # (B,)  updates since it was
    discount: Tensor  # (B,)  gamma to the power of how many steps they are


class PrioritizedReplay:
    """The last `capacity` transitions of n environments; actions are whole numbers.

    state: a tensor (S,) that gives width and dtype of frames. latent: D, numbers kept beside a transition.
    n_step, gamma: a transition reaches so many steps on, or to its episode's end, or to the newest step that there is.
    Everything lies on `device`, where batches are wanted; for MPS, which has no float64, on the CPU.
    """

    def __init__(
        self,
        capacity: int,
        n: int,
        k: int,
        state: Tensor,
        latent: int,
        seed: int,
        alpha: float,
        eps: float,
        device,
        n_step: int = 1,
        gamma: float = 0.99,
    ):
        self.device = torch.device(device)  # of batches
        device = torch.device("cpu") if self.device.type == "mps" else self.device
        self.slots_per_env = -(-capacity // n)  # slots of one environment
        self.n_step, self.gamma = n_step, gamma
        self.k, self.n, self.frames_per_env = k, n, 2 * self.slots_per_env + k + 1  # frames of one environment

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        slots = n * self.slots_per_env
        self.frames = zeros(n * self.frames_per_env, len(state), dtype=state.dtype)
        self.frame_idx = zeros(slots, dtype=torch.long)  # counted, not wrapped
        self.episode_start = zeros(slots, dtype=torch.long)
        self.action = zeros(slots, dtype=torch.long)
        self.scalars = zeros(slots, 4)  # reward, terminated, truncated, update in which the latent was made
        self.latent = zeros(slots, latent)
        self.env_idx = torch.arange(n, device=device)
        self.written = zeros(n, dtype=torch.long)  # frames
        self.current_start = zeros(n, dtype=torch.long)  # the episode's first frame
        self.needs_reset = torch.ones(n, dtype=torch.bool, device=device)  # where an episode begins
        self.steps = 0  # vectorised steps taken in
        self.tree, self.alpha, self.eps = SumTree(slots, device), alpha, eps
        self.max_priority = torch.ones((), dtype=torch.float64, device=device)  # priority so far: that of what is new
        self.generator = torch.Generator(device).manual_seed(seed)

    def __len__(self) -> int:
        return self.n * min(self.steps, self.slots_per_env)

    def add(self, step: Step, latent: Tensor | None = None, update: int = 0) -> None:
        """Take in one step of all n environments; latent (n, D) is of its state."""
        step = Step(*(x.to(self.frames.device) for x in step))
        # an episode's first state is a frame of its own; elsewhere this writes again what is there
        self.current_start = torch.where(self.needs_reset, self.written, self.current_start)
        self.written = self.written + self.needs_reset
        base = self.env_idx * self.frames_per_env
        self.frames[base + (self.written - 1) % self.frames_per_env] = step.state.to(self.frames.dtype)
        self.frames[base + self.written % self.frames_per_env] = step.next_state.to(self.frames.dtype)
        slot = self.env_idx * self.slots_per_env + self.steps % self.slots_per_env
        self.frame_idx[slot], self.episode_start[slot], self.action[slot] = (
            self.written - 1,
            self.current_start,
            step.action,
        )
        latent_update = torch.full_like(step.reward, update)
        self.scalars[slot] = torch.stack(
            [step.reward, step.terminated.float(), step.truncated.float(), latent_update], 1
        )
        if latent is not None:
            self.latent[slot] = latent.to(self.latent.device)
        self.written = self.written + 1
        self.needs_reset = step.terminated | step.truncated
        self.steps += 1
        self.tree.set(slot, self.max_priority.expand(self.n))

    def forget_episode(self, lost: Tensor) -> None:
        """Environments `lost` (n,) bool begin a new episode, though no step ended the old one."""
        self.needs_reset = self.needs_reset | lost.to(self.needs_reset.device)

    def sample(self, b: int, beta: float, update: int = 0) -> Sample:
        """B transitions, one from each of B equal parts of the priorities' sum. No host synchronisation."""
        draw = torch.rand(b, dtype=torch.float64, device=self.frames.device, generator=self.generator)
        total = self.tree.total
        mass = (torch.arange(b, device=draw.device) + draw) * (total / b)
        slot = self.tree.find(torch.minimum(mass, total * (1 - 1e-12)))
        weight = (len(self) * self.tree.get(slot) / total) ** -beta
        return self.get(slot, (weight / weight.max()).float(), update)

    def sample_uniform(self, b: int) -> Sample:
        """B transitions, each as likely as any other, all of weight 1."""
        draw = torch.rand(2, b, dtype=torch.float64, device=self.frames.device, generator=self.generator)
        env_idx, index = (draw * draw.new_tensor([[self.n], [len(self) // self.n]])).long()
        return self.get(env_idx * self.slots_per_env + index, torch.ones(b, device=draw.device))

    def get(self, slot: Tensor, weight: Tensor, update: int = 0) -> Sample:
        """The transitions in `slot` (B,)."""
        reward, terminated, truncated, steps = self.ahead(slot)
        # the window, and the one that is `steps` later; one step on they share all frames but one
        offsets = torch.arange(1 - self.k, 2 if self.n_step == 1 else 1, device=slot.device)[None]
        if self.n_step > 1:
            offsets = torch.cat([offsets.expand(len(slot), -1), offsets + steps[:, None]], 1)
        index = torch.maximum(self.frame_idx[slot, None] + offsets, self.episode_start[slot, None])
        rows = (slot // self.slots_per_env * self.frames_per_env)[:, None] + index % self.frames_per_env
        frames = self.frames.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        age = update - self.scalars[slot, 3]
        ends = (terminated, truncated, weight, slot, self.latent.index_select(0, slot), age, self.gamma**steps)
        batch = Sample(frames[:, : self.k], self.action[slot], reward, frames[:, -self.k :], *ends)
        return Sample(*(x.to(self.device) for x in batch))

    def ahead(self, slot: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Discounted reward, terminated, truncated of the next `n_step` steps from `slot` (B,), and how many (B,) they
        are: fewer where the episode ends, or nothing newer is known."""
        m = self.slots_per_env
        steps_on = torch.arange(self.n_step, device=slot.device)
        place = slot[:, None] % m
        known = ((self.steps - 1) % m - place) % m  # steps that came after
        slots = slot[:, None] - place + (place + steps_on) % m  # (B, n)
        same = (self.episode_start[slots] == self.episode_start[slot, None]) & (steps_on <= known)
        scalars = torch.where(same[..., None], self.scalars[slots], 0.0)
        reward = (scalars[..., 0] * self.gamma**steps_on).sum(1)
        return reward, scalars[..., 1].amax(1), scalars[..., 2].amax(1), same.sum(1)

    def update_priorities(self, slot: Tensor, error: Tensor) -> None:
        """Transitions (B,) are as likely from now on as these errors (B,) say."""
        slot, error = slot.to(self.frames.device), error.to(self.frames.device)
        priority = (error.abs().double() + self.eps) ** self.alpha
        self.tree.set(slot, priority)
        self.max_priority = torch.maximum(self.max_priority, priority.max())

    def keep_latent(self, slot: Tensor, latent: Tensor, update: int) -> None:
        """Latents (B, D) of these transitions, made anew."""
        slot, latent = slot.to(self.frames.device), latent.to(self.frames.device)
        self.latent[slot], self.scalars[slot, 3] = latent[last_of(slot)], float(update)

    TENSORS = (
        "frames",
        "frame_idx",
        "episode_start",
        "action",
        "scalars",
        "latent",
        "written",
        "current_start",
        "needs_reset",
        "max_priority",
    )

    def state_dict(self) -> dict:
        own = {k: getattr(self, k) for k in self.TENSORS}
        return own | {"levels": self.tree.levels, "steps": self.steps, "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        for k in self.TENSORS:
            getattr(self, k).copy_(state[k])
        for mine, theirs in zip(self.tree.levels, state["levels"], strict=True):
            mine.copy_(theirs)
        self.steps = state["steps"]
        self.generator.set_state(state["generator"].cpu())
