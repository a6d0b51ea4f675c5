"""What runs with several seeds say together: interquartile means, bootstrap intervals, profiles, improvements.

The aggregates are those of Agarwal et al. (2021, arXiv 2108.13264). Scores of one agent come as a list with an array
for each data set, of one score a seed; data sets may have different numbers of seeds. Needs SciPy, which is an optional
package; see `check_scipy`.
"""

from collections.abc import Callable, Sequence

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
LEAST_SEEDS = 3  # with fewer there is no interval


def check_scipy() -> None:
    """ValueError with what to install, if SciPy is missing."""
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ValueError('statistics need SciPy: pip install "scipy>=1.11"') from error


def iqm(scores: Sequence[np.ndarray]) -> float:
    """Interquartile mean: of all runs, without the lowest and the highest quarter."""
    from scipy.stats import trim_mean

    return float(trim_mean(np.concatenate(scores), 0.25))


def median(scores: Sequence[np.ndarray]) -> float:
    """Of the data sets' means."""
    return float(np.median([x.mean() for x in scores]))


def mean(scores: Sequence[np.ndarray]) -> float:
    """Of the data sets' means."""
    return float(np.mean([x.mean() for x in scores]))


def optimality_gap(scores: Sequence[np.ndarray], goal: float = 100.0) -> float:
    """How far runs stay below `goal` on average; above it none is better than another."""
    return float(goal - np.mean([np.minimum(x, goal).mean() for x in scores]))


AGGREGATES: dict[str, Callable] = {"IQM": iqm, "median": median, "mean": mean, "optimality gap": optimality_gap}


def has_interval(scores: Sequence[np.ndarray]) -> bool:
    return all(len(x) >= LEAST_SEEDS for x in scores)


def stratified_bootstrap(
    groups: Sequence[Sequence[np.ndarray]], statistic: Callable, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """A percentile interval of statistic(*groups), each group being an agent's scores: the seeds of every data set are
    drawn again from their own, with replacement."""
    rng = np.random.default_rng(seed)
    found = [
        statistic(*([x[rng.integers(len(x), size=len(x))] for x in scores] for scores in groups))
        for _ in range(resamples)
    ]
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
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


def probability_of_improvement(ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray]) -> float:
    """How likely a run of ours is better than one of theirs on the same data set; a tie counts half."""
    shares = [((x[:, None] > y).mean() + (x[:, None] == y).mean() / 2) for x, y in zip(ours, theirs)]
    return float(np.mean(shares))
