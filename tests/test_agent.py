"""Bamba: its losses on a few numbers, what learns from what, what it sees, and that it can learn."""

import copy
import shutil
from dataclasses import replace

import pytest
import torch

from agent import Bamba, Spec, bc_q_loss
from memory import Window, forget, remember

SPEC = Spec(state=4, action=2, low=(-1.0, -2.0), high=(1.0, 0.0))
ENCODERS = {"critic_input": ["state", "embedding", "embedding_detached"], "target_encoder": ["online", "ema"]}


def batch_of(n: int = 8, k: int = 3, seed: int = 0) -> Window:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    return Window(r(n, k, 4), r(n, 2).tanh() - torch.tensor([0.0, 1.0]), r(n), r(n, k, 4), (r(n) > 0).float())


def parts(agent: Bamba) -> dict:
    names = ("encoder", "actor", "critic", "next_state", "reward", "slow_actor", "slow_critic")
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
    loss, _ = agent.losses(batch_of(), False, agent.draw_noise(batch_of()))
    loss.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in agent.encoder.parameters()) == reaches


def test_the_actor_does_not_move_the_critic(tiny):
    agent = Bamba(tiny(), SPEC).train()
    norms = []
    for turn in (False, True):
        torch.manual_seed(3)
        agent.optimiser.zero_grad()
        agent.losses(batch_of(), turn, agent.draw_noise(batch_of()))[0].backward()
        norms.append(torch.stack([p.grad.norm() for p in agent.critic.parameters()]))
    torch.testing.assert_close(*norms)


def test_dead_states_have_no_future(tiny):
    agent = Bamba(tiny(), SPEC).train()
    batch = batch_of()
    dead = target_of(agent, batch._replace(alive=torch.zeros(8)))
    assert torch.equal(dead, batch.reward)
    assert not torch.allclose(target_of(agent, batch._replace(alive=torch.ones(8))), batch.reward)


def target_of(agent, b):
    next_states = agent.normal(b.next_states)
    return agent.target(b, next_states, agent.encoder(next_states), torch.randn_like(b.action))


def test_target_noise_is_clipped_and_within_bounds(tiny):
    agent = Bamba(tiny(action_noise=100.0, action_noise_clip=0.5), SPEC).train()
    seen = []
    critic = agent.slow_critic.forward
    agent.slow_critic.forward = lambda x, a: seen.append(a) or critic(x, a)
    batch = batch_of(512)
    target_of(agent, batch)
    with torch.no_grad():
        z = agent.encoder(agent.normal(batch.next_states))
        clean = agent.policy(z, agent.slow_actor)
    noise = (seen[0] - clean) / agent.reach
    assert noise.shape == (512, 2) and noise.abs().max() <= 0.5 + 1e-5
    assert (noise.abs() > 0.49).float().mean() > 0.9 and not torch.equal(noise[:, 0], noise[:, 1])
    assert (seen[0] >= torch.tensor(SPEC.low)).all() and (seen[0] <= torch.tensor(SPEC.high)).all()


def test_targets_ignore_dropout(tiny):
    for target_encoder in ENCODERS["target_encoder"]:
        agent = Bamba(tiny(drop_p=0.5, action_noise=0.0, target_encoder=target_encoder), SPEC).train()
        b = batch_of()
        targets = [agent.losses(b, False, agent.draw_noise(b))[1]["critic/target"] for _ in range(2)]
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
    agent.normal.fit(torch.randn(50, 4) * 3 + 1)
    walk, memory, replay = torch.randn(6, 2, 4), agent.reset(2), forget(2, 3, torch.zeros(4))
    for state in walk:
        action, memory = agent.act(state, torch.zeros(2), memory)
        states, replay = remember(replay, state)
        with torch.no_grad():
            expected = agent.policy(agent.encoder(agent.normal(states)))
        assert torch.equal(action, expected)


def test_metrics_are_detached_scalars_with_grouped_names(tiny):
    agent = Bamba(tiny(), SPEC).train()
    with_actor, without = agent.update(batch_of()), agent.update(batch_of())
    for metrics in (with_actor, without):
        assert all(v.shape == () and not v.requires_grad and "/" in k for k, v in metrics.items())
    assert set(with_actor) - set(without) == {"actor/loss", "actor/clone", "actor/q_pi", "actor/trust"}


def test_state_dict_is_whole_at_birth(tiny):
    agent = Bamba(tiny(target_encoder="ema"), SPEC).train()
    keys = set(agent.state_dict())
    agent.update(batch_of())
    agent.act(torch.randn(1, 4), torch.zeros(1), agent.reset(1))
    assert set(agent.state_dict()) == keys
    assert {k.split(".")[0] for k in keys} >= {
        "slow_actor",
        "slow_critic",
        "slow_encoder",
        "next_state",
        "reward",
        "normal",
    }


def test_overfits_one_batch(tiny):
    agent = Bamba(tiny(alpha=0.0, drop_p=0.0, learning_rate=3e-3, policy_freq=1), SPEC).train()
    batch = batch_of()
    first = agent.update(batch)
    for _ in range(300):
        last = agent.update(batch)
    for key in ("actor/clone", "loss/state", "loss/reward"):
        assert last[key] < first[key] / 10, key


class LikesMore(torch.nn.Module):
    """A critic to whom every action is better the larger it is."""

    def forward(self, x, action):
        return action.sum(-1).expand(2, -1) + 5


@pytest.mark.parametrize("alpha, goal", [(0.0, (0.0, -1.0)), (50.0, SPEC.high)])
def test_q_off_is_cloning_and_q_on_climbs(tiny, alpha, goal):
    agent = Bamba(tiny(alpha=alpha, drop_p=0.0), SPEC).train()
    agent.critic = agent.slow_critic = LikesMore()
    optimiser = torch.optim.Adam([*agent.encoder.parameters(), *agent.actor.parameters()], lr=3e-3)
    batch = batch_of(64)
    batch = batch._replace(action=torch.tensor([0.0, -1.0]).expand(64, 2))
    for _ in range(150):
        optimiser.zero_grad()
        agent.losses(batch, True, agent.draw_noise(batch))[0].backward()
        optimiser.step()
    mean = agent.policy(agent.encoder(agent.normal(batch.states))).mean(0)
    assert (mean - torch.tensor(goal)).abs().max() < 0.1


def test_bf16_is_near_fp32(tiny):
    agent = Bamba(tiny(drop_p=0.0, action_noise=0.0), SPEC).train()
    twin = Bamba(replace(agent.cfg, precision="bf16"), SPEC).train()
    twin.load_state_dict(agent.state_dict())
    a, b = agent.update(batch_of()), twin.update(batch_of())
    for key in ("loss/critic", "loss/state", "actor/clone"):
        torch.testing.assert_close(a[key], b[key], rtol=3e-2, atol=1e-3)
    assert all(p.dtype == torch.float32 for p in twin.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_equals_eager(tiny):
    agent = Bamba(tiny(drop_p=0.0, action_noise=0.0, n_layers=1), SPEC).train()
    twin = Bamba(replace(agent.cfg, compile=True), SPEC).train()
    twin.load_state_dict(agent.state_dict())
    for seed in range(2):
        a, b = agent.update(copy.deepcopy(batch_of(seed=seed))), twin.update(batch_of(seed=seed))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4, msg=key)
