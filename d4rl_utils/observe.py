"""Partial observations: what an agent is shown of the states, in recorded data and in the environment alike.

positions leaves velocities away, noisy adds noise, drop loses single sensors, flicker whole observations: the tasks RV,
RN, RSM and FLK of Meng et al. (2021, arXiv 2102.12344), whose amounts were 0.1, 0.1 and 0.2. delay shows the past.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from d4rl_utils.reader import Dataset, Transitions

# which numbers of a state say where things are, and not how fast they move
POSITIONS = {name: tuple(range(n)) for name, n in {"hopper": 5, "walker2d": 8, "halfcheetah": 8, "ant": 13}.items()}
POSITIONS |= {
    "CartPole-v1": (0, 2),
    "Acrobot-v1": (0, 1, 2, 3),
    "MountainCar-v0": (0,),
    "LunarLander-v3": (0, 1, 4, 6, 7),
}
AMOUNTS = {"noisy": (0, np.inf), "delay": (1, 1000), "drop": (0, 1), "flicker": (0, 1)}  # (least, most)
DATA_SEED = 0  # noise in a data set is the same for every run, as the data are


class Observe(NamedTuple):
    """A kind of partial observation and how much of it."""

    kind: str  # full, positions, noisy, delay, drop or flicker
    amount: float = 0.0  # noisy: standard deviation; delay: steps; drop, flicker: probability

    def columns(self, body: str, state: int) -> list[int]:
        """Which of a state's numbers are shown. ValueError for positions of an unknown body."""
        if self.kind != "positions":
            return list(range(state))
        if body not in POSITIONS:
            raise ValueError(
                f"--observe positions is known for {', '.join(POSITIONS)}, not for '{body or 'this environment'}': "
                "no data set says which numbers of a state are positions"
            )
        return list(POSITIONS[body])

    def corrupt(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Observations (n, S) with what is random about them. Lost numbers are 0, in the environment's own units."""
        if self.kind == "noisy":
            return (x + self.amount * rng.standard_normal(x.shape)).astype(x.dtype)
        if self.kind in ("drop", "flicker"):
            return x * (rng.random(x.shape if self.kind == "drop" else (len(x), 1)) >= self.amount)
        return x


def parse_observe(text: str) -> Observe:
    """`full`, `positions`, `noisy:0.1`, `delay:3`, `drop:0.1` or `flicker:0.2`. ValueError for anything else."""
    kind, colon, amount = text.partition(":")
    if kind in ("full", "positions") and not colon:
        return Observe(kind)
    if kind in AMOUNTS:
        try:
            found = Observe(kind, int(amount) if kind == "delay" else float(amount))
        except ValueError:
            found = Observe(kind, np.nan)
        low, high = AMOUNTS[kind]
        if low <= found.amount <= high and np.isfinite(found.amount):
            return found
    raise ValueError(
        f"--observe {text} is none of full, positions, noisy:SIGMA, delay:STEPS, drop:PROBABILITY, flicker:PROBABILITY "
        "(such as noisy:0.1, delay:3, drop:0.1, flicker:0.2)"
    )


def partly(dataset: Dataset, text: str, body: str) -> Dataset:
    """The data as an agent sees them, and their name with what that was. text: as of `parse_observe`"""
    observe, (transitions, identity) = parse_observe(text), dataset
    if observe.kind == "full":
        return dataset
    source = "custom" if identity.source == "d4rl" else identity.source  # they are not D4RL's own any more
    return Dataset(_shown(transitions, observe, body), replace(identity, name=f"{identity.name}+{text}", source=source))


def _shown(t: Transitions, observe: Observe, body: str) -> Transitions:
    """Every observation once: a step's next one is the one that the next step begins with."""
    if observe.kind == "delay":
        rows = np.arange(len(t.ends))
        then, after = (np.maximum(rows + i - int(observe.amount), t.episode_start) for i in (0, 1))
        return t._replace(states=t.states[then], next_states=t.states[after])
    columns, rng = observe.columns(body, t.states.shape[1]), np.random.default_rng(DATA_SEED)
    states = observe.corrupt(np.ascontiguousarray(t.states[:, columns]), rng)
    last = np.flatnonzero(t.ends)
    next_states = np.concatenate([states[1:], states[-1:]])
    next_states[last] = observe.corrupt(t.next_states[last][:, columns], rng)
    return t._replace(states=states, next_states=next_states)
