"""What environments answered in one step, and how memories begin anew where an episode is over."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


class Step(NamedTuple):
    """What n environments did in one step. Raw units. An episode ends where terminated or truncated."""

    state: Tensor  # (n, S)
    action: Tensor  # (n,) long, or (n, A)  taken in that state
    reward: Tensor  # (n,)
    next_state: Tensor  # (n, S)  the episode's last one where it ends, never the next episode's first
    terminated: Tensor  # (n,) bool  the MDP ended
    truncated: Tensor  # (n,) bool  only the recording did; a time limit is not a death


def reset_rows(memory, fresh, done: Tensor):
    """A memory of any kind for n environments, with the rows of `fresh` where an episode is over (n,)."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(done.view(-1, *[1] * (old.dim() - 1)), new, old)

    return pytree.tree_map(choose, fresh, memory)
