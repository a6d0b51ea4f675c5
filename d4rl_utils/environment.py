"""The environment an agent is judged in: one of D4RL's bodies, any of Gymnasium's, or what Minari's data bring."""

import functools
import logging
import re
import warnings
from collections.abc import Callable
from importlib.metadata import version as installed
from typing import NamedTuple

from d4rl_utils.names import BODIES, close, d4rl_score
from d4rl_utils.wanted import is_id, wanted

log = logging.getLogger(__name__)

IDS = {"hopper": "Hopper", "walker2d": "Walker2d", "halfcheetah": "HalfCheetah", "ant": "Ant"}
MAX_EPISODE_STEPS = 1000


class Stage(NamedTuple):
    """An environment, and how its returns become scores."""

    name: str  # for people: "hopper v4", "Pendulum-v1", "Hopper-v5"
    make: Callable  # make(render_mode=None) -> a fresh environment
    score: Callable[[float], float] | None  # a return on the scale below; None: there are no reference returns
    scale: str  # "D4RL's scale", "Minari's scale", or ""


class Boxes(NamedTuple):
    """The sizes of an environment, and the bounds of its actions, one number a dimension."""

    state: int
    action: int
    low: tuple[float, ...]
    high: tuple[float, ...]


def open_environment(cfg) -> Stage:
    """Where an agent with the settings `cfg` is judged. Nothing is made yet.

    Raises ValueError for unknown names, and for Minari's data that are neither here nor to be had.
    """
    want, version = wanted(cfg), cfg.env_version
    if want.kind == "minari":
        from d4rl_utils import minari_data

        found = minari_data.open_minari(want.place)
        score, scale = minari_data.scale_of(found)
        make = lambda render_mode=None: minari_data.environment(found, render_mode)  # noqa: E731
        return Stage(found.env_spec.id, make, score, scale)
    return open_stage(want.env, version)


def open_stage(env: str, version: str = "v4") -> Stage:
    """The environment `env` of `make_env`. Nothing is made yet."""
    make = lambda render_mode=None: make_env(env, version, render_mode)  # noqa: E731
    if env in BODIES:
        return Stage(f"{env} {version}", make, functools.partial(d4rl_score, env), "D4RL's scale")
    return Stage(env, make, None, "")


def make_env(env: str, version: str = "v4", render_mode: str | None = None):
    """D4RL's body `env` (hopper, walker2d, halfcheetah, ant), 1000 steps an episode; or Gymnasium's id `env`.

    version: of a body; an id has its own. `v4` with mujoco < 3.5 equals D4RL's -v2 to rounding. Ant has the 27 state
    dims that the data have here. Raises ValueError for an unknown body, id or version, ImportError if Gymnasium, MuJoCo
    or another package that the environment needs is missing.
    """
    if env not in BODIES and not is_id(env):
        raise ValueError(
            f"unknown env '{env}': D4RL's bodies are {', '.join(BODIES)}; Gymnasium's ids look like Hopper-v4"
            f"{close(env, BODIES) or '.'}"
        )
    if version not in ("v4", "v5"):
        raise ValueError(
            f"unknown version '{version}': v4 equals D4RL's -v2 bodies, v5 is Gymnasium's revision of them."
        )
    try:
        import gymnasium
        import mujoco  # noqa: F401  Gymnasium imports it later and says less when it is missing
    except ImportError as error:
        raise ImportError(
            f"the environment needs Gymnasium and MuJoCo ({error}): "
            "pip install 'gymnasium[mujoco]' 'mujoco>=3.1.6,<3.5'"
        ) from error
    options = {}
    if env in BODIES:
        if version == "v4":
            _compare_mujoco()
        if (env, version) == ("ant", "v5"):
            options["include_cfrc_ext_in_observation"] = False
        if render_mode:
            options["camera_name"] = "track"  # the default camera stays behind
        env = f"{IDS[env]}-{version}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*out of date.*", category=DeprecationWarning)
        try:
            return gymnasium.make(env, render_mode=render_mode, **options)
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:  # also MuJoCo's v2 and v3, long gone
            raise ImportError(f"{env} cannot be made: {error}") from error
        except gymnasium.error.Error as error:
            hint = close(env, gymnasium.registry) or f": {error}"
            raise ValueError(f"unknown env '{env}', Gymnasium has none of this name{hint}") from error


def time_limit(env: str) -> int:
    """Steps after which an episode of Gymnasium's id `env` is cut; D4RL's where it has no limit, or is unknown."""
    if not is_id(env):
        return MAX_EPISODE_STEPS
    import gymnasium

    found = gymnasium.registry.get(env)
    return (found and found.max_episode_steps) or MAX_EPISODE_STEPS


def boxes_of(env) -> Boxes:
    """The sizes and bounds of an environment. ValueError unless states are flat, and actions flat and bounded."""
    from gymnasium.spaces import Box

    name, seen, done = env.spec.id if env.spec else type(env).__name__, env.observation_space, env.action_space
    if not isinstance(seen, Box) or len(seen.shape) != 1:
        raise ValueError(f"{name} shows {seen}; an agent here sees flat vectors of numbers (a Box of shape (S,)).")
    if not isinstance(done, Box) or len(done.shape) != 1:
        raise ValueError(f"{name} wants actions from {done}; an agent here gives flat vectors (a Box of shape (A,)).")
    if not done.is_bounded():
        raise ValueError(
            f"{name} wants actions without bounds, {done}; an agent here needs finite ones to stay within."
        )
    return Boxes(seen.shape[0], done.shape[0], tuple(done.low.tolist()), tuple(done.high.tolist()))


def frames_per_second(env) -> int:
    """Steps in a second of the environment's time, for videos."""
    if hasattr(env.unwrapped, "dt"):
        return round(1 / env.unwrapped.dt)
    return env.metadata.get("render_fps") or 30


@functools.cache
def _compare_mujoco() -> None:
    """Say once that a newer MuJoCo is another world."""
    found = installed("mujoco")
    if tuple(int(x) for x in re.findall(r"\d+", found)[:2]) >= (3, 5):
        log.warning(
            "mujoco %s: from 3.5.0 on contacts differ from those in D4RL's data (one step by up to 0.14 in Hopper, by "
            "2.4 in Ant), so scores are not comparable with published ones. pip install 'mujoco>=3.1.6,<3.5'",
            found,
        )
