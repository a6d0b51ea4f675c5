"""What is remembered: the last K states, out of a dataset and out of a running environment, by one rule.

A window of an episode's step t holds the K states that end in t, oldest first, the present last. Places before the
episode's start repeat its first state, as frame stacks do, so there is no padding and no mask, and the agent is trained
on exactly what it meets when it acts. `window` is that rule; `Windows` applies it to recorded rows, `remember` to live
ones.

Return-conditioned agents learn from spans: up to K steps that start anywhere, left-aligned, right-padded under a mask.
A causal model's outputs at real steps do not see what stands behind them.
"""

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


class Span(NamedTuple):
    """A batch of stretches of episodes. Raw units. Places behind a stretch's end repeat its last step, under mask 0."""

    rtg: Tensor  # (B, K)  return-to-go: the sum of rewards from here to the episode's end, undiscounted
    states: Tensor  # (B, K, S)
    actions: Tensor  # (B, K, A)
    steps: Tensor  # (B, K) long  of the episode, from 0
    mask: Tensor  # (B, K)  1 real, then 0


class Spans:
    """Recorded transitions on the training device, sampled as spans; every transition is equally likely to be a start.

    transitions: a `d4rl_utils.Transitions` (NumPy arrays). seed: of the sampler's own generator.
    """

    def __init__(self, transitions, k: int, device: torch.device | str, seed: int):
        rows = len(transitions.rewards)
        if not rows:
            raise ValueError("the dataset holds no transition")
        self.k = k
        first = torch.tensor(transitions.first)
        starts, lengths = torch.unique_consecutive(first, return_counts=True)
        last = (starts + lengths - 1).repeat_interleave(lengths)  # the row in which this row's episode ends
        reward = torch.tensor(transitions.rewards, dtype=torch.float64)
        total = reward.cumsum(0)
        rtg = total[last] - total + reward  # in float64: a million rewards lie below this row's
        facts = (rtg, torch.arange(rows) - first, torch.tensor(transitions.actions), torch.tensor(transitions.states))
        facts = [x.float().reshape(rows, -1) for x in facts]
        self.widths = [x.shape[1] for x in facts]
        self.facts = torch.cat(facts, 1).to(device)  # side by side, so that a batch costs one gather
        self.last = last.to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def states(self) -> Tensor:
        """All recorded states (N, S)."""
        return self.facts[:, -self.widths[-1] :]

    def sample(self, b: int) -> Span:
        """B spans, drawn with replacement. No host synchronisation."""
        rows = torch.randint(len(self.last), (b,), device=self.last.device, generator=self.generator)
        return self.at(rows)

    def at(self, rows: Tensor) -> Span:
        """The spans that start in `rows` (B,)."""
        last = self.last.index_select(0, rows)[:, None]
        places = rows[:, None] + torch.arange(self.k, device=rows.device)
        mask = (places <= last).float()
        places = torch.minimum(places, last)
        facts = self.facts.index_select(0, places.flatten()).unflatten(0, places.shape)
        rtg, steps, actions, states = facts.split(self.widths, -1)
        return Span(rtg.squeeze(-1), states, actions, steps.squeeze(-1).long(), mask)

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


def renew(memory, fresh, over: Tensor):
    """A memory of any kind for n environments, with the rows of `fresh` where an episode is over (n,)."""
    choose = lambda new, old: torch.where(over.view(-1, *[1] * (old.dim() - 1)), new, old)  # noqa: E731
    return pytree.tree_map(choose, fresh, memory)
