"""What is said to have no effect has none: agents that differ in it alone learn the same and act the same."""

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch
from conftest import TINY
from test_dqn import SPEC as DISCRETE
from test_dqn import batch_of
from test_dqn import tiny as tiny_dqn
from test_opso import sampler as goal_sampler
from test_opso import tiny as tiny_opso
from test_ppo import SIZES as PPO_SIZES
from test_ppo import begin, practise

import trainer
from common.interface import EnvSpec
from config import CONFIGS, BambaConfig, PPOConfig, idle_flags, parse
from config.shared import Only, Range, marks_of, metadata_of
from dqn import DQN
from opso import Opso
from utils import agent_of

BODY = EnvSpec(11, 3, (-1.0,) * 3, (1.0,) * 3)
MAZE = EnvSpec(2, 2, (-1.0,) * 2, (1.0,) * 2)


def another(cfg, name: str):
    """A value of the setting that it has not."""
    hint, value = next(f.type for f in fields(cfg) if f.name == name), getattr(cfg, name)
    choices = [c for part in (hint, *get_args(hint)) for c in get_args(part) if isinstance(c, str)]
    if isinstance(value, bool):
        return not value
    if choices:
        return next(c for c in choices if c != value and c not in ("mamba_ssm", "fla"))
    if isinstance(value, int):
        return 2 * value or 3
    high = next(mark.high for mark in metadata_of(hint) if isinstance(mark, Range))
    return 0.6 if value is None or high is not None else 3 * value + 0.5


def learn_offline(cfg, file, weights):
    sampler, _ = agent_of(cfg.agent).open_data(cfg, "cpu", 0)
    agent = agent_of(cfg.agent)(cfg, BODY, "cpu")
    agent.fit_normalizer(sampler)
    return learn(agent, lambda: sampler.sample(cfg.batch_size), weights)


def learn_goals(cfg, file, weights):
    sampler = goal_sampler(file, cfg)
    agent = Opso(cfg, MAZE)
    agent.fit_normalizer(sampler)
    return learn(agent, lambda: sampler.sample(cfg.batch_size), weights, torch.ones(2, 2))


def learn_discrete(cfg, file, weights):
    batch = batch_of()
    agent = DQN(cfg, DISCRETE)
    agent.init_buffer(1, 0)
    return learn(agent, lambda: batch, weights)


def learn(agent, sample, weights: dict, goal=None) -> tuple[list, dict]:
    """What four updates reported, and the actions after them; and the weights before. From `weights` where they fit."""
    own = agent.state_dict()
    start = {k: weights[k] if k in weights and weights[k].shape == v.shape else v.clone() for k, v in own.items()}
    agent.load_state_dict(start)
    start = {k: v.clone() for k, v in start.items()}
    torch.manual_seed(1)
    agent.train()
    found = [float(v) for _ in range(4) for v in agent.update(sample()).values() if v.dim() == 0]
    agent.eval()
    state = torch.linspace(-1, 1, 2 * agent.spec.state).view(2, -1)
    action, _ = agent.act(state, torch.zeros(2), agent.reset(2, goal) if goal is not None else agent.reset(2))
    return [*found, *action.flatten().tolist()], start


def learn_online(cfg, file, weights):
    torch.manual_seed(1)
    given = {f.name: getattr(cfg, f.name) for f in fields(cfg) if f.name not in ("agent", "policy")}
    rows = practise(*begin(**given), 40)
    return [float(x) for row in rows for x in row.values()], {}


WORLDS = {
    "bamba": [
        {"encoder": "none"},
        {"objective": "bc"},
        {"objective": "iql"},
        {"objective": "rebrac", "beta_actor": 0.1},
        {"encoder": "lstm", "objective": "td3bc"},
        {"encoder": "attention", "train_on": "segments"},
        {"encoder": "mamba1", "objective": "bc"},
    ],
    "dm": [{"self_evolution": "off"}],
    "opso": [{"proposer": "none", "proposal_steps": 1}, {"beta_n": 0.0}],
    "ppo": [{"init": "none", "mixer": "mamba2"}],
    "dqn": [{"mixer": "none"}, {"mixer": "lstm"}, {"mixer": "transformer", "per_alpha": 0.0}],
}
SMALL = {
    "bamba": lambda file, changes: BambaConfig(**{**TINY, "n_layers": 1, "dataset": str(file), **changes}),
    "dm": lambda file, changes: CONFIGS["dm"](
        **{**dict(d_model=16, d_state=4, n_layers=1, context_length=3, batch_size=4, dataset=str(file)), **changes}
    ),
    "opso": lambda file, changes: tiny_opso(**changes),
    "ppo": lambda file, changes: PPOConfig(**{**PPO_SIZES, **changes}),
    "dqn": lambda file, changes: tiny_dqn(**changes),
}
LEARN = {"bamba": learn_offline, "dm": learn_offline, "opso": learn_goals, "ppo": learn_online}
LEARN["dqn"] = learn_discrete
# said of data that are not made for this test, of how a run begins, and of how it acts at first
ELSEWHERE = {"hours", "data", "local_transitions", "ant_contacts", "mamba_backend", "random_steps", "inverse_fraction"}


@pytest.mark.parametrize("agent, world", [(agent, i) for agent, worlds in WORLDS.items() for i in range(len(worlds))])
def test_what_is_said_to_have_no_effect_has_none(agent, world, hopper_file, maze_file):
    file = maze_file if agent == "opso" else hopper_file
    cfg = SMALL[agent](file, WORLDS[agent][world])
    torch.manual_seed(0)
    expected, weights = LEARN[agent](cfg, file, {})
    idle = [name for name, mark in marks_of(type(cfg), Only).items() if not mark.holds(cfg) and name not in ELSEWHERE]
    assert idle
    for name in idle:
        torch.manual_seed(0)
        found, _ = LEARN[agent](replace(cfg, **{name: another(cfg, name)}), file, weights)
        assert found == pytest.approx(expected, rel=1e-5), (
            f"--{name} {another(cfg, name)} has an effect with {WORLDS[agent][world]}"
        )


@pytest.mark.parametrize(
    "given, idle",
    [
        ("--alpha 3 --no-state_skip --encoder none", ["alpha", "state_skip"]),
        ("--dataset my.hdf5 --env hopper --data local --local_transitions=9 --hours 2", None),
        ("--data d4rl --local_transitions 9 --preset auto --hours 2", ["local_transitions"]),
        ("--agent opso --q_candidates 3", ["q_candidates"]),
        ("--agent opso --select q --proposal_steps 1 --q_candidates 3", []),
        ("--agent ppo --init none --target_return 3 --kl_coef 1 --hidden_dim 32", ["target_return", "kl_coef"]),
        ("--agent dt --target_return 3 --inference window", []),
        ("--agent opso_online --random_steps 5", ["random_steps"]),
    ],
)
def test_a_given_flag_that_changes_nothing_is_named(given, idle):
    argv = given.split()
    said = idle_flags(parse([w if w != "auto" else "small" for w in argv]), argv)
    wanted = ["hours", "data", "local_transitions"] if idle is None else idle
    assert {s.split()[0].removeprefix("--") for s in said} == set(wanted)
    assert all(" has no effect here: it counts only " in s for s in said)


def test_the_trainer_says_it_before_it_works(hopper_file, tmp_path, capsys):
    sizes = [f"--{k}={v}" for k, v in dict(hidden_dim=8, batch_size=4, num_epochs=1, updates_per_epoch=1).items()]
    argv = [*sizes, "--encoder=none", "--alpha=3", f"--dataset={hopper_file}", "--eval_freq=0", "--no_tensorboard"]
    assert trainer.main([*argv, "--device=cpu", "--threads=1", f"--output_dir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "notice      --alpha has no effect here: it counts only with --objective td3bc\nbamba on" in said
