"""The ant's walker: what is shipped walks where it is told and says how it was made; its training can be repeated."""

import json
from dataclasses import replace

import numpy as np
import pytest

from d4rl_utils.generate.behavior_policy import Policy
from ogbench_utils.generate import rollout as local

pytest.importorskip("ogbench.online_locomotion")


@pytest.mark.parametrize("angle", [0.0, 2.1, 4.2])
def test_the_shipped_ant_walks_where_it_is_told(angle):
    import gymnasium

    env, move, way = gymnasium.make("online-ant-v0"), local.walk(), np.array([np.cos(angle), np.sin(angle)])
    made = []
    for seed in range(3):
        state, _ = env.reset(seed=seed)
        start = env.unwrapped.data.qpos[:2].copy()
        for _ in range(60):
            state, _, over, _, _ = env.step(move(np.concatenate([[0, 0], state]), way))
            assert not over
        made.append(env.unwrapped.data.qpos[:2] - start)
    env.close()
    along, aside = np.mean(made, 0) @ way, abs(np.mean(made, 0) @ [-way[1], way[0]])
    assert along > 3 and aside < along / 2  # metres, in six seconds


def test_the_walker_says_how_it_was_made():
    with np.load(local.WALKER) as file:
        told = json.loads(str(file["made"]))
    assert {"algorithm", "command", "seed", "steps", "versions", "licence"} <= set(told)
    assert told["metres_a_step"] > 0.1 and told["fell"] <= 0.2 * told["ants"]
    assert local.WALKER.stat().st_size < 400_000


@pytest.fixture
def tool(monkeypatch, tmp_path):
    """The training script with settings that finish in seconds."""
    pytest.importorskip("sbx")
    from ogbench_utils.generate import train_walker

    small = {"learning_starts": 20, "batch_size": 8, "policy_kwargs": {"net_arch": [8, 8]}}
    monkeypatch.setattr(train_walker, "SETTINGS", train_walker.SETTINGS | small)
    for name in ("LOOK", "JUDGED"):
        monkeypatch.setattr(train_walker, name, (2, 5))
    monkeypatch.setattr(train_walker, "WALKER", tmp_path / "ant.npz")
    return train_walker


@pytest.mark.slow
def test_a_killed_training_goes_on_and_its_best_rung_is_shipped(tool, tmp_path, monkeypatch):
    cfg = tool.Walker("train", steps=80, eval_every=40, work_dir=tmp_path)
    with pytest.raises(SystemExit, match="train first"):
        tool.keep(cfg)
    tool.train(replace(cfg, steps=40))
    tool.train(cfg)
    lines = (cfg.folder / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["steps"] for line in lines] == [40, 80]  # none twice: it did not begin anew
    assert json.loads((cfg.folder / "state.json").read_text()) == {"steps": 80}
    biases = {}
    for steps in (40, 80):
        with np.load(cfg.folder / f"rung-{steps:08d}.npz") as snapshot:
            biases[steps] = float(snapshot["last_fc.bias"][0])
    monkeypatch.setattr(tool, "walk", lambda policy, *_: (float(policy.mean[1][0]), 0))
    tool.keep(cfg)
    with np.load(tool.WALKER) as file:
        shipped, told = dict(file), json.loads(str(file["made"]))
    assert told["steps"] == max(biases, key=biases.get) and len(set(biases.values())) == 2
    with np.load(cfg.folder / f"rung-{told['steps']:08d}.npz") as snapshot:
        assert set(shipped) == {*snapshot, "made"} and all(np.array_equal(shipped[k], snapshot[k]) for k in snapshot)
    assert Policy({k: v for k, v in shipped.items() if k != "made"}).mean[1].shape == (8,)


def test_an_ant_on_its_back_ends_the_episode_at_a_cost(tool):
    env = tool.make_ant()
    env.reset(seed=0)
    inner = env.unwrapped
    position, velocity = inner.data.qpos.copy(), 0 * inner.data.qvel
    for quaternion, over in ([1, 0, 0, 0], False), ([0, 1, 0, 0], True), ([0, 0, 1, 0], True), ([0, 0, 0, 1], False):
        position[2], position[3:7] = 0.7, quaternion
        inner.set_state(position, velocity)
        _, reward, ended, _, _ = env.step(np.zeros(8))
        assert ended == over and (reward < tool.ON_ITS_BACK / 2) == over
    env.close()
