"""What an environment returns is made sound, or said to be broken."""

import gymnasium
import h5py
import numpy as np
import pytest
from test_trainer import flags

import trainer
from common.checkpoint import read_checkpoint
from common.env_spec import EnvFault
from d4rl_utils import make_env, read_hdf5
from d4rl_utils.names import MAX_EPISODE_STEPS
from gym_utils import make_discrete

pytest.importorskip("mujoco")


FLAWS = ("", "shape", "nan", "words", "array", "two", "inf", "dtype", "raises")


class Odd(gymnasium.Env):
    """Never ends; `flaw` says what else is wrong, from the second step on."""

    metadata = {"render_modes": [], "render_fps": 10}  # noqa: RUF012
    observation_space = gymnasium.spaces.Box(-10, 10, (11,), np.float64)
    action_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, flaw="", render_mode=None):
        self.flaw = flaw

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(11, np.float32 if self.flaw == "dtype" else np.float64), {}

    def step(self, action):
        self.t += 1
        flaw = self.flaw if self.t == 2 else ""
        if flaw == "raises":
            raise KeyError("the wheel came off")
        state = {"shape": np.zeros(12), "nan": np.full(11, np.nan), "words": np.array(["a"] * 11)}.get(
            flaw, np.zeros(11)
        )
        reward = {"array": np.ones(1), "two": np.ones(2), "inf": np.inf}.get(flaw, 1.0)
        return state, reward, np.bool_(False), False, {}


@pytest.fixture(scope="module", autouse=True)
def registered():
    for flaw in FLAWS:
        gymnasium.register(f"Odd{flaw}-v0", Odd, kwargs={"flaw": flaw})
    yield
    for flaw in FLAWS:
        del gymnasium.registry[f"Odd{flaw}-v0"]


@pytest.mark.parametrize(
    "flaw, words",
    [
        ("shape", r"Oddshape-v0 shows observations of shape \(12,\), its space says \(11,\)"),
        ("nan", "Oddnan-v0 showed an observation that is not finite, after step 2"),
        ("words", "Oddwords-v0 shows observations of <U1, its space says float64"),
        ("two", "Oddtwo-v0 pays .* in step 2 of the episode with seed 0: that is no finite number"),
        ("inf", "Oddinf-v0 pays inf in step 2"),
        (
            "raises",
            r"failed in step 2 of the episode with seed 0: KeyError: 'the wheel came off' \(.*env.py, line \d+\)",
        ),
    ],
)
def test_what_cannot_be_mended_is_said(flaw, words):
    env = make_env(f"Odd{flaw}-v0")
    env.reset(seed=0)
    env.step(np.zeros(3, np.float32))
    with pytest.raises(EnvFault, match=words):
        env.step(np.zeros(3, np.float32))


def test_what_can_be_mended_is_and_every_episode_ends(caplog):
    for _ in range(2):
        env = make_env("Oddarray-v0")
        env.reset(seed=0)
        rewards = [env.step(np.zeros(3, np.float32)) for _ in range(MAX_EPISODE_STEPS)]
    assert caplog.text.count("Oddarray-v0 has no time limit: its episodes are cut after 1000 steps") == 1
    assert all(type(reward) is float and type(dead) is bool for _, reward, dead, _, _ in rewards)
    assert [late for *_, late, _ in rewards] == [False] * (MAX_EPISODE_STEPS - 1) + [True]
    state, _ = make_env("Odddtype-v0").reset(seed=0)
    assert state.dtype == np.float64


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_run_in_a_broken_environment_ends_with_a_sentence_and_is_saved(hopper_file, tmp_path, capsys, seeds):
    argv = flags(hopper_file, tmp_path, env="Oddraises-v0", num_eval_episodes=1, num_epochs=2, num_seeds=seeds)
    assert trainer.main(argv) == 1
    said = capsys.readouterr().err
    assert "error: Oddraises-v0 failed in step 2 of the episode with seed 1000000" in said and "last good" in said
    found = [read_checkpoint(path)["updates"] for path in tmp_path.rglob("last_checkpoint.pt")]
    assert found == [10] * seeds  # all that was learned before the evaluation, not what the epoch before had saved


def test_an_environment_needs_no_render_mode_and_says_why_it_cannot_be_made():
    class Plain(Odd):
        def __init__(self, broken=False):
            self.flaw = ""
            if broken:
                raise RuntimeError("no licence")

    gymnasium.register("Plain-v0", Plain)
    assert make_env("Plain-v0").reset(seed=0)[0].shape == (11,)
    gymnasium.register("Plain-v1", Plain, kwargs={"broken": True})
    for make in (make_env, lambda name: make_discrete(name, cnn=False)):
        with pytest.raises(EnvFault, match="Plain-v1 cannot be made: RuntimeError: no licence"):
            make("Plain-v1")
    for name in ("Plain-v0", "Plain-v1"):
        del gymnasium.registry[name]


def test_online_agents_have_the_same_door():
    class Discrete(Odd):
        observation_space, action_space = gymnasium.spaces.Box(-10, 10, (11,), np.float32), gymnasium.spaces.Discrete(2)

    for flaw, words in (("nan", "not finite"), ("raises", "failed in step 2"), ("two", "no finite number")):
        gymnasium.register("Oddest-v0", Discrete, kwargs={"flaw": flaw})
        env = make_discrete("Oddest-v0", cnn=False)
        env.reset(seed=0)
        env.step(1)
        with pytest.raises(EnvFault, match=words):
            env.step(1)
        del gymnasium.registry["Oddest-v0"]


def test_columns_of_d4rls_first_files_are_read(hopper_file, tmp_path, caplog):
    """Rewards and flags of shape (N, 1); actions of one dim as (N,)."""
    path, other = tmp_path / "first.hdf5", tmp_path / "one.hdf5"
    with h5py.File(hopper_file) as old, h5py.File(path, "w") as new, h5py.File(other, "w") as flat:
        for key, data in old.items():
            one_number = key in ("rewards", "terminals", "timeouts")
            new[key] = data[:][:, None] if one_number else data[:]
            flat[key] = data[:, 0] if key == "actions" else data[:]
    mine, theirs = read_hdf5(path).transitions, read_hdf5(hopper_file).transitions
    assert all(np.array_equal(a, b) for a, b in zip(mine, theirs))
    assert "'rewards' has shape (400, 1) and is read as (400,)" in caplog.text
    assert read_hdf5(other).transitions.actions.shape == (400, 1)
