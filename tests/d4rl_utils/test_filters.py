"""The best episodes, and late rewards."""

import numpy as np
import pytest
from conftest import TINY
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import Bamba
from config import BambaConfig
from d4rl_utils import Dataset, DatasetInfo, Transitions, delayed
from d4rl_utils.filters import best_episodes


def dataset_of(lengths: list[int], returns: list[int]) -> Dataset:
    """Episodes of these lengths; each pays its return in its first step. A state is (episode, step)."""
    states = np.array([(i, t) for i, n in enumerate(lengths) for t in range(n)], np.float32)
    step, ends = states[:, 1], np.append(states[1:, 1] == 0, True)
    rewards = np.where(step == 0, np.repeat(returns, lengths), 0).astype(np.float32)
    first = np.arange(len(states)) - step.astype(np.int64)
    transitions = Transitions(states, states[:, :1], rewards, states + 0.5, ends & (states[:, 0] % 2 == 0), ends, first)
    return Dataset(transitions, DatasetInfo("x", "custom", "x.hdf5", "0", len(states), len(lengths), np.mean(returns)))


episodes = st.lists(st.tuples(st.integers(1, 9), st.integers(-5, 5)), min_size=1, max_size=12)


@settings(max_examples=100, deadline=None)
@given(episodes, st.floats(0.01, 1))
def test_the_best_episodes_and_no_more_than_needed(layout, share):
    lengths, returns = (list(x) for x in zip(*layout))
    whole = dataset_of(lengths, returns)
    data, identity = best_episodes(whole, share)
    kept = np.unique(data.states[:, 0]).astype(int)
    left = set(range(len(lengths))) - set(kept)
    assert min(returns[i] for i in kept) >= max((returns[i] for i in left), default=-9)
    sizes = [lengths[i] for i in kept]
    worst = min(kept, key=lambda i: (returns[i], -i))
    assert sum(sizes) >= share * sum(lengths) > sum(sizes) - lengths[worst]
    again = dataset_of(sizes, [returns[i] for i in kept]).transitions  # whole episodes, in recorded order
    for name in ("rewards", "ends", "episode_start"):
        assert np.array_equal(getattr(data, name), getattr(again, name))
    assert data.episode_start.dtype == np.int64 and np.array_equal(data.states[:, 1], again.states[:, 1])
    assert (identity.transitions, identity.episodes) == (sum(sizes), len(kept))
    assert identity.return_mean == pytest.approx(np.mean([returns[i] for i in kept]))


def test_all_of_the_data_are_all_of_them():
    whole = dataset_of([3, 1, 4], [2, 0, 1])
    assert best_episodes(whole, 1.0) is whole


def test_late_rewards_keep_returns():
    data = delayed(dataset_of([3, 1, 4], [2, 7, 1]).transitions)
    assert data.rewards.tolist() == [0, 0, 2, 7, 0, 0, 0, 1] and data.rewards.dtype == np.float32


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5, float("nan")])
def test_no_share_is_said_before_anything_is_opened(share):
    with pytest.raises(ValueError, match="take more than 0"):
        Bamba.open_data(BambaConfig(**TINY, dataset="nowhere.hdf5", pct_traj=share), "cpu", 0)


def test_an_agent_learns_from_the_chosen_alone(hopper_file):
    cfg = BambaConfig(**TINY, dataset=str(hopper_file), pct_traj=0.25)
    sampler, identity = Bamba.open_data(cfg, "cpu", 0)
    assert len(sampler.states) == identity.transitions == 120 and identity.episodes == 3  # of 10 episodes of 40 steps
