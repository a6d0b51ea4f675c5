"""Bamba's settings."""

from dataclasses import dataclass
from typing import Literal

from config.shared import QUICK, Data, Descent, Judging, Machine, Run, Training, check_ranges


@dataclass(frozen=True)
class Encoder:
    """what the agent sees, and the Mamba-2 encoder that summarises it"""

    context_length: int = 5
    """K, how many states the agent sees at once"""
    d_model: int = 256
    """D, width of the residual stream; even, because RoPE turns pairs of features"""
    d_state: int = 64
    """N, size of a head's memory"""
    d_conv: int = 4
    """W, how many steps the causal convolution sees"""
    expand: int = 2
    """E / D, width inside a block over width outside"""
    headdim: int = 64
    """P, features of one head; must divide expand * d_model"""
    n_layers: int = 6
    """Mamba-2 blocks, one above the other"""
    drop_p: float = 0.1
    """dropout on each block's output"""
    mamba_backend: Literal["auto", "torch", "mamba_ssm"] = "auto"
    """which implementation of the state-space layer runs"""


@dataclass(frozen=True)
class Objective:
    """what Bamba wants: TD3+BC's actor and critic, and two auxiliary predictions"""

    alpha: float = 2.5
    """how much Q is worth against cloning; 0 is behaviour cloning"""
    gamma: float = 0.99
    """discount"""
    tau: float = 0.005
    """share of the online nets that enters their targets after each actor update"""
    action_noise: float = 0.2
    """sigma of the noise on the target action, as a share of the action's half range"""
    action_noise_clip: float = 0.5
    """largest such noise"""
    policy_freq: int = 2
    """critic updates for one actor update"""
    hidden_dim: int = 256
    """width of the heads"""
    critic_input: Literal["state", "embedding", "embedding_detached"] = "state"
    """what Q judges: the present state, or the embedding, which then gets the critic's gradient or does not"""
    target_encoder: Literal["online", "ema"] = "online"
    """which encoder reads the next window for the TD target: the online one without dropout, or a slow copy"""
    beta_s: float = 1.0
    """weight of predicting the next state"""
    beta_r: float = 1.0
    """weight of predicting the reward"""


@dataclass(frozen=True)
class BambaConfig(Objective, Encoder, Machine, Judging, Descent, Training, Data, Run):
    """Bamba: behaviour cloning and Q-learning on a Mamba-2 summary of the last K states."""

    def __post_init__(self):
        check_ranges(self)


SMALL_ENCODER = {"d_model": 64, "d_state": 16, "headdim": 32, "n_layers": 2}
PRESETS = {
    "bamba": {
        "small": {**SMALL_ENCODER, "num_epochs": 100, "save_freq": 10},
        "quick": {**SMALL_ENCODER, **QUICK, "batch_size": 128, "hidden_dim": 128},
    }
}
