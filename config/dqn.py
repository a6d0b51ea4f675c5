"""The settings of DQN on windows. The defaults are LunarLander-v3's; `ENV_DEFAULTS` has the other published ones."""

from dataclasses import dataclass
from typing import Annotated, Literal

from config.shared import (
    Agent,
    Compute,
    Count,
    EvalConfig,
    LrDecay,
    Natural,
    NonNegative,
    Online,
    OptimConfig,
    Run,
    Share,
    ShareAbove0,
    UpdateSchedule,
    Width,
    check_ranges,
    only,
    only_above_0,
)

WINDOW, MAMBA = only(mixer=("mamba", "lstm", "transformer")), only(mixer="mamba")
ATTENTION, PRIORITIES = only(mixer="transformer"), only_above_0("per_alpha")


@dataclass(frozen=True)
class Environment:
    """where to act"""

    env: str = "LunarLander-v3"
    """any Gymnasium id with discrete actions; highway-fast-v0 and ALE/Pong-v5 bring their own defaults, see below"""
    cnn: bool = False
    """see images: grey, 84 x 84, through three convolutions (needs ale-py for Atari)"""
    time_feature: bool = False
    """also see which share of the time limit has passed"""
    observe: str = "full"
    """what is shown of states: full, positions, noisy:0.1, delay:3, drop:0.1, flicker:0.2"""


@dataclass(frozen=True)
class Network:
    """what is seen, and what mixes the window into the latent that Q is read from"""

    mixer: Literal["mamba", "lstm", "transformer", "none"] = "mamba"
    """mamba, lstm and transformer read the window; none sees its newest frame alone, which is plain DQN"""
    context_length: Annotated[Count, WINDOW] = 10
    """L, how many observations the agent sees at once"""
    embed_dim: Annotated[Width, only(cnn=False)] = 256
    """width of the hidden layer that embeds an observation"""
    d_model: Width = 128
    """D, width of an embedded observation and of the latent"""
    d_state: Annotated[Width, MAMBA] = 64
    """mamba: N, numbers remembered by each of the expand * d_model channels"""
    d_conv: Annotated[Width, MAMBA] = 4
    """mamba: W, how many observations the causal convolution sees"""
    expand: Annotated[Width, MAMBA] = 2
    """mamba: E / D, width inside the mixer over width outside"""
    n_heads: Annotated[Width, ATTENTION] = 4
    """transformer: heads; must divide d_model"""
    ff_dim: Annotated[Width, ATTENTION] = 256
    """transformer: width of the hidden layer behind the attention"""
    residual: bool = False
    """add the newest embedding to the latent; not as published"""
    dueling: bool = False
    """Q is a value and each action's advantage over their mean (Wang et al. 2016, arXiv 1511.06581)"""


@dataclass(frozen=True)
class QLearning:
    """targets and exploration"""

    gamma: Share = 0.99
    """discount"""
    n_step: Count = 1
    """steps whose rewards enter a target before it goes on with Q"""
    target_every: Count = 1000
    """environment steps between moves of the target network"""
    tau: ShareAbove0 = 1.0
    """share of the network that enters its target then; 1: a copy"""
    double: bool = False
    """double DQN: the network chooses the target's action, the target network values it"""
    truncation: Literal["bootstrap", "terminal"] = "bootstrap"
    """what a time limit is to the target: only an end of the recording, or, as published, a death"""
    td_clip: Annotated[NonNegative, PRIORITIES] = 1.0
    """largest TD error that counts for a priority; 0: no limit"""
    eval_ema: Share = 0.0
    """decay of a running mean of the network that acts in evaluations; 0: it acts itself"""
    amsgrad: bool = False
    """AdamW divides by the greatest second moment so far; as published for Pong"""
    eps_start: Share = 1.0
    """share of random actions at first ..."""
    eps_end: Share = 0.01
    """... and at last"""
    eps_decay: Count = 140_000
    """environment steps over which it falls, linearly"""


@dataclass(frozen=True)
class Replay:
    """how transitions are drawn again, and what is kept with them"""

    per_alpha: NonNegative = 0.6
    """power of the TD error in a priority; 0: all transitions are equally likely"""
    per_beta: Annotated[Share, PRIORITIES] = 0.4
    """power of the weights that correct for it, at first; 1 at last"""
    per_beta_steps: Annotated[Count, PRIORITIES] = 200_000
    """environment steps over which that power rises, linearly"""
    per_eps: Annotated[NonNegative, PRIORITIES] = 1e-6
    """added to a TD error, so that every transition keeps a chance"""
    latent: Literal["store", "off", "refresh", "drift"] = "store"
    """stored latents: keep, keep none, renew when drawn and report their drift, also penalise that drift"""
    drift_coef: Annotated[NonNegative, only(latent="drift")] = 1e-3
    """weight of that penalty, with --latent drift alone"""


@dataclass(frozen=True)
class DQNConfig(
    Replay, QLearning, Network, Compute, EvalConfig, LrDecay, OptimConfig, UpdateSchedule, Online, Environment, Run
):
    """DQN on the last L observations, mixed by Mamba, an LSTM, attention, or not at all."""

    agent: Agent = "dqn"
    batch_size: Count = 64
    learning_rate: NonNegative = 1e-4
    lr_fall: Share = 0.0
    warmup_steps: Natural = 0
    weight_decay: NonNegative = 0.01

    def __post_init__(self):
        check_ranges(self)


ENV_DEFAULTS = {
    "highway-fast-v0": {
        "context_length": 8,
        "d_state": 32,
        "buffer_size": 10_000,
        "gamma": 0.8,
        "eps_decay": 14_000,
        "target_every": 50,
        "learning_rate": 5e-4,
        "env_steps": 20_000,
        "learn_start": 200,
        "per_beta_steps": 20_000,
        "grad_clip": 0.1,
        "td_clip": 0.0,
        "log_every": 50,
        "save_every": 2000,
    },
    "ALE/Pong-v5": {
        "cnn": True,
        "context_length": 4,
        "d_state": 32,
        "buffer_size": 50_000,
        "batch_size": 32,
        "eps_decay": 900_000,
        "target_every": 10_000,
        "env_steps": 1_500_000,
        "per_beta_steps": 1_500_000,
        "td_clip": 0.0,
        "amsgrad": True,
        "log_every": 10_000,
        "save_every": 100_000,
    },
}
QUICK = {"env_steps": 20_000, "per_beta_steps": 20_000, "learn_start": 1000, "eps_decay": 10_000, "target_every": 500}
PRESETS = {"dqn": {"quick": {**QUICK, "d_state": 16}, "small": {"d_state": 16}}}
