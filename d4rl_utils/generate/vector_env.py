"""Many copies of one body stepped side by side: what Gymnasium's v4 `step` does, as arrays and up to twice as fast.

Gymnasium makes the worlds and resets them, MuJoCo moves them; only the few lines that turn positions and velocities
into observations, rewards and terminations are here, for all copies at once. A test holds them against Gymnasium's own,
step by step, bit by bit.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from d4rl_utils.environment import make_env


class Rules(NamedTuple):
    """What Gymnasium's v4 bodies differ by. q (n, nq) positions and v (n, nv) velocities."""

    hidden: int  # leading positions that the agent does not see
    clip: float  # of velocities in observations
    alive: float  # reward of a step
    effort: float  # price of a squared action
    healthy: Callable[[np.ndarray, np.ndarray], np.ndarray]  # q, v -> (n,) bool; else the episode terminates


def _hopper(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    near = (np.abs(q[:, 2:]) < 100).all(1) & (np.abs(v) < 100).all(1)
    return near & (q[:, 1] > 0.7) & (np.abs(q[:, 2]) < 0.2)


def _walker2d(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (q[:, 1] > 0.8) & (q[:, 1] < 2.0) & (np.abs(q[:, 2]) < 1.0)


def _halfcheetah(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.ones(len(q), bool)


def _ant(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (q[:, 2] >= 0.2) & (q[:, 2] <= 1.0) & np.isfinite(q).all(1) & np.isfinite(v).all(1)


RULES = {
    "hopper": Rules(1, 10.0, 1.0, 1e-3, _hopper),
    "walker2d": Rules(1, 10.0, 1.0, 1e-3, _walker2d),
    "halfcheetah": Rules(1, np.inf, 0.0, 0.1, _halfcheetah),
    "ant": Rules(2, np.inf, 1.0, 0.5, _ant),
}


class BatchedMujoco:
    """`n` worlds of the body `env`, seeded by integers `seeds` (n,), freshly reset. `states` (n, S) are float32."""

    def __init__(self, env: str, seeds: np.ndarray):
        import mujoco

        self.rules, self.move = RULES[env], mujoco.mj_step
        self.envs = [make_env(env).unwrapped for _ in seeds]
        # A body is one island. Not looking for others saves a tenth of a step's time and changes no bit. (MuJoCo
        # before 3.3.3 does not look, and has no such flag.)
        for e in self.envs:
            e.model.opt.disableflags |= getattr(mujoco.mjtDisableBit, "mjDSBL_ISLAND", 0)
        self.states = np.stack([e.reset(seed=int(s))[0] for e, s in zip(self.envs, seeds)]).astype(np.float32)
        worlds = [(e.model, e.data) for e in self.envs]
        # Ant's place is its torso's, as of the last physics step but one (that is how Gymnasium reads it)
        place = [d.body("torso").xpos if env == "ant" else d.qpos for _, d in worlds]
        self.views = [(m, d, d.ctrl, d.qpos, d.qvel, p) for (m, d), p in zip(worlds, place)]
        self.x = np.array([p[0] for p in place])
        self.skip, self.dt = self.envs[0].frame_skip, self.envs[0].dt

    def reset(self, lane: int) -> None:
        """Begin a new episode in one lane."""
        self.states[lane] = self.envs[lane].reset()[0]
        self.x[lane] = self.views[lane][-1][0]

    def step(self, lanes: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Lanes (n,) int and actions (n, A) -> rewards (n,) and terminals (n,); `states` of these lanes move on."""
        model, data = self.views[0][:2]
        q, v, x = np.empty((len(lanes), model.nq)), np.empty((len(lanes), model.nv)), np.empty(len(lanes))
        actions, move, skip = actions.astype(np.float64), self.move, self.skip
        for i, lane in enumerate(lanes.tolist()):
            model, data, ctrl, qpos, qvel, place = self.views[lane]
            ctrl[:] = actions[i]
            move(model, data, skip)
            q[i], v[i], x[i] = qpos, qvel, place[0]
        rules = self.rules
        rewards = (x - self.x[lanes]) / self.dt + rules.alive - rules.effort * np.square(actions).sum(1)
        self.x[lanes] = x
        self.states[lanes] = np.concatenate((q[:, rules.hidden :], np.clip(v, -rules.clip, rules.clip)), 1)
        return rewards, ~rules.healthy(q, v)

    def close(self) -> None:
        """Let go of the worlds."""
        for env in self.envs:
            env.close()
