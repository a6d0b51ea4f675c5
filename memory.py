"""What is remembered: the last K states, out of a dataset and out of a running environment, by one rule.

A window of an episode's step t holds the K states that end in t, oldest first, the present last. Places before the
episode's start repeat its first state, as frame stacks do, so there is no padding and no mask, and the agent is trained
on exactly what it meets when it acts. `window` is that rule; `Windows` applies it to recorded rows, `remember` to live
ones.

Agents that learn from their own recent experience keep a rollout: `Rollout` gathers from it the windows they acted on.

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
    memory = Memory(states, (memory.seen + 1).clamp_max(k))
    return recall(memory), memory


def recall(memory: Memory) -> Tensor:
    """The window (n, K, S) that ends in the newest state."""
    k = memory.states.shape[1]
    if k == 1:
        return memory.states
    places = window(torch.full_like(memory.seen, k - 1), k - memory.seen, k)
    return memory.states.gather(1, places[..., None].expand_as(memory.states))


class Turn(NamedTuple):
    """One step of n environments, as the policy gradient wants it."""

    trace: tuple[Tensor, ...]  # each (n, ...)  what it adds to the windows that end here and later
    t: Tensor  # (n,) long  steps of the episode before it
    state: Tensor  # (n, S)  raw
    choice: Tensor  # (n, A)  the action as drawn
    logp: Tensor  # (n,)  log density of that draw
    reward: Tensor  # (n,)  raw
    over: Tensor  # (n,) bool  the episode ends here
    after: Tensor  # (n,)  the value of what follows, where this rollout does not hold it or nothing follows


class Rollout:
    """The last `steps` turns of n environments, behind them the K - 1 before, which the first windows reach into.

    like: a turn, for shapes, dtypes and device.
    """

    def __init__(self, steps: int, k: int, like: Turn):
        self.steps, self.k, self.n, self.count = steps, k, len(like.t), 0
        self.turns = pytree.tree_map(lambda x: x.new_zeros(k - 1 + steps, *x.shape), like)

    @property
    def full(self) -> bool:
        return self.count == self.steps

    def add(self, turn: Turn) -> None:
        """ValueError if there is no room: `turn_over` comes first."""
        if self.full:
            raise ValueError(f"the rollout holds its {self.steps} turns already")
        row = self.k - 1 + self.count
        for room, new in zip(pytree.tree_leaves(self.turns), pytree.tree_leaves(turn)):
            room[row] = new
        self.count += 1

    def now(self) -> Turn:
        """The turns of this rollout, each field (steps, n, ...)."""
        return pytree.tree_map(lambda x: x[self.k - 1 :], self.turns)

    def views(self, places: Tensor) -> tuple[Tensor, ...]:
        """The windows (B, K, ...) that end in the turns `places` (B,) of the flattened (steps * n). Those of an episode
        that is younger than K repeat its first turn."""
        row, lane = places // self.n + self.k - 1, places % self.n
        rows = window(row, row - self.turns.t[row, lane], self.k) * self.n + lane[:, None]
        pick = lambda x: x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)  # noqa: E731
        return tuple(pick(x) for x in self.turns.trace)

    def turn_over(self) -> None:
        """Make room; the newest K - 1 turns stay in reach."""
        for room in pytree.tree_leaves(self.turns):
            room[: self.k - 1] = room[self.steps :].clone()
        self.count = 0

    def state_dict(self) -> dict:
        return {"count": self.count, "turns": pytree.tree_leaves(self.turns)}

    def load_state_dict(self, state: dict) -> None:
        self.count = state["count"]
        for mine, theirs in zip(pytree.tree_leaves(self.turns), state["turns"], strict=True):
            mine.copy_(theirs)


def renew(memory, fresh, over: Tensor):
    """A memory of any kind for n environments, with the rows of `fresh` where an episode is over (n,)."""
    choose = lambda new, old: torch.where(over.view(-1, *[1] * (old.dim() - 1)), new, old)  # noqa: E731
    return pytree.tree_map(choose, fresh, memory)
