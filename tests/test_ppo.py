"""PPO: the ratio is one before it learns, windows stay within their episode, good policies stay good and get better."""

import json
import math
import signal
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from torch.utils import _pytree as pytree

import decision_transformer as decision
import trainer
import utils
from common import logger
from common.checkpoint import write
from common.interface import EnvSpec
from common.optim import RunningMeanStd
from common.vector_env import Envs
from config import CONFIGS, PPOConfig, parse
from ppo import PPO, gae, gaussian_kl, gaussian_log_prob, resolve_config
from ppo.buffer import OpenStep, RolloutBuffer, RolloutStep

TINY_TOKENS = dict(d_model=16, n_layers=1, context_length=4, max_ep_len=50, target_return=30.0)
SIZES = dict(n_steps=16, num_envs=2, batch_size=8, epochs=2, env_steps=4096, value_dim=16, device="cpu")
AGENTS = ("dt", "dmamba", "dm", "bamba")


class Slope:
    """A point on a line, (place, speed, nothing, ...). It earns 1 - place², and is pushed by the mean action.

    Ends after `length` steps by a time limit, and by a fall beyond |place| = 3.
    """

    spec = None

    def __init__(self, length: int = 13, width: int = 11):
        self.length, self.width = length, width

    def reset(self, seed):
        rng = np.random.default_rng(seed)
        self.t, self.x = 0, np.zeros(self.width)
        self.x[0] = rng.uniform(-2, 2)
        return self.x.copy(), {}

    def step(self, action):
        self.t += 1
        self.x[1] = 0.5 * self.x[1] + 0.5 * float(np.mean(action))
        self.x[0] += self.x[1]
        fallen = abs(self.x[0]) > 3
        return self.x.copy(), 1 - self.x[0] ** 2, bool(fallen), self.t == self.length and not fallen, {}

    def close(self):
        pass


def spec_of(state=11, action=3) -> EnvSpec:
    return EnvSpec(state, action, (-1.0,) * action, (1.0,) * action)


def kept(system: str, path, file, **changes) -> str:
    """An untrained offline agent with its data's statistics, saved as the trainer does."""
    sizes = {k: v for k, v in TINY.items() if k != "warmup_steps"} if system == "bamba" else TINY_TOKENS
    cfg = CONFIGS[system](**{**sizes, "dataset": str(file), "device": "cpu", **changes})
    sampler, identity = utils.agent_of(system).open_data(cfg, "cpu", 0)
    offline = utils.agent_of(system)(cfg, spec_of(), "cpu")
    offline.fit_normalizer(sampler)
    utils.save(path, offline, {"data": asdict(identity)})
    return str(path)


@pytest.fixture
def checkpoint(hopper_file, tmp_path):
    return lambda system="dt", **changes: kept(system, tmp_path / f"{system}.pt", hopper_file, **changes)


def begin(spec=None, make=Slope, **changes) -> tuple[PPO, Envs, list]:
    """A fresh agent, its environments, and a list that holds its memory."""
    cfg = resolve_config(PPOConfig(**{**SIZES, **changes}))
    agent = PPO(cfg, spec or spec_of(), "cpu")
    agent.init_buffer(cfg.num_envs, 0)
    agent.load_pretrained()
    agent.train()
    return agent, Envs(make, cfg.num_envs, 0), [agent.reset(cfg.num_envs)]


def act(agent: PPO, envs: Envs, memory: list):
    """One step of all environments, without learning."""
    action, memory[0] = agent.act(envs.state, envs.reward, memory[0], explore=True)
    step, ended = envs.step(action)
    agent.observe(step)
    if ended:
        memory[0] = agent.reset_where(memory[0], step.terminated | step.truncated)
    return step, [e.total for e in ended]


def practise(agent: PPO, envs: Envs, memory: list, steps: int) -> list[dict]:
    """The online loop; what every update said."""
    said = []
    for _ in range(steps):
        act(agent, envs, memory)
        said += [agent.update(batch) for batch in agent.minibatches()]
    return said


# -- what it computes ----------------------------------------------------------------------------


def test_advantages_are_the_sums_that_define_them():
    """P3: deaths, time limits with and without something behind them, and the rollout's own cut."""
    T, n, gamma, lam = 40, 3, 0.9, 0.8
    reward, value, bootstrap_value = (torch.randn(T, n, dtype=torch.float64) for _ in range(3))
    done = torch.rand(T, n) < 0.15
    bootstrap_value = torch.where(done & (torch.rand(T, n) < 0.5), 0.0, bootstrap_value)
    follows = torch.where(done, bootstrap_value, torch.cat([value[1:], bootstrap_value[-1:]]))
    want = torch.zeros_like(value)
    for j in range(n):
        for i in range(T):
            weight = 1.0
            for k in range(i, T):
                want[i, j] += weight * (reward[k, j] + gamma * follows[k, j] - value[k, j])
                weight *= gamma * lam
                if done[k, j]:
                    break
    torch.testing.assert_close(gae(reward, value, done, bootstrap_value, gamma, lam), want)


def test_divergence_is_zero_at_home_and_what_sampling_says():
    """P2, and the density beside torch's own."""
    mean, other, log_std, log_std_o = torch.randn(4, 3).double() / 2
    mean, other = mean[None], other[None]
    assert gaussian_kl(mean, log_std, mean, log_std).abs().max() == 0
    x = mean + log_std.exp() * torch.randn(400_000, 3, dtype=torch.float64)
    theirs = torch.distributions.Normal(mean, log_std.exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(gaussian_log_prob(x, mean, log_std), theirs)
    sampled = (gaussian_log_prob(x, mean, log_std) - gaussian_log_prob(x, other, log_std_o)).mean()
    assert abs(sampled / gaussian_kl(mean, log_std, other, log_std_o).item() - 1) < 0.02


def test_running_moments_are_those_of_all_rows():
    rows, moments = torch.randn(500, 3) * 7 + 40, RunningMeanStd(3)
    for part in rows.split([1, 99, 400]):
        moments.add(part)
    torch.testing.assert_close(moments.mean, rows.mean(0))
    torch.testing.assert_close(moments.var, rows.var(0, correction=0))


# -- the rollout ---------------------------------------------------------------------------------


def test_a_buffer_keeps_what_was_acted_on_and_refuses_more():
    """P4 on a clock: every window holds its place in the rollout; the step of an episode starts anew where it ends."""
    steps, n, k = 6, 2, 5
    view = lambda i: (torch.full((n, k, 1), float(i)),)  # noqa: E731
    one = torch.zeros(n)
    like = RolloutStep(view(0), one.long(), one[:, None], one[:, None], one, one, one.bool(), one)
    buffer = RolloutBuffer(steps, like, None)
    for rollout in range(2):
        for i in range(steps):
            buffer.begin_step(OpenStep(None, view(i), one[:, None] + i, one))
            buffer.end_step(one[:, None], one + i, torch.tensor([i % 3 == 2, False]), one)
        assert buffer.full and buffer.open is None
        assert torch.equal(buffer.flat().view[0][:, 0, 0], torch.arange(6.0).repeat_interleave(n))
        assert buffer.rows.t.T.tolist() == [[0, 1, 2, 0, 1, 2], [steps * rollout + i for i in range(6)]]
        with pytest.raises(ValueError, match="holds its 6 steps"):
            buffer.begin_step(OpenStep(None, view(0), one[:, None], one))
        twin = RolloutBuffer(steps, like, None)
        twin.load_state_dict(buffer.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(*(pytree.tree_leaves(x.rows) for x in (buffer, twin))))
        assert twin.full and torch.equal(twin.t, buffer.t)
        buffer.clear()
    with pytest.raises(ValueError, match="an older version stopped"):
        buffer.load_state_dict({"rollout": {}, "t": one, "discounted": one, "data": None})


@pytest.mark.parametrize("system", AGENTS)
def test_what_is_learned_from_is_what_was_acted_on(system, checkpoint):
    """P1 and P4: stored windows hold the very tokens, and the ratio is one, after learning too."""
    agent, envs, memory = begin(
        init=checkpoint(system), value_warmup=1, warm_enough=1.0, target_kl=0.0, lr_encoder=1e-3
    )
    for iteration in range(3):
        seen, before = [], []
        for _ in range(16):
            state, reward, old = envs.state, envs.reward, memory[0]
            seen.append(agent.policy.window(agent.policy.observe_state(state, reward, old)))
            before.append(agent.buffer.t.clone())
            act(agent, envs, memory)
        for i, (fed, t) in enumerate(zip(seen, before)):
            assert torch.equal(agent.buffer.rows.t[i], t)
            for theirs, mine in zip(fed, agent.buffer.rows.view):
                assert torch.equal(theirs, mine[i])
        said = [agent.update(batch) for batch in agent.minibatches()]
        assert len(said) == 8 and all(m["policy/ratio_off"] < 1e-4 for m in said)
        moved = [m["policy/kl"] for m in said if "policy/kl" in m]
        assert len(moved) == (0 if iteration == 0 else 8) and (not moved or max(moved) > 1e-6)  # it did learn


def test_every_pass_goes_over_each_step_once_and_keeps_its_fields_together(checkpoint):
    agent, envs, memory = begin(init=checkpoint("dt"), target_kl=0.0)
    for _ in range(16):
        act(agent, envs, memory)
    flat = pytree.tree_map(torch.clone, agent.buffer.flat())
    fields = lambda b: torch.cat([b.view[0].flatten(1), b.t[:, None], b.raw_action, b.logp[:, None]], 1)  # noqa: E731
    steps = fields(flat)
    assert len(steps.unique(dim=0)) == 32
    said = [fields(minibatch) for minibatch, _ in agent.minibatches()]
    first, second = torch.cat(said[:4]), torch.cat(said[4:])
    for one in (first, second):
        assert torch.equal(one.unique(dim=0), steps.unique(dim=0))  # unique sorts
        assert not torch.equal(one, steps)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("lie", ["window", "dropout", "moved"])
def test_a_policy_that_is_not_the_one_that_acted_is_found_out(lie, checkpoint):
    agent, envs, memory = begin(init=checkpoint("dmamba", drop_p=0.5))
    for _ in range(16):
        act(agent, envs, memory)
    if lie == "window":
        for x in agent.buffer.rows.view:
            x.copy_(x.roll(1, 2))
    if lie == "dropout":
        agent.policy.train()
    if lie == "moved":
        with torch.no_grad():
            agent.log_std += 0.01
    with pytest.raises(FloatingPointError, match="not the one that acted"):
        next(agent.minibatches())


@pytest.mark.parametrize(
    "truncation, system, bootstraps",
    [("auto", "dt", False), ("auto", "bamba", True), ("bootstrap", "dt", True), ("terminal", "bamba", False)],
)
def test_what_follows_a_time_limit(truncation, system, bootstraps, checkpoint):
    """Deaths are worth nothing; limits too, where the policy sees them come; the rollout's own cut always goes on."""
    agent, envs, memory = begin(init=checkpoint(system), truncation=truncation, sigma=0.3, n_steps=32, num_envs=4)
    limits, deaths = 0, 0
    for i in range(32):
        step, _ = act(agent, envs, memory)
        now = agent.buffer.rows
        assert (now.bootstrap_value[i][step.terminated] == 0).all() and torch.equal(
            now.done[i], step.terminated | step.truncated
        )
        assert bool((now.bootstrap_value[i][step.truncated] != 0).all()) == bootstraps or not step.truncated.any()
        assert i < 31 or (now.bootstrap_value[i][~now.done[i]] != 0).all()
        limits, deaths = limits + step.truncated.sum(), deaths + step.terminated.sum()
    assert limits > 2


def test_the_value_behind_a_rollout_is_that_of_the_next_window(checkpoint):
    agent, envs, memory = begin(init=checkpoint("dmamba"), n_steps=4)
    compared = 0
    for _ in range(4):
        for _ in range(4):
            act(agent, envs, memory)
        now, t = agent.buffer.rows, agent.buffer.t
        z = agent.forward_window(
            agent.policy.window(agent.policy.observe_state(envs.state, envs.reward, memory[0])), t
        )[1]
        value = agent.value(agent.value_input(z, envs.state, t)).squeeze(-1)
        goes_on = ~now.done[-1]
        torch.testing.assert_close(now.bootstrap_value[-1][goes_on], value[goes_on])
        compared += goes_on.sum()
        for _ in agent.minibatches():  # makes room
            pass
    assert compared > 4


def test_an_abandoned_episode_ends_where_it_is(checkpoint):
    agent, envs, memory = begin(init=checkpoint())
    for _ in range(5):
        act(agent, envs, memory)
    agent.on_env_reset(torch.tensor([True, False]))
    now = agent.buffer.rows
    assert (
        now.done[4].tolist() == [True, False] and now.bootstrap_value[4, 0] != 0 and agent.buffer.t.tolist() == [0, 5]
    )


# -- what it keeps, and what it learns -----------------------------------------------------------


@pytest.mark.parametrize("system", AGENTS)
def test_evaluated_before_the_first_step_it_is_the_offline_agent(system, checkpoint, tmp_path):
    """P7, and that a checkpoint of PPO's is whole: it wakes where the offline one has gone, which it left as it was."""
    path = tmp_path / "ppo.pt"
    init = checkpoint(system)
    before = Path(init).read_bytes()
    agent, envs, memory = begin(init=init)
    offline, _ = utils.load(init)
    want = utils.evaluate(offline, lambda mode: Slope(), 3, 5)
    got = utils.evaluate(agent, lambda mode: Slope(), 3, 5)
    assert np.array_equal(want.returns, got.returns)
    practise(agent, envs, memory, 32)
    utils.save(path, agent, {"data": {}})
    assert Path(init).read_bytes() == before
    (tmp_path / f"{system}.pt").unlink()
    twin, _ = utils.load(path)
    assert np.array_equal(*(utils.evaluate(a, lambda mode: Slope(), 3, 5).returns for a in (agent, twin)))


def test_the_value_learns_alone(checkpoint):
    """P5: with no step for the actor, and in the warm-up, the policy stays bit for bit; the value does not."""
    still = dict(lr_encoder=0.0, lr_head=0.0, lr_std=0.0)
    for changes in ({"value_warmup": 0, **still}, {"value_warmup": 9, "warm_enough": 1.0}):
        agent, envs, memory = begin(init=checkpoint("dm"), **changes)
        start = pytree.tree_map(torch.clone, dict(agent.state_dict()))
        said = practise(agent, envs, memory, 32)
        assert said and ("policy/kl" in said[0]) == ("lr_head" in changes)
        moved = {k.split(".")[0] for k, v in agent.state_dict().items() if not torch.equal(v, start[k])}
        assert "value" in moved and not moved & {"policy", "log_std", "ref_policy"}


def test_the_anchor_holds_and_follows_its_target(checkpoint):
    """Without an anchor the policy strays further; far from home the anchor's weight rises, close to it it falls."""
    far = {}
    for coef in (0.0, 10.0):
        agent, envs, memory = begin(
            init=checkpoint(), value_warmup=0, kl_coef=coef, bc_coef=0.0, lr_encoder=3e-3, lr_head=3e-3, target_kl=0.0
        )
        home = pytree.tree_map(torch.clone, dict(agent.policy.state_dict()))
        practise(agent, envs, memory, 48)
        far[coef] = sum((v - home[k]).square().sum().item() for k, v in agent.policy.state_dict().items())
    assert far[10.0] < far[0.0]
    for distance, factor in ((5.0, 1.5), (1e-6, 1 / 1.5), (0.06, 1.0)):  # the target is 0.02 nats a dim, of 3
        agent, envs, memory = begin(init=checkpoint(), value_warmup=0)
        agent.adapt_kl_coef(torch.tensor(distance), 0.0)
        assert math.isclose(agent.kl_coef, 0.1 * factor, rel_tol=1e-5)


def test_passes_end_when_the_policy_has_moved_enough(checkpoint):
    count = {}
    for target in (0.0, 1e-9):
        agent, envs, memory = begin(init=checkpoint(), value_warmup=0, target_kl=target, epochs=5, lr_head=1e-2)
        count[target] = len(practise(agent, envs, memory, 16))
    assert count == {0.0: 20, 1e-9: 4}


def test_sigma_comes_from_the_data_or_from_the_flag(checkpoint):
    agent, *_ = begin(init=checkpoint())
    sigma = agent.log_std.exp()
    assert ((sigma >= 0.05 - 1e-6) & (sigma <= 0.3 + 1e-6)).all()
    rows = agent.buffer.data.at(torch.arange(400))
    rmse = agent.policy.bc_error(rows).sqrt()
    torch.testing.assert_close(sigma, rmse.clamp(0.05, 0.3), rtol=0.1, atol=0)
    agent, *_ = begin(init=checkpoint(), sigma=0.2, bc_coef=0.0)
    assert agent.buffer.data is None and torch.allclose(agent.log_std.exp(), torch.tensor(0.2))


def weak(path, tmp_path) -> str:
    """A dt that has cloned a controller of the slope that pushes the right way, but far too little."""
    import h5py

    rng, rows = np.random.default_rng(1), []
    for i in range(60):
        env = Slope(20, 2)
        x, _ = env.reset(i)
        done = False
        while not done:
            a = np.clip([-0.1 * x[0] + rng.normal(0, 0.05)], -1, 1).astype(np.float32)
            nx, r, dead, cut, _ = env.step(a)
            rows.append((x, a, r, dead, cut, nx))
            x, done = nx, dead or cut
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    with h5py.File(tmp_path / "slope.hdf5", "w") as f:
        for name, column in zip(names, zip(*rows)):
            f[name] = np.array(column) if name in ("terminals", "timeouts") else np.array(column, np.float32)
    cfg = CONFIGS["dt"](
        **{**TINY_TOKENS, "target_return": 0.0, "drop_p": 0.0},
        dataset=str(tmp_path / "slope.hdf5"),
        learning_rate=3e-3,
        warmup_steps=1,
    )
    sampler, identity = decision.DecisionAgent.open_data(cfg, "cpu", 0)
    agent = decision.DecisionAgent(cfg, spec_of(2, 1), "cpu")
    agent.obs_normalizer.fit(sampler.states)
    for _ in range(150):
        agent.update(sampler.sample(64))
    utils.save(path, agent, {"data": asdict(identity)})
    return str(path)


def deterministic(agent: PPO) -> float:
    return float(utils.evaluate(agent, lambda mode: Slope(20, 2), 20, 100).returns.mean())


@pytest.mark.slow
def test_a_weak_policy_gets_better_and_never_much_worse(tmp_path):
    """P6 for a cloned sequence policy, on three seeds."""
    init = weak(tmp_path / "weak.pt", tmp_path)
    for seed in range(3):
        torch.manual_seed(seed)
        agent, envs, memory = begin(
            spec_of(2, 1), lambda: Slope(20, 2), init=init, n_steps=32, num_envs=8, batch_size=64, epochs=8,
            env_steps=8192, lr_encoder=2e-3, lr_head=2e-3, lr_value=3e-3, kl_end=5.0, target_kl=0.05, value_warmup=3,
        )  # fmt: skip
        scores = [deterministic(agent)]
        for _ in range(4):
            practise(agent, envs, memory, 224)
            scores.append(deterministic(agent))
        assert scores[-1] > scores[0] + 1.5 and min(scores) > scores[0] - 1, scores


def test_a_new_mlp_solves_it_too():
    """P6 by the same code."""
    agent, envs, memory = begin(
        spec_of(2, 1), lambda: Slope(20, 2), init="none", n_steps=32, num_envs=8, batch_size=64, epochs=4,
        env_steps=12_288, lr_encoder=3e-3, lr_head=3e-3, lr_std=3e-3, lr_value=3e-3,
    )  # fmt: skip
    before = deterministic(agent)
    practise(agent, envs, memory, 1536)
    assert deterministic(agent) > max(before + 5, 5)
    assert agent.policy.obs_normalizer.std[0] != 1 and agent.ref_policy is None and agent.buffer.data is None


# -- through the front door ----------------------------------------------------------------------


FLAGS = {**SIZES, "threads": 1, "env_steps": 160, "eval_every": 64, "save_every": 64, "log_every": 32}
FLAGS |= {"num_eval_episodes": 2, "num_final_episodes": 2, "value_warmup": 2, "bc_batch": 4}


def flags(out, **more) -> list[str]:
    given = {"agent": "ppo", **FLAGS, "output_dir": out, **more}
    return ["--no_tensorboard", *(f"--{k}={v}" for k, v in given.items())]


def only_run(out):
    (folder,) = [p for p in out.iterdir() if p.is_dir()]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("system", ["dmamba", "bamba", "none"])
def test_a_run_can_be_stopped_resumed_and_evaluated(system, checkpoint, tmp_path, monkeypatch, capsys):
    """P8 through the front door, in MuJoCo's hopper: told to stop in mid-rollout, it ends with the bits of a calm run,
    and needs the offline checkpoint no more."""
    init = "none" if system == "none" else checkpoint(system)
    assert trainer.main(flags(tmp_path / "calm", init=init)) == 0
    step = PPO.observe

    def told(self, taken):
        if self.steps == 90:
            signal.raise_signal(signal.SIGTERM)
        return step(self, taken)

    monkeypatch.setattr(PPO, "observe", told)
    assert trainer.main(flags(tmp_path / "rough", init=init)) == 128 + signal.SIGTERM
    monkeypatch.undo()
    if system != "none":
        (tmp_path / f"{system}.pt").unlink()
    folder = only_run(tmp_path / "rough")
    assert trainer.main(["--resume", str(folder)]) == 0
    parts = [utils.read_checkpoint(f) for f in (only_run(tmp_path / "calm"), folder)]
    for key in ("agent", "optimizer", "run"):
        for one, other in zip(*(pytree.tree_leaves(part[key]) for part in parts), strict=True):
            assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    rows = logger.read_log(folder / "log.jsonl")
    evaluated = [r["env_step"] for r in rows if "eval/score" in r]
    assert evaluated == ([64, 128, 160] if system == "none" else [0, 64, 128, 160])
    assert any("episode/score" in r for r in rows)
    assert rows[0]["score_name"] == "online score" and (folder / "training_curves.png").stat().st_size > 5_000
    assert any("policy/kl" in r for r in rows) and ("bc_coef" in rows[-2] or "bc_coef" in rows[-3])
    capsys.readouterr()
    utils.main(
        [
            "--checkpoint",
            str(folder),
            "--episodes",
            "2",
            "--device",
            "cpu",
            "--env",
            "hopper",
            "--json",
            str(tmp_path / "s.json"),
        ]
    )
    said = capsys.readouterr().out
    assert (
        "learned in hopper v4" in said and json.loads((tmp_path / "s.json").read_text())["score_name"] == "online score"
    )


@pytest.mark.parametrize(
    "more, words",
    [
        ({"init": ""}, "needs --init"),
        ({"init": "missing.pt"}, "no checkpoint at"),
        ({"env": "walker2d"}, "was trained in hopper, not in walker2d"),
        ({"n_steps": 15}, "must divide"),
        ({"env_steps": 16}, "nothing would be learned"),
        ({"precision": "bf16"}, "take --precision fp32"),
        ({"inference": "recurrent"}, "acts and learns on windows"),
        ({"sigma": 0.9}, "is not within 0.05 and 0.5"),
        ({"dataset": "missing.hdf5"}, "--bc_coef 0 --sigma 0.1 does without data"),
        ({"clip_eps": -1}, "clip_eps"),
        ({"init": "none", "env": "humanoid"}, "unknown env"),
        ({"init": "none", "env": "CartPole-v1"}, "wants actions from Discrete"),
    ],
)
def test_bad_settings_end_in_a_sentence_before_work_starts(more, words, checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        trainer.main(flags(tmp_path / "out", **{"init": checkpoint(), **more}))
    assert stop.value.code == 2 and words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_data_than_the_policys_are_refused(checkpoint, hopper_file, tmp_path):
    init = checkpoint()
    part = torch.load(init, weights_only=True)
    part["run"]["data"]["sha256"] = "0" * 64
    write(Path(init), part)
    with pytest.raises(ValueError, match="the policy learned from walk"):
        begin(init=init)
    begin(init=init, dataset=str(hopper_file))  # said by name, they are meant


def test_ppo_is_no_offline_agent_and_recurrent_checkpoints_go_on_by_windows(checkpoint, tmp_path):
    agent, *_ = begin(init=checkpoint("dmamba", inference="recurrent"))
    assert agent.policy.cfg.inference == "window"
    utils.save(tmp_path / "own.pt", agent, {"data": {}})
    with pytest.raises(
        ValueError, match="holds a ppo; ppo fine-tunes bamba, dt, dmamba, dm; go on with it by --resume"
    ):
        resolve_config(PPOConfig(init=str(tmp_path / "own.pt")))
    with pytest.raises(ValueError, match="resolve_config first"):
        PPO(PPOConfig(), spec_of())
    with pytest.raises(ValueError, match="knows no"):
        utils.load(tmp_path / "own.pt", alpha=1.0)


def test_a_wanted_return_can_be_said_at_the_start_and_to_the_evaluation(checkpoint):
    agent, *_ = begin(init=checkpoint(), target_return=17.0)
    assert agent.reset(1).rtg_now.item() == 17.0 and agent.reset(1, 5.0).rtg_now.item() == 5.0
    with pytest.raises(ValueError, match="cannot be asked"):
        begin(init="none", spec=spec_of())[0].reset(1, 5.0)


def test_every_flag_has_a_home_on_the_command_line():
    cfg = parse(["--agent", "ppo", "--init", "none", "--mixer", "mamba2", "--lr_head", "1e-3", "--sigma", "0.4"])
    assert (cfg.num_envs, cfg.lr_head, cfg.sigma, cfg.policy, cfg.env) == (8, 1e-3, 0.4, None, "")
    settled = resolve_config(cfg)
    assert (
        settled.env == "hopper"
        and settled.policy["system"] == "bamba"
        and resolve_config(replace(cfg, mixer="mlp")).policy
    )
