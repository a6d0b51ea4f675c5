"""What several agents are told: the groups of settings that they share, and what numbers make sense."""

from dataclasses import dataclass, fields
from typing import Literal

Agent = Literal["bamba", "dt", "dmamba", "dm", "dqn", "opso", "opso_online", "ppo"]
Precision = Literal["auto", "fp32", "tf32", "bf16"]
Preset = Literal["none", "quick", "small", "base", "upstream"]


@dataclass(frozen=True)
class Run:
    """what to run, and where its traces go"""

    agent: Agent = "bamba"
    """which agent to train"""
    preset: Preset = "none"
    """named settings, applied before the other flags: quick = a few minutes on two CPU cores, small = an hour"""
    seed: int = 42
    """one number seeds network, data order and noise"""
    output_dir: str = "./outputs"
    """every run gets a folder of its own in here"""
    resume: str = ""
    """a checkpoint or run folder to continue exactly, with its own settings; its length and --device may differ"""
    tensorboard: bool = True
    """write TensorBoard event files into the run folder"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""


@dataclass(frozen=True)
class Data:
    """what to learn from"""

    env: str = "hopper"
    """body: hopper, walker2d, halfcheetah or ant; with a file as --dataset also Gymnasium's ids, such as Pendulum-v1"""
    dataset_type: Literal["random", "medium", "medium-replay", "medium-expert", "expert", "full-replay"] = "medium"
    """who collected the data"""
    data: Literal["auto", "d4rl", "local"] = "auto"
    """d4rl: D4RL's own file, downloaded if missing; local: rolled out here; auto: local only if D4RL's cannot be had"""
    dataset_dir: str = "./datasets"
    """where dataset files lie"""
    dataset: str = ""
    """instead of the above: hopper-medium-v2; minari:mujoco/hopper/medium-v0; or a .hdf5 file in D4RL's layout"""
    local_transitions: int = 0
    """how many transitions a local dataset holds; 0: 1M, and for medium-replay as many as D4RL's (202k to 402k)"""
    pct_traj: float = 1.0
    """learn from the episodes of highest return that hold this share of the transitions; with cloning: %BC"""
    env_version: str = "v4"
    """version of D4RL's bodies in Gymnasium; v4 moves as D4RL's did"""


@dataclass(frozen=True)
class Training:
    """how long to learn from data"""

    num_epochs: int = 1000
    """epochs in all"""
    updates_per_epoch: int = 1000
    """gradient updates in one epoch; losses are logged once an epoch"""
    eval_freq: int = 10
    """epochs between evaluations; 0: never"""
    save_freq: int = 50
    """epochs between checkpoints (an evaluation writes one too)"""


@dataclass(frozen=True)
class Online:
    """how long to learn in an environment; an environment step is one step of one environment"""

    env_steps: int = 200_000
    """environment steps in all"""
    num_envs: int = 1
    """environments side by side; updates per environment step stay as they are"""
    log_every: int = 1000
    """environment steps between rows of losses in the log; an episode has a row when it ends"""
    eval_every: int = 0
    """environment steps between evaluations; 0: one at the end"""
    save_every: int = 10_000
    """environment steps between checkpoints, from which a killed run goes on; 0: one at the end"""
    num_final_episodes: int = 50
    """episodes of the evaluation at the end; 0: none"""


@dataclass(frozen=True)
class Cadence:
    """when an agent with a replay learns"""

    buffer_size: int = 100_000
    """transitions that are remembered"""
    learn_start: int = 10_000
    """environment steps before the first update"""
    train_every: int = 1
    """environment steps between rounds of updates"""
    num_updates: int = 1
    """updates in a round"""


@dataclass(frozen=True)
class Descent:
    """how hard to learn"""

    batch_size: int = 256
    """B, windows in one update"""
    learning_rate: float = 3e-4
    """AdamW's step after the warm-up"""
    warmup_steps: int = 1000
    """updates over which the learning rate rises linearly from nearly 0"""
    weight_decay: float = 1e-4
    """AdamW's decay; never on norms, biases, A_log, D, dt_bias"""
    grad_clip: float = 1.0
    """largest gradient norm; Bamba: for the critics and for the rest apart"""


@dataclass(frozen=True)
class Judging:
    """how to evaluate"""

    num_eval_episodes: int = 10
    """episodes in one evaluation"""
    eval_seed: int = 1_000_000
    """seed of the first evaluation episode, the next ones count on from it"""


@dataclass(frozen=True)
class Machine:
    """how to compute"""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; auto takes an NVIDIA card when there is one"""
    precision: Precision = "auto"
    """auto: tf32 on CUDA, else fp32; tf32: CUDA's fast float32 products; bf16: besides, the encoder under autocast"""
    compile: bool = False
    """torch.compile blocks and losses: half a minute at the start, then faster; needs a C++ compiler on a CPU"""
    cuda_graphs: bool = True
    """on CUDA, capture the whole update and replay it"""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice. Give 1 to each of several runs side by side"""


# least and greatest sensible values; the encoder's sizes are checked where it is built, with the nearest legal ones
AT_LEAST_1 = (
    "num_epochs",
    "updates_per_epoch",
    "batch_size",
    "policy_freq",
    "hidden_dim",
    "num_eval_episodes",
    "max_ep_len",
    "n_heads",
    "refresh_every",
)
AT_LEAST_1 += ("env_steps", "num_envs", "log_every", "buffer_size", "train_every", "num_updates", "target_every")
AT_LEAST_1 += ("eps_decay", "per_beta_steps", "embed_dim", "ff_dim")
AT_LEAST_1 += ("n_steps", "epochs", "value_dim", "bc_batch")
AT_LEAST_0 = (
    "local_transitions",
    "warmup_steps",
    "weight_decay",
    "grad_clip",
    "eval_freq",
    "save_freq",
    "threads",
    "alpha",
    "gamma",
    "tau",
)
AT_LEAST_0 += ("action_noise", "action_noise_clip", "beta_s", "beta_r", "learning_rate", "seed", "eval_seed")
AT_LEAST_0 += ("w_a", "w_s", "w_r", "alpha_T", "eval_every", "save_every", "num_final_episodes", "learn_start")
AT_LEAST_0 += ("td_clip", "per_alpha", "per_eps", "drift_coef")
AT_LEAST_1 += ("proposal_steps", "schedule_episodes")
AT_LEAST_0 += ("max_episodes", "random_steps", "beta_v", "beta_n", "beta_a", "nce_bank", "temperature", "max_weight")
AT_LEAST_0 += ("lambda_q", "q_candidates", "focal_alpha", "focal_gamma", "sigma_start", "sigma_end")
AT_LEAST_0 += ("clip_eps", "target_kl", "entropy_coef", "value_coef", "value_warmup", "lr_encoder", "lr_head", "lr_std")
AT_LEAST_0 += ("lr_value", "kl_coef", "kl_start", "kl_end", "bc_coef")
SHARES = ("expectile", "inverse_fraction", "goal_current", "goal_trajectory", "policy_trajectory", "policy_near")
SHARES += ("lr_fall", "offline_share")
SHARES += ("beta_cap", "eps_start", "eps_end", "per_beta", "gae_lambda", "value_into_encoder", "gamma", "tau")
RANGES = dict.fromkeys(AT_LEAST_1, (1, None)) | dict.fromkeys(AT_LEAST_0, (0, None)) | dict.fromkeys(SHARES, (0, 1))
RANGES |= {"sigma": (1e-3, 10)}


def check_ranges(cfg) -> None:
    """ValueError for a number that makes no sense, with its range."""
    for f in fields(cfg):
        value, (low, high) = getattr(cfg, f.name), RANGES.get(f.name, (None, None))
        if value is None:  # the agent knows what to take
            continue
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{f.name} = {value} makes no sense: take {wanted}")


QUICK = {"data": "local", "local_transitions": 200_000, "num_epochs": 10, "updates_per_epoch": 500, "warmup_steps": 200}
QUICK |= {"eval_freq": 2, "save_freq": 2}  # every agent's preset of that name begins so
