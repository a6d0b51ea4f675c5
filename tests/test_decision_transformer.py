"""Return-conditioned agents: what a prediction may see, that acting is what was trained, self-evolution, sizes."""

import copy
import math
import shutil
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import decision_transformer as decision
import model
from common.interface import EnvSpec
from common.windows import Sequence
from config import CONFIGS, parse
from decision_transformer import RTG_SCALE, DecisionAgent, interleave, masked_mean, soften_labels, target_of
from networks.multi_grained import DualMamba

SPEC = EnvSpec(state=4, action=2, low=(-1.0, -2.0), high=(1.0, 0.0))
HOPPER, CHEETAH = EnvSpec(11, 3, (-1.0,) * 3, (1.0,) * 3), EnvSpec(17, 6, (-1.0,) * 6, (1.0,) * 6)
KINDS = {"dt": {}, "dmamba": {}, "dm": {}, "dm dual": {"block": "dual"}, "dm coarse": {"block": "coarse"}}
every = pytest.mark.parametrize("kind", KINDS)
carried = pytest.mark.parametrize("kind", [k for k in KINDS if k != "dt"])


def config(kind: str, **changes):
    name = kind.split()[0]
    tiny = dict(d_model=16, n_layers=2, context_length=4, batch_size=8, warmup_steps=2, max_ep_len=100)
    tiny |= {} if name == "dt" else {"d_state": 4}
    return CONFIGS[name](**{**tiny, **KINDS[kind], **changes})


def make(kind: str, spec: EnvSpec = SPEC, **changes) -> DecisionAgent:
    agent = DecisionAgent(config(kind, **changes), spec)
    agent.obs_normalizer.fit(torch.randn(50, spec.state) * 2 + 1)
    return agent


def span_of(n: int = 8, k: int = 4, seed: int = 0, spec: EnvSpec = SPEC) -> Sequence:
    g = torch.Generator().manual_seed(seed)
    r = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    lengths = torch.randint(1, k + 1, (n, 1), generator=g)
    lengths[0] = k
    mask = (torch.arange(k) < lengths).float()
    actions = r(n, k, spec.action).tanh() * torch.tensor(spec.high)
    return Sequence(r(n, k) * 1000, r(n, k, spec.state), actions, torch.arange(k).expand(n, k) + lengths, mask)


def outputs(agent: DecisionAgent, b: Sequence) -> torch.Tensor:
    """Everything that the trunk says, (B, K, 3, D)."""
    return agent.policy(b.rtg / RTG_SCALE, agent.obs_normalizer(b.states), b.actions, b.steps)


class Walk:
    """n scripted environments: states, and rewards of the steps before them, whatever the actions."""

    def __init__(self, n: int, steps: int, seed: int = 0, dtype=torch.float32):
        g = torch.Generator().manual_seed(seed)
        self.states = torch.randn(steps, n, 4, generator=g).to(dtype)
        self.rewards = torch.randn(steps, n, generator=g).to(dtype) * 50

    def play(self, agent: DecisionAgent, goal: float | None = None):
        """Actions (steps, n, A), and the memory at the end."""
        memory, actions = agent.reset(self.states.shape[1], goal), []
        for state, reward in zip(self.states, self.rewards):
            action, memory = agent.act(state, reward, memory)
            actions.append(action)
        return torch.stack(actions), memory


def with_inference(agent: DecisionAgent, inference: str) -> DecisionAgent:
    twin = DecisionAgent(replace(agent.cfg, inference=inference), agent.spec).to(agent.action_bias.dtype).eval()
    twin.load_state_dict(agent.state_dict())
    return twin


# -- order and causality -------------------------------------------------------------------------


def test_tokens_are_interleaved():
    r, s, a = (torch.full((1, 2, 1), v) for v in (1.0, 2.0, 3.0))
    assert interleave(r, s, a).flatten().tolist() == [1, 2, 3, 1, 2, 3]


def leaks(agent: DecisionAgent, k: int) -> list[int]:
    """Steps t whose predicted action depends on a_t or on anything later."""
    b = span_of(2, k)._replace(steps=torch.arange(k).expand(2, k))
    parts = [b.rtg, b.states, b.actions]
    parts = [p.double().requires_grad_() for p in parts]
    pi = agent.policy.action(outputs(agent, b._replace(rtg=parts[0], states=parts[1], actions=parts[2]))[:, :, 1])
    found = []
    for t in range(k):
        rtg, states, actions = torch.autograd.grad(pi[:, t].sum(), parts, retain_graph=True)
        assert actions[:, :t].abs().sum() > 0 or t == 0
        if rtg[:, t + 1 :].any() or states[:, t + 1 :].any() or actions[:, t:].any():
            found.append(t)
    return found


@every
@pytest.mark.parametrize("n_layers", [1, 2, 3, 4])
def test_no_prediction_sees_its_own_action_or_later(kind, n_layers):
    """E3."""
    assert leaks(make(kind, n_layers=n_layers, context_length=7).double().eval(), 7) == []


class Leaking(DualMamba):
    """FIXTURE, not for use: the released form of `DualMamba`. Groups hold (R_t, s_t, a_t), their outputs are tiled."""

    def forward(self, u):
        steps = u.shape[1] // 3
        last = torch.cat([u[:, :-1], torch.zeros_like(u[:, -1:])], 1)  # the zero at the end, so no shift
        q = self.fine(self.group(last.unflatten(1, (-1, 3)).flatten(2)))
        return self.coarse(u) + self.norm(q).repeat(1, 3, 1)[:, : 3 * steps]


def test_the_published_grouping_is_caught(monkeypatch):
    """The released code shows all labels but the window's last to the network, from two layers on."""
    monkeypatch.setitem(model.MIXERS, "dual", lambda cfg: Leaking(**model.mamba1_sizes(cfg)))
    one, two = (leaks(make("dm dual", n_layers=n, context_length=20).double().eval(), 20) for n in (1, 2))
    assert one == [*range(7), 10, 11, 12] and two == list(range(19))


@every
def test_padding_does_not_reach_real_steps(kind):
    """E4: noise behind the mask changes nothing in front of it, to the bit, nor the losses."""
    agent, b = make(kind, drop_p=0.0), span_of()
    behind = b.mask == 0
    noisy = Sequence(*(torch.where(behind.view(8, 4, *[1] * (x.dim() - 2)), x + 7, x) for x in b[:4]), b.mask)
    real = b.mask.bool()
    assert torch.equal(outputs(agent, b)[real], outputs(agent, noisy)[real]) and behind.any()
    for evolving in (False, agent.teacher is not None):
        assert torch.equal(agent.losses(b, (evolving, False))[0], agent.losses(noisy, (evolving, False))[0])


# -- acting --------------------------------------------------------------------------------------


@carried
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_stepping_is_the_parallel_forward(kind, dtype, tolerance):
    """E1: every token of 50 steps, the action tokens too."""
    agent = make(kind, context_length=50).to(dtype).eval()
    b = span_of(4, 50)
    b = Sequence(*(x.to(dtype) if x.is_floating_point() else x for x in b))._replace(
        steps=torch.arange(50).expand(4, 50)
    )
    whole, policy = outputs(agent, b), agent.policy
    layers, seen = policy.trunk.init_state(4), []
    for t in range(50):
        kinds = (
            ("action", b.actions[:, t - 1], b.steps[:, t] - 1),
            ("return", b.rtg[:, t, None] / RTG_SCALE, b.steps[:, t]),
        )
        kinds += (("state", agent.obs_normalizer(b.states[:, t]), b.steps[:, t]),)
        real = torch.tensor([float(t > 0), 1.0, 1.0], dtype=dtype).expand(4, 3)
        h, layers = policy.trunk.step_tokens(
            torch.stack([policy.embed_token(*kind) for kind in kinds], 1), layers, real
        )
        seen.append(h)
    seen = torch.stack(seen, 1)  # (B, T, (a_{t-1}, R_t, s_t), D)
    torch.testing.assert_close(seen[:, :, 1:], whole[:, :, :2], rtol=0, atol=tolerance * 5)
    torch.testing.assert_close(seen[:, 1:, 0], whole[:, :-1, 2], rtol=0, atol=tolerance * 5)


@carried
def test_window_and_state_agree_until_the_window_forgets(kind):
    """E5; staggered states never remember more than the window did, and often less."""
    agent = make(kind).eval()
    walk = Walk(3, 14)
    window, recurrent, staggered = (
        walk.play(with_inference(agent, how))[0] for how in ("window", "recurrent", "staggered")
    )
    torch.testing.assert_close(window[:4], recurrent[:4], rtol=0, atol=1e-5)
    torch.testing.assert_close(window[:4], staggered[:4], rtol=0, atol=1e-5)
    assert (window[4:] - recurrent[4:]).abs().amax((1, 2)).min() > 1e-6
    for t in range(4, 14):  # K = 4: the state that is read began at the last multiple of 2 that is 2 or 3 steps back
        is_first = Walk(3, 14)
        begin = t - (t % 2 + 2)
        memory = with_inference(agent, "recurrent").reset(3)
        wanted = agent.target_return - is_first.rewards[1 : begin + 1].sum(0)
        memory = memory._replace(rtg_now=wanted, t=torch.full((3,), 1000))  # told below that nothing came before
        twin = with_inference(agent, "recurrent")
        layers = memory.layers
        for s in range(begin, t + 1):
            if s > begin:
                wanted = wanted - is_first.rewards[s]
            h, layers = twin.policy.step_tokens(
                wanted / RTG_SCALE,
                twin.obs_normalizer(is_first.states[s]),
                staggered[s - 1],
                torch.full((3,), s),
                layers,
                torch.full((3,), float(s == begin)),
            )
        torch.testing.assert_close(twin.squash(twin.policy.action(h)), staggered[t], rtol=0, atol=1e-5)


@every
def test_a_window_acts_as_it_was_trained(kind):
    """The action in the t-th live step is the one that training reads in the recorded window that ends there."""
    agent, walk = make(kind).eval(), Walk(2, 9)
    actions, _ = walk.play(agent, goal=500.0)
    rewards = walk.rewards.clone()
    rewards[0] = 0
    rtg = 500.0 - rewards.cumsum(0)
    for t in range(9):
        rows = slice(max(0, t - 3), t + 1)
        steps = torch.arange(t + 1)[rows].expand(2, -1)
        b = Sequence(
            rtg[rows].T, walk.states[rows].transpose(0, 1), actions[rows].transpose(0, 1), steps, torch.ones(2, 1)
        )
        torch.testing.assert_close(agent.predict(b, agent.policy)[1][:, -1], actions[t], rtol=1e-5, atol=1e-5)


MODES = [(k, m) for k in KINDS for m in ("window", "recurrent", "staggered") if k != "dt" or m == "window"]


@pytest.mark.parametrize("kind, inference", MODES)
def test_rows_restart_on_their_own(kind, inference):
    """E6 and E8: four environments with different resets are four single ones; a second episode is like a first."""
    agent = make(kind, inference=inference).double().eval()
    walk = Walk(4, 12, dtype=torch.float64)
    resets = {3: [0], 5: [1, 2], 9: [0]}
    memory, together = agent.reset(4), []
    for t in range(12):
        over = torch.tensor([i in resets.get(t, []) for i in range(4)])
        memory = agent.reset_where(memory, over)
        action, memory = agent.act(walk.states[t], walk.rewards[t], memory)
        together.append(action)
    together = torch.stack(together)
    for i in range(4):
        begins = [0, *(t for t in resets if i in resets[t])]
        for begin, end in zip(begins, [*begins[1:], 12]):
            memory = agent.reset(1)
            for t in range(begin, end):
                action, memory = agent.act(walk.states[t, i : i + 1], walk.rewards[t, i : i + 1], memory)
                torch.testing.assert_close(action[0], together[t, i], rtol=0, atol=1e-6)
    assert torch.equal(walk.play(agent)[0], walk.play(agent)[0])


@pytest.mark.parametrize("kind, inference", MODES)
def test_what_is_still_wanted(kind, inference):
    """E7: target minus what was earned, in every mode; and it matters."""
    agent, walk = make(kind, inference=inference).eval(), Walk(3, 9)
    _, memory = walk.play(agent)
    torch.testing.assert_close(
        memory.rtg[:, -1], (agent.target_return - walk.rewards[1:].sum(0)) / RTG_SCALE, rtol=0, atol=1e-6
    )
    assert memory.t.tolist() == [9, 9, 9]
    assert not torch.allclose(walk.play(agent, goal=0.0)[0], walk.play(agent)[0])
    _, memory = walk.play(make(kind, inference=inference, delayed_reward=True).eval())
    torch.testing.assert_close(
        memory.rtg[:, -1], torch.full((3,), agent.target_return / RTG_SCALE)
    )  # nothing is earned


@pytest.mark.parametrize("kind, inference", MODES)
def test_memory_is_carried_and_of_constant_size(kind, inference):
    agent, walk = make(kind, inference=inference).eval(), Walk(2, 30)
    first = agent.reset(2)
    before = pytree.tree_map(torch.clone, first)
    agent.act(walk.states[0], walk.rewards[0], first)
    assert all(torch.equal(a, b) for a, b in zip(pytree.tree_leaves(first), pytree.tree_leaves(before)))
    _, last = walk.play(agent)
    shapes = lambda m: [x.shape for x in pytree.tree_leaves(m)]  # noqa: E731
    assert shapes(first) == shapes(last) and all(len(x) == 2 for x in pytree.tree_leaves(last))
    if inference == "recurrent" and kind == "dmamba":  # n_layers * E * (W + N) numbers and a step
        assert sum(x.numel() for x in pytree.tree_leaves(last.layers)) == 2 * 2 * 32 * (4 + 4)


def test_actions_keep_their_bounds_and_late_steps_share_a_time():
    agent = make("dmamba", max_ep_len=6).eval()
    with torch.no_grad():
        agent.policy.action[-1].bias.fill_(100.0)
    actions, _ = Walk(2, 20).play(agent)
    assert torch.equal(actions, torch.tensor(SPEC.high).expand(20, 2, 2))


# -- learning ------------------------------------------------------------------------------------


def test_masked_mean_on_four_numbers():
    error, mask = torch.tensor([[[1.0], [2.0]], [[3.0], [100.0]]]), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    assert masked_mean(error, mask).item() == 2.0
    assert masked_mean(error[:, :0], mask[:, :0]).item() == 0.0


def test_the_teacher_must_be_frozen():
    assert soften_labels(torch.tensor([0.0]), torch.tensor([1.0]), torch.tensor(0.25)).item() == 0.25
    with pytest.raises(ValueError, match="frozen"):
        soften_labels(torch.zeros(1), torch.ones(1, requires_grad=True), torch.tensor(0.5))


def gradients(agent: DecisionAgent, b: Sequence, evolving: bool) -> torch.Tensor:
    agent.optimizer.zero_grad()
    agent.losses(b, (evolving, False))[0].backward()
    return torch.cat([p.grad.flatten() for p in agent.policy.parameters() if p.grad is not None])


def test_self_evolution_is_cloning_plus_a_pull():
    agent = make("dm", drop_p=0.0, w_a=1.0, w_s=0.0, w_r=0.0).double()
    b = Sequence(*(x.double() if x.is_floating_point() else x for x in span_of()))
    clone = gradients(agent, b, False)
    agent.beta.fill_(0.3)
    torch.testing.assert_close(gradients(agent, b, True), 0.7 * clone)  # right after a copy the two policies agree
    agent.teacher.net.action[0].bias.data += 0.5
    assert not torch.allclose(gradients(agent, b, True), 0.7 * clone)
    loss, m = agent.losses(b, (True, False))
    whole = 0.7 * m["policy/bc_loss"] + 0.3 * m["policy/to_teacher"] - 0.21 * m["policy/teacher_bc_loss"]
    torch.testing.assert_close(loss, whole)
    agent.beta.fill_(0.0)
    assert torch.equal(gradients(agent, b, True), clone)  # share 0 is cloning, to the bit


def test_the_past_is_renewed_on_time_and_nothing_else_moves_it():
    agent = make("dm", refresh_every=3, num_epochs=1, updates_per_epoch=12, drop_p=0.5).train()
    before = [p.clone() for p in agent.policy.parameters()]
    shares = []
    for update in range(12):
        if update % 3 == 0:
            before = [p.clone() for p in agent.policy.parameters()]
        metrics = agent.update(span_of(seed=update))
        shares.append(metrics["policy/beta"].item())
        assert all(torch.equal(a, b) for a, b in zip(before, agent.teacher.net.parameters()))
        assert ("policy/to_teacher" in metrics) == (update >= 3)
    expected = [0.0] * 3 + [min(0.5, 0.85 * k / 4) for k in (2, 3, 4) for _ in range(3)]
    assert shares == pytest.approx(expected)
    assert not any(p.requires_grad for p in agent.teacher.parameters())


def test_a_running_mean_follows_every_update():
    agent = make("dm", self_evolution="ema").train()
    start = agent.teacher.net.action[0].weight.clone()
    agent.update(span_of())
    torch.testing.assert_close(
        agent.teacher.net.action[0].weight, start + decision.EMA * (agent.policy.action[0].weight - start)
    )


@every
def test_a_woken_agent_makes_the_same_next_updates(kind):
    """E10, over a renewal of the past; dropout's stream is the trainer's to keep."""
    agent = make(kind, refresh_every=2, num_epochs=1, updates_per_epoch=8).train()
    for seed in range(3):
        agent.update(span_of(seed=seed))
    twin = DecisionAgent(agent.cfg, SPEC).train()
    twin.load_state_dict(agent.state_dict())
    twin.optimizer.load_state_dict(copy.deepcopy(agent.optimizer.state_dict()))
    twin.updates = agent.updates
    for seed in range(3, 6):
        said = []
        for each in (agent, twin):
            torch.manual_seed(seed)
            said.append(each.update(span_of(seed=seed)))
        assert said[0].keys() == said[1].keys() and all(torch.equal(said[0][k], said[1][k]) for k in said[0])
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in agent.state_dict().items())


@every
def test_overfits_one_batch(kind):
    """E11, first half."""
    agent = make(kind, drop_p=0.0, learning_rate=3e-3, w_s=0.0, w_r=0.0, w_a=1.0, self_evolution="off").train()
    b = span_of()
    b = b._replace(actions=b.actions * 0.8 - torch.tensor([0.0, 0.1]))
    for _ in range(400):
        last = agent.update(b)
        if last["policy/bc_loss"] < 1e-3:
            break
    assert last["policy/bc_loss"] < 1e-3


def test_auxiliary_predictions_are_learned():
    agent = make("dm", drop_p=0.0, learning_rate=3e-3).train()
    first = agent.update(span_of())
    for _ in range(150):
        last = agent.update(span_of())
    assert last["loss/state"] < first["loss/state"] / 3 and last["loss/return"] < first["loss/return"] / 3


class Blind(nn.Module):
    """No memory at all. (B, L, D) -> (B, L, D)"""

    def forward(self, x):
        return F.silu(x)


@pytest.mark.slow
@pytest.mark.parametrize("kind, solves", [("dt", True), ("dmamba", True), ("blind", False)])
def test_an_action_that_depends_on_ten_steps_ago(kind, solves, monkeypatch):
    """E11, second half: a_t is what the state showed 10 steps before; no single state says it."""
    if kind == "blind":
        monkeypatch.setitem(model.MIXERS, "attention", lambda cfg: Blind())
    k, lag, spec = 12, 10, EnvSpec(1, 1, (-1.0,), (1.0,))
    sizes = dict(context_length=k, d_model=32, drop_p=0.0, learning_rate=3e-3, n_layers=2, warmup_steps=50)
    agent = make(
        "dt" if kind == "blind" else kind, spec, **sizes, **({"d_state": 16} if kind == "dmamba" else {})
    ).train()
    agent.obs_normalizer.mean.zero_(), agent.obs_normalizer.std.fill_(1.0)
    for update in range(400 if solves else 200):
        g = torch.Generator().manual_seed(update)
        states = torch.randint(0, 2, (32, k, 1), generator=g).float() * 2 - 1
        actions = F.pad(states, (0, 0, lag, 0))[:, :k] * 0.8
        mask = (torch.arange(k) >= lag).float().expand(32, k)
        b = Sequence(torch.zeros(32, k), states, torch.zeros_like(actions), torch.arange(k).expand(32, k), mask)
        agent.optimizer.zero_grad()
        decision.set_lr(agent.optimizer, 3e-3, update, 50)
        error = masked_mean((agent.predict(b, agent.policy)[1] - actions).square(), mask)
        error.backward()
        agent.optimizer.step()
        if error < 0.02:
            break
    assert (error < 0.02) == solves


@every
def test_metrics_are_detached_scalars_and_the_state_dict_is_whole_at_birth(kind):
    agent = make(kind).train()
    keys = set(agent.state_dict())
    metrics = agent.update(span_of())
    assert all(v.shape == () and not v.requires_grad and "/" in k for k, v in metrics.items())
    Walk(1, 2).play(agent)
    assert set(agent.state_dict()) == keys


def test_bf16_is_near_fp32():
    agent = make("dm", drop_p=0.0)
    twin = DecisionAgent(replace(agent.cfg, precision="bf16"), SPEC)
    twin.load_state_dict(agent.state_dict())
    a, b = agent.update(span_of()), twin.update(span_of())
    for key in ("loss/action", "loss/state", "loss/return"):
        torch.testing.assert_close(a[key], b[key], rtol=3e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_equals_eager():
    agent = make("dm", drop_p=0.0, n_layers=1, refresh_every=1, num_epochs=1, updates_per_epoch=4)
    twin = DecisionAgent(replace(agent.cfg, compile=True), SPEC)
    twin.load_state_dict(agent.state_dict())
    for seed in range(2):
        a, b = agent.update(span_of(seed=seed)), twin.update(span_of(seed=seed))
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=1e-4, msg=key)


# -- sizes, words --------------------------------------------------------------------------------


def count(*parts: nn.Module) -> int:
    return sum(p.numel() for part in parts for p in part.parameters())


def test_parameter_counts():
    """E9. Where all three heads were counted, both auxiliary ones are asked for; 128 is the DT's one-row word table."""
    heads = dict(w_s=0.05, w_r=0.05)
    policy = lambda name, spec, **more: decision.SequenceModel(CONFIGS[name](**heads, **more), spec)  # noqa: E731
    assert count(policy("dt", HOPPER)) + 128 == 727_695 and count(policy("dt", CHEETAH)) + 128 == 730_008
    assert count(policy("dmamba", HOPPER)) == 832_271 and count(policy("dmamba", HOPPER, n_layers=5)) == 715_663
    assert count(policy("dmamba", CHEETAH, max_ep_len=4096)) == 1_230_872  # as the notebook of JVP15 printed
    sizes = {
        128: (116_608, 167_296, 282_624),
        256: (438_016, 613_120, 1_073_152),
        768: (3_771_648, 5_181_696, 9_314_304),
    }
    for width, counts in sizes.items():
        for block, expected in zip(("coarse", "p", "dual"), counts):
            (mixer,) = decision.mixers_of(CONFIGS["dm"](d_model=width, n_layers=1, block=block))
            assert count(mixer) + width == expected  # and its RMSNorm


def test_only_matrices_decay_and_the_time_table_does_not():
    agent = make("dm")
    decays = {id(p) for p in agent.optimizer.param_groups[0]["params"]}
    names = {k for k, p in agent.policy.named_parameters() if id(p) in decays}
    assert names and not any(w in k for k in names for w in ("A_log", ".D", "time", "norm", "bias"))


@pytest.mark.parametrize(
    "env, kind, wanted",
    [
        ("hopper", "medium", 3600),
        ("walker2d", "random", 5000),
        ("halfcheetah", "medium", 6000),
        ("halfcheetah", "medium-replay", 6000),
        ("halfcheetah", "medium-expert", 12000),
    ],
)
def test_one_target_a_dataset(env, kind, wanted):
    assert target_of(config("dm", env=env, dataset_type=kind)) == wanted
    assert target_of(config("dm", env=env, dataset_type=kind, target_return=7.0)) == 7.0


@pytest.mark.parametrize(
    "change, words",
    [
        ({"context_length": 0}, "take at least 1"),
        ({"context_length": 101}, "stretch of one episode"),
        ({"n_layers": 0}, "from 1 to 1000"),
        ({"drop_p": 1.0}, "less than 1"),
        ({"target_return": math.nan}, "finite return"),
        ({"inference": "recurrent"}, "no state to carry"),
        ({"n_heads": 3}, "multiple of n_heads"),
        ({"w_a": 0.0}, "nothing to learn"),
        ({"env": "Humanoid-v4", "dataset": "mine.hdf5"}, "give --target_return"),
        ({"beta_cap": 1.5}, "from 0 to 1"),
        ({"refresh_every": 0}, "at least 1"),
    ],
)
def test_impossible_settings_are_refused_in_words(change, words):
    with pytest.raises(ValueError, match=words):
        make("dt", **change)


def test_other_refusals():
    with pytest.raises(ValueError, match="finite return"):
        make("dm").reset(2, math.inf)
    with pytest.raises(ValueError, match="2 or more"):
        make("dm", inference="staggered", context_length=1)
    with pytest.raises(ValueError, match="dqn has no preset .upstream."):
        parse(["--agent", "dqn", "--preset", "upstream"])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_is_the_eager_one():
    """E12: 200 steps including a restart."""
    agent = make("dm", inference="recurrent").cuda().eval()
    agent.device = torch.device("cuda")
    walk = Walk(4, 200)
    memory, static = agent.reset(4), agent.reset(4)
    state, reward, over = torch.zeros(4, 4).cuda(), torch.zeros(4).cuda(), torch.zeros(4, dtype=torch.bool).cuda()

    def step():
        action, after = agent.act(state, reward, agent.reset_where(static, over))
        for mine, theirs in zip(pytree.tree_leaves(static), pytree.tree_leaves(after)):
            mine.copy_(theirs)
        return action

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    for mine, theirs in zip(pytree.tree_leaves(static), pytree.tree_leaves(agent.reset(4))):
        mine.copy_(theirs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        action = step()
    for mine, theirs in zip(pytree.tree_leaves(static), pytree.tree_leaves(agent.reset(4))):
        mine.copy_(theirs)
    for t in range(200):
        state.copy_(walk.states[t]), reward.copy_(walk.rewards[t]), over.fill_(t == 120)
        graph.replay()
        expected, memory = agent.act(state, reward, agent.reset_where(memory, over))
        torch.testing.assert_close(action, expected, rtol=0, atol=1e-4)  # rounding grows over 200 carried states
