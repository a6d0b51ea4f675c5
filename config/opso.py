"""OPSO's settings."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from config.shared import (
    Agent,
    Compute,
    Count,
    Dropout,
    EvalConfig,
    Layers,
    LrDecay,
    Natural,
    NonNegative,
    Online,
    Only,
    OptimConfig,
    Positive,
    Range,
    Run,
    Share,
    Training,
    UpdateSchedule,
    Width,
    check_ranges,
    only,
    only_above_0,
)

HISTORY, FOCAL = only(history=True), only(focal=True)
PROPOSER, WRONG_ANSWERS = only(proposer="latent"), only_above_0("beta_n")
UNSEEN_ACTIONS = Only(
    "if inverse dynamics saw no action before (--inverse_data online, or --inverse_fraction 0)",
    lambda cfg: cfg.inverse_data == "online" or not cfg.inverse_fraction,
)


@dataclass(frozen=True)
class GoalData:
    """what to learn from: OGBench's mazes"""

    dataset: str = "antmaze-medium-navigate-v0"
    """OGBench's name; -local in place of -v0 asks for data made on this machine; or a file in its layout (.npz)"""
    data: Literal["auto", "ogbench", "local"] = "auto"
    """ogbench: its own file, downloaded if missing; local: rolled out here; auto: local only if that cannot be had"""
    dataset_dir: str = "./datasets"
    """where dataset files lie"""
    env: str = ""
    """with a file as --dataset, OGBench's name of the data that it is like, e.g. antmaze-medium-navigate-v0"""
    max_trajectories: Annotated[int, Range(-1)] = -1
    """learn from the first so many episodes; -1: from all"""
    inverse_data: Literal["fraction", "online"] = "fraction"
    """whose actions inverse dynamics may see: those of inverse_fraction of the episodes; online: none before phase 2"""
    inverse_fraction: Annotated[Share, only(inverse_data="fraction")] = 1.0
    """f, share of the episodes whose actions may be used; it stands beside every score"""


@dataclass(frozen=True)
class StateModel:
    """the encoder of states and their histories"""

    context_length: Count = 8
    """T, trained steps of a segment; with --history also how many states are looked back at when acting"""
    d_model: Width = 128
    """D, width of a latent"""
    n_layers: Layers = 2
    """mixer blocks, one above the other"""
    mixer: Literal["mamba2", "mamba1"] = "mamba2"
    """what mixes over time"""
    d_state: Width = 16
    """N, size of a head's memory"""
    d_conv: Width = 4
    """W, how many steps the causal convolution sees"""
    expand: Width = 2
    """E / D, width inside a block over width outside"""
    headdim: Width = 64
    """P, features of one head of mamba2; must divide expand * d_model"""
    mamba_backend: Literal["auto", "torch", "mamba_ssm", "fla"] = "auto"
    """which implementation of the state-space layer runs"""
    hidden_dim: Width = 256
    """width of the heads"""


@dataclass(frozen=True)
class GoalSampling:
    """which goals a step is valued by, and what reaching one pays"""

    gamma: Share = 0.99
    """discount; also of how far ahead the values' goals lie"""
    goal_current: Share = 0.2
    """share of the values' goals that are the next state"""
    goal_trajectory: Share = 0.5
    """share that lie ahead in the episode; the rest are any states of the data"""
    policy_trajectory: Share | None = None
    """that share of the policy's goals; none: 1 for navigate, 0.5 for stitch, 0 for explore"""
    policy_near: Share = 0.5
    """share of the policy's goals in the episode that lie as near as the values'; the rest: anywhere ahead"""
    reward: Literal["neg", "zero_one"] = "neg"
    """neg: -1 a step until the goal; zero_one: 1 there and 0 before"""


@dataclass(frozen=True)
class LossWeights:
    """the weights of what is learned without actions"""

    expectile: Share = 0.9
    """tau_e: under-estimates of V cost this, over-estimates the rest; 0.5 is least squares"""
    tau: Share = 0.005
    """share of the online nets that enters their slow copies after each update"""
    beta_v: NonNegative = 1.0
    """weight of V"""
    beta_s: NonNegative = 0.25
    """weight of predicting the next latent"""
    beta_r: NonNegative = 0.1
    """weight of telling whether the goal is reached"""
    beta_n: NonNegative = 0.1
    """weight of InfoNCE between latents a few steps apart"""
    nce_temperature: Annotated[Positive, WRONG_ANSWERS] = 0.1
    """of InfoNCE's scores"""
    nce_bank: Annotated[Natural, WRONG_ANSWERS] = 256
    """latents of earlier batches that serve as wrong answers; 0: those of the batch alone"""


@dataclass(frozen=True)
class ProposalConfig:
    """what proposes and what acts"""

    proposal_steps: Count = 10
    """K, how many steps on the proposed latent lies; 1 is published"""
    temperature: NonNegative = 3.0
    """alpha in the weight exp(alpha * advantage) of proposals; 0 imitates all alike"""
    max_weight: NonNegative = 100.0
    """largest such weight"""


@dataclass(frozen=True)
class AsPublished:
    """ablations, and what the preset `upstream` sets as published; no table recommends to change these"""

    LAST: ClassVar[bool] = True

    history: bool = False
    """a latent is of the states so far, as published; else of one state: histories give the recorded way away"""
    pool: Annotated[Literal["last", "attention"], HISTORY] = "last"
    """what a history is read from: its last place, or a weighted mean of all, as published"""
    rope: Annotated[bool, HISTORY] = False
    """turn features by their place, as published"""
    drop_p: Dropout = 0.0
    """dropout on the embedded states and on each block's output"""
    head_norm: bool = True
    """a LayerNorm behind every ReLU of the heads; off: ReLU alone, as published"""
    value_leap: bool = True
    """V learns from K recorded steps at once, of goals within K steps also from Q; off: from Q alone"""
    beta_a: NonNegative = 0.0
    """weight of aligning steps with the direction of the goal"""
    focal: bool = False
    """the focal loss for the success head, in place of weighing up its rare positives"""
    focal_alpha: Annotated[NonNegative, FOCAL] = 0.25
    """its scale"""
    focal_gamma: Annotated[NonNegative, FOCAL] = 2.0
    """its power: how little the easy ones count"""
    proposer: Literal["latent", "none"] = "latent"
    """latent: propose z*, then inverse dynamics; none: act on the goal directly, as GCIVL and cloning do"""
    goal_in_reach: Annotated[bool, PROPOSER] = True
    """a goal that V puts within K steps is moved to itself; off: proposals to the last, as published"""
    inverse_goal: bool = False
    """inverse dynamics also sees the goal, as published: good with recorded actions, bad with its own (f = 0)"""
    weigh_inverse: bool = True
    """weigh inverse dynamics so too"""
    lambda_q: Annotated[NonNegative, PROPOSER] = 0.0
    """how much the proposer also climbs Q; for proposal_steps 1"""
    select: Annotated[Literal["proposer", "q"], PROPOSER] = "proposer"
    """q: choose among candidates by Q when acting; for proposal_steps 1"""
    q_candidates: Annotated[Natural, only(proposer="latent", select="q")] = 16
    """noisy copies of the proposal among these candidates, beside 8 on the straight way to the goal"""


@dataclass(frozen=True)
class Exploration:
    """how the second phase acts and learns"""

    init: str = ""
    """the checkpoint or run folder of an offline phase; none: the newest one on this data set in output_dir"""
    max_episodes: Natural = 0
    """stop after so many episodes of full length; 0: env_steps decide"""
    schedule_episodes: Count = 200
    """episodes over which both of the following fall, linearly"""
    eps_start: Share = 0.30
    """share of steps that head for the goal instead of the proposal, z* = z + alpha (z_g - z), at first ..."""
    eps_end: Share = 0.05
    """... and at last"""
    sigma_start: NonNegative = 0.20
    """noise on actions, as a share of their half range, at first ..."""
    sigma_end: NonNegative = 0.05
    """... and at last"""
    random_steps: Annotated[Natural, UNSEEN_ACTIONS] = 10_000
    """environment steps of uniformly random actions at first, if inverse dynamics has seen no action yet"""
    offline_share: Share = 0.5
    """share of a batch that comes from the offline data"""


@dataclass(frozen=True)
class Core(
    AsPublished, ProposalConfig, LossWeights, GoalSampling, StateModel, Compute, EvalConfig, OptimConfig, GoalData, Run
):
    """What both phases are told."""

    LEGACY_DEFAULTS: ClassVar[dict] = {
        "inverse_goal": True,
        "goal_in_reach": False,
    }  # of checkpoints from before these flags

    batch_size: Count = 32
    weight_decay: NonNegative = 0.0
    grad_clip: NonNegative = 5.0

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class OPSOConfig(Training, LrDecay, Core):
    """OPSO, phase 1: goal-conditioned values and proposals from states alone; actions by inverse dynamics."""

    agent: Agent = "opso"
    num_epochs: Count = 200
    updates_per_epoch: Count = 500
    eval_freq: Natural = 20


@dataclass(frozen=True)
class OPSOOnlineConfig(Exploration, UpdateSchedule, Online, LrDecay, Core):
    """OPSO, phase 2: inverse dynamics, values and proposals from its own episodes, around phase 1's frozen encoder."""

    agent: Agent = "opso_online"
    env_steps: Count = 1_000_000
    eval_every: Natural = 50_000
    num_final_episodes: Natural = 10
    buffer_size: Count = 1_000_000
    learn_start: Natural = 1000
    train_every: Count = 4
    # what phase 1 learned from, as `resolve_config` found it
    before: dict | None = field(default=None, metadata={"flag": False})


SMALL = {
    "d_model": 64,
    "n_layers": 1,
    "tau": 0.01,
    "num_epochs": 20,
    "eval_freq": 5,
    "save_freq": 10,
    "dataset": "pointmaze-medium-navigate-local",
    "learning_rate": 0.001,
}
QUICK = {
    **SMALL,
    "num_epochs": 10,
    "max_trajectories": 200,
    "num_eval_episodes": 4,
}
UPSTREAM = {
    "context_length": 100,
    "batch_size": 128,
    "drop_p": 0.1,
    "pool": "attention",
    "rope": True,
    "head_norm": False,
    "tau": 0.01,
    "proposal_steps": 1,
    "temperature": 0.0,
    "weigh_inverse": False,
    "beta_v": 0.1,
    "beta_s": 1.0,
    "beta_r": 1.0,
    "beta_a": 0.1,
    "nce_bank": 10_000,
    "reward": "zero_one",
    "history": True,
    "policy_near": 0.0,
    "lr_fall": 0.0,
    "goal_in_reach": False,
    "inverse_goal": True,
}
ONLINE = {k: SMALL[k] for k in ("d_model", "n_layers", "tau", "dataset", "learning_rate")}
PRESETS = {"opso": {"small": SMALL, "quick": QUICK, "upstream": UPSTREAM}}
PRESETS["opso_online"] = {
    "small": {**ONLINE, "env_steps": 200_000},
    "quick": {**ONLINE, "env_steps": 20_000, "num_final_episodes": 4, "eval_every": 0},
    "upstream": UPSTREAM,
}
