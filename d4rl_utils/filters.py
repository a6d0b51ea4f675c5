"""Recorded data made harder or easier on purpose, as in the literature: the best episodes alone, rewards paid late."""

from dataclasses import replace

import numpy as np

from d4rl_utils.reader import Dataset, Transitions, episode_returns


def best_episodes(dataset: Dataset, share: float) -> Dataset:
    """The episodes of highest return that together hold at least `share` of the transitions, in recorded order.

    "%BC" (arXiv 2106.01345) clones these. share 1 keeps every episode. ValueError as `check_share`.
    """
    check_share(share)
    if share == 1:
        return dataset
    transitions, identity = dataset
    returns, starts = episode_returns(transitions), np.unique(transitions.episode_start)
    lengths = np.diff(np.append(starts, len(transitions.ends)))
    order = np.argsort(-returns, kind="stable")
    count = np.searchsorted(lengths[order].cumsum(), share * lengths.sum()) + 1
    kept = np.sort(order[:count])
    rows = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for i in kept])
    first = np.repeat(np.append(0, lengths[kept].cumsum()[:-1]), lengths[kept])
    chosen = Transitions(*(x[rows] for x in transitions))._replace(episode_start=first.astype(np.int64))
    about = {"transitions": len(rows), "episodes": len(kept), "return_mean": float(returns[kept].mean())}
    return Dataset(chosen, replace(identity, **about))


def check_share(share: float) -> None:
    """ValueError unless 0 < share ≤ 1."""
    if not 0 < share <= 1:
        raise ValueError(f"pct_traj = {share} is no share of the data: take more than 0, and 1 for all episodes")


def delayed(transitions: Transitions) -> Transitions:
    """All reward of an episode in its last step (arXiv 2106.01345)."""
    rewards = np.zeros_like(transitions.rewards)
    rewards[transitions.ends] = episode_returns(transitions)
    return transitions._replace(rewards=rewards)
