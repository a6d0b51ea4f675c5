"""Bamba: its losses on a few numbers, what learns from what, what it sees, and that it can learn."""

import copy
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from agent import Bamba
from common.interface import EnvSpec
from common.losses import bc_q_loss
from common.windows import FrameStack, SegmentSampler, Window, WindowSampler
from d4rl_utils import Transitions

SPEC = EnvSpec(state=4, action=2, low=(-1.0, -2.0), high=(1.0, 0.0))
ENCODERS = {"critic_input": ["state", "embedding", "embedding_detached"], "target_encoder": ["online", "ema"]}


def batch_of(n: int = 8, k: int = 3, seed: int = 0) -> Window:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return Window(r(n, k, 4), r(n, 2).tanh() - torch.tensor([0.0, 1.0]), r(n), r(n, k, 4), (r(n) > 0).float())


def parts(agent: Bamba) -> dict:
    names = ("encoder", "actor", "critic", "next_state", "reward", "target_actor", "target_critic")
    return {n: [p.detach().clone() for p in getattr(agent, n).parameters()] for n in names}


def moved(before: dict, after: dict) -> set[str]:
    return {n for n in before if any(not torch.equal(a, b) for a, b in zip(before[n], after[n]))}


def test_objective_on_four_numbers():
    loss, info = bc_q_loss(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([2.0, 2.0]), alpha=1.0)
    assert loss.item() == 1.0 - 1.0  # cloning error 1, and Q counts as ±1 whatever its scale
    loss, _ = bc_q_loss(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([-300.0, 100.0]), alpha=2.0)
    assert loss.item() == pytest.approx(1.0 - 2.0 / 200 * -100)
    loss, _ = bc_q_loss(torch.zeros(2, 1), torch.ones(2, 1), torch.tensor([5.0, 5.0]), alpha=0.0)
    assert loss.item() == 1.0


@pytest.mark.parametrize("critic_input", ENCODERS["critic_input"])
@pytest.mark.parametrize("target_encoder", ENCODERS["target_encoder"])
def test_who_learns_when(tiny, critic_input, target_encoder):
    agent = Bamba(tiny(critic_input=critic_input, target_encoder=target_encoder), SPEC).train()
    before = parts(agent)
    agent.update(batch_of())  # the actor's turn comes first
    middle = parts(agent)
    assert moved(before, middle) == set(before)
    agent.update(batch_of(seed=1))
    assert moved(middle, parts(agent)) == {"encoder", "critic", "next_state", "reward"}
    assert agent.updates == 2


@pytest.mark.parametrize(
    "critic_input, reaches", [("state", False), ("embedding", True), ("embedding_detached", False)]
)
def test_critics_gradient_reaches_the_encoder_only_when_asked(tiny, critic_input, reaches):
    agent = Bamba(tiny(critic_input=critic_input, beta_s=0.0, beta_r=0.0), SPEC).train()
    loss, _ = agent.losses(batch_of(), (False, False), agent.draw_noise(batch_of()))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.encoder.parameters()) == reaches


def test_the_actor_does_not_move_the_critic(tiny):
    agent = Bamba(tiny(), SPEC).train()
    norms = []
    for turn in (False, True):
        torch.manual_seed(3)
        agent.optimizer.zero_grad()
        agent.losses(batch_of(), (turn, False), agent.draw_noise(batch_of()))[0].backward()
        norms.append(torch.stack([p.grad.norm() for p in agent.critic.parameters()]))
    torch.testing.assert_close(*norms)


def test_dead_states_have_no_future(tiny):
    agent = Bamba(tiny(), SPEC).train()
    batch = batch_of()
    dead = target_of(agent, batch._replace(not_done=torch.zeros(8)))
    assert torch.equal(dead, batch.reward)
    assert not torch.allclose(target_of(agent, batch._replace(not_done=torch.ones(8))), batch.reward)


def target_of(agent, b):
    rows = agent.window_rows(b, agent.draw_noise(b))
    return agent.target(rows, torch.randn_like(b.action))


def test_target_noise_is_clipped_and_within_bounds(tiny):
    agent = Bamba(tiny(action_noise=100.0, action_noise_clip=0.5), SPEC).train()
    seen = []
    critic = agent.target_critic.forward
    agent.target_critic.forward = lambda x, a: seen.append(a) or critic(x, a)
    batch = batch_of(512)
    target_of(agent, batch)
    with torch.no_grad():
        z = agent.encoder(agent.obs_normalizer(batch.next_states))
        clean = agent.policy(z, agent.target_actor)
    noise = (seen[0] - clean) / agent.action_scale
    assert noise.shape == (512, 2) and noise.abs().max() <= 0.5 + 1e-5
    assert (noise.abs() > 0.49).float().mean() > 0.9 and not torch.equal(noise[:, 0], noise[:, 1])
    assert (seen[0] >= torch.tensor(SPEC.low)).all() and (seen[0] <= torch.tensor(SPEC.high)).all()


def test_targets_ignore_dropout(tiny):
    for target_encoder in ENCODERS["target_encoder"]:
        agent = Bamba(tiny(drop_p=0.5, action_noise=0.0, target_encoder=target_encoder), SPEC).train()
        b = batch_of()
        targets = [agent.losses(b, (False, False), agent.draw_noise(b))[1]["critic/target"] for _ in range(2)]
        assert torch.equal(*targets)


@pytest.mark.parametrize("push, bound", [(100.0, SPEC.high), (-100.0, SPEC.low)])
def test_actions_fill_their_bounds_and_no_more(tiny, push, bound):
    agent = Bamba(tiny(), SPEC).eval()
    with torch.no_grad():
        agent.actor[-1].bias.fill_(push)
    action, _ = agent.act(torch.randn(5, 4), torch.zeros(5), agent.reset(5))
    assert torch.equal(action, torch.tensor(bound).expand(5, 2))


def test_acting_is_what_was_trained(tiny):
    """The action in the t-th live step equals the policy on the recorded window that ends there."""
    agent = Bamba(tiny(), SPEC).eval()
    agent.obs_normalizer.fit(torch.randn(50, 4) * 3 + 1)
    walk, memory, replay = torch.randn(6, 2, 4), agent.reset(2), FrameStack.init(2, 3, torch.zeros(4))
    for state in walk:
        action, memory = agent.act(state, torch.zeros(2), memory)
        states, replay = replay.push(state)
        with torch.no_grad():
            expected = agent.policy(agent.encoder(agent.obs_normalizer(states)))
        assert torch.equal(action, expected)


# -- segments, encoders, objectives --------------------------------------------------------------

WALK = Transitions(
    states=np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32),
    actions=np.random.default_rng(1).uniform([-1, -2], [1, 0], (60, 2)).astype(np.float32),
    rewards=np.random.default_rng(2).normal(1, 0.5, 60).astype(np.float32),
    next_states=np.random.default_rng(0).normal(size=(61, 4)).astype(np.float32)[1:],
    terminals=np.arange(1, 61) == 20,
    ends=np.isin(np.arange(1, 61), [20, 23, 60]),
    episode_start=np.repeat([0, 20, 23], [20, 3, 37]),
)
MIXERS = ("mamba2", "mamba1", "attention", "lstm")


def segmented(tiny, **changes) -> tuple[Bamba, SegmentSampler]:
    agent = Bamba(tiny(**{"train_on": "segments", "context_length": 5, "drop_p": 0.0} | changes), SPEC).train()
    sampler = SegmentSampler(WALK, agent.cfg.context_length, "cpu", 0, gamma=0.99, before=agent.burn_in)
    for normalizer in (agent.obs_normalizer, agent.delta_normalizer):
        if normalizer:
            normalizer.fit(sampler.states)
    return agent, sampler


@pytest.mark.parametrize("encoder", MIXERS)
@pytest.mark.parametrize("burn_in, state_delta", [(0, False), (0, True), (2, False), (2, True)])
def test_acting_is_what_segments_trained(tiny, encoder, burn_in, state_delta):
    """From an episode's start on, the live action at every place is the training pass's; behind the segment's length
    it is that of the last place."""
    agent, _ = segmented(tiny, encoder=encoder, burn_in=burn_in, state_delta=state_delta)
    burn_in = max(burn_in, state_delta)  # a change wants a state before
    assert agent.burn_in == burn_in and agent.k == 5 + burn_in
    agent.eval()
    walk, memory, lived = torch.randn(9, 2, 4), agent.reset(2), []
    for state in walk:
        action, memory = agent.act(state, torch.zeros(2), memory)
        lived.append(action)
    with torch.no_grad():
        walk = walk.transpose(0, 1)
        walk = torch.cat([walk[:, :1].expand(-1, burn_in, -1), walk], 1)  # what the sampler puts before a start
        z = agent.encoder.sequence(agent.normalize(walk[:, : burn_in + 5]))
        trained = agent.policy(z[:, burn_in:])  # (2, 5, A)
        torch.testing.assert_close(torch.stack(lived[:5], 1), trained)
        for t in range(5, 9):
            seen = walk[:, t - 4 : t + burn_in + 1]
            torch.testing.assert_close(lived[t], agent.policy(agent.encoder(agent.normalize(seen))))


def test_what_stands_before_a_segment_is_seen_and_not_trained(tiny):
    """As many rows as steps, and the states before them reach the first of them, as long as there are any."""
    agent, sampler = segmented(tiny, burn_in=2, state_skip=False)
    plain, _ = segmented(tiny, state_skip=False)
    plain.load_state_dict(agent.state_dict())
    b = sampler.sample(40)
    rows = agent.segment_rows(b, agent.draw_noise(b))
    assert len(rows.z) == len(rows.next_z) == len(rows.reward) == b.mask.numel()
    moved = b._replace(states=torch.cat([b.states[:, :2] + 1, b.states[:, 2:]], 1))
    other = agent.segment_rows(moved, agent.draw_noise(moved))
    first = torch.arange(0, len(rows.z), 5)
    assert not torch.allclose(rows.z[first], other.z[first])
    for x, y in zip(rows._replace(z=(), next_z=()), other._replace(z=(), next_z=())):
        assert not torch.is_tensor(x) or torch.equal(x, y)


def test_changes_of_state_are_seen_in_their_own_spread(tiny):
    """Two frames' difference beside the state, of spread 1 over the data; 0 where nothing was before."""
    walk = np.cumsum(np.random.default_rng(3).normal(0.01, 0.02, (61, 4)), 0).astype(np.float32)
    data = WALK._replace(states=walk[:-1], next_states=walk[1:])
    agent = Bamba(tiny(encoder="none", state_delta=True), SPEC)
    assert agent.k == 2 and agent.actor[0].in_features == 8
    sampler = WindowSampler(data, agent.k, "cpu", 0)
    agent.fit_normalizer(sampler)
    seen = agent.normalize(sampler.at(torch.arange(60)).states)
    assert torch.equal(seen[:, 0, 4:], torch.zeros(60, 4))
    delta = seen[torch.tensor([t not in (0, 20, 23) for t in range(60)]), 1, 4:]
    torch.testing.assert_close(delta.std(0), torch.ones(4), atol=0.1, rtol=0)
    assert torch.equal(seen[torch.tensor([0, 20, 23]), 1, 4:], torch.zeros(3, 4))  # the first state, repeated


def test_burn_in_wants_segments(tiny):
    with pytest.raises(ValueError, match="burn_in"):
        Bamba(tiny(train_on="windows", burn_in=1), SPEC)


def test_a_place_sees_its_past_alone(tiny):
    agent, sampler = segmented(tiny)
    states = agent.obs_normalizer(sampler.sample(40).states)
    changed = states.clone()
    changed[:, 3:] += 1
    with torch.no_grad():
        a, b = agent.encoder.sequence(states), agent.encoder.sequence(changed)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.allclose(a[:, 3:], b[:, 3:])


def test_one_pass_and_two_are_the_same(tiny):
    """Without dropout the next place's embedding is the next step's, as a pass of its own would give it."""
    agent, sampler = segmented(tiny)
    slow, _ = segmented(tiny, target_encoder="ema")
    slow.load_state_dict(agent.state_dict(), strict=False)
    slow.target_encoder.polyak_update(slow.encoder, 1.0)
    b = sampler.sample(40)
    for x, y in zip(agent.segment_rows(b, agent.draw_noise(b)), slow.segment_rows(b, slow.draw_noise(b))):
        if torch.is_tensor(x):
            torch.testing.assert_close(x, y)


def test_what_is_masked_teaches_nothing(tiny):
    agent, sampler = segmented(tiny, objective="rebrac")
    b = sampler.sample(200)
    noise, gone = agent.draw_noise(b), b.mask == 0
    assert gone.any()
    spoilt = b._replace(reward=b.reward.masked_fill(gone, 1e3), action=b.action.masked_fill(gone[..., None], -9.0))
    a, c = (agent.losses(x, (True, False), noise)[0] for x in (b, spoilt))
    torch.testing.assert_close(a, c)


@pytest.mark.parametrize("train_on", ["windows", "segments"])
@pytest.mark.parametrize("encoder", [*MIXERS, "none"])
@pytest.mark.parametrize("objective", ["td3bc", "rebrac", "iql", "bc"])
def test_every_objective_on_every_encoder(tiny, objective, encoder, train_on):
    changes = {} if objective in ("iql", "bc") else {"trust": "explained", "critic_pretrain": 2}
    cfg = tiny(objective=objective, encoder=encoder, train_on=train_on, critic_layernorm=True, head_depth=3, **changes)
    agent = Bamba(cfg, SPEC).train()
    segments = train_on == "segments" and encoder != "none"
    sampler = (SegmentSampler if segments else WindowSampler)(WALK, agent.k, "cpu", 0, gamma=0.99)
    agent.fit_normalizer(sampler)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    for _ in range(4):
        metrics = agent.update(sampler.sample(32))
        assert all(v.isfinite() and not v.requires_grad for v in metrics.values())
    still = {k.split(".")[0] for k, v in agent.state_dict().items() if torch.equal(v, before[k])}
    idle = {"critic", "target_critic"} if objective == "bc" else set()
    idle |= {"next_state", "reward"} if encoder == "none" else set()
    assert still - {"action_bias", "action_scale", "obs_normalizer", "q_weight"} == idle
    action, memory = agent.act(torch.randn(3, 4), torch.zeros(3), agent.reset(3))
    assert action.shape == (3, 2) and action.isfinite().all()


def test_no_encoder_is_td3bc(tiny):
    """An update of `--encoder none` is TD3+BC's, written out."""
    agent = Bamba(tiny(encoder="none", action_noise=0.0, drop_p=0.0), SPEC).train()
    b = WindowSampler(WALK, 1, "cpu", 0).sample(16)
    s, s2 = agent.obs_normalizer(b.states[:, -1]), agent.obs_normalizer(b.next_states[:, -1])
    with torch.no_grad():
        low, high = torch.tensor(SPEC.low), torch.tensor(SPEC.high)
        bound = lambda x: (high + low) / 2 + (high - low) / 2 * x.tanh()  # noqa: E731
        target = b.reward + 0.99 * b.not_done * agent.target_critic(s2, bound(agent.target_actor(s2))).min(0).values
        q = agent.critic(s, b.action)
        pi = bound(agent.actor(s))
        q_pi = agent.critic(s, pi)[0]
        wanted = (q - target).square().mean(1).sum() - 2.5 / q_pi.abs().mean() * q_pi.mean()
        wanted = wanted + (pi - b.action).square().mean()
    loss, _ = agent.losses(b, (True, False), agent.draw_noise(b))
    torch.testing.assert_close(loss.detach(), wanted)


def test_rebracs_target_is_penalised_where_the_data_go_on(tiny):
    plain, rebrac = (
        Bamba(tiny(encoder="none", action_noise=0.0, objective=o, beta_critic=0.5), SPEC) for o in ("td3bc", "rebrac")
    )
    rebrac.load_state_dict(plain.state_dict())
    b = WindowSampler(WALK, 1, "cpu", 0).at(torch.arange(60))
    rows = plain.window_rows(b, plain.draw_noise(b))
    off = plain.target(rows, torch.zeros(60, 2)) - rebrac.target(rows, torch.zeros(60, 2))
    distance = (plain.policy(rows.next_z, plain.target_actor) - b.next_action).square().sum(-1)
    torch.testing.assert_close(off, 0.99 * b.not_done * b.has_next * 0.5 * distance)
    assert (off[[19, 22, 59]] == 0).all()


def test_pretraining_fits_returns_and_clones(tiny):
    agent = Bamba(tiny(encoder="none", critic_pretrain=300, learning_rate=3e-3, grad_clip=10.0), SPEC).train()
    sampler = WindowSampler(WALK, 1, "cpu", 0, gamma=0.9)
    agent.fit_normalizer(sampler)
    first = agent.update(sampler.sample(60))
    for _ in range(299):
        last = agent.update(sampler.sample(60))
    assert last["loss/critic"] < first["loss/critic"] / 5
    assert "actor/q_pi" not in first and "actor/q_pi" in agent.update(sampler.sample(60))


def test_q_counts_by_what_it_explains(tiny):
    agent = Bamba(tiny(encoder="none", trust="explained"), SPEC).train()
    sampler = WindowSampler(WALK, 1, "cpu", 0, gamma=0.9)
    metrics = agent.update(sampler.sample(32))
    assert metrics["actor/lmbda"] == 0 or metrics["critic/explained"] > 0  # an untrained Q explains nothing
    agent.q_weight.fill_(0.5)
    believing = agent.update(sampler.sample(32)) and agent.update(sampler.sample(32))
    assert 0 < believing["critic/q_weight"] <= 0.51 and believing["actor/lmbda"] > 0


def test_a_running_mean_acts(tiny):
    agent = Bamba(tiny(eval_ema=0.5, policy_freq=1, learning_rate=0.1, warmup_steps=0), SPEC).train()
    born = agent.actor[-1].weight.clone()
    agent.update(batch_of())
    torch.testing.assert_close(agent.mean_actor.net[-1].weight, (born + agent.actor[-1].weight) / 2)
    state, memory = torch.randn(2, 4), agent.reset(2)
    acted, _ = agent.act(state, torch.zeros(2), memory)
    own, _ = agent.forward_window(agent.window(agent.observe_state(state, torch.zeros(2), memory)))
    assert not torch.allclose(acted, own)


def test_cosine_ends_at_nothing(tiny):
    agent = Bamba(tiny(lr_schedule="cosine", num_epochs=2, updates_per_epoch=5, warmup_steps=0), SPEC).train()
    rates = []
    for _ in range(10):
        agent.update(batch_of())
        rates.append(agent.optimizer.param_groups[0]["lr"].item())
    assert rates[0] == pytest.approx(3e-4) and rates[5] == pytest.approx(1.5e-4) and rates[-1] < 2e-5
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"objective": "bc", "critic_pretrain": 5}, "no critic"),
        ({"objective": "iql", "trust": "explained"}, "--trust"),
        ({"encoder": "none", "target_encoder": "ema"}, "--target_encoder"),
    ],
)
def test_what_does_not_go_together_is_refused(tiny, changes, words):
    with pytest.raises(ValueError, match=words):
        Bamba(tiny(**changes), SPEC)


def test_metrics_are_detached_scalars_with_grouped_names(tiny):
    agent = Bamba(tiny(), SPEC).train()
    with_actor, without = agent.update(batch_of()), agent.update(batch_of())
    for metrics in (with_actor, without):
        assert all(v.shape == () and not v.requires_grad and "/" in k for k, v in metrics.items())
    assert set(with_actor) - set(without) == {"actor/loss", "actor/bc_loss", "actor/q_pi", "actor/lmbda"}


def test_state_dict_is_whole_at_birth(tiny):
    agent = Bamba(tiny(target_encoder="ema"), SPEC).train()
    keys = set(agent.state_dict())
    agent.update(batch_of())
    agent.act(torch.randn(1, 4), torch.zeros(1), agent.reset(1))
    assert set(agent.state_dict()) == keys
    assert {k.split(".")[0] for k in keys} >= {
        "target_actor",
        "target_critic",
        "target_encoder",
        "next_state",
        "reward",
        "obs_normalizer",
    }


def test_overfits_one_batch(tiny):
    agent = Bamba(tiny(alpha=0.0, drop_p=0.0, learning_rate=3e-3, policy_freq=1), SPEC).train()
    batch = batch_of()
    first = agent.update(batch)
    for _ in range(300):
        last = agent.update(batch)
    for key in ("actor/bc_loss", "loss/state", "loss/reward"):
        assert last[key] < first[key] / 10, key


class LikesMore(torch.nn.Module):
    """A critic to whom every action is better the larger it is."""

    def forward(self, x, action):
        return action.sum(-1).expand(2, -1) + 5


@pytest.mark.parametrize("alpha, goal", [(0.0, (0.0, -1.0)), (50.0, SPEC.high)])
def test_q_off_is_cloning_and_q_on_climbs(tiny, alpha, goal):
    agent = Bamba(tiny(alpha=alpha, drop_p=0.0), SPEC).train()
    agent.critic = agent.target_critic = LikesMore()
    optimizer = torch.optim.Adam([*agent.encoder.parameters(), *agent.actor.parameters()], lr=3e-3)
    batch = batch_of(64)
    batch = batch._replace(action=torch.tensor([0.0, -1.0]).expand(64, 2))
    for _ in range(150):
        optimizer.zero_grad()
        agent.losses(batch, (True, False), agent.draw_noise(batch))[0].backward()
        optimizer.step()
    mean = agent.policy(agent.encoder(agent.obs_normalizer(batch.states))).mean(0)
    assert (mean - torch.tensor(goal)).abs().max() < 0.1


def test_bf16_is_near_fp32(tiny):
    agent = Bamba(tiny(drop_p=0.0, action_noise=0.0), SPEC).train()
    twin = Bamba(replace(agent.cfg, precision="bf16"), SPEC).train()
    twin.load_state_dict(agent.state_dict())
    a, b = agent.update(batch_of()), twin.update(batch_of())
    for key in ("loss/critic", "loss/state", "actor/bc_loss"):
        torch.testing.assert_close(a[key], b[key], rtol=3e-2, atol=1e-3)
    assert all(p.dtype == torch.float32 for p in twin.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_equals_eager(tiny):
    agent = Bamba(tiny(drop_p=0.0, action_noise=0.0, n_layers=1), SPEC).train()
    twin = Bamba(replace(agent.cfg, compile=True), SPEC).train()
    twin.load_state_dict(agent.state_dict())
    for seed in range(2):
        a, b = agent.update(copy.deepcopy(batch_of(seed=seed))), twin.update(batch_of(seed=seed))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4, msg=key)


def test_without_an_encoder_a_running_mean_has_nothing_to_follow(tiny):
    agent = Bamba(tiny(encoder="none", eval_ema=0.5), SPEC).train()
    for _ in range(3):
        assert all(v.isfinite().all() for v in agent.update(batch_of()).values())


def test_a_run_that_is_all_pre_training_says_so(tiny):
    short = tiny(critic_pretrain=10, num_epochs=2, updates_per_epoch=5)
    assert "all 10 updates are pre-training" in Bamba(short, SPEC).describe()
    longer = tiny(critic_pretrain=10, num_epochs=2, updates_per_epoch=6)
    assert "pre-training" not in Bamba(longer, SPEC).describe() and "mamba: PyTorch" in Bamba(longer, SPEC).describe()
    assert "no encoder" in Bamba(tiny(encoder="none"), SPEC).describe()
