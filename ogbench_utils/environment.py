"""OGBench's mazes: made one at a time, seeded whole, and nothing of theirs left in the temporary folder."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from d4rl_utils.names import MAX_EPISODE_STEPS

TASKS = ("task1", "task2", "task3", "task4", "task5")  # of every maze: a start and a goal, each moved a little


class Task:
    """One of OGBench's five tasks as an environment: `reset(seed)` gives the state, and the goal in `info["goal"]`.

    A step pays 1 and ends the episode when the goal is reached, which `info["success"]` says too.
    """

    def __init__(self, env, number: int | None):
        """number: 1 to 5; None: any of them, drawn anew at every reset."""
        self.env, self.number, self.spec = env, number, env.spec

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict]:
        with seeded(self.env, seed):
            return self.env.reset(seed=seed, options={"task_id": self.number} if self.number else {})

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        return self.env.step(action)

    def render(self) -> np.ndarray:
        return self.env.render()

    def close(self) -> None:
        self.env.close()


def make_task(environment: str, task: str | None = None, render_mode: str | None = None) -> Task:
    """A fresh environment, e.g. `antmaze-medium-v0`, for one of TASKS, or for all."""
    from d4rl_utils.sound_env import SoundEnv

    made = SoundEnv(make_maze(environment, render_mode=render_mode or "rgb_array"), MAX_EPISODE_STEPS)
    return Task(made, task and TASKS.index(task) + 1)


def make_maze(environment: str, **settings):
    """OGBench's own environment. ImportError, with what to install, where the package is not."""
    try:
        import gymnasium
        import ogbench  # noqa: F401  it registers its environments
    except ImportError as error:
        raise ImportError(
            f"{environment} needs OGBench's package ({error}): pip install ogbench. Where its dependencies do not "
            "install, pip install --no-deps ogbench is enough for the mazes."
        ) from error
    with own_temporary_folder():
        return gymnasium.make(environment, **settings)


@contextmanager
def own_temporary_folder() -> Iterator[None]:
    """OGBench writes each maze to a temporary file and forgets it; here it goes to a folder that is removed."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder
        try:
            yield
        finally:
            tempfile.tempdir = before


@contextmanager
def seeded(env, seed: int | None) -> Iterator[None]:
    """Everything that OGBench draws inside follows from `seed`; NumPy's global generator is as before afterwards.

    Starts and goals come from that global generator, the steps before a goal is shown from the action space's own.
    """
    if seed is None:
        yield
        return
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    env.unwrapped.action_space.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)
