"""One door for what an environment returns: the space's type, one number a reward, nothing that is not finite, an end.

Needs Gymnasium.
"""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from traceback import extract_tb

import gymnasium
import numpy as np

from common.env_spec import EnvFault

log = logging.getLogger(__name__)
# what an environment's own code may raise; not what tells the program to stop
ERRORS = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError)
ERRORS += (TypeError, ValueError, gymnasium.error.Error)


class SoundEnv(gymnasium.Wrapper):
    """An environment that keeps what its spaces promise, or says what it broke (`EnvFault`).

    limit: steps after which an episode is cut, if the environment has no limit of its own.
    """

    def __init__(self, env: gymnasium.Env, limit: int):
        super().__init__(env)
        self.name = env.spec.id if env.spec else type(env.unwrapped).__name__
        self.limit = limit if env.spec is None or env.spec.max_episode_steps is None else None
        self.count, self.episode_seed = 0, None  # steps of this episode; what it began from

    @contextmanager
    def errors_named(self, where: str) -> Iterator[None]:
        """An error of the environment's own code, with where in an episode it came."""
        try:
            yield
        except EnvFault:
            raise
        except ERRORS as error:
            place, seed = extract_tb(error.__traceback__)[-1], self.episode_seed
            raise EnvFault(
                f"{self.name} failed {where} of the episode with seed {seed}: {type(error).__name__}: {error} "
                f"({place.filename}, line {place.lineno})"
            ) from error

    def sound(self, state) -> np.ndarray:
        space, state = self.env.observation_space, np.asarray(state)
        if state.shape != space.shape:
            raise EnvFault(f"{self.name} shows observations of shape {state.shape}, its space says {space.shape}")
        if state.dtype.kind not in "fiub":
            raise EnvFault(f"{self.name} shows observations of {state.dtype}, its space says {space.dtype}")
        if not np.isfinite(state).all():
            raise EnvFault(
                f"{self.name} showed an observation that is not finite, after step {self.count} of the episode with "
                f"seed {self.episode_seed}"
            )
        return state.astype(space.dtype, copy=False)

    def sound_reward(self, reward) -> float:
        if np.size(reward) != 1 or not np.isfinite(reward).all():
            raise EnvFault(
                f"{self.name} pays {reward} in step {self.count} of the episode with seed {self.episode_seed}: that is "
                "no finite number"
            )
        return float(reward) if np.ndim(reward) == 0 else float(np.reshape(reward, ()))

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.count, self.episode_seed = 0, seed
        with self.errors_named("at the beginning"):
            state, info = self.env.reset(seed=seed, options=options)
        return self.sound(state), info

    def step(self, action):
        self.count += 1
        with self.errors_named(f"in step {self.count}"):
            state, reward, terminated, truncated, info = self.env.step(action)
        reward = self.sound_reward(reward)
        if self.count == self.limit and not (terminated or truncated):
            truncated = True
            say_once("%s has no time limit: its episodes are cut after %d steps", self.name, self.limit)
        return self.sound(state), reward, bool(terminated), bool(truncated), info


@functools.cache
def say_once(text: str, *args) -> None:
    """A warning that is the same for every copy of an environment."""
    log.warning(text, *args)
