"""The environment an agent is evaluated in: one of D4RL's bodies, any of Gymnasium's, or what Minari's data bring."""

import functools
import logging
import re
import warnings
from collections.abc import Callable
from importlib.metadata import version as installed

import numpy as np

from common.env_spec import EnvFault, EnvSpec, EvalEnv
from d4rl_utils.names import ENVS, MAX_EPISODE_STEPS, d4rl_score, suggest
from d4rl_utils.observe import Observe, parse_observe
from d4rl_utils.resolve import body_of, is_id, resolve_dataset

log = logging.getLogger(__name__)

IDS = {"hopper": "Hopper", "walker2d": "Walker2d", "halfcheetah": "HalfCheetah", "ant": "Ant"}

FAR = 10.0  # times an environment's bounds, from which on recorded actions are of another one
TOLERANCE = 1e-3  # of the bounds, for rounding


def make_eval_env(cfg) -> EvalEnv:
    """Where an agent with the settings `cfg` is evaluated: the environment that its data were recorded in.

    Raises ValueError for unknown names, and for Minari's data that are neither here nor to be had.
    """
    want, version, observe = resolve_dataset(cfg), cfg.env_version, parse_observe(cfg.observe)
    if want.kind == "minari":
        from d4rl_utils import minari_data

        found = minari_data.open_minari(want.place)
        score, scale = minari_data.scale_of(found)
        name, make = found.env_spec.id, functools.partial(minari_data.environment, found)
    else:
        name, make, score, scale = scored_env(want.env, version)
    if observe.kind == "full":
        return describe_env(name, make, score, scale)
    body = body_of(want)
    observe.columns(body, 0)  # raises before there is an environment
    return describe_env(f"{name}, {cfg.observe}", functools.partial(make_observed, make, observe, body), score, scale)


def eval_env_of(env: str, version: str = "v4") -> EvalEnv:
    """The environment `env` of `make_env`."""
    return describe_env(*scored_env(env, version))


def scored_env(env: str, version: str) -> tuple[str, Callable, Callable[[float], float] | None, str]:
    """Name, maker, score and scale of `make_env`'s environment."""
    make = functools.partial(make_env, env, version)
    if env in ENVS:
        return f"{env} {version}", make, functools.partial(d4rl_score, env), "D4RL's scale"
    return env, make, None, ""


def make_observed(make: Callable, observe: Observe, body: str, render_mode: str | None = None):
    """An environment of `make`, of whose states only a part is shown."""
    from d4rl_utils.observed_env import ObservedEnv

    return ObservedEnv(make(render_mode=render_mode), observe, body)


def describe_env(name: str, make: Callable, score: Callable[[float], float] | None, scale: str) -> EvalEnv:
    """`EvalEnv`'s fields, and what one instance of the environment says of itself."""
    env = make()
    spec, fps = spec_of(env), frames_per_second(env)
    env.close()
    return EvalEnv(make, spec, score, fps, name, scale)


def check_recorded(env: str, spec: EnvSpec, state: int, actions: np.ndarray) -> None:
    """ValueError if recorded states of so many dims and actions (N, A) are of another environment: by their dims, or as
    actions are `FAR` times what it takes. A warning if some are outside its bounds: no agent can do these.
    """
    dims = state, actions.shape[1]
    if dims != (spec.state, spec.action):
        raise ValueError(
            f"the data have {dims[0]} state and {dims[1]} action dims, {env} has {spec.state} and {spec.action}: "
            "--env must name the environment that recorded the data (a body, or one of Gymnasium's ids)"
        )
    low, high = np.float32(spec.low), np.float32(spec.high)
    times = np.abs((actions - (high + low) / 2) / ((high - low) / 2))  # 1: at a bound
    largest, share = float(times.max()), float((times > 1 + TOLERANCE).any(1).mean())
    if largest > FAR:
        raise ValueError(
            f"the data have actions up to {largest:.3g} times what {env} takes, and {share:.1%} of the rows are beyond "
            "its bounds: they were recorded in another environment, or in other units. Scale them to its bounds"
        )
    if share:
        log.warning(
            "%.1f %% of the rows have actions outside %s's bounds, up to %.3g times: no policy can do these.",
            100 * share,
            env,
            largest,
        )


def make_env(env: str, version: str = "v4", render_mode: str | None = None):
    """D4RL's body `env` (hopper, walker2d, halfcheetah, ant), 1000 steps an episode; or Gymnasium's id `env`.

    version: of a body; an id has its own. `v4` with mujoco < 3.5 equals D4RL's -v2 to rounding. Ant has the 27 state
    dims that the data have here. Raises ValueError for an unknown body, id or version, ImportError if Gymnasium, MuJoCo
    or another package that the environment needs is missing.
    """
    if env not in ENVS and not is_id(env):
        raise ValueError(
            f"unknown env '{env}': D4RL's bodies are {', '.join(ENVS)}; Gymnasium's ids look like Hopper-v4"
            f"{suggest(env, ENVS) or '.'}"
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
    from d4rl_utils.sound_env import ERRORS, SoundEnv

    options = {"render_mode": render_mode} if render_mode else {}  # not every environment knows the word
    if env in ENVS:
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
            made = gymnasium.make(env, disable_env_checker=True, **options)
        except (gymnasium.error.DependencyNotInstalled, ImportError) as error:  # also MuJoCo's v2 and v3, long gone
            raise ImportError(f"{env} cannot be made: {error}") from error
        except gymnasium.error.Error as error:
            hint = suggest(env, gymnasium.registry) or f": {error}"
            raise ValueError(f"unknown env '{env}', Gymnasium has none of this name{hint}") from error
        except ERRORS as error:  # of the environment's own code
            raise EnvFault(f"{env} cannot be made: {type(error).__name__}: {error}") from error
    from d4rl_utils.body_env import BodyEnv

    return BodyEnv(made) if BodyEnv.knows(made) else SoundEnv(made, MAX_EPISODE_STEPS)


def time_limit(env: str) -> int:
    """Steps after which an episode of Gymnasium's id `env` is cut; D4RL's where it has no limit, or is unknown."""
    if not is_id(env):
        return MAX_EPISODE_STEPS
    import gymnasium

    found = gymnasium.registry.get(env)
    return (found and found.max_episode_steps) or MAX_EPISODE_STEPS


def spec_of(env) -> EnvSpec:
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
    return EnvSpec(seen.shape[0], done.shape[0], tuple(done.low.tolist()), tuple(done.high.tolist()))


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
