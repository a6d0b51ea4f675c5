"""DQN on windows: sizes, schedules, targets, the last output of Mamba-1, what memory is for, and whole runs."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch.utils import _pytree as pytree

import gym_utils as discrete
import trainer
import utils
from common import logger
from common.interface import EnvSpec
from common.prioritized_replay import Sample
from common.rollout import Step
from common.vector_env import Envs
from config import ENV_DEFAULTS, DQNConfig, parse
from dqn import DQN, epsilon, per_beta_at
from gym_utils import make_discrete, open_discrete, to_gray84
from networks.last_step_mixers import MIXERS, Mamba, Transformer
from networks.mamba import Mamba1
from networks.selective_scan import selective_scan, selective_scan_last, selective_scan_loop

TINY = dict(d_model=16, embed_dim=16, d_state=4, ff_dim=16, context_length=3, batch_size=8, learn_start=8, device="cpu")
SPEC = EnvSpec(4, 2)
HIGHWAY = DQNConfig(env="highway-fast-v0", **ENV_DEFAULTS["dqn"]["highway-fast-v0"])
every = pytest.mark.parametrize("mixer", MIXERS)


def tiny(**changes) -> DQNConfig:
    return DQNConfig(**{**TINY, **changes})


def batch_of(b: int = 8, k: int = 3, s: int = 4, latent: int = 16, seed: int = 0, gamma: float = 0.99) -> Sample:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    flag = lambda: torch.randint(2, (b,), generator=g).float()  # noqa: E731
    action, slot = torch.randint(2, (b,), generator=g), torch.arange(b)
    return Sample(
        r(b, k, s),
        action,
        r(b),
        r(b, k, s),
        flag(),
        flag(),
        torch.ones(b),
        slot,
        r(b, latent),
        torch.ones(b),
        torch.full((b,), gamma),
    )


# -- sizes and schedules -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mixer, highway, lunar",
    [
        ("mamba", 168_965, 189_060),
        ("none", 40_197, 35_716),
        ("lstm", 172_293, 167_812),
        ("transformer", 173_701, 169_476),
    ],
)
def test_golden_parameter_counts(mixer, highway, lunar):
    count = lambda cfg, spec: sum(p.numel() for p in DQN(cfg, spec).net.parameters())  # noqa: E731
    assert count(replace(HIGHWAY, mixer=mixer), EnvSpec(25, 5)) == highway
    assert count(DQNConfig(mixer=mixer), EnvSpec(8, 4)) == lunar


def test_golden_schedules():
    wanted = {0: 1.0, 1: 0.99992929, 7000: 0.505, 14_000: 0.01, 20_000: 0.01}
    assert all(epsilon(HIGHWAY, t) == pytest.approx(e, abs=1e-8) for t, e in wanted.items())
    assert epsilon(DQNConfig(), 100_000) == pytest.approx(0.29285714, abs=1e-8)
    assert per_beta_at(HIGHWAY, 10_000) == pytest.approx(0.7) and per_beta_at(HIGHWAY, 10**6) == 1


def test_an_environment_brings_its_numbers_and_flags_win():
    cfg = parse(["--agent", "dqn", "--env", "highway-fast-v0", "--grad_clip", "0.5"])
    assert (cfg.context_length, cfg.gamma, cfg.target_every, cfg.grad_clip) == (8, 0.8, 50, 0.5)
    assert parse(["--agent", "dqn", "--env=CartPole-v1"]) == DQNConfig(env="CartPole-v1")


# -- the last output of Mamba-1 ------------------------------------------------------------------


@pytest.mark.parametrize("length, d_state", [(1, 4), (2, 16), (10, 64), (16, 4), (7, 16)])
def test_the_last_output_is_the_loops(length, d_state):
    """Values and all gradients; enough rows that more than one block is needed at the largest size."""
    rows, width = 7, 48
    x, dt = torch.randn(rows, length, width), torch.rand(rows, length, width) * 0.5
    B, C, A = torch.randn(rows, length, d_state), torch.randn(rows, length, d_state), -torch.rand(width, d_state) * 9
    parts = [t.double().requires_grad_() for t in (x, dt, A, B, C)]
    slow = selective_scan_loop(*parts)[:, -1]
    push = torch.randn_like(slow)
    every = dict(allow_unused=True, materialize_grads=True)  # of one token, A decides nothing
    wanted = torch.autograd.grad(slow, parts, push, **every)
    for kind, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        mine = [t.detach().to(kind).requires_grad_() for t in parts]
        fast = selective_scan_last(*mine[:4], mine[4][:, -1])
        got = torch.autograd.grad(fast, mine, push.to(kind), **every)
        for a, b in zip((fast, *got), (slow, *wanted), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * b.abs().max().item())


@pytest.mark.parametrize("scan", [selective_scan, selective_scan_last])
def test_an_exported_scan_is_the_same_in_operations_of_torch(scan):
    class Scan(torch.nn.Module):
        def forward(self, *inputs):
            return scan(*inputs)

    shapes = (3, 7, 4), (3, 7, 4), (4, 5), (3, 7, 5), (3, 5) if scan is selective_scan_last else (3, 7, 5)
    x, dt, A, B, C = (torch.randn(*shape) for shape in shapes)
    inputs = x, dt.abs(), -A.abs(), B, C
    program = torch.export.export(Scan(), inputs)
    assert not any("bamba" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(*inputs), scan(*inputs))


def test_the_last_outputs_gradient_is_its_derivative():
    x, dt, B, C = (torch.rand(*s).double().requires_grad_() for s in ((2, 3, 2), (2, 3, 2), (2, 3, 3), (2, 3)))
    A = (-torch.rand(2, 3).double() - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(selective_scan_last, (x, dt, A, B, C))


def test_the_mixer_is_mamba1_read_last_and_large_inputs_stay_finite():
    mixer, e = Mamba(DQNConfig(d_model=32, d_state=16)).double(), torch.randn(5, 10, 32).double()
    torch.testing.assert_close(mixer(e), Mamba1.forward(mixer, e)[:, -1], rtol=1e-12, atol=1e-12)
    e = (torch.randn(5, 10, 32) * 1e3).requires_grad_()
    y = mixer.float()(e)
    y.sum().backward()
    assert y.isfinite().all() and e.grad.isfinite().all()


@pytest.mark.parametrize(("kind", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_the_compiled_mixer_is_the_eager_one(kind, close):
    """Values and gradients of the form that the compiler is given; `aot_eager` compiles no code, so this is quick."""
    mixer, e = Mamba(DQNConfig(d_model=16, d_state=4)).to(kind), torch.randn(5, 6, 16, dtype=kind).requires_grad_()
    found = []
    for f in (mixer, torch.compile(mixer, fullgraph=True, dynamic=False, backend="aot_eager")):
        y = f(e)
        found.append((y, *torch.autograd.grad(y.square().sum(), [e, *mixer.parameters()])))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=close, atol=close * b.abs().max().item())


def test_one_layer_read_last_needs_no_causal_mask():
    mixer, e = Transformer(DQNConfig(context_length=6, d_model=32)).double(), torch.randn(3, 6, 32).double()
    mixer.pos_embedding.data.normal_()
    mask = torch.nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64)
    for how in ({}, {"src_mask": mask, "is_causal": True}):
        torch.testing.assert_close(mixer(e), mixer.layer(e + mixer.pos_embedding, **how)[:, -1], rtol=0, atol=1e-12)


# -- targets and updates -------------------------------------------------------------------------


def test_targets_by_hand():
    b = batch_of(gamma=0.5)._replace(terminated=torch.tensor([0.0, 0, 1, 1, 0, 0, 1, 1]))
    b = b._replace(truncated=torch.tensor([0.0, 1, 0, 1, 0, 1, 0, 1]))
    agent = DQN(tiny(mixer="none", gamma=0.5), SPEC)
    with torch.no_grad():
        agent.net.head.bias += torch.tensor([3.0, 0.0])  # the network and its target differ
    q = agent.target_net(b.next_states)[0]
    assert torch.allclose(agent.target(b), b.reward + 0.5 * (1 - b.terminated) * q.amax(1))
    agent.cfg = replace(agent.cfg, truncation="terminal")
    assert torch.allclose(agent.target(b), b.reward + 0.5 * (1 - b.terminated) * (1 - b.truncated) * q.amax(1))
    agent.cfg = replace(agent.cfg, truncation="bootstrap", double=True)
    chosen = agent.net(b.next_states)[0].argmax(1)
    assert torch.allclose(agent.target(b), b.reward + 0.5 * (1 - b.terminated) * q[torch.arange(8), chosen])


def test_the_loss_is_hubers_by_weight():
    agent = DQN(tiny(mixer="none", gamma=0.0), SPEC)
    b = batch_of(gamma=0.0)
    q = agent.net(b.states)[0].gather(1, b.action[:, None])[:, 0].detach()
    b = b._replace(
        reward=q + torch.tensor([0.5, 1, 3, -3, 0, 0, 0, 0]), weight=torch.tensor([1, 1, 1, 0.5, 1, 1, 1, 1])
    )
    loss, said = agent.losses(b, "none", None)
    assert loss.item() == pytest.approx((0.125 + 0.5 + 2.5 + 0.5 * 2.5) / 8, rel=1e-5)
    assert said["loss/td_unweighted"].item() == pytest.approx((0.125 + 0.5 + 2.5 + 2.5) / 8, rel=1e-5)


def test_a_dueling_head_is_a_value_and_advantages_of_mean_zero():
    net = DQN(tiny(mixer="none", dueling=True), SPEC).net
    q, z = net(batch_of().states)
    value, advantage = net.head.value(z), net.head.advantage(z)
    torch.testing.assert_close(q, value + advantage - advantage.mean(1, keepdim=True))
    torch.testing.assert_close(q.mean(1), value[:, 0])  # what the value alone says


def test_the_target_moves_by_tau_every_so_many_steps():
    agent = DQN(tiny(mixer="none", tau=0.25, target_every=3, learn_start=100, latent="off"), SPEC)
    agent.init_buffer(1, 0)
    before = [p.clone() for p in agent.target_net.net.parameters()]
    with torch.no_grad():
        for p in agent.net.parameters():
            p.add_(1.0)
    for step in range(1, 7):
        none = torch.zeros(1, dtype=torch.bool)
        agent.observe(
            Step(torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), torch.zeros(1), torch.zeros(1, 4), none, none)
        )
        list(agent.minibatches())
        moved = sum(0.25 * 0.75**i for i in range(step // 3))
        for old, now in zip(before, agent.target_net.net.parameters()):
            torch.testing.assert_close(now, old + moved)


def test_the_rate_falls_by_environment_steps():
    agent, rates = DQN(tiny(mixer="none", lr_fall=0.5, learning_rate=1.0, env_steps=100), SPEC), []
    for agent.steps in (0, 50, 75, 100):
        agent.begin_update()
        rates.append(float(agent.optimizer.param_groups[0]["lr"]))
    assert rates == [1.0, 1.0, 0.5, 0.0]


def test_a_running_mean_acts_in_evaluations_and_nowhere_else():
    agent = DQN(tiny(mixer="none", eval_ema=0.9, learning_rate=1e-2), SPEC)
    mean = [p.clone() for p in agent.net.parameters()]
    for _ in range(3):
        agent.update(batch_of())
        mean = [0.9 * m + 0.1 * p for m, p in zip(mean, agent.net.parameters())]
    for m, p in zip(mean, agent.mean_net.net.parameters()):
        torch.testing.assert_close(m, p)
    with torch.no_grad():  # the two disagree for certain
        agent.mean_net.net.head.bias.copy_(torch.tensor([1e3, 0.0]))
        agent.net.head.bias.copy_(torch.tensor([0.0, 1e3]))
    agent.cfg, state = replace(agent.cfg, eps_start=0.0, eps_end=0.0), torch.zeros(2, 4)
    assert agent.act(state, torch.zeros(2), agent.reset(2))[0].tolist() == [0, 0]
    assert agent.act(state, torch.zeros(2), agent.reset(2), explore=True)[0].tolist() == [1, 1]


def test_the_time_and_a_part_of_the_state_are_shown():
    env = open_discrete("CartPole-v1", cnn=False, time_feature=True, observe="positions")
    made, whole = env.make(), open_discrete("CartPole-v1", cnn=False).make()
    assert env.state == 3
    (shown, _), (state, _) = made.reset(seed=3), whole.reset(seed=3)
    for step in range(1, 4):
        np.testing.assert_allclose(shown, [state[0], state[2], (step - 1) / 500], rtol=1e-6)
        shown, state = made.step(1)[0], whole.step(1)[0]
    with pytest.raises(ValueError, match="has no time limit that --time_feature could show"):
        open_discrete("highway-fast-v0", cnn=False, time_feature=True)
    with pytest.raises(ValueError, match="known for .*LunarLander-v3, not for 'highway-fast-v0'"):
        open_discrete("highway-fast-v0", cnn=False, observe="positions")


@every
def test_without_a_future_q_is_the_reward(mixer):
    torch.manual_seed(0)
    agent, b = DQN(tiny(mixer=mixer, gamma=0.0, learning_rate=1e-2), SPEC), batch_of(gamma=0.0)
    losses = [agent.update(b)["loss/td"].item() for _ in range(200)]
    assert losses[-1] < losses[0] / 50


def feed(agent: DQN, steps: int, n: int = 1, seed: int = 0) -> None:
    """Act and learn in random numbers."""
    g, memory = torch.Generator().manual_seed(seed), agent.reset(n)
    state = torch.randn(n, 4, generator=g)
    for _ in range(steps):
        action, memory = agent.act(state, torch.zeros(n), memory, explore=True)
        after, over = torch.randn(n, 4, generator=g), torch.rand(2, n, generator=g) < 0.1
        agent.observe(Step(state, action, torch.randn(n, generator=g), after, *over))
        memory, state = agent.reset_where(memory, over.any(0)), after
        for batch in agent.minibatches():
            agent.update(batch)


@pytest.mark.parametrize("n", [1, 3])
def test_updates_and_copies_keep_their_cadence(n):
    """The ratio of updates to environment steps does not depend on the number of environments."""
    agent = DQN(tiny(mixer="none", learn_start=30, train_every=2, num_updates=3, target_every=45), SPEC)
    agent.init_buffer(n, 0)
    feed(agent, 90 // n - 1, n)
    before = [p.clone() for p in agent.target_net.net.parameters()]
    live = list(agent.net.parameters())
    assert agent.updates == 3 * ((90 - n) // 2 - 29 // 2) and not torch.equal(before[0], live[0])
    feed(agent, 1, n)
    assert all(torch.equal(a, b) for a, b in zip(agent.target_net.net.parameters(), live)) and agent.steps == 90


def test_the_uniform_loss_looks_at_all_alike_and_learns_nothing():
    agent = DQN(tiny(mixer="none", batch_size=64), SPEC)
    agent.init_buffer(2, 0)
    feed(agent, 9, 2)
    assert "loss/td_uniform" not in agent.schedule_metrics()  # nothing is learned yet
    agent.updates, net = 1, [p.clone() for p in agent.net.parameters()]
    agent.buffer.update_priorities(torch.arange(2), torch.full((2,), 1e6))  # as good as nothing else would be drawn
    slots = torch.arange(2)[:, None] * agent.buffer.slots_per_env + torch.arange(9)
    b = agent.buffer.get(slots.flatten(), torch.ones(18))
    each = torch.nn.functional.smooth_l1_loss(
        agent.net(b.states)[0].gather(1, b.action[:, None])[:, 0], agent.target(b), reduction="none"
    )
    mean = np.mean([agent.schedule_metrics()["loss/td_uniform"] for _ in range(60)])
    assert mean == pytest.approx(each.mean().item(), abs=5 * each.std().item() / 60)
    assert all(torch.equal(a, b) for a, b in zip(agent.net.parameters(), net))


@pytest.mark.parametrize("latent", ["store", "off", "refresh", "drift"])
def test_modes_of_the_stored_latents(latent):
    """Only `drift` changes what is learned; what is stored is what was computed when acting."""
    nets = {}
    for mode in ("off", latent):
        torch.manual_seed(0)
        agent = DQN(tiny(latent=mode, drift_coef=1.0, learning_rate=1e-2, learn_start=10), SPEC)
        agent.init_buffer(1, 0)
        feed(agent, 9)
        if mode != "off":
            b = agent.buffer.get(torch.arange(9), torch.ones(9))
            torch.testing.assert_close(b.latent, agent.net(b.states)[1].detach(), rtol=0, atol=1e-6)
        feed(agent, 20)
        nets[mode] = torch.cat([p.flatten() for p in agent.net.parameters()]).detach()
        said = agent.update(agent.buffer.sample(8, 1.0))
        assert ("latent/drift" in said) == (mode in ("refresh", "drift"))
    assert torch.equal(nets["off"], nets[latent]) == (latent != "drift")


def test_exploration_is_random_actions_in_its_share():
    agent = DQN(tiny(mixer="none", eps_start=0.5, eps_end=0.5), SPEC)
    state, memory = torch.randn(1, 4).expand(4000, 4), agent.reset(4000)
    greedy, _ = agent.act(state, torch.zeros(4000), memory)
    action, _ = agent.act(state, torch.zeros(4000), memory, explore=True)
    assert (greedy == greedy[0]).all() and abs((action != greedy).float().mean().item() - 0.25) < 0.04


@every
def test_what_memory_is_for(mixer):
    """A cue is shown in the first of four steps and asked for in the last: a window answers, one frame cannot."""
    torch.manual_seed(0)
    cfg = tiny(mixer=mixer, d_model=32, embed_dim=32, d_state=8, context_length=4, batch_size=64, gamma=0.9)
    agent = DQN(replace(cfg, learning_rate=1e-3, weight_decay=0.0, per_alpha=0.0, target_every=50), EnvSpec(2, 2))
    agent.init_buffer(500, 0)
    cue = torch.randint(2, (500,)) * 2.0 - 1
    frames = [torch.stack([cue * (k == 0), torch.full((500,), k / 3)], 1) for k in range(4)] + [torch.zeros(500, 2)]
    memory, none = agent.reset(500), torch.zeros(500, dtype=torch.bool)
    for k in range(4):
        _, memory = agent.act(frames[k], torch.zeros(500), memory)
        action = torch.randint(2, (500,))
        reward = ((action == (cue > 0)) * (k == 3)).float()
        agent.observe(Step(frames[k], action, reward, frames[k + 1], none | (k == 3), none))
    for i in range(150):
        agent.update(agent.buffer.sample(64, 0.0))
        if i % 50 == 49:
            agent.target_net.polyak_update(agent.net, 1.0)
    memory = agent.reset(500)
    for k in range(4):
        action, memory = agent.act(frames[k], torch.zeros(500), memory)
    right = (action == (cue > 0)).float().mean().item()
    assert 0.4 < right < 0.6 if mixer == "none" else right == 1.0


# -- environments --------------------------------------------------------------------------------


def test_environments_wake_where_they_were_by_playing_again():
    make = open_discrete("CartPole-v1", False).make
    one, other = Envs(make, 2, seed=0), Envs(make, 2, seed=9)
    g = torch.Generator().manual_seed(0)
    moves = [torch.randint(2, (2,), generator=g) for _ in range(90)]
    for move in moves[:50]:
        one.step(move)
    assert not other.load_state_dict(one.state_dict()).any()
    for move in moves[50:]:
        (a, ended), (b, too) = one.step(move), other.step(move)
        assert all(torch.equal(x, y) for x, y in zip(a, b)) and ended == too


class Drifting:
    """Forgets its seed: every reset goes on from the last one."""

    spec, count = None, 0

    def reset(self, seed):
        Drifting.count += 1
        return np.full(2, Drifting.count, np.float32), {}

    def step(self, action):
        return np.full(2, Drifting.count + 0.5, np.float32), 1.0, False, False, {}


def test_an_environment_that_does_not_repeat_itself_is_found_out(caplog):
    one = Envs(Drifting, 1, seed=0)
    one.step(torch.zeros(1, dtype=torch.long))
    assert Envs(Drifting, 1, seed=0).load_state_dict(one.state_dict()).tolist() == [True]
    assert "does not repeat itself" in caplog.text


def test_the_next_episodes_first_state_is_no_next_state():
    envs = Envs(open_discrete("CartPole-v1", False).make, 1, seed=0)
    for _ in range(60):
        before = envs.state
        step, ended = envs.step(torch.ones(1, dtype=torch.long))
        assert torch.equal(step.state, before) and torch.equal(step.next_state, envs.state) != bool(ended)
        if ended:
            assert step.terminated.item() and ended[0].length == ended[0].total


@pytest.mark.parametrize(
    "env, cnn, kind, words",
    [
        ("Pendulum-v1", False, ValueError, "chooses one of a few"),
        ("CartPole-v9", False, ValueError, "CartPole-v1"),
        ("CartPole-v1", True, ValueError, "--cnn is for images"),
        ("CarRacing-v3", False, (ValueError, ImportError), "CarRacing-v3"),
    ],
)
def test_worlds_that_do_not_fit_are_refused_in_words(env, cnn, kind, words):
    with pytest.raises(kind, match=words):
        open_discrete(env, cnn)


@pytest.mark.parametrize(
    "env, module, words",
    [
        ("highway-fast-v0", "highway_env", "pip install highway-env"),
        ("ALE/Pong-v5", "ale_py", "pip install ale-py"),
        ("LunarLander-v3", "Box2D", r"pip install 'gymnasium\[box2d\]'"),
    ],
)
def test_missing_packages_are_named_with_the_command(env, module, words, monkeypatch):
    for name in [m for m in sys.modules if m.startswith("gymnasium.envs.box2d")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=words):
        make_discrete(env, env.startswith("ALE"))


def test_odd_observations_become_flat_float32():
    assert open_discrete("Taxi-v4", False).state == 500  # one of 500, as one-hot
    made = make_discrete("Blackjack-v1", False)
    seen, _ = made.reset(seed=0)
    assert seen.dtype == np.float32 and seen.shape == (32 + 11 + 2,)


# -- images --------------------------------------------------------------------------------------


def test_images_become_small_and_grey_and_the_network_has_the_published_size():
    image = np.zeros((210, 160, 3), np.uint8)
    image[:105] = (255, 0, 0)
    small = to_gray84(image).reshape(84, 84)
    assert small.dtype == np.uint8 and (small[:41] == 76).all() and (small[43:] == 0).all()
    cfg = DQNConfig(env="ALE/Pong-v5", **{**ENV_DEFAULTS["dqn"]["ALE/Pong-v5"], "buffer_size": 64, "batch_size": 2})
    agent = DQN(cfg, EnvSpec(84 * 84, 6, image=True))
    assert sum(p.numel() for p in agent.net.parameters()) == 635_942
    agent.init_buffer(1, 0)
    assert agent.buffer.frames.dtype == torch.uint8
    action, memory = agent.act(torch.from_numpy(to_gray84(image))[None], torch.zeros(1), agent.reset(1))
    state = torch.from_numpy(to_gray84(image))[None]
    agent.observe(Step(state, action, torch.zeros(1), state, *torch.zeros(2, 1, dtype=torch.bool)))
    assert agent.update(agent.buffer.sample(2, 1.0))["loss/td"].isfinite()


def test_pong_is_seen_learned_and_resumed(tmp_path, monkeypatch):
    pytest.importorskip("ale_py")
    monkeypatch.setitem(discrete.BASELINE_RETURNS, "ALE/Pong-v5", {"random": -20.7})
    made = make_discrete("ALE/Pong-v5", True)
    seen, _ = made.reset(seed=0)
    assert seen.shape == (84 * 84,) and seen.dtype == np.uint8 and 20 < seen.mean() < 200
    more = {"env": "ALE/Pong-v5", "d_model": 8, "env_steps": 200, "learn_start": 180, "batch_size": 2}
    assert trainer.main([*flags(tmp_path, **more, num_final_episodes=0), "--cnn"]) == 0
    folder = only_run(tmp_path)
    assert "ale-py" in json.loads((folder / "config.json").read_text())["versions"]  # the simulator that was used
    assert trainer.main(["--resume", str(folder), "--env_steps", "204"]) == 0
    assert utils.read_checkpoint(folder)["updates"] == 25


# -- whole runs ----------------------------------------------------------------------------------


def flags(out, **more) -> list[str]:
    given = {"agent": "dqn", "threads": 1, "output_dir": out, **TINY, "env_steps": 300, "learn_start": 40}
    given |= {"log_every": 50, "save_every": 50, "num_final_episodes": 2, "eps_decay": 200, "buffer_size": 100} | more
    return ["--no_tensorboard", *(f"--{k}={v}" for k, v in given.items())]


def only_run(out):
    (folder,) = [p for p in out.iterdir() if p.is_dir()]
    return folder


def rows_of(folder) -> list[dict]:
    passing = ("seconds", "updates_per_s", "steps_per_s")
    return [{k: v for k, v in r.items() if k not in passing} for r in logger.read_log(folder / "log.jsonl")]


def lands(state: torch.Tensor) -> torch.Tensor:
    """Gymnasium's own controller of the lander. (n, 8) -> (n,)"""
    from gymnasium.envs.box2d.lunar_lander import LunarLander, heuristic

    return torch.tensor([heuristic(LunarLander(), s) for s in state.numpy()])


def brakes(state: torch.Tensor) -> torch.Tensor:
    return torch.full((len(state),), 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "env, policy, episodes, low, high, outcome",
    [
        ("LunarLander-v3", lands, 20, 200, 300, "landed"),
        ("highway-fast-v0", brakes, 8, 20, 22, "crash"),
    ],
)
def test_evaluation_gives_known_policies_what_they_are_worth(env, policy, episodes, low, high, outcome):
    """The lander's controller solves its task; who always brakes on the highway earns the published best of 21."""
    place = open_discrete(env, False)
    known = type("Known", (DQN,), {"act": lambda self, state, reward, memory: (policy(state), memory)})
    agent = known(tiny(mixer="none"), EnvSpec(place.state, place.actions))
    row = utils.summary(utils.evaluate(agent, place.make, episodes, 0, outcome=place.outcome), None)
    assert low < row["eval/return_mean"] < high and row["eval/episodes"] == episodes
    assert row[f"eval/{outcome}"] >= 0.8 if outcome == "landed" else row[f"eval/{outcome}"] <= 0.1
    if env == "highway-fast-v0":
        assert row["eval/action_4"] == 1


@every
def test_every_mixer_trains_and_is_evaluated(mixer, tmp_path, capsys):
    assert trainer.main(flags(tmp_path, env="CartPole-v1", mixer=mixer, eval_every=150, num_eval_episodes=2)) == 0
    folder = only_run(tmp_path)
    said, rows = capsys.readouterr().out, rows_of(folder)
    assert "baseline    random" in said and "actions     0 " in said and (folder / "training_curves.png").exists()
    assert [r["env_step"] for r in rows if "loss/td" in r] == [50, 100, 150, 200, 250, 300]
    assert [r["env_step"] for r in rows if "eval/return_mean" in r] == [150, 300] and rows[-1]["eval/episodes"] == 2
    assert sum(r.get("episode/length", 0) for r in rows) <= 300 and rows[-2]["updates"] == 261
    out = tmp_path / "score.json"
    utils.main(["--checkpoint", str(folder), "--episodes", "3", "--device", "cpu", "--json", str(out)])
    said = capsys.readouterr().out
    assert "learned in CartPole-v1, 300 environment steps" in said and "always 1" in said
    record = json.loads(out.read_text())
    shares = [record["eval/action_0"], record["eval/action_1"]]
    assert sum(shares) == pytest.approx(1) and len(record["returns"]) == 3 and record["baseline_returns"]


def test_a_checkpoint_that_was_kept_for_evaluation_cannot_be_resumed(tmp_path, capsys):
    trainer.main(flags(tmp_path, env="CartPole-v1", mixer="none", env_steps=60))
    with pytest.raises(SystemExit):
        trainer.main(["--resume", str(only_run(tmp_path) / "best_checkpoint.pt")])
    assert "kept to be evaluated" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, words",
    [
        ({"context_length": 0}, "take at least 1"),
        ({"buffer_size": 4}, "never holds a batch"),
        ({"learn_start": 400}, "nothing would be learned"),
        ({"mixer": "transformer", "n_heads": 3}, "multiple of n_heads"),
        ({"eps_end": 2}, "eps_end = 2"),
        ({"num_envs": 0}, "num_envs"),
        ({"precision": "bf16"}, "learns in float32"),
        ({"env": "Pendulum-v1"}, "chooses one of a few"),
        ({"d_state": 0}, "d_state"),
    ],
)
def test_bad_settings_end_in_a_sentence(more, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main(flags(tmp_path, **{"env": "CartPole-v1", **more}))
    assert stop.value.code == 2 and words in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "env, more",
    [
        ("LunarLander-v3", {"num_envs": 2, "latent": "refresh", "env_steps": 200}),
        ("highway-fast-v0", {"env_steps": 90, "latent": "store"}),
    ],
)
def test_killed_and_resumed_an_online_run_keeps_its_bits(env, more, tmp_path):
    """SIGKILL between checkpoints, then SIGTERM, then the rest: weights, replay, environments and log are the same."""
    pytest.importorskip("Box2D" if "Lunar" in env else "highway_env")
    more = {"env": env, "save_every": 20, "num_final_episodes": 1, "log_every": 20, **more}
    assert trainer.main(flags(tmp_path / "calm", **more)) == 0
    rough, begin = tmp_path / "rough", [sys.executable, "trainer.py"]
    words = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    child = subprocess.Popen([*begin, *flags(rough, **more)], **words)
    limit = time.time() + 240
    while not (rough.exists() and list(rough.glob("*/last_checkpoint.pt"))):
        assert child.poll() is None and time.time() < limit, child.stdout.read()
        time.sleep(0.005)
    child.kill()
    child.communicate()
    folder = only_run(rough)
    reached = utils.read_checkpoint(folder)["steps"]
    assert 0 < reached < utils.read_checkpoint(only_run(tmp_path / "calm"))["steps"]

    update = DQN.update

    def stopping(self, batch):
        if self.steps > reached + 10 and not told_once:
            told_once.append(signal.raise_signal(signal.SIGTERM))
        return update(self, batch)

    told_once: list = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DQN, "update", stopping)
        assert trainer.main(["--resume", str(folder)]) == 128 + signal.SIGTERM
    assert trainer.main(["--resume", str(folder)]) == 0
    one, other = utils.read_checkpoint(only_run(tmp_path / "calm")), utils.read_checkpoint(folder)
    assert one["steps"] == other["steps"]
    for key in ("agent", "optimizer", "run"):
        for a, b in zip(*(pytree.tree_leaves(part[key]) for part in (one, other)), strict=True):
            assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    assert rows_of(only_run(tmp_path / "calm"))[1:] == rows_of(folder)[1:]
