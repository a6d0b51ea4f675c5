"""Which policy PPO works on: out of a checkpoint or new; the environment it acts in; the data it is cloned from."""

import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import d4rl_utils
from common.checkpoint import AGENTS, agent_of, config_of, read_checkpoint
from common.interface import EnvSpec, EvalEnv, FramePolicy, WindowPolicy
from common.windows import FrameStack, SequenceSampler, WindowSampler
from config import BambaConfig, MLPConfig, PPOConfig
from model import Normalizer

NEW_ENCODER = {"train_on": "windows", "context_length": 5, "state_skip": False, "head_depth": 2, "eval_ema": 0.0}


class MLPPolicy(FramePolicy):
    """The baseline: an action from the present state alone, by two tanh layers (CleanRL's). Its memory
    is a window of K = 1."""

    def __init__(self, cfg: MLPConfig, spec: EnvSpec, device: torch.device | str = "cpu"):
        super().__init__(cfg, spec, device)
        self.k = 1
        self.register_action_bounds()
        self.obs_normalizer = Normalizer(spec.state)
        self.body = tanh_layers(spec.state, cfg.hidden_dim, cfg.hidden_dim)
        self.head = orthogonal(nn.Linear(cfg.hidden_dim, spec.action), 0.01)
        self.to(device)

    @torch.no_grad()
    def act(
        self, state: Tensor, reward: Tensor, memory: FrameStack, explore: bool = False
    ) -> tuple[Tensor, FrameStack]:
        memory = self.observe_state(state, reward, memory)
        action, _ = self.forward_window(self.window(memory))
        return action.clamp(self.action_bias - self.action_scale, self.action_bias + self.action_scale), memory

    def forward_window(self, view: tuple[Tensor], t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States (B, 1, S) -> actions (B, A), which may lie beyond their bounds; embedding (B, D)"""
        z = self.body(self.obs_normalizer(view[0][:, -1]).clamp(-10, 10))
        return self.action_bias + self.action_scale * self.head(z), z

    def param_groups(self) -> tuple[list[nn.Module], list[nn.Module]]:
        return [self.body], [self.head]


def orthogonal(layer: nn.Linear, gain: float) -> nn.Linear:
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def tanh_layers(*widths: int) -> nn.Sequential:
    """A tanh behind every layer, orthogonal weights. (..., widths[0]) -> (..., widths[-1])"""
    layers = [m for i, o in zip(widths, widths[1:]) for m in (orthogonal(nn.Linear(i, o), math.sqrt(2)), nn.Tanh())]
    return nn.Sequential(*layers)


# -- out of the settings -------------------------------------------------------------------------


def resolve_config(cfg: PPOConfig) -> PPOConfig:
    """The settings with what `init` implies: the policy's system, sizes, environment and data. From then on the file is
    needed for its tensors only, once; a checkpoint of PPO's is whole by this.

    ValueError for a checkpoint that cannot be fine-tuned, or not there.
    """
    if not cfg.init:
        raise ValueError("--agent ppo needs --init: a checkpoint or run folder to go on from, or none for a new policy")
    if cfg.init == "none":
        where = {"env": cfg.env or "hopper", "env_version": cfg.env_version or "v4"}
        if cfg.mixer == "mlp":
            own = {"system": "mlp", "config": asdict(MLPConfig(**where, hidden_dim=cfg.hidden_dim))}
        else:
            own = {"system": "bamba", "config": asdict(BambaConfig(**where, **NEW_ENCODER))}
        return replace(cfg, policy={**own, "data": None}, **where)
    ckpt = read_checkpoint(cfg.init)
    kind = agent_of(ckpt["system"])
    if not issubclass(kind, WindowPolicy):
        able = [name for name in AGENTS if issubclass(agent_of(name), WindowPolicy)]
        hint = "; go on with it by --resume" if ckpt["system"] == "ppo" else ""
        raise ValueError(f"{cfg.init} holds a {ckpt['system']}; ppo fine-tunes {', '.join(able)}{hint}")
    saved = config_of(ckpt, cfg.init)
    if cfg.env and cfg.env != saved.env:
        raise ValueError(f"{cfg.init} was trained in {saved.env}, not in {cfg.env}: leave --env away")
    changes = {"env_version": cfg.env_version or saved.env_version, "dataset_dir": cfg.dataset_dir or saved.dataset_dir}
    if cfg.dataset:
        changes |= {"dataset": cfg.dataset, "dataset_type": BambaConfig.dataset_type}
    sizes = replace(kind.finetuning_config(saved, cfg.target_return), **changes)
    own = {"system": ckpt["system"], "config": asdict(sizes), "data": ckpt["run"]["data"]}
    return replace(cfg, policy=own, env=saved.env, env_version=changes["env_version"])


def policy_config(cfg: PPOConfig):
    """The policy's own settings, computing where and as `cfg` says."""
    if cfg.policy["system"] == "mlp":
        return replace(MLPConfig(**cfg.policy["config"]), env_version=cfg.env_version)
    how = {"compile": cfg.compile, "precision": cfg.precision, "cuda_graphs": False, "env_version": cfg.env_version}
    return replace(config_of(cfg.policy, "the policy in this checkpoint"), **how)


def policy_class(cfg: PPOConfig) -> type[WindowPolicy]:
    name = cfg.policy["system"]
    return MLPPolicy if name == "mlp" else agent_of(name)


def policy_of(cfg: PPOConfig, spec: EnvSpec, device: torch.device | str) -> WindowPolicy:
    """The policy, untrained."""
    return policy_class(cfg)(policy_config(cfg), spec, device)


def make_eval_env(cfg: PPOConfig) -> EvalEnv:
    """Where the checkpoint's data were recorded; a new policy's environment needs no data."""
    if cfg.policy["data"] is None:
        return d4rl_utils.eval_env_of(cfg.env, cfg.env_version)
    return policy_class(cfg).make_eval_env(policy_config(cfg))


def load_into(policy: WindowPolicy, cfg: PPOConfig, spec: EnvSpec) -> None:
    """The tensors of the checkpoint at `init`. ValueError if it is not the one that the settings come from."""
    ckpt = read_checkpoint(cfg.init)
    if (ckpt["system"], ckpt["run"]["data"]) != (cfg.policy["system"], cfg.policy["data"]):
        raise ValueError(f"{cfg.init} has changed since this run began")
    if EnvSpec(**ckpt["spec"]) != spec:
        raise ValueError(f"{cfg.init} was made for {ckpt['spec']}, but {cfg.env} has {spec}")
    policy.load_acting_weights(ckpt["agent"])


def bc_sampler(cfg: PPOConfig, device: torch.device | str, seed: int) -> WindowSampler | SequenceSampler:
    """The sampler of the data that the policy learned from, or of `dataset`. ValueError if they cannot be had."""
    without = "--bc_coef 0 --sigma 0.1 does without data; --dataset and --dataset_dir say where they are"
    try:
        sampler, identity = policy_class(cfg).open_data(policy_config(cfg), device, seed)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the data that {Path(cfg.init).name} learned from cannot be had: {error}. {without}"
        ) from error
    if not cfg.dataset and identity.sha256 != cfg.policy["data"]["sha256"]:
        raise ValueError(
            f"the policy learned from {cfg.policy['data']['name']} (SHA-256 {cfg.policy['data']['sha256'][:12]}), but "
            f"here {identity.name} is {identity.sha256[:12]}. {without}"
        )
    return sampler
