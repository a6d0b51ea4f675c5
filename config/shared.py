"""What several agents are told: the groups of settings that they share. Beside a field stand the values that it may
have (`Range`) and when it counts at all (`Only`)."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal, NamedTuple, get_args


class Range(NamedTuple):
    """The values that a number may have; both ends belong to them unless said otherwise. None: no end."""

    low: float | None = None
    high: float | None = None
    above: bool = False  # low itself is out
    below: bool = False  # high itself is out

    def __contains__(self, x) -> bool:
        if self.low is not None and not (x > self.low if self.above else x >= self.low):
            return False
        return self.high is None or (x < self.high if self.below else x <= self.high)

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.above else f"at least {self.low:g}" if self.low is not None else ""
        if self.high is None:
            return low or "any number"
        if self.above or self.below or self.low is None:
            return f"{low} and {'less than' if self.below else 'at most'} {self.high:g}"
        return f"from {self.low:g} to {self.high:g}"


class Only(NamedTuple):
    """A setting that counts under a condition. Given where that does not hold, it is said to have no effect."""

    words: str  # behind "it counts only"
    holds: Callable  # the settings -> whether it counts


def only(**wanted) -> Only:
    """It counts while the other settings have these values, or one of such a tuple: only(objective="td3bc")"""
    allowed = {name: value if isinstance(value, tuple) else (value,) for name, value in wanted.items()}
    parts = []
    for name, values in allowed.items():
        if isinstance(values[0], bool):
            parts.append(f"{'with' if values[0] else 'without'} --{name}")
        else:
            parts.append(f"with --{name} {', '.join(values[:-1])}{' or ' if values[1:] else ''}{values[-1]}")
    return Only(" and ".join(parts), lambda cfg: all(getattr(cfg, name) in values for name, values in allowed.items()))


def only_above_0(name: str) -> Only:
    """It counts while another number is more than 0: a weight that switches something on."""
    return Only(f"with --{name} above 0", lambda cfg: getattr(cfg, name) > 0)


Count = Annotated[int, Range(1)]
Layers = Annotated[int, Range(1, 1000)]
Width = Annotated[int, Range(1, 65_536)]
Seeds = Annotated[int, Range(1, 1024)]
Natural = Annotated[int, Range(0)]
NonNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, above=True)]
Share = Annotated[float, Range(0, 1)]
ShareAbove0 = Annotated[float, Range(0, 1, above=True)]
Dropout = Annotated[float, Range(0, 1, below=True)]

Agent = Literal["bamba", "dt", "dmamba", "dm", "dqn", "opso", "opso_online", "ppo"]
Precision = Literal["auto", "fp32", "tf32", "bf16"]
Preset = Literal["none", "quick", "small", "base", "upstream", "auto"]


@dataclass(frozen=True)
class Run:
    """what to run, and where its traces go"""

    LEGACY_DEFAULTS: ClassVar[dict] = {}  # of settings younger than a checkpoint: what was done before them

    agent: Agent = "bamba"
    """which agent to train"""
    preset: Preset = "none"
    """named settings, applied before the other flags: quick = minutes on a CPU core, small = an hour or two, auto = the
    longest that ends within --hours here (offline agents, on a CPU)"""
    hours: Annotated[Positive, only(preset="auto")] = 1.0
    """of --preset auto: how long the run may take"""
    seed: Natural = 42
    """one number seeds network, data order and noise"""
    num_seeds: Seeds = 1
    """seeds, from that one on, that learn in one process by one update; a run folder each (bamba, dt, dmamba, dm,
    opso)"""
    output_dir: str = "./outputs"
    """every run gets a folder of its own in here"""
    resume: str = ""
    """a checkpoint or run folder to continue exactly, with its own settings; its length and --device may differ"""
    tensorboard: bool = True
    """write TensorBoard event files into the run folder"""
    wandb: bool = False
    """also log to Weights & Biases (pip install wandb)"""


def named_by_d4rl(cfg) -> bool:
    """Whether the data are D4RL's or stand in for them, not a file of one's own, and not Minari's or LeRobot's."""
    return not cfg.dataset.startswith(("minari:", "lerobot:")) and Path(cfg.dataset).suffix not in (".hdf5", ".h5")


NAMED_BY_D4RL = Only("for data that D4RL names", named_by_d4rl)
ONES_OWN = Only("for a file as --dataset", lambda c: bool(c.dataset) and not named_by_d4rl(c))
ROLLED_OUT = Only("for data that D4RL names, and not with --data d4rl", lambda c: named_by_d4rl(c) and c.data != "d4rl")


@dataclass(frozen=True)
class Data:
    """what to learn from"""

    env: str = "hopper"
    """body: hopper, walker2d, halfcheetah or ant; with a file as --dataset also Gymnasium's ids, such as Pendulum-v1"""
    dataset_type: Literal["random", "medium", "medium-replay", "medium-expert", "expert", "full-replay"] = "medium"
    """who collected the data"""
    data: Annotated[Literal["auto", "d4rl", "local"], NAMED_BY_D4RL] = "auto"
    """d4rl: D4RL's own file, downloaded if missing; local: rolled out here; auto: local only if D4RL's cannot be had"""
    dataset_dir: str = "./datasets"
    """where dataset files lie"""
    dataset: str = ""
    """instead of the above: hopper-medium-v2; minari:mujoco/hopper/medium-v0; lerobot:USER/NAME or lerobot:FOLDER; or a
    .hdf5 file in D4RL's layout or d3rlpy's"""
    local_transitions: Annotated[Natural, ROLLED_OUT] = 0
    """how many transitions a local dataset holds; 0: 1M, and for medium-replay as many as D4RL's (202k to 402k)"""
    pct_traj: ShareAbove0 = 1.0
    """learn from the episodes of highest return that hold this share of the transitions; with cloning: %BC"""
    observe: str = "full"
    """what is shown of states, in data and environment: full, positions, noisy:0.1, delay:3, drop:0.1, flicker:0.2"""
    ant_contacts: Annotated[Literal["refuse", "drop"], ONES_OWN] = "refuse"
    """what becomes of a file of ant's whose last 84 of 111 state dims, the contact forces, are not zero"""
    env_version: str = "v4"
    """version of D4RL's bodies in Gymnasium; v4 moves as D4RL's did"""


@dataclass(frozen=True)
class Training:
    """how long to learn from data"""

    num_epochs: Count = 1000
    """epochs in all"""
    updates_per_epoch: Count = 1000
    """gradient updates in one epoch; losses are logged once an epoch"""
    eval_freq: Natural = 10
    """epochs between evaluations; 0: never"""
    save_freq: Natural = 50
    """epochs between checkpoints (an evaluation writes one too)"""


@dataclass(frozen=True)
class Online:
    """how long to learn in an environment; an environment step is one step of one environment"""

    env_steps: Count = 200_000
    """environment steps in all"""
    num_envs: Count = 1
    """environments side by side; updates per environment step stay as they are"""
    log_every: Count = 1000
    """environment steps between rows of losses in the log; an episode has a row when it ends"""
    eval_every: Natural = 0
    """environment steps between evaluations; 0: one at the end"""
    save_every: Natural = 10_000
    """environment steps between checkpoints, from which a killed run goes on; 0: one at the end"""
    num_final_episodes: Natural = 50
    """episodes of the evaluation at the end; 0: none"""


@dataclass(frozen=True)
class UpdateSchedule:
    """when an agent with a replay learns"""

    buffer_size: Count = 100_000
    """transitions that are remembered"""
    learn_start: Natural = 10_000
    """environment steps before the first update"""
    train_every: Count = 1
    """environment steps between rounds of updates"""
    num_updates: Count = 1
    """updates in a round"""


@dataclass(frozen=True)
class OptimConfig:
    """how hard to learn"""

    batch_size: Count = 256
    """B, windows in one update"""
    learning_rate: NonNegative = 3e-4
    """AdamW's step after the warm-up"""
    warmup_steps: Natural = 1000
    """updates over which the learning rate rises linearly from nearly 0"""
    weight_decay: NonNegative = 1e-4
    """AdamW's decay; never on norms, biases, A_log, D, dt_bias"""
    grad_clip: NonNegative = 1.0
    """largest gradient norm; Bamba: for the critics and for the rest apart"""


@dataclass(frozen=True)
class LrDecay:
    """how learning ends"""

    lr_fall: Share = 0.8
    """share of the run, at its end, in which the learning rate falls linearly to 0; 0: it stays"""


@dataclass(frozen=True)
class EvalConfig:
    """how to evaluate"""

    num_eval_episodes: Count = 10
    """episodes in one evaluation"""
    eval_seed: Natural = 1_000_000
    """seed of the first evaluation episode, the next ones count on from it"""


@dataclass(frozen=True)
class Compute:
    """how to compute"""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; auto takes an NVIDIA card when there is one"""
    precision: Precision = "auto"
    """auto: tf32 on CUDA, else fp32; tf32: CUDA's fast float32 products; bf16: besides, the encoder under autocast"""
    compile: bool = False
    """torch.compile blocks and losses: half a minute at the start, then faster; needs a C++ compiler on a CPU"""
    cuda_graphs: bool = True
    """on CUDA, capture the whole update and replay it"""
    threads: Natural = 0
    """CPU threads; 0: PyTorch's choice. Give 1 to each of several runs side by side"""


def ranges_of(config: type) -> dict[str, Range]:
    """The range of every number among a config's settings."""
    return marks_of(config, Range)


def marks_of(config: type, wanted: type) -> dict:
    """What of this type stands beside a config's settings, by their names."""
    found = {}
    for kind in config.__mro__:  # the most derived annotation that has one
        for name, hint in inspect.get_annotations(kind).items():
            marks = [mark for mark in metadata_of(hint) if isinstance(mark, wanted)]
            if marks:
                found.setdefault(name, marks[0])
    return found


def metadata_of(hint) -> list:
    """Everything beside a type and the types that it is made of: Annotated[Annotated[int, a] | None, b] -> [b, a]"""
    own = list(getattr(hint, "__metadata__", ()))
    return own + [mark for part in get_args(hint) for mark in metadata_of(part)]


def check_ranges(cfg) -> None:
    """ValueError for a number that is out of its range, with the range."""
    for name, allowed in ranges_of(type(cfg)).items():
        value = getattr(cfg, name)
        if value is not None and value not in allowed:  # None: the agent knows what to take
            raise ValueError(f"{name} = {value} is out of range: take {allowed}")


QUICK = {  # every agent's preset of that name begins so
    "data": "local",
    "local_transitions": 200_000,
    "num_epochs": 10,
    "updates_per_epoch": 500,
    "warmup_steps": 200,
    "eval_freq": 2,
    "save_freq": 2,
}
