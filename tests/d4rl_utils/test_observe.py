"""Partial observations: data and environment show the same, and say so."""

import numpy as np
import pytest
from test_trainer import flags, only_run

import trainer
import utils
from config import BambaConfig
from d4rl_utils import Dataset, DatasetInfo, Transitions, make_env, make_eval_env, open_data
from d4rl_utils.observe import Observe, parse_observe, partly

pytest.importorskip("mujoco")


def recorded(episodes: int = 3, steps: int = 12) -> tuple[Transitions, list, list]:
    """Episodes of hopper as a recorder has them; the seeds and actions that play them again."""
    env, rng, rows, plays = make_env("hopper"), np.random.default_rng(0), [], []
    for seed in range(episodes):
        state, actions = env.reset(seed=seed)[0], rng.uniform(-1, 1, (steps, 3)).astype(np.float32)
        for i, action in enumerate(actions):
            after, reward, *_ = env.step(action)
            rows.append((state, action, reward, after, False, i == steps - 1, seed * steps))
            state = after
        plays.append(actions)
    kinds = np.float32, np.float32, np.float32, np.float32, bool, bool, np.int64
    return Transitions(*(np.array(column, kind) for column, kind in zip(zip(*rows), kinds))), plays


def shown(text: str, source: str = "d4rl", body: str = "hopper") -> Dataset:
    transitions, _ = recorded()
    info = DatasetInfo("hopper-medium-v2", source, "f", "sha", len(transitions.ends), 3, 1.0)
    return partly(Dataset(transitions, info), text, body)


@pytest.mark.parametrize("text", ["full", "positions", "delay:1", "delay:3", "delay:50"])
def test_the_environment_shows_what_the_data_show(text):
    seen = shown(text).transitions
    env = make_eval_env(BambaConfig(env="hopper", observe=text)).make()
    for seed, actions in enumerate(recorded()[1]):
        state, _ = env.reset(seed=seed)
        for row, action in enumerate(actions, seed * 12):
            np.testing.assert_array_equal(seen.states[row], state.astype(np.float32))
            state = env.step(action)[0]
            np.testing.assert_array_equal(seen.next_states[row], state.astype(np.float32))


@pytest.mark.parametrize("text", ["positions", "noisy:0.1", "delay:3", "drop:0.3", "flicker:0.3"])
def test_a_step_ends_in_what_the_next_one_begins_with(text):
    seen = shown(text).transitions
    inner = np.flatnonzero(~seen.ends)
    np.testing.assert_array_equal(seen.next_states[inner], seen.states[inner + 1])
    again = shown(text).transitions
    np.testing.assert_array_equal(seen.states, again.states)  # the data are the same for every run
    np.testing.assert_array_equal(seen.next_states, again.next_states)


def test_amounts_are_what_they_say():
    x, rng = np.ones((20_000, 4)), np.random.default_rng(0)
    assert (Observe("noisy", 0.5).corrupt(x, rng) - x).std() == pytest.approx(0.5, rel=0.02)
    dropped, flickered = (Observe(kind, 0.2).corrupt(x, rng) for kind in ("drop", "flicker"))
    assert (dropped == 0).mean() == pytest.approx(0.2, abs=0.01) == (flickered == 0).mean()
    assert 0 < (dropped == 0).all(1).mean() < 0.01  # single sensors
    assert set((flickered == 0).mean(1)) == {0.0, 1.0}  # whole observations


@pytest.mark.parametrize("text", ["noisy:0.1", "drop:0.3", "flicker:0.3"])
def test_an_episodes_noise_is_its_seeds(text):
    def play(env, seed):
        states = [env.reset(seed=seed)[0]]
        return np.array(states + [env.step(np.zeros(3))[0] for _ in range(10)])

    env, full = (make_eval_env(BambaConfig(env="hopper", observe=kind)).make() for kind in (text, "full"))
    one = play(env, 1)
    play(env, 2)
    np.testing.assert_array_equal(play(env, 1), one)
    assert (one != play(full, 1)).any()
    flat = make_eval_env(BambaConfig(env="hopper", observe="noisy:0")).make()
    np.testing.assert_array_equal(play(flat, 1), play(full, 1))  # the simulator's own stream is untouched


@pytest.mark.parametrize(
    "text", ["", "half", "positions:1", "full:1", "noisy", "noisy:", "noisy:-1", "noisy:nan", "noisy:inf", "delay:0"]
    + ["delay:1.5", "drop:2", "flicker:x", "Positions"],
)  # fmt: skip
def test_nonsense_is_refused(text):
    with pytest.raises(ValueError, match=f"--observe {text} is none of full, positions"):
        parse_observe(text)


def test_what_was_shown_is_in_the_datas_name():
    assert shown("full").identity.name == "hopper-medium-v2" and shown("full").identity.source == "d4rl"
    info = shown("drop:0.1").identity
    assert (info.name, info.source) == ("hopper-medium-v2+drop:0.1", "custom")  # no D4RL score
    assert shown("drop:0.1", "local").identity.source == "local"
    with pytest.raises(ValueError, match="positions is known for hopper"):
        shown("positions", body="")


def test_positions_of_an_unknown_environment(hopper_file, capsys):
    with pytest.raises(SystemExit):
        trainer.main(flags(hopper_file, "out", env="Pendulum-v1", observe="positions"))
    assert (
        "positions is known for hopper, walker2d, halfcheetah, ant, CartPole-v1, Acrobot-v1" in capsys.readouterr().err
    )
    with pytest.raises(ValueError, match="--observe noise:1 is none"):
        open_data(BambaConfig(dataset=str(hopper_file), observe="noise:1"))


@pytest.mark.parametrize("agent", ["bamba", "dmamba"])
def test_a_run_and_its_evaluation(hopper_file, tmp_path, capsys, agent):
    words = ["--agent", agent, "--dataset", str(hopper_file), "--observe", "positions", "--no_tensorboard"]
    words += [
        "--d_model",
        "16",
        "--n_layers",
        "1",
        "--batch_size",
        "8",
        "--updates_per_epoch",
        "2",
        "--num_epochs",
        "2",
    ]
    words += ["--num_eval_episodes", "1", "--eval_freq", "2", "--output_dir", str(tmp_path), "--device", "cpu"]
    assert trainer.main(words) == 0
    folder = only_run(tmp_path)
    assert utils.main(["--checkpoint", str(folder), "--episodes", "1", "--device", "cpu"]) in (None, 0)
    said = capsys.readouterr().out
    assert "walk+positions" in said and "hopper v4, positions" in said
    agent, _ = utils.load(folder / "last_checkpoint.pt", compile=False, cuda_graphs=False)
    assert agent.spec.state == 5 and len(agent.obs_normalizer.mean) == 5
