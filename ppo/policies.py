"""Which policy PPO works on: out of a checkpoint or new; the world it lives in; the data it is cloned from.

A policy is an nn.Module with `reset` and `act` of the contract (agent.py), and with the faces that `act` is made of, as
`Bamba` has them: `see` takes in the present, `view` shows the window, `look` gives action and embedding, `did` takes in
the action, `trace` is what a step adds to later windows; `miss` is the distance from recorded actions, `parts` are
the nets.
"""

import logging
import math
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import agent
import d4rl_utils
import decision
from agent import Bamba, Spec, World
from checkpoints import config_of, read_checkpoint
from config import BambaConfig, MLPConfig, PPOConfig
from decision import Decision
from memory import Memory, Spans, Windows, forget
from model import Normaliser

log = logging.getLogger(__name__)

POLICIES = {"bamba": Bamba, "dt": Decision, "dmamba": Decision, "dm": Decision}
SEES_TIME = ("dt", "dmamba", "dm")
SMALL = {"d_model": 64, "d_state": 16, "headdim": 32, "n_layers": 2, "drop_p": 0.0}  # of a new encoder


class MLPPolicy(nn.Module):
    """The baseline: an action from the present state alone, by two tanh layers (CleanRL's). It lives in Bamba's memory
    of K = 1."""

    def __init__(self, cfg: MLPConfig, spec: Spec, device: torch.device | str = "cpu"):
        super().__init__()
        self.cfg = cfg
        low, high = torch.tensor(spec.low), torch.tensor(spec.high)
        self.register_buffer("middle", (high + low) / 2)
        self.register_buffer("reach", (high - low) / 2)
        self.normal = Normaliser(spec.state)
        self.body = tanh_layers(spec.state, cfg.hidden_dim, cfg.hidden_dim)
        self.head = orthogonal(nn.Linear(cfg.hidden_dim, spec.action), 0.01)
        self.to(device)

    def reset(self, n: int, goal: None = None) -> Memory:
        if goal is not None:
            raise ValueError(f"this policy wants the highest return: it cannot be asked for {goal}")
        return forget(n, self.cfg.context_length, self.normal.mean)

    @torch.no_grad()
    def act(self, state: Tensor, reward: Tensor, memory: Memory, explore: bool = False) -> tuple[Tensor, Memory]:
        memory = self.see(state, reward, memory)
        action, _ = self.look(self.view(memory))
        return action.clamp(self.middle - self.reach, self.middle + self.reach), memory

    def look(self, view: tuple[Tensor], t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """States (B, 1, S) -> actions (B, A), which may lie beyond their bounds; embedding (B, D)"""
        z = self.body(self.normal(view[0][:, -1]).clamp(-10, 10))
        return self.middle + self.reach * self.head(z), z

    see, view, did, trace = Bamba.see, Bamba.view, Bamba.did, Bamba.trace

    def parts(self) -> tuple[list[nn.Module], list[nn.Module]]:
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


def settle(cfg: PPOConfig) -> PPOConfig:
    """The settings with what `init` implies: the policy's system, sizes, environment and data. From then on the file is
    needed for its tensors only, once; a checkpoint of PPO's is whole by this.

    ValueError for a checkpoint that cannot be fine-tuned, or not there.
    """
    if not cfg.init:
        raise ValueError("--agent ppo needs --init: a checkpoint or run folder to go on from, or none for a new policy")
    if cfg.init == "none":
        place = {"env": cfg.env or "hopper", "env_version": cfg.env_version or "v4"}
        if cfg.mixer == "mlp":
            own = {"system": "mlp", "config": asdict(MLPConfig(**place, hidden_dim=cfg.hidden_dim))}
        else:
            own = {"system": "bamba", "config": asdict(BambaConfig(**place, **SMALL))}
        return replace(cfg, policy={**own, "data": None}, **place)
    part = read_checkpoint(cfg.init)
    if part["system"] not in POLICIES:
        hint = "; go on with it by --resume" if part["system"] == "ppo" else ""
        raise ValueError(f"{cfg.init} holds a {part['system']}; ppo fine-tunes {', '.join(POLICIES)}{hint}")
    saved = config_of(part, cfg.init)
    if cfg.env and cfg.env != saved.env:
        raise ValueError(f"{cfg.init} was trained in {saved.env}, not in {cfg.env}: leave --env away")
    changes = {"env_version": cfg.env_version or saved.env_version, "dataset_dir": cfg.dataset_dir or saved.dataset_dir}
    if cfg.dataset:
        changes |= {"dataset": cfg.dataset, "dataset_type": BambaConfig.dataset_type}
    if part["system"] in SEES_TIME:
        if saved.inference != cfg.inference:
            log.info(f"{cfg.init} acts by {saved.inference} inference; ppo goes on with windows, as it was trained")
        target = saved.target_return if cfg.target_return is None else cfg.target_return
        changes |= {"inference": "window", "target_return": target, "self_evolution": "off"}
    own = {"system": part["system"], "config": asdict(replace(saved, **changes)), "data": part["run"]["data"]}
    return replace(cfg, policy=own, env=saved.env, env_version=changes["env_version"])


def config_in(cfg: PPOConfig):
    """The policy's own settings, computing where and as `cfg` says."""
    if cfg.policy["system"] == "mlp":
        return replace(MLPConfig(**cfg.policy["config"]), env_version=cfg.env_version)
    how = {"compile": cfg.compile, "precision": cfg.precision, "cuda_graphs": False, "env_version": cfg.env_version}
    return replace(config_of(cfg.policy, "the policy in this checkpoint"), **how)


def policy_of(cfg: PPOConfig, spec: Spec, device: torch.device | str) -> nn.Module:
    """The policy, untrained."""
    return POLICIES.get(cfg.policy["system"], MLPPolicy)(config_in(cfg), spec, device)


def world(cfg: PPOConfig) -> World:
    """Where the checkpoint's data were recorded; a new policy's environment needs no data."""
    if cfg.policy["data"] is None:
        return agent.world_on(d4rl_utils.open_stage(cfg.env, cfg.env_version))
    return agent.world(config_in(cfg))


def load_into(policy: nn.Module, cfg: PPOConfig, spec: Spec) -> None:
    """The tensors of the checkpoint at `init`. ValueError if it is not the one that the settings come from."""
    part = read_checkpoint(cfg.init)
    if (part["system"], part["run"]["data"]) != (cfg.policy["system"], cfg.policy["data"]):
        raise ValueError(f"{cfg.init} has changed since this run began")
    if Spec(**part["spec"]) != spec:
        raise ValueError(f"{cfg.init} was made for {part['spec']}, but {cfg.env} has {spec}")
    policy.load_state_dict({k: v for k, v in part["agent"].items() if not k.startswith("past.")})


def open_cloned(cfg: PPOConfig, device: torch.device | str, seed: int) -> Windows | Spans:
    """The sampler of the data that the policy learned from, or of `dataset`. ValueError if they cannot be had."""
    module = decision if cfg.policy["system"] in SEES_TIME else agent
    without = "--bc_coef 0 --sigma 0.1 does without data; --dataset and --dataset_dir say where they are"
    try:
        sampler, identity = module.data(config_in(cfg), device, seed)
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
