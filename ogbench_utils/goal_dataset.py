"""Recorded episodes -> batches of segments, each step of them with goals.

A segment is a stretch of T + K rows of one episode that may start at any of its transitions. A causal encoder reads
it once; its output in place j is the latent of a history of j + 1 states, so every one of the first T places is a
training example, and short histories, which are all that there is early in an episode, are among them. Behind an
episode's end its last row repeats: a causal encoder's outputs at real places do not see what stands behind them.

Goals are drawn as OGBench draws them: the next state, one of the same episode's future (near ones more often, by
the discount, for values; all alike for the policy, of which a share `near` is drawn as for values), or any state of the
data. A goal is reached when the next place (x, y) lies within the environment's tolerance of it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class GoalSegments(NamedTuple):
    """A batch. B segments, T trained places, L = T + K rows, S state, A action. Raw units."""

    states: Tensor  # (B, L, S)
    actions: Tensor  # (B, T, A)
    rows: Tensor  # (B, L) long  in the data; behind an episode's end its last row again
    mask: Tensor  # (B, T)  1 where a transition stands, 0 behind the episode's end
    k_step_idx: Tensor  # (B, T) long  the place that lies K steps on, or at the episode's end if that is nearer
    subgoal_idx: Tensor  # (B, T) long  the same, or the place of the policy goal if that is nearer
    value_goals: Tensor  # (B, T, S)
    success: Tensor  # (B, T)  1 where the next state is at the value goal
    future: Tensor  # (B, T)  1 where the value goal is a later state of the same episode
    policy_goals: Tensor  # (B, T, S)
    has_actions: Tensor  # (B,)  1 where the actions may be used


class Goals(NamedTuple):
    """How goals are drawn: shares of the value's, and of the policy's."""

    current: float  # the next state
    trajectory: float  # a future state of the episode, Geometric(1 - gamma) steps on; the rest: any row
    policy_trajectory: float  # a future state; the rest: any row
    near: float  # share of these that are Geometric(1 - gamma) steps on; the rest: uniform
    gamma: float
    tolerance: float  # of (x, y)


class Draws(NamedTuple):
    """All that is random in a batch of segments. Each (B, T) but `starts`; what is not a row lies in (0, 1]."""

    starts: Tensor  # (B,) rows
    value_kind: Tensor
    value_steps: Tensor
    value_any: Tensor  # rows
    policy_place: Tensor
    policy_kind: Tensor
    policy_steps: Tensor
    policy_reach: Tensor
    policy_any: Tensor  # rows


class GoalDataset:
    """Episodes of rows, one after another on one device, sampled as segments; every transition is as likely a start.

    What a kind of rows must have: `states` (R, S), `actions` (R, A), `last` (R,) the row in which a row's episode ends,
    `has_actions` (R,) 1 where they may be used, `starts` the rows with a transition, `valid_rows` those that are states
    of the data at all.
    """

    def __init__(self, t: int, k: int, goals: Goals, device: torch.device | str, seed: int):
        self.t, self.k, self.goals = t, k, goals
        self.generator = torch.Generator(device).manual_seed(seed)

    def sample(self, b: int) -> GoalSegments:
        """B segments, drawn with replacement. No host synchronisation."""
        return self.at(self.draw(b, self.generator))

    def draw(self, b: int, generator: torch.Generator, starts: Tensor | None = None) -> Draws:
        """What `at` wants for b segments. starts: rows (b,) to start in"""
        device, shape = self.last.device, (b, self.t)

        def row_of(table: Tensor, shape: tuple) -> Tensor:
            return table[torch.randint(len(table), shape, device=device, generator=generator)]

        def uniform() -> Tensor:
            return 1 - torch.rand(shape, device=device, generator=generator)

        starts = row_of(self.starts, (b,)) if starts is None else starts
        value = uniform(), uniform(), row_of(self.valid_rows, shape)
        return Draws(starts, *value, uniform(), uniform(), uniform(), uniform(), row_of(self.valid_rows, shape))

    def at(self, draws: Draws) -> GoalSegments:
        """The segments of these draws, with goals."""
        t, k, goals, starts, device = self.t, self.k, self.goals, draws.starts, draws.starts.device
        last = self.last.index_select(0, starts)[:, None]
        rows = torch.minimum(starts[:, None] + torch.arange(t + k, device=device), last)
        here, after = rows[:, :t], rows[:, 1 : t + 1]
        mask = here < last
        k_step_idx = torch.minimum(torch.arange(k, t + k, device=device)[None], last - starts[:, None])

        value_rows = torch.minimum(here + self.geometric(draws.value_steps), last)
        value_rows = torch.where(draws.value_kind < goals.current, after, value_rows)
        anywhere = draws.value_kind >= goals.current + goals.trajectory
        value_rows = torch.where(anywhere, draws.value_any, value_rows)
        policy_rows = after + (draws.policy_place * (last - after + 1)).long()
        near_policy_rows = here + self.geometric(draws.policy_steps)
        policy_rows = torch.where(draws.policy_kind < goals.near, near_policy_rows, policy_rows)
        policy_rows = torch.minimum(policy_rows, last)
        steps = policy_rows - here
        anywhere_policy = draws.policy_reach >= goals.policy_trajectory
        subgoal_idx = torch.where(
            anywhere_policy, k_step_idx, torch.minimum(k_step_idx, torch.arange(t, device=device) + steps)
        )
        policy_rows = torch.where(anywhere_policy, draws.policy_any, policy_rows)

        states, value_goals = take(self.states, rows), take(self.states, value_rows)
        near = (states[:, 1 : t + 1, :2] - value_goals[..., :2]).square().sum(-1) <= goals.tolerance**2
        return GoalSegments(
            states,
            take(self.actions, here),
            rows,
            mask.float(),
            k_step_idx,
            subgoal_idx,
            value_goals,
            near.float(),
            (~anywhere).float(),
            take(self.states, policy_rows),
            self.has_actions.index_select(0, starts),
        )

    def geometric(self, u: Tensor) -> Tensor:
        """Steps ahead, from 1 on, by the discount. u: in (0, 1]"""
        return (u.log() / np.log(self.goals.gamma)).floor().long() + 1

    def state_dict(self) -> dict:
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.generator.set_state(state["generator"].cpu())


def take(table: Tensor, rows: Tensor) -> Tensor:
    """Rows (B, L) of a table (R, X). -> (B, L, X)"""
    return table.index_select(0, rows.flatten()).unflatten(0, rows.shape)


class OfflineGoalDataset(GoalDataset):
    """The episodes of a data set. states (R, S), actions (R, A), ends (E,): as in `reader.Episodes`.

    seed: of the sampler's own generator. labelled_fraction: share of the episodes whose actions may be used, the same
    ones for one `label_seed`.
    """

    def __init__(
        self,
        episodes,
        t: int,
        k: int,
        goals: Goals,
        device: torch.device | str,
        seed: int,
        labelled_fraction: float = 1.0,
        label_seed: int = 0,
    ):
        super().__init__(t, k, goals, device, seed)
        self.states = torch.from_numpy(episodes.states).to(device)
        self.actions = torch.from_numpy(episodes.actions).to(device)
        ends = torch.from_numpy(np.ascontiguousarray(episodes.ends))
        lengths = ends.diff(prepend=ends.new_full((1,), -1))  # in rows
        has_actions = torch.zeros(len(ends))
        order = torch.randperm(len(ends), generator=torch.Generator().manual_seed(label_seed))
        has_actions[order[: round(labelled_fraction * len(ends))]] = 1.0
        number = torch.arange(len(ends)).repeat_interleave(lengths)
        self.last, self.has_actions = ends[number].to(device), has_actions[number].to(device)
        self.valid_rows = torch.arange(len(self.last), device=device)
        self.starts = (self.valid_rows != self.last).nonzero().squeeze(1)


class OnlineGoalDataset(GoalDataset):
    """Episodes of one's own, the oldest forgotten when there is no more room. All of them show their actions.

    An episode comes in whole when it is over, so that goals may lie anywhere ahead in it.
    """

    def __init__(self, room: int, n: int, state: int, action: int, t, k, goals: Goals, device, seed: int):
        """room: rows; n: environments whose episodes grow side by side."""
        super().__init__(t, k, goals, device, seed)
        self.states, self.actions = torch.zeros(room, state, device=device), torch.zeros(room, action, device=device)
        self.last = torch.full((room,), -1, device=device)  # -1: nothing stands here
        self.has_actions = torch.ones(room, device=device)
        self.head, self.episodes = 0, 0  # where the next one goes; how many there were
        self.open_episodes: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(n)]  # (state, action) of each step
        self.look()

    def look(self) -> None:
        """Which rows can be drawn."""
        self.valid_rows = (self.last >= 0).nonzero().squeeze(1)
        self.starts = self.valid_rows[self.valid_rows != self.last[self.valid_rows]]

    def add(self, step) -> None:
        """One step (a `rollout.Step`) of all environments; those that end there are learned from."""
        over = (step.terminated | step.truncated).tolist()
        for i, grown in enumerate(self.open_episodes):
            grown.append((step.state[i], step.action[i]))
            if over[i]:
                states = torch.stack([*(s for s, _ in grown), step.next_state[i]])
                actions = torch.stack([a for _, a in grown])
                self.keep(states.to(self.states), actions.to(self.actions))
                grown.clear()

    def keep(self, states: Tensor, actions: Tensor) -> None:
        """A whole episode: states (T + 1, S), actions (T, A)."""
        n, room = len(states), len(self.last)
        if n > room:
            raise ValueError(f"an episode of {n} states does not fit in buffer_size = {room}: take a larger one")
        if self.head + n > room:
            self.last[self.head :] = -1  # what is left of the oldest ones there
            self.head = 0
        begin, end = self.head, self.head + n
        self.states[begin:end], self.actions[begin : end - 1], self.last[begin:end] = states, actions, end - 1
        self.head, self.episodes = end, self.episodes + 1
        self.look()

    def state_dict(self) -> dict:
        rows = self.valid_rows.cpu()
        return super().state_dict() | {
            "rows": rows,
            "states": self.states[self.valid_rows].cpu(),
            "actions": self.actions[self.valid_rows].cpu(),
            "last": self.last[self.valid_rows].cpu(),
            "at": self.head,
            "episodes": self.episodes,
            "growing": [[(s.cpu(), a.cpu()) for s, a in grown] for grown in self.open_episodes],
        }

    def load_state_dict(self, state: dict) -> None:
        super().load_state_dict(state)
        rows, device = state["rows"].to(self.last.device), self.last.device
        self.last.fill_(-1)
        self.states[rows], self.actions[rows] = state["states"].to(device), state["actions"].to(device)
        self.last[rows] = state["last"].to(device)
        self.head, self.episodes = state["at"], state["episodes"]
        self.open_episodes = [[(s.to(device), a.to(device)) for s, a in grown] for grown in state["growing"]]
        self.look()
