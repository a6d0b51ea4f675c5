"""What there is to know of an environment. Part of the contract (common/interface.py); needs no PyTorch."""

from collections.abc import Callable
from typing import NamedTuple


class EnvFault(ValueError):
    """An environment broke what its spaces promise: a sentence that names it."""


class EnvSpec(NamedTuple):
    """What the environment fixes and no flag can change."""

    state: int  # numbers in an observation, flat
    action: int  # dims of an action, or how many discrete actions there are
    low: tuple[float, ...] = ()  # bounds of the action, one number a dimension; empty: actions are discrete
    high: tuple[float, ...] = ()
    image: bool = False  # observations are 84 x 84 bytes


class EvalEnv(NamedTuple):
    """Where an agent is evaluated."""

    make: Callable  # make(render_mode=None) -> a fresh gymnasium environment
    spec: EnvSpec
    score: Callable[[float], float] | None  # return -> score; None: no reference returns, so returns are all there is
    fps: int  # steps in a second of its time, for videos
    name: str  # for people, e.g. "hopper v4"
    scale: str  # of the score: "D4RL's scale", "Minari's scale × 100", or "" without one
    outcome: Callable | None = None  # (info, reward) of an episode's last step -> {"crash": 0 or 1, ...}
    action_names: tuple[str, ...] = ()  # of discrete actions
    baseline_returns: Callable | None = None  # () -> returns of policies that look at nothing, by name
    tasks: tuple[str, ...] = ()  # several to be evaluated in: make(render_mode, task)
