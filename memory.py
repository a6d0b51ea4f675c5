"""What is remembered: the last K states, out of a dataset and out of a running environment, by one rule.

A window of an episode's step t holds the K states that end in t, oldest first, the present last. Places before the
episode's start repeat its first state, as frame stacks do, so there is no padding and no mask, and the agent is trained
on exactly what it meets when it acts. `window` is that rule; `Windows` applies it to recorded rows, `remember` to live
ones.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Window(NamedTuple):
    """A batch. B batch, K context, S state, A action. Raw units: the agent normalises, the data do not."""

    states: Tensor  # (B, K, S)  oldest first; the present is states[:, -1]
    action: Tensor  # (B, A)     taken in the present state
    reward: Tensor  # (B,)
    next_states: Tensor  # (B, K, S)  the same window one step later
    alive: Tensor  # (B,)       1 unless the step ended the MDP; a time limit is not a death


def window(present: Tensor, first: Tensor, k: int) -> Tensor:
    """Rows (B, k) of the window that ends in row `present` (B,) of an episode that begins in row `first` (B,)."""
    back = torch.arange(k - 1, -1, -1, device=present.device)
    return torch.maximum(present[:, None] - back, first[:, None])


class Windows:
    """Recorded transitions on the training device, sampled as windows; every transition is equally likely.

    transitions: a `d4rl_utils.Transitions` (NumPy arrays). seed: of the sampler's own generator.
    """

    def __init__(self, transitions, k: int, device: torch.device | str, seed: int):
        if not len(transitions.rewards):
            raise ValueError("the dataset holds no transition")
        self.k = k
        self.states = torch.tensor(transitions.states, device=device)
        self.first = torch.tensor(transitions.first, device=device)
        # What belongs to one row lies side by side, so that a batch costs two gathers.
        facts = (transitions.actions, transitions.rewards, transitions.next_states, ~transitions.terminals)
        facts = [torch.tensor(x, dtype=torch.float32, device=device).reshape(len(self.first), -1) for x in facts]
        self.widths = [x.shape[1] for x in facts]
        self.facts = torch.cat(facts, 1)
        self.generator = torch.Generator(device).manual_seed(seed)

    def sample(self, b: int) -> Window:
        """B windows, drawn with replacement. No host synchronisation."""
        rows = torch.randint(len(self.first), (b,), device=self.states.device, generator=self.generator)
        return self.at(rows)

    def at(self, rows: Tensor) -> Window:
        """The windows that end in `rows` (B,)."""
        places = window(rows, self.first.index_select(0, rows), self.k)
        states = self.states.index_select(0, places.flatten()).unflatten(0, places.shape)
        action, reward, next_state, alive = self.facts.index_select(0, rows).split(self.widths, 1)
        # One step later the oldest state falls out and s' comes in; before K steps the first state just repeats less.
        next_states = torch.cat([states[:, 1:], next_state[:, None]], 1)
        return Window(states, action, reward.squeeze(1), next_states, alive.squeeze(1))

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


class Memory(NamedTuple):
    """What an agent of this kind carries from step to step, for n environments."""

    states: Tensor  # (n, K, S)  the newest last; rows that are not there yet hold anything
    seen: Tensor  # (n,)       how many of them are there


def forget(n: int, k: int, like: Tensor) -> Memory:
    """The memory before the first state. like: (S,), gives width, dtype and device."""
    return Memory(like.new_zeros(n, k, len(like)), torch.zeros(n, dtype=torch.long, device=like.device))


def remember(memory: Memory, state: Tensor) -> tuple[Tensor, Memory]:
    """Take in the present (n, S); returns the window (n, K, S) that ends in it, and the memory one step on."""
    k = memory.states.shape[1]
    states = torch.cat([memory.states[:, 1:], state[:, None]], 1)
    seen = (memory.seen + 1).clamp_max(k)
    places = window(torch.full_like(seen, k - 1), k - seen, k)
    return states.gather(1, places[..., None].expand_as(states)), Memory(states, seen)
