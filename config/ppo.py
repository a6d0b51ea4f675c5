"""The settings of PPO around a policy that was trained offline, or from scratch."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from config.decision import Returns
from config.shared import (
    Agent,
    Compute,
    Count,
    Data,
    EvalConfig,
    Natural,
    NonNegative,
    Online,
    Only,
    Precision,
    Range,
    Run,
    Share,
    Width,
    check_ranges,
    only,
)

NEW, NEW_MLP = only(init="none"), only(init="none", mixer="mlp")
TRAINED = Only("with a checkpoint as --init", lambda cfg: cfg.init != "none")
ANCHORED = Only("with a checkpoint as --init and --kl_coef above 0", lambda cfg: cfg.init != "none" and cfg.kl_coef > 0)
CLONING = Only("with a checkpoint as --init and --bc_coef above 0", lambda cfg: cfg.init != "none" and cfg.bc_coef > 0)


@dataclass(frozen=True)
class PolicyInit:
    """which policy to begin with, and where it acts"""

    init: str = ""
    """a checkpoint or run folder of bamba, dt, dmamba or dm, which stays as it is; none: a new policy"""
    mixer: Annotated[Literal["mlp", "mamba2"], NEW] = "mlp"
    """of a new policy: an MLP on the present state, or Bamba's encoder of the last K states, small"""
    hidden_dim: Annotated[Width, NEW_MLP] = 64
    """of a new MLP: width of its two layers"""
    env: str = ""
    """where to act; none: the environment of the checkpoint's data, and for a new policy hopper"""
    env_version: str = ""
    """version of D4RL's bodies in Gymnasium; none: the checkpoint's, and for a new policy v4"""
    dataset: str = ""
    """data to be cloned beside, as for the offline agents; none: those that the checkpoint learned from"""
    dataset_dir: str = ""
    """where dataset files lie; none: where they lay for the checkpoint"""


@dataclass(frozen=True)
class Rollouts:
    """how experience is gathered, and what it says of an action"""

    n_steps: Count = 512
    """steps of every environment in one iteration: collect, then learn from that"""
    gamma: Share = 0.99
    """discount"""
    gae_lambda: Share = 0.95
    """lambda of the advantages: 0 is one step and the value behind it, 1 the whole return"""
    truncation: Literal["auto", "bootstrap", "terminal"] = "auto"
    """what a time limit is to the value; auto: terminal if the policy sees the time (dt, dmamba, dm), else bootstrap"""


@dataclass(frozen=True)
class PolicyGradient:
    """the clipped objective, and how hard to descend on it"""

    batch_size: Count = 512
    """steps in one update; must divide n_steps * num_envs"""
    epochs: Count = 10
    """passes over an iteration's steps, at most"""
    clip_eps: NonNegative = 0.2
    """the ratio of new to old probability counts from 1 - this to 1 + this"""
    target_kl: NonNegative = 0.015
    """no further pass once the policy is this far (nats) from the one that acted; 0: all passes"""
    entropy_coef: NonNegative = 0.0
    """weight of the entropy"""
    value_coef: NonNegative = 0.5
    """weight of the value's squared error"""
    value_into_encoder: Share = 0.0
    """share of the value's gradient that reaches the encoder"""
    value_dim: Width = 256
    """width of the value's two layers"""
    lr_encoder: NonNegative | None = None
    """Adam's step for the encoder, falling linearly to 0 at the end; none: 3e-5, and for a new policy 3e-4"""
    lr_head: NonNegative | None = None
    """the same for the action head; none: 1e-4, and for a new policy 3e-4"""
    lr_std: NonNegative = 3e-4
    """the same for log sigma"""
    lr_value: NonNegative = 3e-4
    """the same for the value"""
    grad_clip: NonNegative = 0.5
    """largest gradient norm, for the policy and for the value apart"""
    sigma: Annotated[float | None, Range(1e-3, 10)] = None
    """of the Gaussian around the policy's action, in half ranges of the action, at first; none: as far as the policy is
    from the data's actions, within 0.05 and 0.3, and for a new policy 1"""


@dataclass(frozen=True)
class Regularizers:
    """what keeps a trained policy from collapse; a new policy has none of it"""

    kl_coef: Annotated[NonNegative, TRAINED] = 0.1
    """weight of KL(policy, offline policy) at first; it adapts so that the KL follows its target; 0: no anchor"""
    kl_start: Annotated[NonNegative, ANCHORED] = 0.02
    """target of that KL at first, nats per action dim ..."""
    kl_end: Annotated[NonNegative, ANCHORED] = 0.5
    """... and at last, linearly"""
    bc_coef: Annotated[NonNegative, TRAINED] = 0.5
    """weight of cloning the offline data at first, 0 from the middle of the run; 0: never, and no data are needed"""
    bc_batch: Annotated[Count, CLONING] = 64
    """offline windows cloned in one update"""
    value_warmup: Annotated[Natural, TRAINED] = 10
    """iterations at most in which the value alone learns, before the policy does ..."""
    warm_enough: Annotated[Share, TRAINED] = 0.5
    """... or until it explains this share of the returns' variance"""


@dataclass(frozen=True)
class PPOConfig(Returns, Regularizers, PolicyGradient, Rollouts, Compute, EvalConfig, Online, PolicyInit, Run):
    """PPO: fine-tunes a policy that was trained offline in its environment, or trains a new one."""

    agent: Agent = "ppo"
    precision: Precision = "fp32"
    env_steps: Count = 1_000_000
    num_envs: Count = 8
    log_every: Count = 4096
    eval_every: Natural = 20_000
    save_every: Natural = 20_000
    # {"system", "config", ...} of the policy, as `ppo.resolve_config` found it
    policy: dict | None = field(default=None, metadata={"flag": False})

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class MLPConfig(Data):
    """Of the policy that is an MLP on the present state."""

    agent: str = "mlp"
    hidden_dim: Width = 64
    context_length: Count = 1


QUICK = {"env_steps": 60_000, "n_steps": 256, "eval_every": 10_000, "save_every": 10_000, "log_every": 2048}
PRESETS = {"ppo": {"quick": {**QUICK, "batch_size": 256, "value_warmup": 5}, "small": {"env_steps": 300_000}}}
