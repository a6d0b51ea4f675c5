"""Environments side by side for an agent that learns online, in a run that can be killed and goes on to the bit.

Few simulators can be saved. But an episode is its seed and its actions: every reset gets a seed of its own from one
stream, the actions since then are kept, and waking plays them again and compares what is seen. Environments that do not
repeat themselves are found out by that, and begin a new episode.
"""

import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.rollout import Step

log = logging.getLogger(__name__)


class EpisodeStats(NamedTuple):
    """An episode that is over."""

    total: float  # its return
    length: int
    terminated: bool


class Envs:
    """n environments; each begins its next episode by itself. make() -> a Gymnasium environment with flat states."""

    def __init__(self, make: Callable, n: int, seed: int, device: torch.device | str = "cpu"):
        self.envs, self.device = [make() for _ in range(n)], device
        self.rng = np.random.default_rng(seed)
        self.seeds, self.totals = [0] * n, [0.0] * n
        self.actions: list[list[np.ndarray]] = [[] for _ in range(n)]  # since the last reset
        self.goals: list[np.ndarray | None] = [None] * n  # what an environment says is wanted, if it does
        self.seen = np.stack([self.begin(i) for i in range(n)])
        self.reward = torch.zeros(n, device=device)  # of the last actions
        self.state = self.as_tensor(self.seen)

    def begin(self, i: int) -> np.ndarray:
        """A new episode in environment i; its first state (S,)."""
        self.seeds[i], self.totals[i] = int(self.rng.integers(2**31)), 0.0
        self.actions[i].clear()
        state, info = self.envs[i].reset(seed=self.seeds[i])
        self.goals[i] = info.get("goal")
        return state

    @property
    def goal(self) -> Tensor | None:
        """What is wanted in each (n, S), for agents that are told; None if the environments do not say."""
        return None if self.goals[0] is None else self.as_tensor(np.stack(self.goals))

    def step(self, action: Tensor) -> tuple[Step, list[EpisodeStats]]:
        """Actions (n,) or (n, A) -> what happened, and the episodes that ended. `state` and `reward` move on."""
        before, moves, ended = self.state, action.cpu().numpy(), []
        n = len(self.envs)
        next_state_np, reward, done = self.seen.copy(), np.zeros(n, np.float32), np.zeros((2, n), dtype=bool)
        for i, env in enumerate(self.envs):
            next_state_np[i], gained, done[0, i], done[1, i], _ = env.step(moves[i])
            self.actions[i].append(moves[i])
            self.totals[i] += float(gained)
            reward[i] = gained
        self.seen = next_state_np.copy()
        for i in np.flatnonzero(done.any(0)):
            ended.append(EpisodeStats(self.totals[i], len(self.actions[i]), bool(done[0, i])))
            self.seen[i] = self.begin(i)
        self.reward, next_state = self.as_tensor(reward), self.as_tensor(next_state_np)
        self.state = self.as_tensor(self.seen) if ended else next_state
        return Step(before, action, self.reward, next_state, *self.as_tensor(done)), ended

    def as_tensor(self, x: np.ndarray) -> Tensor:
        """On the device; MuJoCo's float64 as the float32 that agents learn in."""
        return torch.from_numpy(x.astype(np.float32) if x.dtype == np.float64 else x).to(self.device)

    def close(self) -> None:
        for env in self.envs:
            env.close()

    def state_dict(self) -> dict:
        return {
            "rng": self.rng.bit_generator.state,
            "seeds": list(self.seeds),
            "actions": [torch.from_numpy(np.array(a)) for a in self.actions],
            "reward": self.reward,
            "seen": torch.from_numpy(self.seen),
        }

    def load_state_dict(self, state: dict) -> Tensor:
        """Back to where it was; returns those (n,) bool that could not be brought there and began a new episode."""
        self.rng.bit_generator.state = state["rng"]
        self.seeds, seen = list(state["seeds"]), state["seen"].numpy()
        lost = np.zeros(len(self.envs), dtype=bool)
        for i, env in enumerate(self.envs):
            (now, info), self.totals[i], self.actions[i] = env.reset(seed=self.seeds[i]), 0.0, []
            self.goals[i] = info.get("goal")
            for action in state["actions"][i].numpy():
                now, gained, *_ = env.step(action)
                self.actions[i].append(action)
                self.totals[i] += float(gained)
            if not np.array_equal(now, seen[i]):
                lost[i] = True
                now = self.begin(i)
            self.seen[i] = now
        if lost.any():
            log.warning(
                "%s does not repeat itself from a seed and its actions: %d of %d episodes begin anew, so this run will "
                "not end with the bits of one that was never stopped",
                self.envs[0].spec.id if self.envs[0].spec else type(self.envs[0]).__name__,
                lost.sum(),
                len(lost),
            )
        self.reward, self.state = state["reward"].to(self.device), self.as_tensor(self.seen)
        return torch.from_numpy(lost).to(self.device)
