"""One door for what an environment returns: the space's type, one number a reward, nothing that is not finite, an end.

Needs Gymnasium.
"""

import logging

import gymnasium
import numpy as np

from common.env_spec import EnvFault

log = logging.getLogger(__name__)


class SoundEnv(gymnasium.Wrapper):
    """An environment that keeps what its spaces promise, or says what it broke (`EnvFault`)."""

    def __init__(self, env: gymnasium.Env):
        super().__init__(env)
        self.name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self.count = 0  # steps of this episode

    def sound(self, state) -> np.ndarray:
        space, state = self.env.observation_space, np.asarray(state)
        if state.shape != space.shape:
            raise EnvFault(f"{self.name} shows observations of shape {state.shape}, its space says {space.shape}")
        if state.dtype.kind not in "fiub":
            raise EnvFault(f"{self.name} shows observations of {state.dtype}, its space says {space.dtype}")
        if not np.isfinite(state).all():
            raise EnvFault(
                f"{self.name} showed an observation that is not finite, after step {self.count} of an episode"
            )
        return state.astype(space.dtype, copy=False)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.count = 0
        state, info = self.env.reset(seed=seed, options=options)
        return self.sound(state), info

    def step(self, action):
        state, reward, terminated, truncated, info = self.env.step(action)
        self.count += 1
        if np.size(reward) != 1 or not np.isfinite(reward).all():
            raise EnvFault(f"{self.name} pays {reward} in step {self.count} of an episode: that is no finite number")
        reward = float(reward) if np.ndim(reward) == 0 else float(np.reshape(reward, ()))
        return self.sound(state), reward, bool(terminated), bool(truncated), info


def made_sound(env: gymnasium.Env, steps: int) -> SoundEnv:
    """`env`, whose episodes end: after `steps`, if it has no limit of its own."""
    if env.spec is None or env.spec.max_episode_steps is None:
        name = env.spec.id if env.spec else type(env.unwrapped).__name__
        log.warning("%s has no time limit: its episodes are cut after %d steps", name, steps)
        env = gymnasium.wrappers.TimeLimit(env, steps)
    return SoundEnv(env)
