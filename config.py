"""Every number and every flag, once: the dataclasses below are the command line, the help, the record in a checkpoint.

A field is a flag (`--batch_size`), its default the default, the sentence under it the help. Agents inherit the groups
that they share (`class BambaConfig(Encoder, Training, ...)`) and give a field a default of their own by naming it
again; each group is a section of `--help`. `PRESETS` are named overrides, for each agent its own.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, make_dataclass
from typing import Literal


@dataclass(frozen=True)
class Run:
    """what to run, and where its traces go"""

    agent: Literal["bamba", "dt", "dmamba", "dm"] = "bamba"
    """which agent to train"""
    preset: Literal["none", "quick", "small", "base", "upstream"] = "none"
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


# -- return-conditioned agents: one program, and what the three differ in -------------------------


@dataclass(frozen=True)
class Tokens:
    """the sequence model over (return-to-go, state, action) tokens"""

    context_length: int = 20
    """K, steps in a window; each is three tokens"""
    d_model: int = 128
    """D, width of the residual stream"""
    n_layers: int = 3
    """blocks, one above the other"""
    drop_p: float = 0.1
    """dropout on the tokens and on each block's output (and on attention's weights)"""
    channel_mlp: bool = True
    """an MLP of width 4 D behind every mixer"""
    mlp_embedding: bool = False
    """embed tokens by a residual MLP and not by one matrix; the action head gets a hidden layer too"""
    time_after_norm: bool = False
    """add the time embedding after the tokens' LayerNorm and not before it"""
    max_ep_len: int = 1000
    """rows of the time table; later steps share the last one"""


@dataclass(frozen=True)
class Attention:
    """the mixer of dt"""

    n_heads: int = 1
    """heads; must divide d_model"""


@dataclass(frozen=True)
class StateSpace:
    """the mixer of dmamba and dm"""

    d_state: int = 16
    """N, numbers remembered by each of the expand * d_model channels"""
    d_conv: int = 4
    """W, how many tokens the causal convolution sees"""
    expand: int = 2
    """E / D, width inside a block over width outside"""
    mamba_backend: Literal["auto", "torch", "mamba_ssm"] = "auto"
    """which implementation of the state-space layer runs"""


@dataclass(frozen=True)
class Grained:
    """the multi-grained block of dm"""

    block: Literal["p", "dual", "coarse"] = "p"
    """p: as the paper draws it; dual: two whole mixers, as released but repaired; coarse: plain Mamba-1"""


@dataclass(frozen=True)
class Imitation:
    """what is learned from a window, and from whom"""

    w_a: float = 1.0
    """weight of the action error"""
    w_s: float = 0.0
    """weight of predicting the next state; 0 leaves the head out"""
    w_r: float = 0.0
    """weight of predicting the next return-to-go; 0 leaves the head out"""
    self_evolution: Literal["off", "snapshot", "ema"] = "off"
    """soften labels toward an older policy: a copy renewed every refresh_every updates, or a running mean"""
    alpha_T: float = 0.85
    """the older policy's share beta rises linearly to this at the end of training ..."""
    beta_cap: float = 0.5
    """... but not above this"""
    refresh_every: int = 2500
    """updates between steps of beta, and between copies of the older policy"""


@dataclass(frozen=True)
class Returns:
    """what is asked for when acting, and how much of the past is looked at"""

    target_return: float | None = None
    """the return asked for; none: the one in decision.TARGETS for the body and data"""
    inference: Literal["window", "recurrent", "staggered"] = "window"
    """the last K steps anew; one state that remembers all; two states that restart in turn, never older than K"""


@dataclass(frozen=True)
class ReturnConditioned(Returns, Imitation, Tokens, Machine, Judging, Training, Data, Run):
    """Acts so that a wanted return comes true."""

    num_epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    grad_clip: float = 0.25

    def __post_init__(self):
        check_ranges(self)


@dataclass(frozen=True)
class DTConfig(Attention, ReturnConditioned):
    """Decision Transformer: causal attention over (return-to-go, state, action) tokens."""

    agent: Literal["bamba", "dt", "dmamba", "dm"] = "dt"


@dataclass(frozen=True)
class DMambaConfig(StateSpace, ReturnConditioned):
    """Decision Mamba: the Decision Transformer with Mamba-1 in attention's place."""

    agent: Literal["bamba", "dt", "dmamba", "dm"] = "dmamba"
    n_layers: int = 6
    channel_mlp: bool = False


@dataclass(frozen=True)
class DMConfig(Grained, DMambaConfig):
    """Multi-grained Decision Mamba: a second, finer scan; two more predictions; labels that an older self softens."""

    agent: Literal["bamba", "dt", "dmamba", "dm"] = "dm"
    time_after_norm: bool = True
    w_a: float = 0.9
    w_s: float = 0.05
    w_r: float = 0.05
    self_evolution: Literal["off", "snapshot", "ema"] = "snapshot"
    warmup_steps: int = 2500
    weight_decay: float = 1e-5


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
AT_LEAST_0 += ("w_a", "w_s", "w_r", "alpha_T")
RANGES = dict.fromkeys(AT_LEAST_1, (1, None)) | dict.fromkeys(AT_LEAST_0, (0, None)) | {"gamma": (0, 1), "tau": (0, 1)}
RANGES |= {"beta_cap": (0, 1)}


def check_ranges(cfg) -> None:
    """ValueError for a number that makes no sense, with its range."""
    for f in fields(cfg):
        value, (low, high) = getattr(cfg, f.name), RANGES.get(f.name, (None, None))
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise ValueError(f"{f.name} = {value} makes no sense: take {wanted}")


CONFIGS = {"bamba": BambaConfig, "dt": DTConfig, "dmamba": DMambaConfig, "dm": DMConfig}

SMALL_ENCODER = {"d_model": 64, "d_state": 16, "headdim": 32, "n_layers": 2}
QUICK = {"data": "local", "local_transitions": 200_000, "num_epochs": 10, "updates_per_epoch": 500, "warmup_steps": 200}
QUICK |= {"eval_freq": 2, "save_freq": 2}
# One thread of a busy machine makes about 60 (dt), 35 (dmamba) and 22 (dm) updates a second of `small`;
# `upstream` is each one's release, `base` a size in between.
SMALL = {"d_model": 64, "n_layers": 2, "batch_size": 16, "learning_rate": 1e-3, "warmup_steps": 1000}
SMALL |= {"num_epochs": 50, "save_freq": 10}
SMALL_MAMBA = {**SMALL, "d_state": 8}
BASE, UPSTREAM = {"d_model": 256, "n_layers": 6}, {"d_model": 768, "n_layers": 24, "drop_p": 0.0}
PRESETS = {
    "bamba": {
        "small": {**SMALL_ENCODER, "num_epochs": 100, "save_freq": 10},
        "quick": {**SMALL_ENCODER, **QUICK, "batch_size": 128, "hidden_dim": 128},
    },
    "dt": {"small": SMALL, "quick": {**SMALL, **QUICK}, "base": BASE, "upstream": {}},
    "dmamba": {"small": SMALL_MAMBA, "quick": {**SMALL_MAMBA, **QUICK}, "base": BASE, "upstream": {"drop_p": 0.0}},
    "dm": {
        "small": {**SMALL_MAMBA, "refresh_every": 1000},
        "quick": {**SMALL_MAMBA, **QUICK, "refresh_every": 500},
        "base": BASE,
        "upstream": UPSTREAM,
    },
}


def groups_of(config: type) -> list[type]:
    """The sections that an agent's settings come in."""
    return [g for g in reversed(config.__mro__) if g.__bases__ == (object,)]


def parse(argv: Sequence[str] | None = None, prog: str = "trainer.py"):
    """The config of the agent that the command line (default: sys.argv) names. An undeclared flag ends the program."""
    import tyro  # here, so that an agent can be imported and used without it

    argv = list(sys.argv[1:] if argv is None else argv)
    agent, preset = word_after("--agent", argv) or "bamba", word_after("--preset", argv) or "none"
    config = CONFIGS.get(agent, BambaConfig)  # unknown names are refused below, with the choices
    known = PRESETS.get(agent, {})
    if preset in {name for names in PRESETS.values() for name in names} and agent in CONFIGS and preset not in known:
        raise ValueError(f"{agent} has no preset {preset!r}; it has {', '.join(known)}")
    defaults = {f.name: f.default for f in fields(config)} | known.get(preset, {})
    # The groups are flat in use and nested only here: that is what makes each one a section of --help.
    groups = {g.__name__: g(**{f.name: defaults[f.name] for f in fields(g)}) for g in groups_of(config)}
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


def readme_table() -> str:
    """Every flag as Markdown, a table a group, out of the dataclasses' own words; then what each agent starts from."""
    import inspect
    import re

    lines = []
    users = {g: [name for name, config in CONFIGS.items() if g in groups_of(config)] for g in all_groups()}
    for group in all_groups():
        words = dict(re.findall(r'    (\w+): .*\n    """((?:.|\n)*?)"""', inspect.getsource(group)))
        whose = "" if len(users[group]) == len(CONFIGS) else f" ({', '.join(users[group])})"
        lines += [f"\n**{group.__name__}**{whose}: {group.__doc__}\n", "| flag | default | |", "|---|---|---|"]
        for f in fields(group):
            lines.append(f"| `{f.name}` | {shown(f.default)} | {' '.join(words[f.name].split())} |")
    lines += ["\n**Where an agent starts from other defaults**\n", "| agent | |", "|---|---|"]
    for name, config in CONFIGS.items():
        groups = {f.name: f.default for g in groups_of(config) for f in fields(g)}
        own = [f"`{f.name}` {shown(f.default)}" for f in fields(config) if f.default != groups[f.name]]
        lines += [f"| `{name}` | {', '.join(w for w in own if not w.startswith('`agent`'))} |"] if own else []
    return "\n".join(lines).strip()


def all_groups() -> list[type]:
    """Every section of every agent, each once."""
    return list(dict.fromkeys(g for config in CONFIGS.values() for g in groups_of(config)))


def shown(default) -> str:
    return "none" if default in ("", None) else str(default)


if __name__ == "__main__":
    print(readme_table())
