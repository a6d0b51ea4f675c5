"""The bodies' quick steps against Gymnasium's own, to the bit, and what they do with what is not sound."""

import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.envs.mujoco.hopper_v4 import HopperEnv

from common.env_spec import EnvFault
from d4rl_utils import make_env
from d4rl_utils.body_env import BodyEnv
from d4rl_utils.sound_env import SoundEnv

BODIES = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4", "ant": "Ant-v4"}


def gymnasiums(env_id):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return gymnasium.make(env_id)


@pytest.mark.parametrize("strength", [0.2, 1.0])  # weak actions let bodies stand longer, strong ones throw them
@pytest.mark.parametrize("body", BODIES)
def test_every_step_is_gymnasiums_to_the_bit(body, strength):
    ours, theirs = make_env(body), gymnasiums(BODIES[body])
    assert isinstance(ours, BodyEnv)
    rng, falls, cuts = np.random.default_rng(0), 0, 0
    for seed in range(8):
        state, _ = ours.reset(seed=seed)
        expected, _ = theirs.reset(seed=seed)
        assert np.array_equal(state, expected)
        done = False
        while not done:
            action = (strength * rng.uniform(-1, 1, ours.action_space.shape)).astype(np.float32)
            state, reward, terminated, truncated, info = ours.step(action)
            expected = theirs.step(action)
            assert np.array_equal(state, expected[0]) and state.dtype == expected[0].dtype
            assert (reward, terminated, truncated) == expected[1:4]
            assert info == {key: expected[4][key] for key in info}
            assert isinstance(reward, float) and isinstance(terminated, bool) and isinstance(truncated, bool)
            done = terminated or truncated
            falls, cuts = falls + terminated, cuts + truncated
            if cuts == 2:
                return
    assert falls or body == "halfcheetah"


def test_unhealthy_is_what_gymnasium_says(tmp_path, monkeypatch):
    """States that random actions do not reach: thrown high, turned over, in fast motion."""
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its remarks about them into a file of the present folder
    rng, seen = np.random.default_rng(1), set()
    for body, env_id in BODIES.items():
        ours, theirs = make_env(body), gymnasiums(env_id)
        for seed in range(40):
            ours.reset(seed=seed), theirs.reset(seed=seed)
            at, speed = ours.unwrapped.data.qpos.copy(), ours.unwrapped.data.qvel.copy()
            at += rng.normal(size=at.shape) * rng.choice([0.0, 0.1, 0.5])
            speed += rng.normal(size=speed.shape) * rng.choice([0.0, 10.0, 200.0])
            for env in (ours, theirs):
                env.unwrapped.set_state(at, speed)
            action = np.zeros(ours.action_space.shape, np.float32)
            one, other = ours.step(action), theirs.step(action)
            assert np.array_equal(one[0], other[0]) and one[1:4] == other[1:4]
            seen.add((body, one[2]))
    assert len(seen) == 7  # halfcheetah is never unhealthy


def test_states_handed_out_stay_what_they_were():
    env = make_env("hopper")
    first, _ = env.reset(seed=0)
    second, *_ = env.step(env.action_space.sample())
    kept = first.copy(), second.copy()
    for _ in range(5):
        env.step(env.action_space.sample())
    assert np.array_equal(first, kept[0]) and np.array_equal(second, kept[1])


def test_a_wrong_action_and_a_missing_reset_are_refused():
    env = make_env("hopper")
    with pytest.raises(EnvFault, match="ResetNeeded"):
        env.step(np.zeros(3, np.float32))
    env.reset(seed=3)
    with pytest.raises(EnvFault, match=r"in step 1 of the episode with seed 3: ValueError: Action dimension mismatch"):
        env.step(np.zeros(1, np.float32))


def test_what_is_not_finite_is_said():
    env = make_env("hopper")
    env.reset(seed=5)
    env.unwrapped._forward_reward_weight = np.nan
    with pytest.raises(EnvFault, match="pays nan in step 1 of the episode with seed 5"):
        env.step(np.zeros(3, np.float32))


def test_others_go_the_usual_way(request):
    def register(name, **options):
        gymnasium.register(name, **options)
        request.addfinalizer(lambda: gymnasium.registry.pop(name))

    class Mine(HopperEnv):
        pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        register("Mine-v0", entry_point=Mine, max_episode_steps=1000)
        register("Heavy-v0", entry_point=HopperEnv, max_episode_steps=1000, kwargs={"healthy_reward": 2.0})
        register("Endless-v0", entry_point=HopperEnv)
        register("Short-v0", entry_point=HopperEnv, max_episode_steps=7)
    for name in ("Mine-v0", "Heavy-v0", "Endless-v0", "Hopper-v5", "Pendulum-v1"):
        assert type(make_env(name)) is SoundEnv
    assert type(make_env("hopper", "v5")) is SoundEnv
    assert type(make_env("Hopper-v4")) is BodyEnv
    short = make_env("Short-v0")
    short.reset(seed=0)
    assert [short.step(np.zeros(3, np.float32))[3] for _ in range(7)] == [False] * 6 + [True]
