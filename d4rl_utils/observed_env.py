"""An environment that shows its states only in part. Needs Gymnasium."""

from collections import deque

import gymnasium
import numpy as np

from d4rl_utils.observe import Observe

STREAM = 1  # beside an episode's seed: noise has a stream of its own, and the simulator's is as it was


class ObservedEnv(gymnasium.Wrapper):
    """What `observe.partly` does to data, step by step. An episode's noise depends on the seed of its reset alone."""

    def __init__(self, env: gymnasium.Env, observe: Observe, body: str):
        super().__init__(env)
        self.observe, self.rng = observe, np.random.default_rng()
        self.columns = observe.columns(body, env.observation_space.shape[0])
        shape = (len(self.columns),)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, shape, env.observation_space.dtype)
        self.past = deque(maxlen=1 + int(observe.amount) if observe.kind == "delay" else 1)

    def show(self, state: np.ndarray) -> np.ndarray:
        self.past.append(state)
        return self.observe.corrupt(self.past[0][None, self.columns], self.rng)[0]

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        state, info = self.env.reset(seed=seed, options=options)
        if seed is not None:
            self.rng = np.random.default_rng([seed, STREAM])
        self.past.clear()
        return self.show(state), info

    def step(self, action):
        state, *rest = self.env.step(action)
        return self.show(state), *rest
