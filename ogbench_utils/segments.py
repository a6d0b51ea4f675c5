"""Recorded episodes -> batches of segments, each step of them with goals.

A segment is a stretch of T + K rows of one episode that may start at any of its transitions. A causal encoder reads
it once; its output in place j is the latent of a history of j + 1 states, so every one of the first T places is a
training example, and short histories, which are all that there is early in an episode, are among them. Behind an
episode's end its last row repeats: a causal encoder's outputs at real places do not see what stands behind them.

Goals are drawn as OGBench draws them: the next state, one of the same episode's future (near ones more often, by the
discount, for values; all alike for the policy), or any state of the data. A goal is reached when the next place (x, y)
lies within the environment's tolerance of it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Segments(NamedTuple):
    """A batch. B segments, T trained places, L = T + K rows, S state, A action. Raw units."""

    states: Tensor  # (B, L, S)
    actions: Tensor  # (B, T, A)
    rows: Tensor  # (B, L) long  in the data; behind an episode's end its last row again
    mask: Tensor  # (B, T)  1 where a transition stands, 0 behind the episode's end
    ahead: Tensor  # (B, T) long  the place that lies K steps on, or at the episode's end if that is nearer
    value_goals: Tensor  # (B, T, S)
    reached: Tensor  # (B, T)  1 where the next state is at the value goal
    future: Tensor  # (B, T)  1 where the value goal is a later state of the same episode
    policy_goals: Tensor  # (B, T, S)
    labelled: Tensor  # (B,)  1 where the actions may be used


class Goals(NamedTuple):
    """How goals are drawn: shares of the value's, and of the policy's."""

    current: float  # the next state
    trajectory: float  # a future state of the episode, Geometric(1 - gamma) steps on; the rest: any row
    policy_trajectory: float  # a future state, uniform; the rest: any row
    gamma: float
    tolerance: float  # of (x, y)


class Recorded:
    """Episodes on the training device, sampled as segments; every transition is equally likely to be the start.

    states (R, S), actions (R, A), ends (E,): as in `reader.Episodes`. seed: of the sampler's own generator.
    labelled: share of the episodes whose actions may be used, the same ones for one `label_seed`.
    """

    def __init__(
        self,
        episodes,
        t: int,
        k: int,
        goals: Goals,
        device: torch.device | str,
        seed: int,
        labelled: float = 1.0,
        label_seed: int = 0,
    ):
        self.t, self.k, self.goals = t, k, goals
        self.states = torch.from_numpy(episodes.states).to(device)
        self.actions = torch.from_numpy(episodes.actions).to(device)
        ends = torch.from_numpy(np.ascontiguousarray(episodes.ends))
        lengths = ends.diff(prepend=ends.new_full((1,), -1))  # in rows
        chosen = torch.zeros(len(ends))
        order = torch.randperm(len(ends), generator=torch.Generator().manual_seed(label_seed))
        chosen[order[: round(labelled * len(ends))]] = 1.0
        number = torch.arange(len(ends)).repeat_interleave(lengths)
        self.last = ends[number].to(device)  # the row in which a row's episode ends
        self.chosen = chosen[number].to(device)
        self.starts = (torch.arange(len(self.last)) != ends[number]).nonzero().squeeze(1).to(device)
        self.generator = torch.Generator(device).manual_seed(seed)

    def sample(self, b: int) -> Segments:
        """B segments, drawn with replacement. No host synchronisation."""
        return self.at(self.starts.index_select(0, self.below(len(self.starts), (b,))))

    def at(self, starts: Tensor) -> Segments:
        """The segments that start in rows (B,), with goals drawn for them."""
        t, k, goals, device = self.t, self.k, self.goals, starts.device
        last = self.last.index_select(0, starts)[:, None]
        rows = torch.minimum(starts[:, None] + torch.arange(t + k, device=device), last)
        here, after = rows[:, :t], rows[:, 1 : t + 1]
        mask = here < last
        ahead = torch.minimum(torch.arange(k, t + k, device=device)[None], last - starts[:, None])

        u, kind = self.uniform(here.shape), self.uniform(here.shape)
        leap = (u.log() / np.log(goals.gamma)).floor().long() + 1  # Geometric(1 - gamma), from 1
        value_rows = torch.minimum(here + leap, last)
        value_rows = torch.where(kind < goals.current, after, value_rows)
        anywhere = kind >= goals.current + goals.trajectory
        value_rows = torch.where(anywhere, self.below(len(self.last), here.shape), value_rows)
        u = self.uniform(here.shape)
        policy_rows = after + (u * (last - after + 1)).long()
        anywhere_policy = self.uniform(here.shape) >= goals.policy_trajectory
        policy_rows = torch.where(anywhere_policy, self.below(len(self.last), here.shape), policy_rows)
        policy_rows = torch.where(anywhere_policy, policy_rows, torch.minimum(policy_rows, last))

        take = lambda table, places: table.index_select(0, places.flatten()).unflatten(0, places.shape)  # noqa: E731
        states, value_goals = take(self.states, rows), take(self.states, value_rows)
        near = (states[:, 1 : t + 1, :2] - value_goals[..., :2]).square().sum(-1) <= goals.tolerance**2
        return Segments(
            states,
            take(self.actions, here),
            rows,
            mask.float(),
            ahead,
            value_goals,
            near.float(),
            (~anywhere).float(),
            take(self.states, policy_rows),
            self.chosen.index_select(0, starts),
        )

    def uniform(self, shape: tuple) -> Tensor:
        """In (0, 1]."""
        return 1 - torch.rand(shape, device=self.last.device, generator=self.generator)

    def below(self, n: int, shape: tuple) -> Tensor:
        return torch.randint(n, shape, device=self.last.device, generator=self.generator)

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())
