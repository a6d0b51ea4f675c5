"""Bamba's settings."""

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from config.shared import (
    QUICK,
    Compute,
    Count,
    Data,
    Dropout,
    EvalConfig,
    Layers,
    Natural,
    NonNegative,
    Only,
    OptimConfig,
    Run,
    Share,
    Training,
    Width,
    check_ranges,
    only,
)

ENCODER, MAMBA = only(encoder=("mamba2", "mamba1", "attention", "lstm")), only(encoder=("mamba2", "mamba1"))
CRITIC, REBRAC = only(objective=("td3bc", "rebrac", "iql")), only(objective="rebrac")
NOISE, IQL = only(objective=("td3bc", "rebrac")), only(objective="iql")
PUBLISHED = Only(
    "with --objective rebrac and without --beta_actor", lambda c: c.objective == "rebrac" and c.beta_actor is None
)


@dataclass(frozen=True)
class EncoderConfig:
    """what the agent sees, and the Mamba-2 encoder that summarises it"""

    encoder: Literal["mamba2", "mamba1", "attention", "lstm", "none"] = "mamba2"
    """what mixes the states over time; none: no encoder, the heads see the present state alone, as TD3+BC's do"""
    train_on: Annotated[Literal["windows", "segments"], ENCODER] = "segments"
    """windows: K states for one step to learn from; segments: every place of K steps in a row, many times cheaper"""
    context_length: Annotated[Count, ENCODER] = 4
    """K, how many states the agent sees at once; with segments also how many steps in a row are trained"""
    burn_in: Annotated[Natural, ENCODER] = 0
    """states before a segment that the encoder sees too, and that are not trained; at a start the first is repeated"""
    state_delta: bool = False
    """everything also sees how the state changed since the step before; for when velocities are not shown"""
    state_skip: Annotated[bool, ENCODER] = True
    """the heads see the present state beside the embedding"""
    d_model: Annotated[Width, ENCODER] = 64
    """D, width of the residual stream; even, because RoPE turns pairs of features"""
    d_state: Annotated[Width, MAMBA] = 16
    """N, size of a head's memory"""
    d_conv: Annotated[Width, MAMBA] = 4
    """W, how many steps the causal convolution sees"""
    expand: Annotated[Width, MAMBA] = 2
    """E / D, width inside a block over width outside"""
    headdim: Annotated[Width, only(encoder="mamba2")] = 32
    """P, features of one head; must divide expand * d_model"""
    n_heads: Annotated[Width, only(encoder="attention")] = 4
    """heads of --encoder attention; must divide d_model"""
    n_layers: Annotated[Layers, ENCODER] = 2
    """blocks, one above the other"""
    drop_p: Annotated[Dropout, ENCODER] = 0.0
    """dropout on each block's output"""
    mamba_backend: Annotated[Literal["auto", "torch", "mamba_ssm", "fla"], MAMBA] = "auto"
    """which implementation of the state-space layer runs"""


@dataclass(frozen=True)
class ObjectiveConfig:
    """what Bamba wants: an actor and its critic, and two auxiliary predictions"""

    objective: Literal["td3bc", "rebrac", "iql", "bc"] = "rebrac"
    """losses of actor and critic: TD3+BC, ReBRAC, implicit Q-learning, or cloning alone"""
    alpha: Annotated[NonNegative, only(objective="td3bc")] = 2.5
    """td3bc: how much Q is worth against cloning; 0 is behaviour cloning"""
    beta_actor: Annotated[NonNegative | None, REBRAC] = None
    """rebrac: the actor's penalty on leaving the data; none: as published for the data set"""
    min_beta_actor: Annotated[NonNegative, PUBLISHED] = 0.0
    """rebrac: least published penalty; in a short run Q is not yet right about what is far from the data"""
    beta_critic: Annotated[NonNegative | None, REBRAC] = None
    """rebrac: the critic's penalty on leaving the data; none: as published for the data set"""
    expectile: Annotated[Share, IQL] = 0.7
    """iql: which expectile of Q the value is"""
    iql_temperature: Annotated[NonNegative, IQL] = 3.0
    """iql: how steeply an action's weight rises with its advantage"""
    critic_pretrain: Natural = 10_000
    """updates at the start that fit the critics to the recorded returns and the actor to the recorded actions"""
    trust: Literal["always", "explained"] = "always"
    """explained: Q counts by the share of the returns' variance that it explains"""
    gamma: Annotated[Share, CRITIC] = 0.99
    """discount"""
    tau: Annotated[Share, CRITIC] = 0.005
    """share of the online nets that enters their targets after each actor update"""
    action_noise: Annotated[NonNegative, NOISE] = 0.2
    """sigma of the noise on the target action, as a share of the action's half range"""
    action_noise_clip: Annotated[NonNegative, NOISE] = 0.5
    """largest such noise"""
    policy_freq: Annotated[Count, CRITIC] = 2
    """critic updates for one actor update"""
    hidden_dim: Width = 256
    """width of the heads"""
    head_depth: Layers = 3
    """hidden layers of actor and critics"""
    critic_layernorm: Annotated[bool, CRITIC] = True
    """LayerNorm behind every hidden layer of the critics; rebrac wants it"""
    lr_schedule: Literal["constant", "cosine"] = "cosine"
    """what the learning rate does after the warm-up; cosine: it ends at 0"""
    eval_ema: Share = 0.999
    """decay of a running mean of encoder and actor that acts in evaluations; 0: they act themselves"""
    critic_input: Annotated[Literal["state", "embedding", "embedding_detached"], CRITIC] = "state"
    """what Q sees: the present state, or the embedding, which then gets the critic's gradient or does not"""
    target_encoder: Annotated[Literal["online", "ema"], CRITIC] = "online"
    """which encoder reads the next window for the TD target: the online one without dropout, or a slow copy"""
    beta_s: Annotated[NonNegative, ENCODER] = 1.0
    """weight of predicting the next state"""
    beta_r: Annotated[NonNegative, ENCODER] = 1.0
    """weight of predicting the reward"""


@dataclass(frozen=True)
class BambaConfig(ObjectiveConfig, EncoderConfig, Compute, EvalConfig, OptimConfig, Training, Data, Run):
    """Bamba: behaviour cloning and Q-learning on a Mamba-2 summary of the last K states."""

    LEGACY_DEFAULTS: ClassVar[dict] = {  # of checkpoints from before these flags
        "encoder": "mamba2",
        "train_on": "windows",
        "state_skip": False,
        "objective": "td3bc",
        "critic_pretrain": 0,
        "trust": "always",
        "head_depth": 2,
        "critic_layernorm": False,
        "lr_schedule": "constant",
        "eval_ema": 0.0,
    }

    weight_decay: NonNegative = 0.0

    def __post_init__(self):
        check_ranges(self)


UPSTREAM = {  # what was published: TD3+BC's objective on windows
    "objective": "td3bc",
    "train_on": "windows",
    "context_length": 5,
    "state_skip": False,
    "d_model": 256,
    "d_state": 64,
    "headdim": 64,
    "n_layers": 6,
    "drop_p": 0.1,
    "critic_pretrain": 0,
    "head_depth": 2,
    "critic_layernorm": False,
    "lr_schedule": "constant",
    "eval_ema": 0.0,
    "learning_rate": 3e-4,
    "weight_decay": 1e-4,
}
PRESETS = {
    "bamba": {
        "small": {"num_epochs": 100, "save_freq": 10, "min_beta_actor": 0.01},
        "quick": {**QUICK, "num_epochs": 12, "updates_per_epoch": 1000, "critic_pretrain": 4000, "beta_actor": 0.2}
        | {"learning_rate": 1e-3},  # so few updates want a larger one
        "base": {"d_model": 256, "d_state": 64, "headdim": 64, "n_layers": 6},
        "upstream": UPSTREAM,
    }
}
