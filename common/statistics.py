"""What runs with several seeds say together: interquartile means, bootstrap intervals, profiles, improvements.

The aggregates are those of Agarwal et al. (2021, arXiv 2108.13264). Scores of one agent come as a list with an array
for each data set, of one score a seed, (seeds,); data sets may have different numbers of seeds. With axes before that
one, (..., seeds), the aggregates have them too, as a bootstrap's resamples do. Needs SciPy, which is an optional
package; see `check_scipy`.
"""

from collections.abc import Callable, Sequence

import numpy as np

from common.packages import optional

RESAMPLES = 2000
CONFIDENCE = 0.95
LEAST_SEEDS = 3  # with fewer there is no interval


def check_scipy() -> None:
    """ValueError with what to install, if SciPy is missing."""
    optional("scipy.stats", '"scipy>=1.11"', "a report")


def iqm(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Interquartile mean: of all runs, without the lowest and the highest quarter."""
    from scipy.stats import trim_mean

    return trim_mean(np.concatenate(scores, -1), 0.25, axis=-1)


def median(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Of the data sets' means."""
    return np.median([x.mean(-1) for x in scores], axis=0)


def mean(scores: Sequence[np.ndarray]) -> np.ndarray:
    """Of the data sets' means."""
    return np.mean([x.mean(-1) for x in scores], axis=0)


def optimality_gap(scores: Sequence[np.ndarray], goal: float = 100.0) -> np.ndarray:
    """How far runs stay below `goal` on average; above it none is better than another."""
    return goal - np.mean([np.minimum(x, goal).mean(-1) for x in scores], axis=0)


AGGREGATES: dict[str, Callable] = {"IQM": iqm, "median": median, "mean": mean, "optimality gap": optimality_gap}


def has_interval(scores: Sequence[np.ndarray]) -> bool:
    return all(len(x) >= LEAST_SEEDS for x in scores)


def stratified_bootstrap(
    groups: Sequence[Sequence[np.ndarray]], statistic: Callable, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """A percentile interval of statistic(*groups), each group being an agent's scores: the seeds of every data set are
    drawn again from their own, with replacement."""
    rng = np.random.default_rng(seed)
    drawn = [[x[rng.integers(len(x), size=(resamples, len(x)))] for x in scores] for scores in groups]
    low, high = np.quantile(statistic(*drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def mean_interval(values: np.ndarray) -> tuple[float, float] | None:
    """Student's interval of a mean over seeds (n,); None with fewer than three."""
    from scipy.stats import t

    if len(values) < LEAST_SEEDS:
        return None
    half = t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def performance_profile(scores: Sequence[np.ndarray], levels: np.ndarray) -> np.ndarray:
    """Share of runs with a score above each level (L,), every data set counting the same. -> (L,)"""
    return np.mean([(x[:, None] > levels).mean(0) for x in scores], axis=0)


def probability_of_improvement(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> np.ndarray:
    """How likely a run of ours is better than one of theirs on the same data set; a tie counts half."""
    pairs = [(x[..., :, None], y[..., None, :]) for x, y in zip(ours, theirs)]
    return np.mean([((x > y) + (x == y) / 2).mean((-2, -1)) for x, y in pairs], axis=0)
