"""Gymnasium's environments with discrete actions, as flat observations or small grey images, and what a score in one
of them is worth: how its episodes end, and what policies earn that look at nothing."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from common.env_spec import EnvFault
from d4rl_utils.names import suggest
from d4rl_utils.observe import parse_observe

# Where ids come from that Gymnasium itself does not have: pattern of the id, module, how to install it.
PACKAGES = (
    (
        r"(highway|merge|roundabout|intersection|racetrack|exit|u-turn|two-way|lane-keeping)-",
        "highway_env",
        "highway-env",
    ),
    (r"ALE/", "ale_py", "ale-py"),
)
ACTIONS = {
    "highway-fast-v0": ("left", "idle", "right", "faster", "slower"),
    "LunarLander-v3": ("nothing", "left engine", "main engine", "right engine"),
}
# Mean returns of 100 episodes, reset with seeds 0 to 99, random actions from seed 0 (gymnasium 1.4.0, highway-env
# 1.12.1); of other environments `baseline_returns` plays some.
BASELINE_RETURNS = {
    "highway-fast-v0": {"random": 8.59, "always idle": 11.86, "always faster": 7.03, "always slower": 21.16},
    "LunarLander-v3": {"random": -191.96, "always nothing": -136.70},
}
OUTCOMES = {
    "highway-fast-v0": lambda info, reward: {"crash": info["crashed"]},
    "LunarLander-v3": lambda info, reward: {"landed": reward == 100, "crash": reward == -100},
}
LONGEST_EPISODE = 27_000  # steps, of an environment without a limit: half an hour of an Atari game at four frames each
BASELINE_EPISODES, BASELINE_STEPS = 20, 2000  # of one policy, whichever is reached first


class DiscreteEnv(NamedTuple):
    """What there is to know of one."""

    make: Callable  # make(render_mode=None) -> a fresh environment: flat float32, or 7056 bytes
    state: int
    actions: int
    image: bool
    names: tuple[str, ...]  # of the actions
    outcome: Callable | None  # as in `EvalEnv`


def open_discrete(env: str, cnn: bool, time_feature: bool = False, observe: str = "full") -> DiscreteEnv:
    """ValueError for what is unknown or does not fit, ImportError with the command to run for a missing package.

    time_feature: states also say which share of the time limit has passed. observe: as of `d4rl_utils.parse_observe`
    """
    make = functools.partial(make_discrete, env, cnn, time_feature, observe)
    made = make()
    state, actions = made.observation_space.shape[0], int(made.action_space.n)
    made.close()
    return DiscreteEnv(make, state, actions, cnn, ACTIONS.get(env, ()), OUTCOMES.get(env))


def make_discrete(
    env: str, cnn: bool, time_feature: bool = False, observe: str = "full", render_mode: str | None = None
):
    """A Gymnasium environment whose observations are flat, and sound (`SoundEnv`). Raises what `open_discrete` does."""
    try:
        import gymnasium
        from gymnasium.spaces import Box, Discrete
        from gymnasium.wrappers import (
            DtypeObservation,
            FlattenObservation,
            TimeAwareObservation,
            TransformObservation,
        )
    except ImportError as error:
        raise ImportError(f"the environment needs Gymnasium ({error}): pip install 'gymnasium>=1.0'") from error
    from d4rl_utils.observed_env import ObservedEnv
    from d4rl_utils.sound_env import ERRORS, SoundEnv

    for pattern, module, package in PACKAGES:
        if re.match(pattern, env):
            try:
                gymnasium.register_envs(__import__(module))
            except ImportError as error:
                raise ImportError(f"{env} needs the package {package}: pip install {package}") from error
    try:
        options = {"render_mode": render_mode} if render_mode else {}  # not every environment knows the word
        made = gymnasium.make(env, disable_env_checker=True, **options)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        hint = " With pip: pip install 'gymnasium[box2d]'" if "ox2" in str(error) else ""
        raise ImportError(f"{env} cannot be made: {error}{hint}") from error
    except gymnasium.error.Error as error:
        raise ValueError(f"Gymnasium cannot make {env!r}{suggest(env, gymnasium.registry) or f': {error}'}") from error
    except ERRORS as error:  # of the environment's own code
        raise EnvFault(f"{env} cannot be made: {type(error).__name__}: {error}") from error
    seen, done = made.observation_space, made.action_space
    if not isinstance(done, Discrete):
        raise ValueError(f"{env} wants actions from {done}; dqn chooses one of a few (a Discrete space)")
    if done.start:
        raise ValueError(f"{env} counts its actions from {done.start}; dqn counts from 0")
    image = isinstance(seen, Box) and seen.dtype == np.uint8 and len(seen.shape) in (2, 3)
    if cnn and not image:
        raise ValueError(f"--cnn is for images of bytes, but {env} shows {seen}: leave it away")
    if image and not cnn:
        raise ValueError(f"{env} shows images, {seen}: take --cnn, which sees them grey and of 84 x 84")
    shown = parse_observe(observe)
    if cnn and (time_feature or shown.kind != "full"):
        raise ValueError(
            "--time_feature and --observe are for states that are vectors, not for images: leave them away"
        )
    if cnn:
        return SoundEnv(TransformObservation(made, to_gray84, Box(0, 255, (84 * 84,), np.uint8)), LONGEST_EPISODE)
    if not seen.is_np_flattenable:
        raise ValueError(f"{env} shows {seen}, which is no vector of fixed length: dqn cannot see it")
    made = made if isinstance(seen, Box) and len(seen.shape) == 1 else FlattenObservation(made)
    made = made if made.observation_space.dtype == np.float32 else DtypeObservation(made, np.float32)
    if shown.kind != "full":
        made = ObservedEnv(made, shown, env)
    if time_feature:
        if made.spec.max_episode_steps is None:
            raise ValueError(f"{env} has no time limit that --time_feature could show: leave it away")
        made = TimeAwareObservation(made, normalize_time=True)
    return SoundEnv(made, LONGEST_EPISODE)


def to_gray84(image: np.ndarray) -> np.ndarray:
    """(H, W) or (H, W, 3) bytes -> 84 x 84 of them, flat. Every pixel is the mean of those that it covers."""
    import torch

    x = torch.from_numpy(image).float()
    x = x @ torch.tensor([0.299, 0.587, 0.114]) if x.dim() == 3 else x
    return torch.nn.functional.adaptive_avg_pool2d(x[None, None], 84).round().byte().flatten().numpy()


def baseline_returns(env: str, env_info: DiscreteEnv, seed: int) -> dict[str, float]:
    """Mean returns of random actions and of each action for ever, measured before or played now, from seed on.

    One that ends no episode within BASELINE_STEPS is left out.
    """
    if env in BASELINE_RETURNS:
        return BASELINE_RETURNS[env]
    rng, made, means = np.random.default_rng(seed), env_info.make(), {}
    for action in (None, *range(env_info.actions)):
        returns, total = [], 0.0
        made.reset(seed=seed)
        for _ in range(BASELINE_STEPS):
            move = int(rng.integers(env_info.actions)) if action is None else action
            _, reward, terminated, truncated, _ = made.step(move)
            total += float(reward)
            if terminated or truncated:
                returns, total = [*returns, total], 0.0
                if len(returns) == BASELINE_EPISODES:
                    break
                made.reset(seed=seed + len(returns))
        if returns:
            name = "random" if action is None else f"always {env_info.names[action] if env_info.names else action}"
            means[name] = float(np.mean(returns))
    made.close()
    return means
