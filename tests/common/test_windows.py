"""Windows end in the present, never reach across an episode's start, and are the same when recorded and when lived."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.windows import FrameStack, SegmentSampler, SequenceSampler, WindowSampler, discounted_returns, window
from d4rl_utils import Transitions


def layout(lengths: list[int], width: int = 2) -> Transitions:
    """Episodes of these lengths; a state says its episode and its step, so a window shows where it comes from."""
    states = [np.array([[e, t] for t in range(n + 1)], np.float32) for e, n in enumerate(lengths)]
    rows = sum(lengths)
    ends = np.zeros(rows, bool)
    ends[np.cumsum(lengths) - 1] = True
    return Transitions(
        states=np.concatenate([s[:-1] for s in states]),
        actions=np.arange(rows, dtype=np.float32)[:, None],
        rewards=np.arange(rows, dtype=np.float32) * 10,
        next_states=np.concatenate([s[1:] for s in states]),
        terminals=ends & (np.arange(rows) % 2 == 0),
        ends=ends,
        episode_start=np.repeat(np.cumsum([0, *lengths[:-1]]), lengths).astype(np.int64),
    )


def test_window_repeats_the_first_state():
    rows = window(torch.tensor([0, 1, 5, 7]), torch.tensor([0, 0, 5, 5]), 4)
    assert rows.tolist() == [[0, 0, 0, 0], [0, 0, 0, 1], [5, 5, 5, 5], [5, 5, 6, 7]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 6))
def test_every_window_of_every_layout(lengths, k):
    data = layout(lengths)
    batch = WindowSampler(data, k, "cpu", seed=0).at(torch.arange(sum(lengths)))
    for row in range(sum(lengths)):
        episode, t = data.states[row].astype(int)
        expected = [[episode, max(0, t - i)] for i in range(k - 1, -1, -1)]
        following = [[episode, max(0, t + 1 - i)] for i in range(k - 1, -1, -1)]
        assert batch.states[row].tolist() == expected
        assert batch.next_states[row].tolist() == following
        assert (
            batch.reward[row] == row * 10
            and batch.action[row] == row
            and batch.not_done[row] == (not data.terminals[row])
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 12), st.integers(1, 6))
def test_lived_windows_equal_recorded_ones(length, k):
    data = layout([length])
    recorded = WindowSampler(data, k, "cpu", seed=0).at(torch.arange(length))
    memory = FrameStack.init(1, k, torch.zeros(2))
    for t in range(length):
        before = memory.states.clone()
        seen, following = memory.push(torch.tensor(data.states[t])[None])
        assert torch.equal(seen[0], recorded.states[t])
        assert torch.equal(memory.states, before)  # carried, not changed in place
        memory = following


def test_environments_do_not_share_a_memory():
    memory = FrameStack.init(2, 3, torch.zeros(1))
    _, memory = memory.push(torch.tensor([[1.0], [10.0]]))
    seen, _ = memory.push(torch.tensor([[2.0], [20.0]]))
    assert seen.squeeze(-1).tolist() == [[1, 1, 2], [10, 10, 20]]


def test_sampling_is_uniform_over_transitions_and_owned():
    data = layout([1, 1, 98])
    sampler = WindowSampler(data, 2, "cpu", seed=1)
    torch.manual_seed(5)
    actions = sampler.sample(20_000).action.flatten()
    assert torch.rand(1) == torch.rand(
        1, generator=torch.Generator().manual_seed(5)
    )  # the global stream is not touched
    counts = torch.bincount(actions.long(), minlength=100)
    assert counts.min() > 120 and counts.max() < 290  # 200 ± 14 expected of each
    state = sampler.state_dict()
    first = sampler.sample(4)
    sampler.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(first, sampler.sample(4)) if torch.is_tensor(a))


# -- segments ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 6))
def test_every_segment_of_every_layout(lengths, t):
    """All draws together hold every transition t times; each stays in its episode, its next states behind its own."""
    data = layout(lengths)
    sampler = SegmentSampler(data, t, "cpu", seed=0)
    batch = sampler.at(torch.arange(len(sampler.episode)))
    real = batch.mask > 0
    assert torch.bincount(batch.action.squeeze(-1)[real].long(), minlength=sum(lengths)).tolist() == [t] * sum(lengths)
    assert real[:, 0].all() and (batch.mask.diff(dim=1) <= 0).all()  # real ones first
    for b in range(len(real)):
        rows = batch.action[b].squeeze(-1)[real[b]].long().numpy()
        assert (np.diff(rows) == 1).all() and (data.episode_start[rows] == data.episode_start[rows[0]]).all()
        assert torch.equal(batch.states[b, : len(rows)], torch.tensor(data.states[rows]))
        behind = torch.tensor(data.next_states[rows[-1:]])
        assert torch.equal(batch.states[b, len(rows) :], behind.expand(t + 1 - len(rows), -1))
        assert batch.reward[b][real[b]].tolist() == (rows * 10).tolist()
        assert batch.not_done[b][real[b]].tolist() == (~data.terminals[rows]).tolist()
        assert batch.has_next[b][real[b]].tolist() == (~data.ends[rows]).tolist()
        following = batch.next_action[b].squeeze(-1)[real[b]][~data.ends[rows]]
        assert following.tolist() == (rows[~data.ends[rows]] + 1).tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 5))
def test_what_stands_before_a_segment(lengths, t, past):
    """The states of the same episode's steps before, its first repeated where there are none; the rest is unchanged."""
    data = layout(lengths)
    bare, sampler = SegmentSampler(data, t, "cpu", 0), SegmentSampler(data, t, "cpu", 0, before=past)
    draws = torch.arange(len(sampler.episode))
    plain, batch = bare.at(draws), sampler.at(draws)
    assert torch.equal(batch.states[:, past:], plain.states)
    assert all(torch.equal(a, b) for a, b in zip(plain[1:], batch[1:]) if torch.is_tensor(a))
    for b, first_row in enumerate(batch.action[:, 0, 0].long().tolist()):
        rows = np.maximum(np.arange(first_row - past, first_row), data.episode_start[first_row])
        assert torch.equal(batch.states[b, :past], torch.tensor(data.states[rows]))


@pytest.mark.parametrize("sampler", [WindowSampler, SegmentSampler])
def test_next_states_are_the_recorded_ones(sampler):
    data = layout([3, 1, 2])
    assert torch.equal(sampler(data, 2, "cpu", 0, gamma=0.9).next_states, torch.tensor(data.next_states))


def test_segments_are_drawn_in_transitions_and_owned():
    sampler = SegmentSampler(layout([30, 2]), 4, "cpu", seed=1)
    assert len(sampler.sample(64).mask) == 16 and len(sampler.sample(3).mask) == 1
    state = sampler.state_dict()
    first = sampler.sample(64)
    sampler.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(first, sampler.sample(64)) if torch.is_tensor(a))


def test_returns_to_go():
    """Ends in a death, ends by a time limit: the tail of the second is worth its mean reward for ever."""
    data = layout([2, 3])  # rewards 0 10 | 20 30 40; ends in rows 1 and 4
    data = data._replace(terminals=np.array([False, True, False, False, False]))
    g, tail = 0.5, 30 / 0.5
    wanted = [5, 10, 20 + g * (30 + g * (40 + g * tail)), 30 + g * (40 + g * tail), 40 + g * tail]
    assert discounted_returns(data, g).tolist() == wanted
    assert discounted_returns(data, 1.0).tolist() == [10, 10, 90, 70, 40]
    batch = WindowSampler(data, 2, "cpu", 0, gamma=g).at(torch.arange(5))
    assert batch.returns.tolist() == wanted and batch.has_next.tolist() == [1, 0, 1, 1, 0]
    assert batch.next_action[batch.has_next > 0].flatten().tolist() == [1, 3, 4]


def test_no_transition_is_an_error():
    empty = Transitions(
        *(np.zeros((0, 2), np.float32),) * 2,
        np.zeros(0, np.float32),
        np.zeros((0, 2), np.float32),
        *(np.zeros(0, bool),) * 2,
        np.zeros(0, np.int64),
    )
    with pytest.raises(ValueError, match="no transition"):
        WindowSampler(empty, 3, "cpu", 0)
    with pytest.raises(ValueError, match="no transition"):
        SegmentSampler(empty, 3, "cpu", 0)


# -- spans ---------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.integers(1, 6))
def test_every_span_of_every_layout(lengths, k):
    data = layout(lengths)
    spans = SequenceSampler(data, k, "cpu", seed=0)
    batch = spans.at(torch.arange(sum(lengths)))
    ends = np.cumsum(lengths)
    for row in range(sum(lengths)):
        episode, t = data.states[row].astype(int)
        real = min(k, lengths[episode] - t)
        assert batch.mask[row].tolist() == [1.0] * real + [0.0] * (k - real)
        assert batch.states[row, :real].tolist() == [[episode, t + i] for i in range(real)]
        assert batch.steps[row, :real].tolist() == list(range(t, t + real))
        assert batch.actions[row, :real, 0].tolist() == list(range(row, row + real))
        rewards = data.rewards.astype(np.float64)
        rtg = [rewards[row + i : ends[episode]].sum() for i in range(real)]
        np.testing.assert_allclose(batch.rtg[row, :real].numpy(), rtg, rtol=1e-6)
        assert (batch.states[row, real:, 0] == episode).all()  # what stands behind is of the same episode
    assert spans.states.shape == (sum(lengths), 2) and batch.steps.dtype == torch.long


def test_returns_to_go_keep_their_digits_behind_a_million_rewards():
    data = layout([1000] * 300)
    data = data._replace(rewards=np.full(300_000, 1000.1, np.float32))
    rtg = SequenceSampler(data, 2, "cpu", 0).at(torch.tensor([299_999])).rtg
    assert rtg[0, 0].item() == np.float32(1000.1)


def test_spans_start_anywhere_alike_and_own_their_stream():
    sampler = SequenceSampler(layout([1, 1, 98]), 3, "cpu", seed=1)
    starts = sampler.sample(20_000).actions[:, 0].flatten()
    counts = torch.bincount(starts.long(), minlength=100)
    assert counts.min() > 120 and counts.max() < 290
    state = sampler.state_dict()
    first = sampler.sample(4)
    sampler.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(first, sampler.sample(4)) if torch.is_tensor(a))
    with pytest.raises(ValueError, match="no transition"):
        SequenceSampler(layout([1])._replace(rewards=np.zeros(0, np.float32)), 3, "cpu", 0)
