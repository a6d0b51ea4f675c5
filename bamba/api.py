"""Train, load, act and evaluate from Python."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bamba import trainer, utils
from bamba.common.evaluation import Player
from bamba.config import CONFIGS

SEED = utils.EvalArgs.seed  # of the first episode of an evaluation


class Policy:
    """A trained agent that acts on NumPy arrays, in float64 on the CPU or where it was loaded to.

    agent: the module itself. checkpoint: everything that was saved with it.
    """

    def __init__(self, agent, checkpoint: dict):
        self.agent, self.checkpoint, self.player = agent, checkpoint, None

    def reset(self, n: int = 1, goal: np.ndarray | float | None = None) -> None:
        """Begin episodes in n environments. goal: states to reach (n, S), or a return to ask for, of agents that are
        told one."""
        self.player = Player(self.agent, n, goal)

    def act(self, state: np.ndarray, reward: np.ndarray | float = 0.0) -> np.ndarray:
        """The present state (S,) -> the action (A,), or a whole number; of n environments (n, S) -> (n, A).

        reward: what the last action earned, 0 at first; return-conditioned agents want it. ValueError before `reset`,
        and for another number of environments or of numbers in a state.
        """
        if self.player is None:
            raise ValueError("call reset() before the first act() of an episode")
        state = np.asarray(state, dtype=np.float64)
        rows = np.atleast_2d(state)
        n = self.player.count
        if rows.shape != (n, self.agent.spec.state):
            raise ValueError(
                f"states of shape {state.shape}; reset() was told {n}, and a state has {self.agent.spec.state}"
            )
        action = self.player.act(rows, np.zeros(n) + reward)
        return action[0] if state.ndim == 1 else action


class TrainedRun(NamedTuple):
    """A training that is over."""

    folder: Path  # what `load` and trainer.py --resume take
    scores: list[tuple[int, float]]  # (update or environment step, score) of every evaluation
    finished: bool  # False: a signal ended it; it can be resumed

    def policy(self) -> Policy:
        """The agent as it was at last."""
        return load(self.folder)


def load(path: str | Path, device: str = "cpu") -> Policy:
    """A checkpoint or run folder of any agent. ValueError for what is missing, damaged or of another version."""
    return Policy(*utils.load(path, utils.pick_device(device), compile=False, cuda_graphs=False))


def evaluate(policy: Policy | str | Path, episodes: int = 10, seed: int = SEED) -> np.ndarray:
    """Returns (episodes,) of whole episodes in the environment that the agent was trained for."""
    policy = policy if isinstance(policy, Policy) else load(policy)
    env = type(policy.agent).make_eval_env(policy.agent.cfg)
    return utils.evaluate(policy.agent, env.make, episodes, seed, outcome=env.outcome, tasks=env.tasks).returns


def train(agent: str = "bamba", callbacks: Sequence[Callable[[dict], None]] = (), **settings) -> TrainedRun:
    """Train an agent; the settings are trainer.py's flags (docs/settings.md), also `resume`.

    callbacks: each is called with every row of the log when it is written: a dictionary with `kind` (`losses`,
    `evaluation`, `episode`), `update` or `env_step`, and the numbers; and at the end with `kind` `end` and `folder`.
    Raises ValueError for settings that mean nothing, and what stops a training (FloatingPointError, OSError).
    """
    run = trainer.begin(flags_of({"agent": agent, **settings}))
    try:
        run.listen(callbacks)
        status = trainer.train(run)
    finally:
        run.close()
    for callback in callbacks:
        callback({"kind": "end", run.unit: run.global_step, "folder": run.folder})
    return TrainedRun(run.folder, list(run.scores), status == 0)


def flags_of(settings: dict) -> list[str]:
    """Settings as a command line. ValueError for an agent or a setting that does not exist."""
    agent = settings["agent"]
    if agent not in CONFIGS:
        raise ValueError(f"there is no agent {agent!r}; there are {', '.join(CONFIGS)}")
    known = [f.name for f in fields(CONFIGS[agent]) if f.metadata.get("flag", True)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise ValueError(f"{agent} has no setting {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
    flags = []
    for name, value in settings.items():
        if value is None:  # as if it were not there
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            flags.append(f"--{name}={value}")
    return flags
