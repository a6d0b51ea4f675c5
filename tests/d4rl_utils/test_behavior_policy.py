"""Behaviour policies: what is shipped acts as what was trained, and what the manifest says of it is true."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from d4rl_utils.environment import make_env
from d4rl_utils.generate.behavior_policy import MANIFEST, Policy, ladder_path, policy_snapshots, rollout_returns
from d4rl_utils.names import DIMS, ENVS, d4rl_score

pytest.importorskip("mujoco")
MANIFESTED = json.loads(MANIFEST.read_text())


def test_a_policy_is_a_tanh_gaussian_network():
    layers = {"fc0": (11, 16), "fc1": (16, 16), "last_fc": (16, 3), "last_fc_log_std": (16, 3)}
    net = torch.nn.ModuleDict({name: torch.nn.Linear(*sizes) for name, sizes in layers.items()})
    states, noise = torch.randn(5, 11), torch.randn(5, 3)
    x = net["fc1"](net["fc0"](states).relu()).relu()
    expected = torch.distributions.Normal(net["last_fc"](x), net["last_fc_log_std"](x).exp())
    expected = (expected.mean + expected.stddev * noise).tanh()
    actions = Policy(net.state_dict())(states.numpy(), noise.numpy())
    np.testing.assert_allclose(actions, expected.detach(), atol=1e-6)


# -- what is shipped --------------------------------------------------------------------------------------------------


def test_returns_are_gymnasiums():
    policy = Policy(np.load(MANIFEST.with_name("hopper-medium.npz")))
    env, noise = make_env("hopper"), np.random.default_rng(3)
    state, total, over = env.reset(seed=3)[0], 0.0, False
    while not over:
        action = policy(state[None].astype(np.float32), noise.standard_normal((1, 3), np.float32))[0]
        state, reward, terminated, truncated, _ = env.step(action)
        total, over = total + reward, terminated or truncated
    assert rollout_returns(policy, "hopper", episodes=1, seed=3)[0] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("name", [name for name in MANIFESTED if not name.endswith("-ladder")])
def test_shipped_returns_are_the_manifests(name):
    """A few episodes tell a policy from a wrong one."""
    env, line = name.partition("-")[0], MANIFESTED[name]
    policy, episodes = Policy(np.load(MANIFEST.with_name(f"{name}.npz"))), 4 if env == "halfcheetah" else 16
    returns = rollout_returns(policy, env, episodes, seed=7)
    assert abs(returns.mean() - line["return_mean"]) < 3 * line["return_std"] / episodes**0.5 + 100
    assert line.get("d4rl_score", d4rl_score(env, line["return_mean"])) == pytest.approx(
        d4rl_score(env, line["return_mean"]), abs=0.1
    )
    assert line["episodes"] >= 100 and {"algorithm", "command", "seed", "steps", "versions", "licence"} <= set(line)


@pytest.mark.parametrize("env", [env for env in ENVS if f"{env}-ladder" in MANIFESTED])
def test_ladders_lead_from_the_bottom_to_medium(env):
    policies, lines = policy_snapshots(env), MANIFESTED[f"{env}-ladder"]["rungs"]
    assert len(policies) == len(lines) >= 6
    for policy in policies:
        assert policy.hidden[0][0].shape[0] == DIMS[env][0] and policy.mean[1].shape == DIMS[env][1:]
    steps, scores = ([line[key] for line in lines] for key in ("steps", "return_mean"))
    assert steps == sorted(set(steps)) and max(np.diff(steps)) < 2 * min(np.diff(steps))
    assert steps[-1] == MANIFESTED[f"{env}-medium"]["steps"]
    assert abs(d4rl_score(env, scores[0])) < 15 and d4rl_score(env, scores[-1]) > 30
    first = rollout_returns(policies[0], env, episodes=4, seed=0)
    assert abs(first.mean() - scores[0]) < 4 * lines[0]["return_std"]


def test_policies_are_small_and_all_manifested():
    files = {file.stem: file.stat().st_size for file in MANIFEST.parent.glob("*.npz")}
    assert set(files) == set(MANIFESTED) and sum(files.values()) < 6_000_000


def test_no_ladder_is_an_error():
    with pytest.raises(FileNotFoundError, match="nobody-ladder"):
        policy_snapshots("nobody")
    assert ladder_path("ant").parent == MANIFEST.parent


# -- how it is trained ------------------------------------------------------------------------------------------------


@pytest.fixture
def tool(monkeypatch):
    """The training script with settings that finish in a second."""
    pytest.importorskip("stable_baselines3")
    from d4rl_utils.generate import train_behavior_policy as train_behaviour

    small = {"net_arch": [16, 16]}
    monkeypatch.setitem(train_behaviour.SETTINGS, "sac", {"learning_starts": 20, "policy_kwargs": small})
    monkeypatch.setitem(train_behaviour.SETTINGS, "sbx", {"learning_starts": 20, "policy_kwargs": small})
    ppo = {
        "n_steps": 8,
        "batch_size": 32,
        "learning_rate": 3e-4,
        "policy_kwargs": small | {"activation_fn": torch.nn.ReLU},
    }
    monkeypatch.setitem(train_behaviour.SETTINGS, "ppo", ppo)
    monkeypatch.setattr(train_behaviour, "LANES", {"ppo": 4, "sac": 1, "sbx": 1})
    monkeypatch.setattr(train_behaviour, "rollout_returns", lambda *a: rollout_returns(*a[:2], 3, a[3]))
    return train_behaviour


@pytest.mark.parametrize("env", ["hopper", "halfcheetah", "ant"])
def test_environments_are_gymnasiums(tool, env):
    lanes, seeds = tool.LanesEnv(env, 2, seed=5, squash=True), np.random.default_rng(5).integers(2**31, size=2)
    theirs = [make_env(env) for _ in seeds]
    for world, seed in zip(theirs, seeds):
        world.reset(seed=int(seed))
    rng, ends, states = np.random.default_rng(0), 0, lanes.reset()
    np.testing.assert_array_equal(states, np.stack([e.reset()[0] for e in theirs]).astype(np.float32))
    for _ in range(1005 if env == "halfcheetah" else 150):
        noise = rng.normal(size=(2, *lanes.action_space.shape))
        states, rewards, dones, infos = lanes.step(noise)
        for i, world in enumerate(theirs):
            state, reward, terminated, truncated, _ = world.step(np.tanh(noise[i]))
            assert rewards[i] == np.float32(reward) and dones[i] == (terminated or truncated)
            if dones[i]:
                np.testing.assert_array_equal(infos[i]["terminal_observation"], state.astype(np.float32))
                assert infos[i]["TimeLimit.truncated"] == (truncated and not terminated)
                state, ends = world.reset()[0], ends + 1
            np.testing.assert_array_equal(states[i], state.astype(np.float32))
    assert ends


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "sac", "sbx"])
def test_the_exported_actor_acts_as_the_trained_one(tool, tmp_path, algorithm):
    """PPO's with the normalisation of observations folded in, and tanh taken out of the environment."""
    if algorithm == "sbx":
        pytest.importorskip("sbx")
    model = tool.make_model(tool.Train("hopper", algorithm, work_dir=tmp_path))
    if (
        algorithm != "sbx"
    ):  # untrained is enough where nothing but the layers' order can go wrong, and compiling is slow
        model.learn(64)
    states = np.random.default_rng(0).normal(size=(50, 11)).astype(np.float32)
    policy, zeros = Policy(tool.weights_of(model)), np.zeros((50, 3), np.float32)
    if algorithm == "ppo":
        actions, _ = model.predict(model.get_vec_normalize_env().normalize_obs(states), deterministic=True)
        actions, std = np.tanh(actions), model.policy.log_std.exp().detach().numpy()
        got = np.arctanh(policy(states, zeros + 0.5)) - np.arctanh(policy(states, zeros))
        np.testing.assert_allclose(got, np.tile(0.5 * std, (50, 1)), atol=2e-3)
    else:
        actions, _ = model.predict(states, deterministic=True)
    np.testing.assert_allclose(policy(states, zeros), actions, atol=5e-3)  # float16


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_a_killed_training_goes_on_from_its_checkpoint(tool, tmp_path, algorithm, monkeypatch):
    cfg = tool.Train("hopper", algorithm, steps=192, eval_every=64, save_every=64, work_dir=tmp_path)
    looked = tool.evaluate_snapshot

    def look(folder, model, before):
        looked(folder, model, before)
        if model.num_timesteps == 128:
            raise KeyboardInterrupt  # a rung later than the last checkpoint

    monkeypatch.setattr(tool, "evaluate_snapshot", look)
    with pytest.raises(KeyboardInterrupt):
        tool.train(cfg)
    assert [row["steps"] for row in tool.read_log(cfg.folder)] == [0, 64, 128]
    model = tool.make_model(cfg)
    updates = model._n_updates
    assert model.num_timesteps == 64 and updates > 0
    monkeypatch.setattr(tool, "evaluate_snapshot", looked)
    tool.train(cfg)
    assert [row["steps"] for row in tool.read_log(cfg.folder)] == [0, 64, 128, 192]
    assert len((cfg.folder / "log.jsonl").read_text().splitlines()) == 5  # 128 was made twice
    assert tool.make_model(cfg)._n_updates > 2 * updates
    tool.train(cfg)  # done already
    told = json.loads((cfg.folder / "settings.json").read_text())["command"]
    assert told.count(tool.MODULE) == 1
    tool.train(replace(cfg, steps=256, fall_from=0))
    told = json.loads((cfg.folder / "settings.json").read_text())["command"]
    assert told.endswith("--steps 256 --eval_every 64 --fall_from 0 (continued at 192)")
    assert len(list(cfg.folder.glob("rung-*.npz"))) == 5 and not list(cfg.folder.glob("part-*"))


def test_what_is_kept_is_whole_and_described(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "MANIFEST", tmp_path / "policies" / "manifest.json")
    (tmp_path / "policies").mkdir()
    cfg = tool.Train("hopper", "ppo", steps=320, eval_every=64, work_dir=tmp_path)
    tool.train(cfg)
    tool.export(tool.Export(env="hopper", algorithm="ppo", level="expert", low=0, ladder=3, work_dir=tmp_path))
    lines = json.loads(tool.MANIFEST.read_text())
    assert set(lines) == {"hopper-expert", "hopper-ladder"}
    assert [snapshot["steps"] for snapshot in lines["hopper-ladder"]["rungs"]][-1] == lines["hopper-expert"]["steps"]
    assert "train hopper ppo --seed 0" in lines["hopper-expert"]["command"]
    assert str(tmp_path) not in json.dumps(lines)
    before = (tmp_path / "policies" / "hopper-expert.npz").read_bytes()
    with pytest.raises(SystemExit, match="no policy with a return"):
        tool.export(tool.Export(env="hopper", algorithm="ppo", level="expert", low=9999, work_dir=tmp_path))

    def fail(path, **arrays):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(tool.np, "savez_compressed", fail)
    with pytest.raises(OSError, match="disk full"):
        tool.export(tool.Export(env="hopper", algorithm="ppo", level="expert", low=0, work_dir=tmp_path))
    assert (tmp_path / "policies" / "hopper-expert.npz").read_bytes() == before
    assert json.loads(tool.MANIFEST.read_text()) == lines
