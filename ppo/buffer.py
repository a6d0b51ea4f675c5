"""What PPO remembers of an iteration, and learns from in minibatches."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.windows import Sequence, SequenceSampler, Window, WindowSampler


class RolloutStep(NamedTuple):
    """One step of n environments; a whole iteration has a leading axis T."""

    view: tuple[Tensor, ...]  # each (n, K, ...)  the window that was acted on
    t: Tensor  # (n,) long  steps of the episode before it
    state: Tensor  # (n, S)  raw
    raw_action: Tensor  # (n, A)  the action as drawn
    logp: Tensor  # (n,)  log density of that draw
    reward: Tensor  # (n,)  raw
    done: Tensor  # (n,) bool  the episode ends here
    bootstrap_value: Tensor  # (n,)  the value of what follows, where this rollout does not hold it or nothing follows


class Minibatch(NamedTuple):
    """A part of an iteration, or all of it. B steps."""

    view: tuple[Tensor, ...]  # each (B, K, ...)  the windows that were acted on
    t: Tensor  # (B,) long
    value_input: Tensor  # (B, D + S, or one more)  of the policy that acted
    raw_action: Tensor  # (B, A)
    logp: Tensor  # (B,)  of that action, when it was drawn
    advantage: Tensor  # (B,)
    target: Tensor  # (B,)  of the value
    ref_action: Tensor | tuple  # (B, A)  the offline policy's action; () without a reference policy
    data: Sequence | Window | tuple  # what to clone; () if nothing


class Iteration(NamedTuple):
    """What holds for all updates of an iteration."""

    progress: float  # share of the run that lay behind when it began
    value_only: bool  # the value warms up
    cloning: bool  # data are cloned beside
    metrics: dict[str, Tensor]
    kl_sums: Tensor  # (2,)  over a pass: KL to the policy that acted, and to the offline one

    @property
    def variant(self) -> tuple[bool, bool]:
        return self.value_only, self.cloning


class OpenStep(NamedTuple):
    """A step between the action and the environment's answer."""

    memory: object  # the policy's, with the action in it
    view: tuple[Tensor, ...]
    raw_action: Tensor
    logp: Tensor


class RolloutBuffer:
    """T steps of n environments, each with the window that was acted on; and the data to clone, if any.

    like: one step, for shapes, dtypes and device.
    """

    def __init__(self, steps: int, like: RolloutStep, data: WindowSampler | SequenceSampler | None):
        self.steps, self.count, self.data = steps, 0, data
        self.rows = pytree.tree_map(lambda x: x.new_zeros(steps, *x.shape), like)
        self.leaves = pytree.tree_leaves(self.rows)  # once: in every step it costs more than the copies
        self.t = torch.zeros_like(like.t)  # (n,) steps of the episodes that are under way
        self.discounted = torch.zeros_like(like.reward)  # (n,) returns so far, with which the next rollout begins
        self.open: OpenStep | None = None

    @property
    def full(self) -> bool:
        return self.count == self.steps

    def begin_step(self, step: OpenStep) -> None:
        """An action was drawn. ValueError if there is no room: `clear` comes first."""
        if self.full:
            raise ValueError(f"the rollout holds its {self.steps} steps already")
        self.open = step

    def end_step(self, state: Tensor, reward: Tensor, done: Tensor, bootstrap_value: Tensor) -> None:
        """The environments answered."""
        view, raw_action, logp = self.open.view, self.open.raw_action, self.open.logp
        step = *view, self.t, state, raw_action, logp, reward, done, bootstrap_value  # as a RolloutStep is flattened
        for row, new in zip(self.leaves, step, strict=True):
            row[self.count] = new
        self.count += 1
        self.t = torch.where(done, 0, self.t + 1)
        self.open = None

    def flat(self) -> RolloutStep:
        """The iteration's steps, each field (T * n, ...)."""
        return pytree.tree_map(lambda x: x.flatten(0, 1), self.rows)

    def clear(self) -> None:
        self.count = 0

    def state_dict(self) -> dict:
        own = {"count": self.count, "rows": self.leaves, "t": self.t, "discounted": self.discounted}
        return own | {"data": self.data.state_dict() if self.data else None}

    def load_state_dict(self, state: dict) -> None:
        """ValueError for that of a version whose rollouts held no windows."""
        if "rows" not in state:
            raise ValueError(
                "an older version stopped this run, and its rollouts held no windows: resume it with that version, "
                "or fine-tune its policy's checkpoint anew"
            )
        self.count = state["count"]
        for mine, theirs in zip(self.leaves, state["rows"], strict=True):
            mine.copy_(theirs)
        self.t.copy_(state["t"])
        self.discounted.copy_(state["discounted"])
        if self.data:
            self.data.load_state_dict(state["data"])
