"""Prioritised replay: the tree's sums and draws, and that windows gathered from single frames are the literal ones."""

import pytest
import torch

from common.prioritized_replay import FAN, PrioritizedReplay, SumTree
from common.rollout import Step
from common.windows import window


def tree_of(priorities: list[float], capacity: int = 0) -> SumTree:
    tree = SumTree(capacity or len(priorities))
    tree.set(torch.arange(len(priorities)), torch.tensor(priorities, dtype=torch.float64))
    return tree


def replay_of(capacity=40, n=1, k=3, width=2, latent=0, seed=0, alpha=0.6) -> PrioritizedReplay:
    return PrioritizedReplay(capacity, n, k, torch.zeros(width), latent, seed, alpha, 1e-6, "cpu")


# -- the tree ------------------------------------------------------------------------------------


def test_golden_draws_and_weights():
    tree = tree_of([1, 2, 3, 4])
    mass = torch.tensor([0, 0.999, 1, 2.999, 3, 5.999, 6, 9.999], dtype=torch.float64)
    assert tree.total == 10 and tree.find(mass).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    share = tree.get(torch.arange(4)) / tree.total
    for beta, wanted in ((0.4, [1, 0.757858, 0.644394, 0.574349]), (1.0, [1, 1 / 2, 1 / 3, 1 / 4])):
        weight = (4 * share) ** -beta
        torch.testing.assert_close(weight / weight.max(), torch.tensor(wanted).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("capacity", [1, FAN, FAN + 1, 5000])
def test_the_root_is_the_sum_of_the_leaves_after_many_changes(capacity):
    tree, g = SumTree(capacity), torch.Generator().manual_seed(0)
    for _ in range(400):
        leaf = torch.randint(capacity, (250,), generator=g)
        tree.set(leaf, 10 ** torch.empty(250).uniform_(-6, 2, generator=g))
    assert tree.total.item() == pytest.approx(tree.levels[0].sum().item(), rel=1e-12)
    for low, high in zip(tree.levels, tree.levels[1:]):
        assert torch.equal(low.sum(1), high.view(-1)[: len(low)])


def test_of_duplicates_the_last_counts():
    tree = tree_of([1, 1, 1])
    tree.set(torch.tensor([0, 2, 0, 2, 0]), torch.tensor([5.0, 6.0, 7.0, 8.0, 9.0]))
    assert tree.get(torch.arange(3)).tolist() == [9, 1, 8] and tree.total == 18


def test_draws_are_in_proportion_and_never_of_mass_zero():
    g = torch.Generator().manual_seed(0)
    priority = torch.rand(300, generator=g).double()
    priority[torch.rand(300, generator=g) < 0.5] = 0
    tree = tree_of(priority.tolist(), capacity=700)
    draws = 200_000
    found = tree.find(torch.rand(draws, generator=g).double() * tree.total)
    count = torch.bincount(found, minlength=300).double()
    share = priority / priority.sum()
    assert count[priority == 0].sum() == 0 and count[300:].sum() == 0
    assert ((count - draws * share).abs() <= 5 * (draws * share * (1 - share)).sqrt()).all()
    edge = torch.nextafter(tree.total, torch.zeros(()).double())  # rounding on the way down must not leave the tree
    assert priority[tree.find(torch.stack([edge, tree.total, tree.total * 2]))].min() > 0


# -- windows -------------------------------------------------------------------------------------


class Literal:
    """The published storage: both windows of every transition, whole."""

    def __init__(self, n: int, k: int):
        self.k, self.frames, self.rows = k, [[] for _ in range(n)], {}

    def add(self, slots: list[int], step: Step) -> None:
        for i, slot in enumerate(slots):
            own = self.frames[i] = self.frames[i] or [step.state[i]] * self.k
            after = [*own[1:], step.next_state[i]]
            facts = (step.action[i], step.reward[i], step.terminated[i].float(), step.truncated[i].float())
            self.rows[slot] = (torch.stack(own), torch.stack(after), *facts)
            self.frames[i] = [] if step.terminated[i] | step.truncated[i] else after


def play(replay: PrioritizedReplay, steps: int, ending: float, seed: int = 0, literal: Literal | None = None, latent=0):
    """Random episodes into the replay; frames are numbered, so that each is its own."""
    g, n, at = torch.Generator().manual_seed(seed), replay.n, 0
    state = None
    for _ in range(steps):
        if state is None:
            at, state = at + n, torch.arange(at, at + n).float()[:, None].repeat(1, 2)
        fresh = torch.arange(at, at + n).float()[:, None].repeat(1, 2)
        at += n
        ends = torch.rand(2, n, generator=g) < ending
        step = Step(state, torch.randint(4, (n,), generator=g), torch.rand(n, generator=g), fresh, *ends)
        slot = (replay.env_idx * replay.slots_per_env + replay.steps % replay.slots_per_env).tolist()
        replay.add(step, torch.full((n, latent), float(replay.steps)) if latent else None)
        if literal:
            literal.add(slot, step)
        first = torch.arange(at, at + n).float()[:, None].repeat(1, 2)
        at += n if ends.any() else 0
        state = torch.where(ends.any(0)[:, None], first, fresh)


@pytest.mark.parametrize("n, capacity, ending", [(1, 40, 0.1), (1, 37, 0.4), (3, 30, 0.02), (2, 16, 0.9)])
def test_frames_stored_once_give_the_literal_windows(n, capacity, ending):
    """Bit for bit, through many rounds of the ring, with episodes longer and shorter than both ring and window."""
    replay, literal = replay_of(capacity, n, k=5), Literal(n, 5)
    for part in range(6):
        play(replay, 300, ending, seed=part, literal=literal)
        literal.frames = [[] for _ in range(n)]  # `play` begins anew, so both must be told
        replay.forget_episode(torch.ones(n, dtype=torch.bool))
        batch = replay.sample(64, 0.5)
        rows = [literal.rows[s] for s in batch.slot.tolist()]
        wanted = [torch.stack(column) for column in zip(*rows)]
        got = (batch.states, batch.next_states, batch.action, batch.reward, batch.terminated, batch.truncated)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert len(replay) == n * -(-capacity // n)


@pytest.mark.parametrize("n, capacity, ending", [(1, 40, 0.1), (3, 60, 0.05), (2, 16, 0.6)])
def test_several_steps_are_those_that_follow_one_by_one(n, capacity, ending):
    """Against the one-step transitions of the same replay, followed while there are more of the episode."""
    gamma, steps = 0.9, 3
    replay = PrioritizedReplay(capacity, n, 4, torch.zeros(2), 0, 0, 0.6, 1e-6, "cpu", steps, gamma)
    for part in range(4):
        play(replay, 100, ending, seed=part)
        replay.forget_episode(torch.ones(n, dtype=torch.bool))  # `play` begins anew
        batch = replay.sample(64, 0.5)
        replay.n_step = 1
        one = replay.get(torch.arange(n * replay.slots_per_env), torch.ones(n * replay.slots_per_env))
        replay.n_step = steps
        newest = (replay.steps - 1) % replay.slots_per_env
        for i, slot in enumerate(batch.slot.tolist()):
            reward, discount, at = 0.0, 1.0, slot
            for _ in range(steps):
                reward, discount, last = reward + discount * one.reward[at].item(), discount * gamma, at
                place, over = at % replay.slots_per_env, one.terminated[at] + one.truncated[at] > 0
                at = at - place + (place + 1) % replay.slots_per_env
                if over or place == newest or replay.episode_start[at] != replay.episode_start[slot]:
                    break
            assert batch.reward[i].item() == pytest.approx(reward, rel=1e-5)
            assert batch.discount[i].item() == pytest.approx(discount, rel=1e-6)
            assert torch.equal(batch.next_states[i], one.next_states[last])
            assert (batch.terminated[i], batch.truncated[i]) == (one.terminated[last], one.truncated[last])
            assert torch.equal(batch.states[i], one.states[slot]) and batch.action[i] == one.action[slot]


def test_a_window_is_memorys_window():
    replay = replay_of(k=4)
    play(replay, 12, 0.0)
    batch = replay.get(torch.arange(12), torch.ones(12))
    places = window(torch.arange(12), torch.zeros(12, dtype=torch.long), 4)
    assert torch.equal(batch.states[..., 0], places.float())  # frames are numbered
    assert torch.equal(batch.states[1:], batch.next_states[:-1])  # one later in the same episode
    assert torch.equal(batch.states[0], batch.states[0, :1].expand(4, 2))  # the first frame repeats


# -- priorities ----------------------------------------------------------------------------------


def test_errors_become_priorities_and_what_is_new_gets_the_greatest():
    replay = replay_of()
    play(replay, 10, 0.0)
    assert replay.tree.get(torch.arange(10)).tolist() == [1.0] * 10
    replay.update_priorities(torch.arange(4), torch.tensor([0.0, -0.5, 1.0, 2.0]))
    wanted = torch.tensor([2.51189e-4, 0.659755, 1.000001, 1.515717]).double()
    torch.testing.assert_close(replay.tree.get(torch.arange(4)), wanted, rtol=0, atol=1e-6)
    play(replay, 1, 0.0)
    assert replay.tree.get(torch.tensor([10])).item() == pytest.approx(1.515717, abs=1e-6)


def test_weights_undo_the_draw():
    replay = replay_of()
    play(replay, 20, 0.1)
    assert torch.equal(replay.sample(16, 1.0).weight, torch.ones(16))  # all priorities are equal
    replay.update_priorities(torch.arange(20), torch.linspace(0, 3, 20))
    assert torch.equal(replay.sample(16, 0.0).weight, torch.ones(16))
    batch = replay.sample(4000, 1.0)
    mean = torch.zeros(20).index_add(0, batch.slot, batch.weight) / batch.weight.sum()
    assert (mean - 1 / 20)[1:].abs().max() < 0.01  # with beta = 1 every transition counts the same (0 is hardly drawn)


@pytest.mark.parametrize("steps", [7, 70])
def test_uniform_draws_know_no_priority(steps):
    """Nor what is not filled; three environments, so that slots are not one row."""
    replay = replay_of(capacity=60, n=3)
    play(replay, steps, 0.1)
    replay.update_priorities(torch.arange(3), torch.full((3,), 1e6))
    filled = min(steps, 20) * 3
    batch = replay.sample_uniform(100 * filled)
    seen = torch.bincount(batch.slot, minlength=60)
    assert (seen > 0).sum() == filled and batch.weight.eq(1).all()
    assert (seen[seen > 0] - 100).abs().max() < 50  # five standard deviations


def test_latents_age_and_are_renewed():
    replay = replay_of(latent=3)
    play(replay, 8, 0.2, latent=3)
    batch = replay.get(torch.tensor([5, 2]), torch.ones(2), update=7)
    assert batch.latent[:, 0].tolist() == [5, 2] and batch.age.tolist() == [7, 7]
    replay.keep_latent(torch.tensor([2, 2]), torch.tensor([[1.0] * 3, [9.0] * 3]), update=4)
    batch = replay.get(torch.tensor([2]), torch.ones(1), update=7)
    assert batch.latent.tolist() == [[9.0] * 3] and batch.age.item() == 3


def test_it_wakes_as_it_was():
    one, other = replay_of(n=2, latent=1), replay_of(n=2, latent=1, seed=5)
    play(one, 70, 0.1, latent=1)
    one.update_priorities(torch.arange(20), torch.rand(20))
    one.sample(8, 0.5)
    other.load_state_dict(one.state_dict())
    for replay in (one, other):
        play(replay, 3, 0.5, seed=9, latent=1)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(one.sample(8, 0.5), other.sample(8, 0.5)))


def test_cpprb_draws_the_same():
    """An independent prioritised buffer, in C++: the same frequencies and weights from the same errors."""
    cpprb = pytest.importorskip("cpprb")
    errors = torch.rand(50, generator=torch.Generator().manual_seed(1)) * 3
    peer = cpprb.PrioritizedReplayBuffer(64, {"i": {}}, alpha=0.6, eps=1e-6)
    peer.add(i=range(50))
    peer.update_priorities(list(range(50)), errors.numpy())
    replay = replay_of(capacity=64)
    play(replay, 50, 0.0)
    replay.update_priorities(torch.arange(50), errors)
    theirs, ours = peer.sample(60_000, beta=0.7), replay.sample(60_000, 0.7)
    share = [torch.bincount(torch.as_tensor(x).long(), minlength=50) / 60_000 for x in (theirs["indexes"], ours.slot)]
    assert (share[0] - share[1]).abs().max() < 0.004
    weights = dict(zip(theirs["indexes"].tolist(), theirs["weights"].tolist()))
    for slot, weight in zip(ours.slot[::500].tolist(), ours.weight[::500].tolist()):
        assert weight == pytest.approx(weights[slot], rel=1e-3)
