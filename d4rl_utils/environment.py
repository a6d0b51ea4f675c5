"""The environment an agent trained on D4RL is judged in."""

import functools
import logging
import re
import warnings
from importlib.metadata import version as installed

from d4rl_utils.names import BODIES

log = logging.getLogger(__name__)

IDS = {"hopper": "Hopper", "walker2d": "Walker2d", "halfcheetah": "HalfCheetah", "ant": "Ant"}
MAX_EPISODE_STEPS = 1000


def make_env(env: str, version: str = "v4", render_mode: str | None = None):
    """Gymnasium's body `env` (hopper, walker2d, halfcheetah, ant) with its time limit of 1000 steps.

    `v4` with mujoco < 3.5 equals D4RL's -v2 to rounding. Ant has the 27 state dims that the data have here.
    Raises ValueError for an unknown body or version, ImportError if Gymnasium or MuJoCo is missing.
    """
    if env not in BODIES:
        raise ValueError(f"unknown env '{env}': D4RL's bodies are {', '.join(BODIES)}.")
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
    if version == "v4":
        _compare_mujoco()
    options = {"include_cfrc_ext_in_observation": False} if (env, version) == ("ant", "v5") else {}
    if render_mode:
        options["camera_name"] = "track"  # the default camera stays behind
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*out of date.*", category=DeprecationWarning)
        return gymnasium.make(f"{IDS[env]}-{version}", render_mode=render_mode, **options)


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
