"""OPSO: golden numbers, losses on chains that can be solved by hand, histories, two phases, and the doors."""

import itertools
import json
import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import starting, write_npz
from torch.utils import _pytree as pytree

import offline_trainer
import online_trainer
import trainer
import utils
from common import logger
from common.checkpoint import load, save, write
from common.interface import EnvSpec
from common.optim import td_target
from common.rollout import Step
from common.stacked import StackedAgents
from config import PRESETS, OPSOConfig, OPSOOnlineConfig
from ogbench_utils import read_npz
from ogbench_utils.goal_dataset import Goals, OfflineGoalDataset
from opso import Opso
from opso.agent import value_at_distance
from opso.losses import cosine_step, expectile, info_nce, success_loss, update_pos_weight
from opso.online_agent import OpsoOnline, inherit_sizes, schedule

SPEC = EnvSpec(2, 2, (-1.0, -1.0), (1.0, 1.0))
TINY = dict(d_model=16, headdim=8, d_state=4, n_layers=1, hidden_dim=16, context_length=4, proposal_steps=3)
TINY |= dict(batch_size=4, nce_bank=8, warmup_steps=2, dataset="walk.npz", env="pointmaze-medium-navigate-v0")


def tiny(**changes) -> OPSOConfig:
    return OPSOConfig(**{**TINY, **changes})


def sampler(path, cfg, seed=0, **more) -> OfflineGoalDataset:
    episodes = read_npz(path, "pointmaze-medium-navigate-v0").episodes
    goals = Goals(cfg.goal_current, cfg.goal_trajectory, 1.0, cfg.policy_near, cfg.gamma, 1.0)
    return OfflineGoalDataset(episodes, cfg.context_length, cfg.proposal_steps, goals, "cpu", seed, **more)


def count(net) -> int:
    return sum(p.numel() for p in net.parameters())


# -- golden numbers ------------------------------------------------------------------------------


def test_sizes_are_the_published_ones():
    cfg = OPSOConfig(**{**PRESETS["opso"]["upstream"], "nce_bank": 1})
    agent = Opso(cfg, EnvSpec(29, 8, (-1.0,) * 8, (1.0,) * 8))
    assert count(agent.encoder) == 234_521 and count(agent.q) == 329_218 and count(agent.v) == 131_841
    assert count(agent.predict) == 65_920 and count(agent.inverse) == 166_408


def test_an_under_estimate_costs_tau_and_an_over_estimate_the_rest():
    one, zero = torch.ones(1), torch.zeros(1)
    assert expectile(one, zero, 0.9).item() == pytest.approx(0.9)
    assert expectile(zero, one, 0.9).item() == pytest.approx(0.1)
    targets = torch.tensor([0.0, 1, 2, 10])
    grid = torch.linspace(0, 10, 20_001)
    best = lambda tau: grid[expectile(targets[:, None], grid[None], tau).sum(0).argmin()].item()  # noqa: E731
    assert best(0.9) == pytest.approx(7.75, abs=1e-3) and best(0.5) == pytest.approx(3.25, abs=1e-3)
    assert best(0.1) == pytest.approx(1.05, abs=0.01)  # what the published sign learns


def test_alignment_contrast_balance_and_focus():
    loss, long = cosine_step(torch.zeros(1, 2), torch.tensor([[1.0, 0]]), torch.tensor([[1.0, 1]]))
    assert loss.item() == pytest.approx(-math.sqrt(0.5)) and long.item() == 1
    assert cosine_step(torch.zeros(1, 2), torch.ones(1, 2), torch.zeros(1, 2))[1].item() == 0  # no way, no direction

    three, rows, one = torch.eye(3), torch.tensor([0, 100, 200]), torch.ones(3)
    cfg, empty = SimpleNamespace(nce_temperature=0.1), (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    assert info_nce(three, three, rows, rows, one, empty, cfg).item() == pytest.approx(9.0796e-5, rel=1e-3)
    bank = (three[:1], torch.tensor([5000]))
    assert info_nce(three, three, rows, rows, one, bank, cfg) > 0.2  # the same latent elsewhere is a wrong answer
    for near_or_empty in (torch.tensor([20]), torch.tensor([-1])):  # in time; not filled yet
        loss = info_nce(three[:1], three[:1], rows[:1], rows[:1], one[:1], (three[:1], near_or_empty), cfg)
        assert loss.item() == 0
    masked = info_nce(three, three, rows, rows, torch.tensor([1.0, 1, 0]), empty, cfg)
    assert masked.item() == pytest.approx(math.log(1 + math.exp(-10)), rel=1e-2)

    weight = torch.ones(())
    for positives, expected in ((2, 1.02), (0, 1.0198), (1, 1.079602)):
        weight = update_pos_weight(weight, (torch.arange(8) < positives).float(), torch.ones(8))
        assert weight.item() == pytest.approx(expected, abs=1e-6)
    focal = SimpleNamespace(focal=True, focal_alpha=0.25, focal_gamma=2.0)
    assert success_loss(torch.zeros(1), torch.ones(1), weight, focal).item() == pytest.approx(0.0433217, abs=1e-6)


def test_schedules_fall_and_stay():
    epsilon = [schedule(0.30, 0.05, i, 200) for i in (0, 50, 100, 199, 200, 300)]
    assert epsilon == pytest.approx([0.30, 0.2375, 0.175, 0.05125, 0.05, 0.05])
    assert [schedule(0.20, 0.05, i, 200) for i in (0, 100, 200)] == pytest.approx([0.20, 0.125, 0.05])


# -- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reward", ["neg", "zero_one"])
def test_values_of_a_chain_are_its_discounted_distances(reward):
    """Six states in a row, tables for Q and V, steps either way: V is the value of the shortest way."""
    n, gamma = 6, 0.9
    s, a, g = (
        x.flatten() for x in torch.meshgrid(torch.arange(n), torch.tensor([-1, 1]), torch.arange(n), indexing="ij")
    )
    after = (s + a).clamp(0, n - 1)
    success = (after == g).float()
    q, v = torch.zeros(n, n, n), torch.zeros(n, n, requires_grad=True)
    descent = torch.optim.Adam([v], 0.1 if reward == "neg" else 0.01)
    for i in range(1600):
        if i == 1000:
            descent.param_groups[0]["lr"] /= 10
        paid = success - 1 if reward == "neg" else success
        with torch.no_grad():
            q[s, after, g] = td_target(paid, 1 - success, v[after, g], gamma)
        descent.zero_grad()
        expectile(q[s, after, g], v[s, g], 0.999).mean().backward()
        descent.step()
    steps = (torch.arange(n)[:, None] - torch.arange(n)).abs().float()
    expected = -(1 - gamma ** (steps - 1)) / (1 - gamma) if reward == "neg" else gamma ** (steps - 1)
    apart = steps > 0
    assert ((v - expected)[apart].abs() <= 0.02 * expected[apart].abs() + 0.01).all()


def test_what_is_masked_out_teaches_nothing(maze_file):
    """A segment behind an episode's end must change no gradient, whatever stands there."""
    agent = Opso(tiny(beta_a=0.1), SPEC)
    data = sampler(maze_file, agent.cfg)
    agent.fit_normalizer(data)
    b = starting(data, data.starts[data.starts + 1 == data.last[data.starts]][:4])  # one transition each, then nothing
    assert b.mask.sum() == 4

    def gradients(batch):
        agent.zero_grad()
        agent.pos_weight.fill_(1)  # a running mean: it would move from call to call
        torch.manual_seed(0)
        agent.losses(batch, None, agent.draw_noise(batch))[0].backward()
        return torch.cat([p.grad.flatten() for p in agent.parameters() if p.grad is not None])

    torch.manual_seed(1)
    junk = lambda x, keep: torch.where(keep, x, torch.randn_like(x) * 9)  # noqa: E731
    real = b.mask.bool()
    other = b._replace(
        states=junk(b.states, (torch.arange(b.states.shape[1]) < 2)[None, :, None]),
        actions=junk(b.actions, real[..., None]),
        value_goals=junk(b.value_goals, real[..., None]),
        policy_goals=junk(b.policy_goals, real[..., None]),
        success=torch.where(real, b.success, 1 - b.success),
    )
    torch.testing.assert_close(gradients(b), gradients(other), atol=1e-6, rtol=1e-5)


def test_who_learns_from_what(maze_file):
    """Slow copies get no gradient; actions reach inverse dynamics alone; unlabelled actions reach nobody."""
    agent = Opso(tiny(), SPEC)
    data = sampler(maze_file, agent.cfg)
    agent.fit_normalizer(data)
    b = data.sample(8)
    agent.losses(b, None, agent.draw_noise(b))[0].backward()
    assert all(
        p.grad is None for net in (agent.target_encoder, agent.target_q, agent.target_v) for p in net.parameters()
    )
    assert all(p.grad is not None for net in agent.critic_nets + agent.actor_nets for p in net.parameters())

    def grads(batch):
        agent.zero_grad()
        agent.pos_weight.fill_(1)  # a running mean: it would move from call to call
        torch.manual_seed(0)
        agent.losses(batch, None, agent.draw_noise(batch))[0].backward()
        return {k: p.grad.clone() for k, p in agent.named_parameters() if p.grad is not None}

    plain, turned = grads(b), grads(b._replace(actions=-b.actions))
    assert {k.split(".")[0] for k in plain if not torch.equal(plain[k], turned[k])} == {"inverse"}
    hidden = b._replace(has_actions=torch.zeros(8))
    assert all(g.abs().max() == 0 for k, g in grads(hidden).items() if k.startswith("inverse"))
    assert all(
        torch.equal(x, y) for x, y in zip(grads(hidden).values(), grads(hidden._replace(actions=-b.actions)).values())
    )


def test_a_leap_promises_no_more_than_the_way_was_worth(maze_file):
    """With V = 0 everywhere, K steps along the data cost K discounted steps, fewer at the episode's end."""
    cfg = tiny(gamma=0.9)
    agent = Opso(cfg, SPEC)
    data = sampler(maze_file, cfg)
    b = starting(data, data.last.unique() - 2)  # two transitions before the ends
    agent.target_v.net.net[-1].weight.zero_()
    agent.target_v.net.net[-1].bias.zero_()
    n, t = len(b.mask), cfg.context_length
    slow = torch.randn(n, t + cfg.proposal_steps, cfg.d_model)
    worst = torch.full((n * t,), -1e9)
    leap = agent.n_step_value(b, slow, torch.randn(n * t, cfg.d_model), worst).view(n, t)
    assert leap[:, 0].tolist() == pytest.approx([-1.9] * n) and leap[:, 1].tolist() == pytest.approx([-1.0] * n)
    better = agent.n_step_value(b, slow, torch.randn(n * t, cfg.d_model), torch.full_like(worst, -0.5)).view(n, t)
    assert (better[b.mask.bool()] == -0.5).all()
    agent.target_v.net.net[-1].bias.fill_(-5.0)  # everything is far: what one step promises does not count
    far = agent.n_step_value(b, slow, torch.randn(n * t, cfg.d_model), torch.full_like(worst, -5.0)).view(n, t)
    assert far[:, 0].tolist() == pytest.approx([-1.9 - 0.81 * 5] * n)


def test_the_learning_rate_comes_to_rest_in_both_phases():
    agent = Opso(tiny(num_epochs=10, updates_per_epoch=10, lr_fall=0.5, learning_rate=1.0), SPEC)
    rates = []
    for agent.updates in (0, 50, 75, 99, 100, 500):
        rates.append(agent.lr_now())
    assert rates == pytest.approx([1, 1, 0.5, 0.02, 0, 0])
    assert Opso(tiny(lr_fall=0.0, learning_rate=1.0), SPEC).lr_now() == 1
    online = OpsoOnline(OPSOOnlineConfig(**TINY, env_steps=100, lr_fall=0.5, learning_rate=1.0), SPEC)
    online.updates, rates = 10**9, []  # phase 1's are among them
    for online.steps in (0, 50, 75, 100):
        rates.append(online.lr_now())
    assert rates == pytest.approx([1, 1, 0.5, 0])


def test_values_begin_far_from_every_goal():
    """From 0 the asymmetric loss would take most of a training to bring far goals down."""
    far, near = Opso(tiny(gamma=0.98), SPEC), Opso(tiny(reward="zero_one"), SPEC)
    z, goal = torch.randn(2, 50, 16)
    assert (far.v(z, goal) + 42.5).abs().max() < 3 and (far.target_q(z, goal, goal) + 42.5).abs().max() < 3
    assert near.v(z, goal).abs().max() < 3


def test_inverse_dynamics_learns_a_law(tmp_path):
    """s' = s + 0.2 a: from two latents of places, the action."""
    path = write_npz(tmp_path / "law.npz", [60] * 20)
    raw = dict(np.load(path))
    raw["observations"][:, :2] = 0.2 * np.cumsum(raw["actions"], 0) - 0.2 * raw["actions"]
    np.savez(path, **raw)
    cfg = tiny(
        proposal_steps=1, batch_size=32, beta_n=0.0, temperature=0.0, d_model=32, hidden_dim=64, learning_rate=3e-3
    )
    agent = Opso(cfg, SPEC)
    data = sampler(path, cfg)
    agent.fit_normalizer(data)
    errors = [agent.update(data.sample(32))["policy/action_error"].item() for _ in range(200)]
    assert np.mean(errors[:10]) > 0.3 and np.mean(errors[-20:]) < 0.1


# -- histories -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixer, pool, rope", [("mamba2", "last", False), ("mamba1", "last", False), ("mamba2", "attention", True)]
)
def test_acting_sees_the_histories_that_were_trained_on(maze_file, mixer, pool, rope):
    cfg = tiny(mixer=mixer, pool=pool, rope=rope, history=True)
    agent = Opso(cfg, SPEC).double().eval()
    data = sampler(maze_file, cfg)
    agent.fit_normalizer(data)
    agent.double()
    states = data.states[:13].double()
    memory = agent.reset(1, data.states[:1])
    trained = agent.latents(states[None, : cfg.context_length], agent.target_encoder)[0]
    for t in range(9):
        z, memory = agent.encode_step(states[t : t + 1], memory)
        begin = max(0, t + 1 - cfg.context_length)
        alone = agent.latents(states[None, begin : t + 1], agent.target_encoder)[0, -1]
        torch.testing.assert_close(z[0], alone)
        if t < cfg.context_length:
            torch.testing.assert_close(z[0], trained[t])
    other = states.clone()
    other[3:] = 7.0  # the future
    again = agent.latents(other[None, : cfg.context_length], agent.target_encoder)[0]
    torch.testing.assert_close(again[:3], trained[:3])


@pytest.mark.parametrize("history", [False, True])
def test_a_latent_is_of_one_state_unless_histories_are_asked_for(maze_file, history):
    """Then nothing that values, proposals or actions are made of knows the past, in training as in acting."""
    cfg = tiny(history=history)
    agent = Opso(cfg, SPEC).eval()
    agent.fit_normalizer(sampler(maze_file, cfg))
    states, other = torch.randn(3, cfg.context_length, 2), torch.randn(3, cfg.context_length, 2)
    other[:, -1] = states[:, -1]
    one, two = (agent.latents(x, agent.target_encoder)[:, -1] for x in (states, other))
    assert torch.allclose(one, two) != history
    goal, acted = agent.reset(3, states[:, -1]).goal, []
    assert torch.allclose(one, goal) != history  # goals are single states
    for way in (states, other):
        memory = agent.reset(3, states[:, 0])
        for t in range(cfg.context_length):
            action, memory = agent.act(way[:, t], None, memory)
        acted.append(action)
    assert torch.allclose(*acted) != history


def test_acting_is_a_function_of_what_was_seen_and_rows_do_not_mix(maze_file):
    for cfg in (tiny(drop_p=0.5), tiny(select="q", proposal_steps=1), tiny(proposer="none")):
        agent = Opso(cfg, SPEC).eval()
        agent.fit_normalizer(sampler(maze_file, cfg))
        goal, state = torch.randn(3, 2), torch.randn(3, 2)
        together, _ = agent.act(state, None, agent.reset(3, goal))
        again, _ = agent.act(state, None, agent.reset(3, goal))
        alone = torch.cat([agent.act(state[i : i + 1], None, agent.reset(1, goal[i : i + 1]))[0] for i in range(3)])
        assert torch.equal(together, again) and together.abs().max() <= 1
        torch.testing.assert_close(together, alone)
    with pytest.raises(ValueError, match="must be told a goal"):
        agent.reset(2)


def test_selection_takes_the_candidate_that_q_likes_best(maze_file):
    agent = Opso(tiny(select="q", proposal_steps=1), SPEC).eval()
    z, goal = torch.randn(5, 16), torch.randn(5, 16)
    best = agent.subgoal(z, goal)
    agent.cfg = replace(agent.cfg, select="proposer")
    plain = agent.subgoal(z, goal)
    score = lambda x: agent.target_q(z, x, goal).amin(0)  # noqa: E731
    assert (score(best) >= score(plain)).all() and (score(best) >= score(goal)).all() and (best != plain).any()


@pytest.mark.parametrize("reward", ["neg", "zero_one"])
def test_a_goal_within_reach_is_moved_to_and_a_far_one_by_way_of_the_proposal(reward):
    agent = Opso(tiny(reward=reward, proposal_steps=3), SPEC).eval()
    step = lambda left: {"neg": float(left == 1) - 1, "zero_one": float(left == 1)}[reward]  # noqa: E731
    value = lambda left: sum(0.99**i * step(left - i) for i in range(left))  # noqa: E731  of a goal so many steps away
    for left in range(1, 6):
        assert value_at_distance(left, agent.cfg) == pytest.approx(value(left))
    z, goal = torch.randn(5, 16), torch.randn(5, 16)
    agent.target_v.forward = lambda *_: torch.tensor([[value(n) + 1e-4] for n in (1, 2, 3, 4, 50)])
    near, subgoal, proposed = (
        torch.tensor([[1], [1], [1], [0], [0]]) > 0,
        agent.subgoal(z, goal),
        agent.propose(z, goal),
    )
    assert torch.equal(subgoal, torch.where(near, goal, proposed))
    agent.cfg = replace(agent.cfg, goal_in_reach=False)
    assert torch.equal(agent.subgoal(z, goal), proposed)


def test_inverse_dynamics_follows_the_proposal_and_not_the_goal():
    z, subgoal, *goals = torch.randn(4, 5, 16)
    for asked in (False, True):
        agent = Opso(tiny(inverse_goal=asked), SPEC)
        one, other = (agent.action(z, subgoal, goal) for goal in goals)
        assert torch.equal(one, other) != asked


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"select": "q"}, "Q values one-step moves"),
        ({"lambda_q": 0.1}, "Q values one-step moves"),
        ({"context_length": 0}, "take at least 1"),
        ({"goal_current": 0.8}, "more than all goals"),
        ({"gamma": 1.0}, "take less than 1"),
    ],
)
def test_settings_that_cannot_be(changes, words):
    with pytest.raises(ValueError, match=words):
        Opso(tiny(**changes), SPEC)


def test_shares_are_shares():
    for wrong in ({"inverse_fraction": 1.5}, {"expectile": -0.1}, {"proposal_steps": 0}, {"policy_trajectory": 2.0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} = .* is out of range"):
            tiny(**wrong)


def test_checkpoints_from_before_a_flag_act_as_they_did(tmp_path):
    agent = Opso(tiny(inverse_goal=True, goal_in_reach=False), SPEC).eval()
    save(tmp_path / "old.pt", agent, {})
    part = torch.load(tmp_path / "old.pt", weights_only=True)
    del part["config"]["inverse_goal"], part["config"]["goal_in_reach"]
    write(tmp_path / "old.pt", part)
    woken = load(tmp_path / "old.pt")[0].eval()
    state, goal = torch.randn(2, 5, 2)
    for one in (agent, woken):
        one.target_v.forward = lambda *_: torch.zeros(5, 1)  # every goal is within reach
    acted = [one.act(state, None, one.reset(5, goal))[0] for one in (agent, woken)]
    assert torch.equal(*acted) and woken.cfg.inverse_goal and not woken.cfg.goal_in_reach
    assert inherit_sizes(OPSOOnlineConfig(dataset="walk.npz", env=agent.cfg.env), part).inverse_goal


# -- phase 2 -------------------------------------------------------------------------------------


def online(path, **changes) -> OpsoOnline:
    given = {**TINY, "dataset": str(path), "buffer_size": 200, "learn_start": 1, "train_every": 2, **changes}
    agent = OpsoOnline(OPSOOnlineConfig(**given), SPEC)
    agent.init_buffer(2, 0)
    return agent


def live(agent, steps: int) -> list:
    """A point that moves as told, in episodes of 10 steps; the batches it learned from."""
    place, memory, batches = torch.zeros(2, 2), agent.reset(2, torch.ones(2, 2)), []
    for t in range(steps):
        action, memory = agent.act(place, None, memory, explore=True)
        cut = torch.full((2,), t % 10 == 9)
        agent.observe(Step(place, action, torch.zeros(2), place + 0.2 * action, cut & False, cut))
        place = place + 0.2 * action
        if cut.any():
            place = torch.zeros(2, 2)
            memory = agent.reset_where(memory, cut, torch.ones(2, 2))
        for batch in agent.minibatches():
            batches.append(batch)
            agent.update(batch)
    return batches


def test_the_second_phase_learns_from_its_own_steps_around_a_frozen_encoder(maze_file):
    agent = online(maze_file, offline_share=0.5, sigma_end=0.0, eps_end=0.0, schedule_episodes=10)
    before = {k: v.clone() for k, v in agent.state_dict().items()}
    batches = live(agent, 60)
    after = agent.state_dict()
    moved = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert (
        not moved & {"encoder", "target_encoder", "obs_normalizer"}
        and {"inverse", "propose", "q", "v", "target_q"} <= moved
    )
    assert len(batches) == agent.updates > 20 and agent.steps == 120 and agent.buffer.own.episodes == 12
    assert all(len(b.mask) == 4 and b.has_actions.sum() == 4 for b in batches)  # f = 1: all of them are labelled
    step = batches[-1].states[:2, 1] - batches[-1].states[:2, 0]  # own ones come first
    torch.testing.assert_close(step, 0.2 * batches[-1].actions[:2, 0])
    row = agent.schedule_metrics()
    assert row["explore/epsilon"] == 0 == row["explore/sigma"] and 0 < row["explore/goal_biased"] < 0.5


def test_without_actions_it_begins_at_random_and_labels_are_its_own_alone(maze_file):
    agent = online(maze_file, inverse_data="online", random_steps=1000)
    batches = live(agent, 30)
    assert all(b.has_actions.tolist() == [1, 1, 0, 0] for b in batches)
    actions = torch.cat([b.actions[:2, 0] for b in batches])
    assert actions.abs().max() > 0.8 and abs(actions.mean()) < 0.2 and 0.4 < actions.std() < 0.75  # uniform


def test_noise_and_detours_really_fade(maze_file):
    agent = online(maze_file, schedule_episodes=20)
    began = agent.exploration()
    live(agent, 50)
    assert began == (0.30, 0.20) and agent.exploration() == pytest.approx((0.175, 0.125))
    calm, memory = agent.act(torch.zeros(2, 2), None, agent.reset(2, torch.ones(2, 2)))
    assert torch.equal(calm, agent.act(torch.zeros(2, 2), None, agent.reset(2, torch.ones(2, 2)))[0])


def test_the_second_phase_takes_the_sizes_of_the_first():
    part = {"system": "opso", "config": {**vars(tiny(d_model=32, inverse_fraction=0.5))}}
    cfg = inherit_sizes(OPSOOnlineConfig(dataset="walk.npz", env=TINY["env"], max_episodes=3), part)
    assert (cfg.d_model, cfg.inverse_fraction, cfg.env_steps) == (32, 0.5, 3000)
    with pytest.raises(ValueError, match="--d_model 64 contradicts --init, which has 32"):
        inherit_sizes(OPSOOnlineConfig(d_model=64, dataset="walk.npz", env=TINY["env"]), part)
    with pytest.raises(ValueError, match="another maze"):
        inherit_sizes(OPSOOnlineConfig(), part)
    with pytest.raises(ValueError, match="holds a 'bamba'"):
        inherit_sizes(OPSOOnlineConfig(), {**part, "system": "bamba"})


# -- through the doors ---------------------------------------------------------------------------


class Field:
    """A plain in place of OGBench's maze: 20 steps to get within 1 of a goal that the seed names."""

    spec = None

    def __init__(self, width: int, actions: int):
        self.width, self.actions = width, actions

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        self.place, self.t = np.zeros(self.width), 0
        self.goal = np.zeros(self.width)
        self.goal[:2] = rng.uniform(-3, 3, 2)
        return self.place.copy(), {"goal": self.goal}

    def step(self, action):
        assert action.shape == (self.actions,) and action.dtype == np.float32
        self.place[:2] += 0.2 * action[:2]
        self.t += 1
        there = bool(np.linalg.norm((self.place - self.goal)[:2]) <= 1)
        return self.place.copy(), float(there), there, self.t == 20 and not there, {"success": float(there)}

    def close(self):
        pass


@pytest.fixture
def field(monkeypatch):
    from ogbench_utils import DATASETS
    from ogbench_utils.names import DIMS

    assert "antmaze-medium-navigate-v0" in DATASETS
    make = lambda environment, task, mode: Field(*DIMS[environment.split("-")[0]])  # noqa: E731
    monkeypatch.setattr("ogbench_utils.make_task", make)


SMALL_RUN = {k: v for k, v in TINY.items() if k not in ("dataset", "env")} | dict(threads=1, device="cpu")


def words(**given) -> list[str]:
    return ["--no_tensorboard", *(f"--{k}={v}" for k, v in given.items())]


def only(folder, agent: str):
    [found] = [p for p in folder.iterdir() if p.is_dir() and f"-{agent}-" in p.name]
    return found


@pytest.mark.slow
def test_the_users_commands_on_a_file_in_antmazes_layout(tmp_path, field, capsys, monkeypatch):
    """offline_trainer, utils, online_trainer, utils, as the README has them; stopped and resumed to the bit."""
    name = "antmaze-medium-navigate-v0"
    (tmp_path / "data").mkdir()
    write_npz(tmp_path / "data" / f"{name}.npz", [30] * 8, 29, 8)
    given = dict(dataset=name, dataset_dir=tmp_path / "data", **SMALL_RUN, num_eval_episodes=1)
    first = words(**given, max_trajectories=5, num_epochs=2, updates_per_epoch=6, eval_freq=1, inverse_fraction=0.6)
    assert offline_trainer.main([*first, f"--output_dir={tmp_path / 'out'}"]) == 0
    folder = only(tmp_path / "out", "opso")
    part, said = utils.read_checkpoint(folder), capsys.readouterr().out
    assert part["updates"] == 12 and part["run"]["data"]["episodes"] == 5 and part["run"]["data"]["source"] == "ogbench"
    assert "f = 0.6" in said and "success rate" in said and (folder / "training_curves.png").stat().st_size > 10_000
    rows = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    keys = set().union(*rows)
    assert {f"loss/{k}" for k in ("critic", "value", "state", "reward", "nce", "propose", "inverse")} <= keys
    assert {f"eval/task{i}" for i in range(1, 6)} | {"eval/success", "eval/score"} <= keys
    assert "behavior_score" not in keys

    update = Opso.update

    def told(self, batch):
        if self.updates == 8:
            signal.raise_signal(signal.SIGTERM)
        return update(self, batch)

    monkeypatch.setattr(Opso, "update", told)
    assert offline_trainer.main([*first, f"--output_dir={tmp_path / 'rough'}"]) == 128 + signal.SIGTERM
    monkeypatch.setattr(Opso, "update", update)
    assert trainer.main(["--resume", str(only(tmp_path / "rough", "opso"))]) == 0
    same(part, utils.read_checkpoint(only(tmp_path / "rough", "opso")))

    capsys.readouterr()
    record = tmp_path / "score.json"
    argv = ["--checkpoint", str(tmp_path / "out" / "best_checkpoint.pt"), "--episodes", "2", "--device", "cpu"]
    utils.main([*argv, "--json", str(record), "--env", name])
    said = capsys.readouterr().out
    found = json.loads(record.read_text())
    assert "tasks   task1" in said and "f = 0.6" in said and "success rate" in said
    assert list(found["tasks"]) == [f"task{i}" for i in range(1, 6)] and len(found["returns"]) == 10
    assert found["eval/score"] == pytest.approx(100 * np.mean(found["returns"]))
    with pytest.raises(SystemExit):
        utils.main([*argv, "--env", "antmaze-large-navigate-v0"])

    given |= dict(env_steps=120, learn_start=20, train_every=10, log_every=40, save_every=0, num_final_episodes=1)
    for key in ("d_model", "headdim", "context_length"):
        given.pop(key)  # the first phase knows
    second = words(**given, output_dir=tmp_path / "out", eval_every=60, num_envs=2)
    assert online_trainer.main(second) == 0
    folder = only(tmp_path / "out", "opso_online")
    part, said = utils.read_checkpoint(folder), capsys.readouterr().out
    assert part["steps"] == 120 and 0 < part["updates"] <= 11 and part["run"]["data"]["before"]["name"] == name
    assert f"goes on from {only(tmp_path / 'out', 'opso') / 'best_checkpoint.pt'}, " in said
    assert (folder / "online_training_curves.png").stat().st_size > 10_000 and "success rate" in said
    keys = set().union(*(json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()))
    assert {"episode/return", "explore/epsilon", "explore/sigma", "explore/goal_biased"} <= keys
    utils.main(["--checkpoint", str(folder), "--episodes", "1", "--device", "cpu"])
    assert "after   antmaze-medium-navigate-v0" in capsys.readouterr().out

    began = OpsoOnline.update

    def told_too(self, batch):
        if self.updates == 3:
            signal.raise_signal(signal.SIGTERM)
        return began(self, batch)

    init = f"--init={only(tmp_path / 'out', 'opso')}/best_checkpoint.pt"
    monkeypatch.setattr(OpsoOnline, "update", told_too)
    assert online_trainer.main([*second, init, f"--output_dir={tmp_path / 'rough2'}"]) == 128 + signal.SIGTERM
    monkeypatch.setattr(OpsoOnline, "update", began)
    assert trainer.main(["--resume", str(only(tmp_path / "rough2", "opso_online"))]) == 0
    same(part, utils.read_checkpoint(only(tmp_path / "rough2", "opso_online")))


def same(one: dict, other: dict) -> None:
    """The same weights, optimisers, random streams and experience, to the bit."""
    for key in ("agent", "optimizer", "run"):
        pairs = itertools.zip_longest(*(pytree.tree_leaves(part[key]) for part in (one, other)))
        for a, b in pairs:
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b, key


def test_without_a_first_phase_the_second_says_what_to_do(tmp_path, capsys):
    with pytest.raises(SystemExit):
        online_trainer.main(["--dataset", "antmaze-medium-navigate-v0", "--output_dir", str(tmp_path)])
    assert "run python offline_trainer.py --dataset antmaze-medium-navigate-v0 first" in capsys.readouterr().err


def test_losses_fall_on_a_few_segments(maze_file):
    agent = Opso(tiny(learning_rate=3e-3, gamma=0.9), SPEC)
    data = sampler(maze_file, agent.cfg)
    agent.fit_normalizer(data)
    batch = data.sample(4)
    seen = [agent.update(batch) for _ in range(60)]
    for key in ("loss/critic", "loss/propose", "loss/inverse", "loss/reward"):
        assert seen[-1][key] < 0.7 * seen[0][key], key
    assert all(torch.isfinite(v) for m in seen for v in m.values())
    assert (agent.bank_rows >= 0).all() and agent.bank_at == 60 * 4 % 8
    torch.testing.assert_close(agent.bank.norm(dim=1), torch.ones(8))


def test_evaluation_plays_every_task_and_asks_for_its_goal(maze_file):
    cfg = tiny()
    agent = Opso(cfg, SPEC)
    agent.fit_normalizer(sampler(maze_file, cfg))
    asked = []
    make = lambda mode, task: asked.append(task) or Field(2, 2)  # noqa: E731
    outcome = lambda info, reward: {"success": info["success"]}  # noqa: E731
    result = utils.evaluate(agent, make, 3, 5, outcome=outcome, tasks=("a", "b"))
    assert asked == ["a"] * 3 + ["b"] * 3 and len(result.returns) == 6 and list(result.tasks) == ["a", "b"]
    assert np.array_equal(result.returns, result.outcomes["success"])
    alone = utils.evaluate(agent, make, 1, 6, outcome=outcome, tasks=("a",))  # episode 1 of either task
    assert alone.lengths[0] == result.lengths[1] == result.lengths[4]
    row = utils.summary(result, lambda mean: 100 * mean)
    assert row["eval/score"] == pytest.approx((row["eval/a"] + row["eval/b"]) / 2)


# -- several seeds at once -----------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"beta_a": 0.1, "proposer": "none"}, {"nce_bank": 0, "head_norm": True}])
def test_stacked_seeds_are_separate_runs(maze_file, changes):
    """With buffers that updates write: InfoNCE's bank, and the weight of reached goals."""

    def alone(seed):
        torch.manual_seed(seed)
        agent = Opso(tiny(**changes), SPEC)
        data = sampler(maze_file, agent.cfg, seed)
        agent.fit_normalizer(data)
        return agent.train(), data

    agents, datas = zip(*(alone(seed) for seed in range(3)))
    both = StackedAgents(list(agents), datas[0], [(seed, 10 + seed) for seed in range(3)], False, False)
    both.train()
    said = [{k: v.clone() for k, v in both.update().items()} for _ in range(12)]
    both.unstack()
    for seed, learned in enumerate(both.agents):
        agent, data = alone(seed)
        torch.manual_seed(10 + seed)
        for metrics in said:
            own = agent.update(data.sample(agent.cfg.batch_size))
            assert own.keys() == metrics.keys()
            for k, v in own.items():
                torch.testing.assert_close(metrics[k][seed], v, rtol=1e-4, atol=1e-5, msg=k)
        for k, v in agent.state_dict().items():
            torch.testing.assert_close(learned.state_dict()[k], v, rtol=1e-3, atol=1e-4, msg=k)
    assert not torch.equal(both.agents[0].pos_weight, both.agents[1].pos_weight)


@pytest.mark.slow
def test_seeds_of_a_run_are_trained_evaluated_and_resumed_together(tmp_path, capsys):
    name = "pointmaze-medium-navigate-v0"
    (tmp_path / "data").mkdir()
    write_npz(tmp_path / "data" / f"{name}.npz", [30] * 8)
    given = dict(dataset=name, dataset_dir=tmp_path / "data", **SMALL_RUN, num_eval_episodes=1)
    given |= dict(num_epochs=2, updates_per_epoch=4, eval_freq=2)
    argv = words(**given)
    assert trainer.main(["--agent", "opso", *argv, "--seed=4", f"--output_dir={tmp_path / 'alone'}"]) == 0
    together = ["--seed=3", "--num_seeds=2", f"--output_dir={tmp_path / 'out'}"]
    assert trainer.main(["--agent", "opso", *argv, *together]) == 0
    assert "mean of 2 seeds" in capsys.readouterr().out
    (alone,), group = (sorted((tmp_path / d).rglob("last_checkpoint.pt")) for d in ("alone", "out"))
    theirs, mine = utils.read_checkpoint(alone), utils.read_checkpoint(group[1])
    for k, v in theirs["agent"].items():
        torch.testing.assert_close(mine["agent"][k], v, rtol=1e-3, atol=1e-4, msg=k)
    rows = [[r for r in logger.read_log(f.parent / "log.jsonl") if "eval/score" in r] for f in (alone, group[1])]
    for a, b in zip(*rows, strict=True):
        assert a["eval/score"] == b["eval/score"] and a["eval/task3"] == b["eval/task3"]
    assert trainer.main(["--resume", str(group[0].parent.parent), "--num_epochs", "3"]) == 0
    assert utils.read_checkpoint(group[1])["updates"] == 12
    assert utils.main(["--checkpoint", str(group[0]), "--episodes", "1"]) == 0


@pytest.mark.parametrize("flag", ["--inverse_fraction=0.5", "--drop_p=0.1"])
def test_seeds_that_would_not_learn_from_the_same_are_refused(flag, maze_file, capsys):
    with pytest.raises(SystemExit):
        trainer.main(["--agent", "opso", "--num_seeds", "2", flag])
    assert "give each seed a run of its own" in capsys.readouterr().err
