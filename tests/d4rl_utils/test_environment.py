"""The environments agents are evaluated in, and the arrays that stand for them when data are rolled."""

import logging
import sys
import warnings

import numpy as np
import pytest

from common.env_spec import EnvSpec
from d4rl_utils import ENVS, environment, make_env
from d4rl_utils.generate.vector_env import BatchedMujoco
from d4rl_utils.names import DIMS

pytest.importorskip("mujoco")


@pytest.mark.parametrize("env", ENVS)
@pytest.mark.parametrize("version", ["v4", "v5"])
def test_bodies_have_the_dims_of_the_data_and_say_nothing(env, version):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        world = make_env(env, version)
    assert (world.observation_space.shape[0], world.action_space.shape[0]) == DIMS[env]
    assert world.spec.id.endswith(version) and world.spec.max_episode_steps == 1000
    world.close()


def test_only_the_one_warning_is_silenced():
    before = list(warnings.filters)
    make_env("hopper").close()
    assert [f for f in warnings.filters if "out of date" in str(f[1])] == [] and warnings.filters == before


def test_unknown_bodies_and_versions():
    with pytest.raises(ValueError, match="'reacher'.*hopper"):
        make_env("reacher")
    with pytest.raises(ValueError, match="'v2'.*v4"):
        make_env("hopper", "v2")


@pytest.mark.parametrize("package", ["gymnasium", "mujoco"])
def test_a_missing_package_is_named_with_its_cure(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install"):
        make_env("hopper")


@pytest.mark.parametrize("version, lines", [("3.4.0", 0), ("3.5.0", 1), ("3.10.1", 1), ("4.0", 1)])
def test_a_newer_mujoco_is_told_once(monkeypatch, caplog, version, lines):
    environment._compare_mujoco.cache_clear()
    monkeypatch.setattr(environment, "installed", lambda package: version)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            make_env("hopper").close()
    environment._compare_mujoco.cache_clear()
    assert len([r for r in caplog.records if "not comparable" in r.getMessage()]) == lines


@pytest.mark.parametrize("env", ENVS)
def test_lanes_are_gymnasium_step_by_step_and_bit_by_bit(env):
    n, steps = 3, 250
    rng, lanes, worlds = np.random.default_rng(0), BatchedMujoco(env, np.arange(n)), [make_env(env) for _ in range(n)]
    states = np.stack([w.reset(seed=i)[0] for i, w in enumerate(worlds)])
    fallen = 0
    for _ in range(steps):
        np.testing.assert_array_equal(lanes.states, states.astype(np.float32))
        who = np.sort(rng.permutation(n)[: rng.integers(1, n + 1)])  # any subset may be stepped
        actions = np.tanh(rng.standard_normal((len(who), DIMS[env][1]), np.float32))
        rewards, terminals = lanes.step(who, actions)
        for i, lane in enumerate(who):
            states[lane], reward, terminal, _, _ = worlds[lane].step(actions[i].astype(np.float64))
            assert (rewards[i], terminals[i]) == (reward, terminal)
            if terminal:
                states[lane] = worlds[lane].reset()[0]
                lanes.reset(lane)
                fallen += 1
    assert fallen > 0 or env == "halfcheetah"
    lanes.close()


# -- what was recorded, beside what an environment takes ---------------------------------------------


def test_actions_outside_the_bounds_are_told_and_far_outside_refused(caplog):
    spec = EnvSpec(3, 2, (-1.0, 0.0), (1.0, 4.0))
    actions = np.float32([[1, 4], [-1, 0], [0.5, 2]] * 10)
    environment.check_recorded("hopper", spec, 3, actions)
    environment.check_recorded("hopper", spec, 3, actions * np.float32(1.0000001))  # rounding
    assert not caplog.text
    actions[4, 1] = 8.0  # two and a half times its range from the middle: (8 - 2) / 2 = 3
    environment.check_recorded("hopper", spec, 3, actions)
    assert "3.3 % of the rows have actions outside hopper's bounds, up to 3 times" in caplog.text
    actions[4, 1] = 2 + 21.0
    with pytest.raises(ValueError, match=r"up to 10.5 times what hopper takes, and 3.3% of the rows .* in other units"):
        environment.check_recorded("hopper", spec, 3, actions)
    for dims in ((4, actions), (3, actions[:, :1])):
        with pytest.raises(ValueError, match="--env must name the environment"):
            environment.check_recorded("hopper", spec, *dims)
