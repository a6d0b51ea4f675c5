"""What is remembered: the last K states, out of a dataset and out of a running environment, by one rule.

A window of an episode's step t holds the K states that end in t, oldest first, the present last. Places before the
episode's start repeat its first state, as frame stacks do, so there is no padding and no mask, and the agent is trained
on exactly what it meets when it acts. `window` is that rule; `WindowSampler` applies it to recorded rows, `FrameStack`
to live ones.

Segments are the cheap form of the same: T steps of an episode that a causal encoder reads once, learning at every one
of them. A place sees what stands before it in the segment, so the first places see less than T states.

Return-conditioned agents learn from spans: up to K steps that start anywhere, left-aligned, right-padded under a mask.
A causal model's outputs at real steps do not see what stands behind them.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Window(NamedTuple):
    """A batch. B batch, K context, S state, A action. Raw units: the agent normalises, the data do not."""

    states: Tensor  # (B, K, S)  oldest first; the present is states[:, -1]
    action: Tensor  # (B, A)     taken in the present state
    reward: Tensor  # (B,)
    next_states: Tensor  # (B, K, S)  the same window one step later
    not_done: Tensor  # (B,)       1 unless the step ended the MDP; a time limit is not a death
    next_action: Tensor | tuple = ()  # (B, A)  recorded in s'; anything where has_next is 0
    has_next: Tensor | tuple = ()  # (B,)       1 where the same episode goes on
    returns: Tensor | tuple = ()  # (B,)        `discounted_returns` from here, if the sampler was given a gamma


class Segment(NamedTuple):
    """A batch of T steps in a row, each within one episode. Raw units. Where it is shorter, its end repeats, masked.

    P states stand before the first step; where the episode has fewer, its first is repeated, as in windows.
    """

    states: Tensor  # (B, P+T+1, S)  the last real step's next state stands behind it
    action: Tensor  # (B, T, A)
    reward: Tensor  # (B, T)
    not_done: Tensor  # (B, T)
    next_action: Tensor  # (B, T, A)
    has_next: Tensor  # (B, T)
    returns: Tensor | tuple  # (B, T)
    mask: Tensor  # (B, T)  1 real, then 0


def discounted_returns(transitions, gamma: float) -> np.ndarray:
    """Monte-Carlo returns-to-go (N,), discounted, in the data's units.

    Where a recording ends without the MDP's end, its tail is taken to be worth the episode's mean reward for ever,
    r / (1 - gamma); with gamma 1 there is no such sum, and the tail counts nothing.
    """
    starts, lengths = np.unique(np.asarray(transitions.episode_start), return_counts=True)
    last = starts + lengths - 1
    reward = np.asarray(transitions.rewards, dtype=np.float64)
    tail = np.add.reduceat(reward, starts) / lengths / (1 - gamma) if gamma < 1 else np.zeros(len(starts))
    value, out = np.where(np.asarray(transitions.terminals)[last], 0.0, tail), np.empty(len(reward))
    for back in range(lengths.max()):  # from the ends of all episodes at once
        live = lengths > back
        rows = last[live] - back
        value[live] = reward[rows] + gamma * value[live]
        out[rows] = value[live]
    return out


def columns_of(transitions, gamma: float | None, device) -> tuple[Tensor, list[int]]:
    """What belongs to one row, side by side, so that a batch costs one gather: (N, width), and the columns' widths.

    action, reward, next_state, alive, next_action, has_next, and with a gamma the returns.
    """
    has_next = ~transitions.ends
    following = np.minimum(np.arange(len(has_next)) + 1, len(has_next) - 1)
    columns = [transitions.actions, transitions.rewards, transitions.next_states, ~transitions.terminals]
    columns += [np.asarray(transitions.actions)[following], has_next]
    columns += [] if gamma is None else [discounted_returns(transitions, gamma)]
    columns = [torch.tensor(x, dtype=torch.float32, device=device).reshape(len(has_next), -1) for x in columns]
    return torch.cat(columns, 1), [x.shape[1] for x in columns]


def window(present: Tensor, first: Tensor, k: int) -> Tensor:
    """Rows (B, k) of the window that ends in row `present` (B,) of an episode that begins in row `first` (B,)."""
    back = torch.arange(k - 1, -1, -1, device=present.device)
    return torch.maximum(present[:, None] - back, first[:, None])


class RecordedSteps:
    """Recorded steps, one a row."""

    columns: Tensor  # (N, width)  of `columns_of`
    widths: list[int]

    @property
    def actions(self) -> Tensor:
        """All recorded actions (N, A)."""
        return self.columns[:, : self.widths[0]]

    @property
    def next_states(self) -> Tensor:
        """All recorded next states (N, S)."""
        start = sum(self.widths[:2])
        return self.columns[:, start : start + self.widths[2]]

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


class WindowSampler(RecordedSteps):
    """Recorded transitions on the training device, sampled as windows; every transition is equally likely.

    transitions: a `d4rl_utils.Transitions` (NumPy arrays). seed: of the sampler's own generator. gamma: of the returns,
    if a batch is to have them.
    """

    def __init__(self, transitions, k: int, device: torch.device | str, seed: int, gamma: float | None = None):
        if not len(transitions.rewards):
            raise ValueError("the dataset holds no transition")
        self.k = k
        self.states = torch.tensor(transitions.states, device=device)
        self.episode_start = torch.tensor(transitions.episode_start, device=device)
        self.columns, self.widths = columns_of(transitions, gamma, device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def sample(self, b: int) -> Window:
        """B windows, drawn with replacement. No host synchronisation."""
        return self.at(self.draw(b, self.generator))

    def draw(self, b: int, generator: torch.Generator) -> Tensor:
        """What `at` wants for b windows."""
        return torch.randint(len(self.episode_start), (b,), device=self.states.device, generator=generator)

    def at(self, rows: Tensor) -> Window:
        """The windows that end in `rows` (B,)."""
        indices = window(rows, self.episode_start.index_select(0, rows), self.k)
        states = self.states.index_select(0, indices.flatten()).unflatten(0, indices.shape)
        columns = self.columns.index_select(0, rows).split(self.widths, 1)
        action, reward, next_state, not_done, next_action, has_next, *returns = columns
        # One step later the oldest state falls out and s' comes in; before K steps the first state just repeats less.
        next_states = torch.cat([states[:, 1:], next_state[:, None]], 1)
        reward, not_done, has_next = reward.squeeze(1), not_done.squeeze(1), has_next.squeeze(1)
        returns = returns[0].squeeze(1) if returns else ()
        return Window(states, action, reward, next_states, not_done, next_action, has_next, returns)


class SegmentSampler(RecordedSteps):
    """Recorded transitions on the training device, sampled as segments of T; every transition is equally likely.

    A segment's place in its episode is drawn so that it may reach over either end; what it has there is left away. So a
    step is as likely as any other, whatever its episode's length and wherever it stands in it.
    """

    def __init__(
        self, transitions, t: int, device: torch.device | str, seed: int, gamma: float | None = None, before: int = 0
    ):
        """transitions, seed, gamma: as of `WindowSampler`. before: P, states before a segment's first step"""
        if not len(transitions.rewards):
            raise ValueError("the dataset holds no transition")
        self.t = t
        self.past = torch.arange(-before, 0, device=device)
        self.states = torch.tensor(transitions.states, device=device)
        self.columns, self.widths = columns_of(transitions, gamma, device)
        first, lengths = torch.unique_consecutive(torch.tensor(transitions.episode_start), return_counts=True)
        draws = lengths + t - 1  # places of a segment that hold at least one of the episode's steps
        self.episode_start, self.last = first.to(device), (first + lengths - 1).to(device)
        self.earlier = (draws.cumsum(0) - draws).to(device)  # draws of all earlier episodes
        self.episode = torch.arange(len(draws)).repeat_interleave(draws).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def sample(self, b: int) -> Segment:
        """Segments of b steps together (at least one segment), drawn with replacement. No host synchronisation."""
        return self.at(self.draw(b, self.generator))

    def draw(self, b: int, generator: torch.Generator) -> Tensor:
        """What `at` wants for segments of b steps together."""
        count = max(1, b // self.t)
        return torch.randint(len(self.episode), (count,), device=self.states.device, generator=generator)

    def at(self, draws: Tensor) -> Segment:
        """The segments of these draws (B,), out of len(self.episode)."""
        episode = self.episode.index_select(0, draws)
        first, last = self.episode_start.index_select(0, episode), self.last.index_select(0, episode)
        start = first - (self.t - 1) + draws - self.earlier.index_select(0, episode)
        begin, end = torch.maximum(start, first), torch.minimum(start + self.t - 1, last)
        rows = begin[:, None] + torch.arange(self.t, device=draws.device)  # (B, T)
        mask = (rows <= end[:, None]).float()
        rows = torch.minimum(rows, end[:, None])
        columns = self.columns.index_select(0, rows.flatten()).unflatten(0, rows.shape).split(self.widths, 2)
        action, reward, next_state, not_done, next_action, has_next, *returns = columns
        states = self.states.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        # behind the last real step stands its next state, however often the step is repeated
        following = torch.where(mask[:, 1:, None] > 0, states[:, 1:], next_state[:, :-1])
        before = torch.maximum(begin[:, None] + self.past, first[:, None])  # (B, P)
        before = self.states.index_select(0, before.flatten()).unflatten(0, before.shape)
        states = torch.cat([before, states[:, :1], following, next_state[:, -1:]], 1)
        reward, not_done, has_next = reward.squeeze(2), not_done.squeeze(2), has_next.squeeze(2)
        returns = returns[0].squeeze(2) if returns else ()
        return Segment(states, action, reward, not_done, next_action, has_next, returns, mask)


class Sequence(NamedTuple):
    """A batch of stretches of episodes. Raw units. Places behind a stretch's end repeat its last step, under mask 0."""

    rtg: Tensor  # (B, K)  return-to-go: the sum of rewards from here to the episode's end, undiscounted
    states: Tensor  # (B, K, S)
    actions: Tensor  # (B, K, A)
    steps: Tensor  # (B, K) long  of the episode, from 0
    mask: Tensor  # (B, K)  1 real, then 0


class SequenceSampler:
    """Recorded transitions on the training device, sampled as spans; every transition is equally likely to be a start.

    transitions: a `d4rl_utils.Transitions` (NumPy arrays). seed: of the sampler's own generator.
    """

    def __init__(self, transitions, k: int, device: torch.device | str, seed: int):
        rows = len(transitions.rewards)
        if not rows:
            raise ValueError("the dataset holds no transition")
        self.k = k
        first = torch.tensor(transitions.episode_start)
        starts, lengths = torch.unique_consecutive(first, return_counts=True)
        last = (starts + lengths - 1).repeat_interleave(lengths)  # the row in which this row's episode ends
        reward = torch.tensor(transitions.rewards, dtype=torch.float64)
        total = reward.cumsum(0)
        rtg = total[last] - total + reward  # in float64: a million rewards lie below this row's
        columns = (rtg, torch.arange(rows) - first, torch.tensor(transitions.actions), torch.tensor(transitions.states))
        columns = [x.float().reshape(rows, -1) for x in columns]
        self.widths = [x.shape[1] for x in columns]
        self.columns = torch.cat(columns, 1).to(device)  # side by side, so that a batch costs one gather
        self.last = last.to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    @property
    def states(self) -> Tensor:
        """All recorded states (N, S)."""
        return self.columns[:, -self.widths[-1] :]

    @property
    def actions(self) -> Tensor:
        """All recorded actions (N, A)."""
        return self.columns[:, 2 : 2 + self.widths[2]]

    def sample(self, b: int) -> Sequence:
        """B spans, drawn with replacement. No host synchronisation."""
        return self.at(self.draw(b, self.generator))

    def draw(self, b: int, generator: torch.Generator) -> Tensor:
        """What `at` wants for b sequences."""
        return torch.randint(len(self.last), (b,), device=self.last.device, generator=generator)

    def at(self, rows: Tensor) -> Sequence:
        """The spans that start in `rows` (B,)."""
        last = self.last.index_select(0, rows)[:, None]
        indices = rows[:, None] + torch.arange(self.k, device=rows.device)
        mask = (indices <= last).float()
        indices = torch.minimum(indices, last)
        columns = self.columns.index_select(0, indices.flatten()).unflatten(0, indices.shape)
        rtg, steps, actions, states = columns.split(self.widths, -1)
        return Sequence(rtg.squeeze(-1), states, actions, steps.squeeze(-1).long(), mask)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


class FrameStack(NamedTuple):
    """The last K states of n environments: what an agent of windows carries from step to step."""

    states: Tensor  # (n, K, S)  the newest last; rows that are not there yet hold anything
    seen: Tensor  # (n,)       how many of them are there

    @classmethod
    def init(cls, n: int, k: int, like: Tensor) -> "FrameStack":
        """Before the first state. like: (S,), gives width, dtype and device."""
        return cls(like.new_zeros(n, k, len(like)), torch.zeros(n, dtype=torch.long, device=like.device))

    def push(self, state: Tensor) -> tuple[Tensor, "FrameStack"]:
        """Take in the present (n, S); returns the window (n, K, S) that ends in it, and the stack one step on."""
        k = self.states.shape[1]
        states = torch.cat([self.states[:, 1:], state[:, None]], 1)
        stack = FrameStack(states, (self.seen + 1).clamp_max(k))
        return stack.read_window(), stack

    def read_window(self) -> Tensor:
        """The window (n, K, S) that ends in the newest state."""
        k = self.states.shape[1]
        if k == 1:
            return self.states
        indices = window(torch.full_like(self.seen, k - 1), k - self.seen, k)
        return self.states.gather(1, indices[..., None].expand_as(self.states))
