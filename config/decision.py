"""The return-conditioned agents' settings: one program, and what the three differ in."""

from dataclasses import dataclass
from typing import Annotated, Literal

from config.shared import (
    QUICK,
    Agent,
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
    Range,
    Run,
    Share,
    Training,
    Width,
    check_ranges,
    only,
)

EVOLVING = only(self_evolution=("snapshot", "ema"))
ON_RETURNS = Only(
    "for a policy that acts on returns (dt, dmamba, dm)",
    lambda cfg: cfg.agent != "ppo" or (cfg.policy or {}).get("system") in ("dt", "dmamba", "dm"),
)


@dataclass(frozen=True)
class SequenceConfig:
    """the sequence model over (return-to-go, state, action) tokens"""

    context_length: Count = 20
    """K, steps in a window; each is three tokens"""
    d_model: Width = 128
    """D, width of the residual stream"""
    n_layers: Layers = 3
    """blocks, one above the other"""
    drop_p: Dropout = 0.1
    """dropout on the tokens and on each block's output (and on attention's weights)"""
    channel_mlp: bool = True
    """an MLP of width 4 D behind every mixer"""
    mlp_embedding: bool = False
    """embed tokens by a residual MLP and not by one matrix; the action head gets a hidden layer too"""
    time_after_norm: bool = False
    """add the time embedding after the tokens' LayerNorm and not before it"""
    max_ep_len: Count = 1000
    """rows of the time table; later steps share the last one"""


@dataclass(frozen=True)
class AttentionConfig:
    """the mixer of dt"""

    n_heads: Width = 1
    """heads; must divide d_model"""


@dataclass(frozen=True)
class StateSpace:
    """the mixer of dmamba and dm"""

    d_state: Width = 16
    """N, numbers remembered by each of the expand * d_model channels"""
    d_conv: Width = 4
    """W, how many tokens the causal convolution sees"""
    expand: Width = 2
    """E / D, width inside a block over width outside"""
    mamba_backend: Literal["auto", "torch", "mamba_ssm"] = "auto"
    """which implementation of the state-space layer runs"""


@dataclass(frozen=True)
class Grained:
    """the multi-grained block of dm"""

    block: Literal["p", "dual", "coarse"] = "p"
    """p: as the paper draws it; dual: two whole mixers, as released but repaired; coarse: plain Mamba-1"""


@dataclass(frozen=True)
class SequenceLoss:
    """what is learned from a window, and from whom"""

    delayed_reward: bool = False
    """pay all of an episode's reward in its last step; when acting, the return asked for then stays as it is"""
    w_a: NonNegative = 1.0
    """weight of the action error"""
    w_s: NonNegative = 0.0
    """weight of predicting the next state; 0 leaves the head out"""
    w_r: NonNegative = 0.0
    """weight of predicting the next return-to-go; 0 leaves the head out"""
    self_evolution: Literal["off", "snapshot", "ema"] = "off"
    """soften labels toward an older policy: a copy renewed every refresh_every updates, or a running mean"""
    alpha_T: Annotated[Share, EVOLVING] = 0.85
    """the older policy's share beta rises linearly to this at the end of training ..."""
    beta_cap: Annotated[Share, EVOLVING] = 0.5
    """... but not above this"""
    refresh_every: Annotated[Count, EVOLVING] = 2500
    """updates between steps of beta, and between copies of the older policy"""


@dataclass(frozen=True)
class Returns:
    """what is asked for when acting, and how much of the past is looked at"""

    target_return: Annotated[float | None, Range(), ON_RETURNS] = None
    """the return asked for; none: the one in decision_transformer.TARGETS for the body and data"""
    inference: Literal["window", "recurrent", "staggered"] = "window"
    """the last K steps anew; one state that remembers all; two states that restart in turn, never older than K"""


@dataclass(frozen=True)
class ReturnConditioned(Returns, SequenceLoss, SequenceConfig, Compute, EvalConfig, OptimConfig, Training, Data, Run):
    """Acts so that a wanted return comes true."""

    num_epochs: Count = 100
    batch_size: Count = 64
    learning_rate: NonNegative = 1e-4
    warmup_steps: Natural = 10_000
    grad_clip: NonNegative = 0.25

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class DTConfig(AttentionConfig, ReturnConditioned):
    """Decision Transformer: causal attention over (return-to-go, state, action) tokens."""

    agent: Agent = "dt"


@dataclass(frozen=True)
class DMambaConfig(StateSpace, ReturnConditioned):
    """Decision Mamba: the Decision Transformer with Mamba-1 in attention's place."""

    agent: Agent = "dmamba"
    n_layers: Layers = 6
    channel_mlp: bool = False


@dataclass(frozen=True)
class DMConfig(Grained, DMambaConfig):
    """Multi-grained Decision Mamba: a second, finer scan; two more predictions; labels that an older self softens."""

    agent: Agent = "dm"
    time_after_norm: bool = True
    w_a: NonNegative = 0.9
    w_s: NonNegative = 0.05
    w_r: NonNegative = 0.05
    self_evolution: Literal["off", "snapshot", "ema"] = "snapshot"
    warmup_steps: Natural = 2500
    weight_decay: NonNegative = 1e-5


# One thread of a busy machine makes about 60 (dt), 35 (dmamba) and 22 (dm) updates a second of `small`;
# `upstream` is each one's release, `base` a size in between.
SMALL = {
    "d_model": 64,
    "n_layers": 2,
    "batch_size": 16,
    "learning_rate": 1e-3,
    "warmup_steps": 1000,
    "num_epochs": 50,
    "save_freq": 10,
}
SMALL_MAMBA = {**SMALL, "d_state": 8}
BASE, UPSTREAM = {"d_model": 256, "n_layers": 6}, {"d_model": 768, "n_layers": 24, "drop_p": 0.0}
PRESETS = {
    "dt": {"small": SMALL, "quick": {**SMALL, **QUICK}, "base": BASE, "upstream": {}},
    "dmamba": {"small": SMALL_MAMBA, "quick": {**SMALL_MAMBA, **QUICK}, "base": BASE, "upstream": {"drop_p": 0.0}},
    "dm": {
        "small": {**SMALL_MAMBA, "refresh_every": 1000},
        "quick": {**SMALL_MAMBA, **QUICK, "refresh_every": 500},
        "base": BASE,
        "upstream": UPSTREAM,
    },
}
