"""What the settings ask for, files of any environment, and whose environment evaluates."""

from types import SimpleNamespace

import gymnasium
import h5py
import numpy as np
import pytest
import torch
from test_trainer import flags, only_run

import trainer
import utils
from agent import Bamba
from common import logger
from common.env_spec import EnvSpec
from config import BambaConfig
from d4rl_utils import make_env, make_eval_env, open_data, spec_of
from d4rl_utils.environment import frames_per_second, time_limit
from d4rl_utils.resolve import body_and_type, resolve_dataset

pytest.importorskip("mujoco")


class Reach(gymnasium.Env):
    """A point to be brought to 3; its action is a force from 0 to 5, so nothing here is symmetric."""

    metadata = {"render_modes": [], "render_fps": 12}  # noqa: RUF012  Gymnasium's own spelling
    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gymnasium.spaces.Box(0.0, np.array([5.0], np.float32))

    def __init__(self, render_mode=None):
        self.taken = []

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.v = self.np_random.normal(size=2) * 0.1
        return np.array([self.x, self.v]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.v += 0.1 * (action[0] - 2.5)
        self.x += 0.1 * self.v
        return np.array([self.x, self.v]), -abs(self.x - 3), False, False, {}


@pytest.fixture(scope="module", autouse=True)
def registered():
    gymnasium.register("Reach-v0", Reach, max_episode_steps=20)
    yield
    del gymnasium.registry["Reach-v0"]


@pytest.fixture
def reach_file(tmp_path):
    """Ten episodes of 20 random steps, without `timeouts`: only the environment's limit tells where they end."""
    env, columns = make_env("Reach-v0"), {k: [] for k in ("observations", "actions", "rewards", "terminals")}
    rng = np.random.default_rng(0)
    for episode in range(10):
        state, over = env.reset(seed=episode)[0], False
        while not over:
            action = rng.uniform(0, 5, 1).astype(np.float32)
            following, reward, dead, over, _ = env.step(action)
            for key, value in zip(columns, (state, action, reward, dead)):
                columns[key].append(value)
            state = following
    path = tmp_path / "reach.hdf5"
    with h5py.File(path, "w") as f:
        for key, values in columns.items():
            f[key] = np.array(values)
    return path


def test_settings_mean_one_thing(tmp_path):
    cfg = lambda **changes: BambaConfig(**{"dataset_dir": str(tmp_path), **changes})  # noqa: E731
    (tmp_path / "mine.hdf5").touch()
    for changes, expected in [
        ({}, ("d4rl", "hopper", "medium", "auto", "")),
        ({"env": "ant", "dataset_type": "expert"}, ("d4rl", "ant", "expert", "auto", "")),
        ({"dataset": "walker2d-medium-replay-v2"}, ("d4rl", "walker2d", "medium-replay", "auto", "")),
        (
            {"dataset": "walker2d-medium-replay-v2", "env": "walker2d"},
            ("d4rl", "walker2d", "medium-replay", "auto", ""),
        ),
        ({"dataset": "ant-expert-local"}, ("d4rl", "ant", "expert", "local", "")),
        ({"dataset": "ant-expert", "data": "local"}, ("d4rl", "ant", "expert", "local", "")),
        ({"dataset": "minari:mujoco/hopper/medium-v0"}, ("minari", "", "", "", "mujoco/hopper/medium-v0")),
        ({"dataset": "a/b.hdf5", "env": "Pendulum-v1"}, ("file", "Pendulum-v1", "", "", "a/b.hdf5")),
        ({"dataset": "mine.hdf5"}, ("file", "hopper", "", "", str(tmp_path / "mine.hdf5"))),
    ]:
        assert tuple(resolve_dataset(cfg(**changes))) == expected, changes


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dataset": "hoper-medium-v2"}, "neither a name of D4RL's .*Did you mean hopper-medium-v2"),
        ({"dataset": "gibberish"}, r"neither .*nor minari:NAME .*nor a file \(.hdf5\).$"),
        ({"dataset": "hopper-medium-v2", "env": "walker2d"}, "--env walker2d contradicts --dataset hopper-medium-v2"),
        ({"dataset": "hopper-expert", "dataset_type": "random"}, "--dataset_type random contradicts"),
        ({"dataset": "minari:a/b-v0", "env": "ant"}, "--env ant contradicts .* bring their own"),
        ({"dataset": "mine.hdf5", "dataset_type": "expert"}, "a file has no type"),
        ({"dataset": "hopper-medium-v2", "data": "local"}, "contradict each other.*quick preset"),
        ({"dataset": "hopper-medium-local", "data": "d4rl"}, "contradict each other"),
        ({"data": "cloud"}, "'cloud'.*auto, d4rl, local"),
        ({"env": "hoper"}, "unknown env 'hoper'.*Did you mean hopper"),
        ({"env": "Pendulum-v1"}, "D4RL has no data of 'Pendulum-v1'.*--dataset FILE.hdf5"),
    ],
)
def test_what_means_nothing_or_two_things_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        resolve_dataset(BambaConfig(**changes))


def test_any_environment_has_its_own_sizes_bounds_and_limit():
    env = make_env("Reach-v0")
    assert spec_of(env)[:4] == (2, 1, (0.0,), (5.0,)) and frames_per_second(env) == 12 and time_limit("Reach-v0") == 20
    assert spec_of(make_env("Pendulum-v1")).high == (2.0,) and frames_per_second(make_env("hopper")) == 125
    assert time_limit("hopper") == time_limit("Nothing-v9") == 1000


@pytest.mark.parametrize(
    "seen, done, words",
    [
        (gymnasium.spaces.Discrete(3), None, r"shows Discrete\(3\); an agent here sees flat vectors"),
        (gymnasium.spaces.Box(0, 1, (4, 4)), None, "shows Box"),
        (gymnasium.spaces.Dict({"a": Reach.observation_space}), None, "shows Dict"),
        (None, gymnasium.spaces.MultiBinary(3), "wants actions from MultiBinary"),
        (None, gymnasium.spaces.Box(-np.inf, np.inf, (2,)), "without bounds"),
    ],
)
def test_other_spaces_are_refused(seen, done, words):
    env = SimpleNamespace(
        spec=None, observation_space=seen or Reach.observation_space, action_space=done or Reach.action_space
    )
    with pytest.raises(ValueError, match=words):
        spec_of(env)


def test_a_missing_simulator_is_named(monkeypatch):
    def make(*args, **more):
        raise gymnasium.error.DependencyNotInstalled('Box2D is not installed, run `pip install "gymnasium[box2d]"`')

    monkeypatch.setattr(gymnasium, "make", make)
    with pytest.raises(ImportError, match="LunarLander-v3 cannot be made: Box2D is not installed"):
        make_env("LunarLander-v3")


@pytest.mark.slow
def test_a_run_on_a_file_of_another_environment(reach_file, tmp_path, capsys):
    """From file to evaluation: episodes by the environment's limit, actions in its bounds, returns for scores."""
    out = tmp_path / "out"
    argv = flags(reach_file, out, env="Reach-v0", num_epochs=2, eval_freq=1)
    assert trainer.main(argv) == 0
    said = capsys.readouterr()
    folder = only_run(out)
    rows = logger.read_log(folder / "log.jsonl")
    assert folder.name.startswith("reach-bamba-s42-") and rows[0]["score_name"] == "return"
    assert rows[0]["data"]["episodes"] == 10 and rows[0]["behavior_score"] == rows[0]["data"]["return_mean"]
    evaluations = [r for r in rows if "eval/return_mean" in r]
    assert len(evaluations) == 2 and not any("eval/score" in r for r in rows)
    assert f"return      {evaluations[-1]['eval/return_mean']:.1f}  last, update 10" in said.out
    assert "score" not in said.out and "return=" in said.err  # the progress bar too
    assert (folder / "training_curves.png").stat().st_size > 10_000

    agent, _ = utils.load(folder)
    assert agent.spec.low == (0.0,) and agent.spec.high == (5.0,)
    for env in ("Reach-v0", "reach"):
        utils.main(["--checkpoint", str(folder), "--episodes", "2", "--device", "cpu", "--env", env])
    said = capsys.readouterr().out
    assert "score   none: there are no reference returns for Reach-v0" in said and "eval    in Reach-v0" in said
    with pytest.raises(SystemExit):
        utils.main(["--checkpoint", str(folder), "--env_version", "v5", "--device", "cpu"])
    assert "--env_version v5 is for D4RL's bodies" in capsys.readouterr().err


def test_bounds_are_kept_whatever_they_are(tiny):
    from agent import Bamba
    from common.interface import EnvSpec

    spec = EnvSpec(2, 2, (0.0, -3.0), (5.0, -1.0))
    pi = Bamba(tiny(), spec).policy(torch.randn(500, 16) * 50)
    assert (pi >= torch.tensor(spec.low)).all() and (pi <= torch.tensor(spec.high)).all()
    assert (pi.amax(0) - pi.amin(0) > torch.tensor([2.5, 1.0])).all()


def test_a_known_file_is_not_evaluated_in_another_body(tmp_path):
    """walker2d and halfcheetah have the same dims: only the file's identity tells them apart."""
    from d4rl_utils.generate.rollout import make_local

    path = str(make_local("halfcheetah", "random", 100, 0, 1, tmp_path).path)
    with pytest.raises(
        ValueError, match="is halfcheetah-random-local: evaluate it with --env halfcheetah, not walker2d"
    ):
        open_data(BambaConfig(env="walker2d", dataset=path))
    assert open_data(BambaConfig(env="halfcheetah", dataset=path)).identity.source == "local"


def test_scores_are_on_d4rls_scale_for_bodies_alone():
    assert make_eval_env(BambaConfig(dataset="a.hdf5")).score(3234.3) == 100
    for env in ("Hopper-v4", "Pendulum-v1"):
        stage = make_eval_env(BambaConfig(dataset="a.hdf5", env=env))
        assert (stage.name, stage.score, stage.scale) == (env, None, "")


@pytest.mark.parametrize(
    "settings, found",
    [
        ({}, ("hopper", "medium")),
        ({"env": "ant", "dataset_type": "expert"}, ("ant", "expert")),
        ({"dataset": "walker2d-expert-v2"}, ("walker2d", "expert")),
        ({"dataset": "halfcheetah-medium-replay-local"}, ("halfcheetah", "medium-replay")),
        ({"dataset": "minari:mujoco/walker2d/expert-v0"}, ("walker2d", "expert")),
        ({"dataset": "minari:D4RL/door/human-v2"}, ("", "human")),
        ({"dataset": "mine.hdf5", "env": "walker2d"}, ("walker2d", "medium")),
        ({"dataset": "mine.hdf5", "env": "Pendulum-v1"}, ("", "medium")),
        ({"env": "Pendulum-v1"}, ("Pendulum-v1", "medium")),
    ],
)
def test_the_body_and_the_type_of_data(settings, found):
    assert body_and_type(BambaConfig(**settings)) == found


def test_penalties_come_with_the_datas_name():
    spec = EnvSpec(17, 6, (-1.0,) * 6, (1.0,) * 6)

    def penalties(**changes):
        agent = Bamba(BambaConfig(**changes), spec)
        return agent.beta_actor, agent.beta_critic

    assert penalties(dataset="walker2d-expert-v2") == penalties(env="walker2d", dataset_type="expert") == (0.01, 0.5)
    assert penalties(dataset="halfcheetah-medium-v2") == (0.001, 0.01)
    assert penalties(dataset="halfcheetah-medium-v2", min_beta_actor=0.01) == (0.01, 0.01)
    assert penalties(dataset="walker2d-medium-v2", min_beta_actor=0.01) == (0.05, 0.1)
    assert penalties(dataset="walker2d-medium-v2", min_beta_actor=0.1, beta_actor=0.0) == (0.0, 0.1)
