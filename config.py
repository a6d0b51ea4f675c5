"""Every number and every flag, once: the dataclasses below are the command line, the help, the record in a checkpoint.

A field is a flag (`--batch_size`), its default the default, the sentence under it the help. Agents inherit the groups
that they share (`class BambaConfig(Encoder, Training, ...)`); each group is a section of `--help`. `PRESETS` are named
overrides.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import Literal


@dataclass(frozen=True)
class Run:
    """what to run, and where its traces go"""

    agent: Literal["bamba"] = "bamba"
    """which agent to train"""
    preset: Literal["none", "quick", "small"] = "none"
    """named settings, applied before the other flags: quick = a few minutes on two CPU cores, small = an hour"""
    seed: int = 42
    """one number seeds network, data order and noise"""
    output_dir: str = "./outputs"
    """every run gets a folder of its own in here"""
    resume: str = ""
    """a checkpoint or run folder to continue exactly, with its own settings; --num_epochs and --device may differ"""
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


@dataclass(frozen=True)
class Training:
    """how long and how hard to learn"""

    num_epochs: int = 1000
    """epochs in all"""
    updates_per_epoch: int = 1000
    """gradient updates in one epoch; losses are logged once an epoch"""
    batch_size: int = 256
    """B, windows in one update"""
    learning_rate: float = 3e-4
    """AdamW's step after the warm-up"""
    warmup_steps: int = 1000
    """updates over which the learning rate rises linearly from nearly 0"""
    weight_decay: float = 1e-4
    """AdamW's decay; never on norms, biases, A_log, D, dt_bias"""
    grad_clip: float = 1.0
    """largest gradient norm, for the critics and for the rest apart"""
    eval_freq: int = 10
    """epochs between evaluations; 0: never"""
    save_freq: int = 50
    """epochs between checkpoints (an evaluation writes one too)"""


@dataclass(frozen=True)
class Judging:
    """how to evaluate"""

    num_eval_episodes: int = 10
    """episodes in one evaluation"""
    eval_seed: int = 1_000_000
    """seed of the first evaluation episode, the next ones count on from it"""
    env_version: str = "v4"
    """version of D4RL's bodies in Gymnasium; v4 moves as D4RL's did"""


@dataclass(frozen=True)
class Machine:
    """how to compute"""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps; auto takes a GPU when there is one"""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """tf32: CUDA's fast float32 products; bf16: the encoder under autocast (decays and sums stay in float32)"""
    compile: bool = False
    """torch.compile the encoder's blocks: half a minute at the start, then faster; needs a C++ compiler on a CPU"""
    cuda_graphs: bool = True
    """on CUDA, capture the whole update and replay it; falls back to eager with the reason"""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice. Give 1 to each of several runs side by side"""


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
class BambaConfig(Objective, Encoder, Machine, Judging, Training, Data, Run):
    """Bamba: behaviour cloning and Q-learning on a Mamba-2 summary of the last K states."""

    def __post_init__(self):
        check_ranges(self)


# least and greatest sensible values; the encoder's sizes are checked where it is built, with the nearest legal ones
AT_LEAST_1 = (
    "num_epochs",
    "updates_per_epoch",
    "batch_size",
    "policy_freq",
    "hidden_dim",
    "num_eval_episodes",
)
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
RANGES = dict.fromkeys(AT_LEAST_1, (1, None)) | dict.fromkeys(AT_LEAST_0, (0, None)) | {"gamma": (0, 1), "tau": (0, 1)}


def check_ranges(cfg) -> None:
    """ValueError for a number that makes no sense, with its range."""
    for f in fields(cfg):
        value, (low, high) = getattr(cfg, f.name), RANGES.get(f.name, (None, None))
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{f.name} = {value} makes no sense: take {wanted}")


CONFIGS = {"bamba": BambaConfig}

SMALL_ENCODER = {"d_model": 64, "d_state": 16, "headdim": 32, "n_layers": 2}
QUICK = {"data": "local", "local_transitions": 200_000, "num_epochs": 10, "updates_per_epoch": 500, "warmup_steps": 200}
QUICK |= {"batch_size": 128, "hidden_dim": 128, "eval_freq": 2, "save_freq": 2}
PRESETS = {
    "none": {},
    "small": {**SMALL_ENCODER, "num_epochs": 100, "save_freq": 10},
    "quick": {**SMALL_ENCODER, **QUICK},
}


def parse(argv: Sequence[str] | None = None, prog: str = "trainer.py"):
    """The config of the agent that the command line (default: sys.argv) names. An undeclared flag ends the program."""
    import tyro  # here, so that an agent can be imported and used without it

    argv = list(sys.argv[1:] if argv is None else argv)
    config = CONFIGS.get(word_after("--agent", argv), BambaConfig)
    preset = PRESETS.get(word_after("--preset", argv), {})  # an unknown name is refused below, with the choices
    # The groups are flat in use and nested only here: that is what makes each one a section of --help.
    groups = {
        g.__name__: g(**{f.name: preset[f.name] for f in fields(g) if f.name in preset})
        for g in reversed(config.__bases__)
    }
    nested = make_dataclass(config.__name__, [(name, type(g), g) for name, g in groups.items()], frozen=True)
    marks = (tyro.conf.OmitArgPrefixes,)
    parts = tyro.cli(nested, args=argv, prog=prog, description=config.__doc__, use_underscores=True, config=marks)
    return config(**{f.name: getattr(getattr(parts, name), f.name) for name, g in groups.items() for f in fields(g)})


def word_after(flag: str, argv: Sequence[str]) -> str:
    """What the command line says behind `flag`, as `--flag word` or `--flag=word`; the last one counts, as for tyro."""
    found = [b for a, b in zip(argv, argv[1:]) if a == flag] + [
        a.split("=", 1)[1] for a in argv if a.startswith(flag + "=")
    ]
    return found[-1] if found else ""


def readme_table(config: type) -> str:
    """Every flag of an agent as Markdown, a table a group, out of the dataclasses' own words."""
    import inspect
    import re

    lines = []
    for group in reversed(config.__bases__):
        words = dict(re.findall(r'    (\w+): .*\n    """((?:.|\n)*?)"""', inspect.getsource(group)))
        lines += [f"\n**{group.__name__}**: {group.__doc__}\n", "| flag | default | |", "|---|---|---|"]
        for f in fields(group):
            default = f.default if f.default != "" else "none"
            lines.append(f"| `{f.name}` | {default} | {' '.join(words[f.name].split())} |")
    return "\n".join(lines).strip()


if __name__ == "__main__":
    print(readme_table(BambaConfig))
