"""Phase 2: inverse dynamics, values and proposals go on from the agent's own episodes, around a frozen encoder.

A batch is part own segments, whose actions are known, part offline ones; both train values and proposals. Goals in
the agent's own episodes are drawn in hindsight, as from data. Acting explores by heading for the goal in a share
epsilon of the steps, z* = z + alpha (z_g - z), alpha ~ U(0.2, 1), in place of the proposal, and by noise on actions;
both fade out over the first episodes. If no action was seen before, the first steps are uniformly random.

Where we differ from the code: a replay (there each transition is used once or never); the true latent and not a
prediction is what inverse dynamics learns from; the noise fades out as announced; the encoder is deaf to dropout.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from common.checkpoint import config_of, read_checkpoint
from common.interface import EnvSpec, OnlineAgent
from common.optim import count_due
from common.rollout import Step
from config import OPSOConfig, OPSOOnlineConfig
from ogbench_utils import name_of, split_name
from ogbench_utils.goal_dataset import GoalSegments, OnlineGoalDataset
from opso.agent import GoalMemory, Opso
from opso.data import goals, labelled_fraction, open_data

STEPS = {"pointmaze": 1000, "antmaze": 1000, "humanoidmaze": 2000}  # of an episode, if its goal is not reached
INHERITED = ("context_length", "d_model", "n_layers", "mixer", "d_state", "d_conv", "expand", "headdim", "pool", "rope")
INHERITED += ("hidden_dim", "head_norm", "proposal_steps", "proposer", "nce_bank", "inverse_data", "inverse_fraction")
INHERITED += ("gamma", "reward", "history", "inverse_goal")


class MixedBuffer:
    """Own episodes, and the offline data beside them."""

    def __init__(self, own: OnlineGoalDataset, offline):
        self.own, self.offline = own, offline

    def sample(self, b: int, share: float) -> GoalSegments:
        """B segments, `share` of them offline ones."""
        many = round(b * share) if self.offline else 0
        if not many:
            return self.own.sample(b)
        parts = self.own.sample(b - many), self.offline.sample(many)
        return GoalSegments(*(torch.cat(pair) for pair in zip(*parts)))

    def state_dict(self) -> dict:
        return {"own": self.own.state_dict(), "offline": self.offline and self.offline.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.own.load_state_dict(state["own"])
        if self.offline:
            self.offline.load_state_dict(state["offline"])


class OpsoOnline(Opso, OnlineAgent):
    """Phase 2: inverse dynamics and values from its own episodes; the encoder stays as it is."""

    frozen = True
    curves = "online_training_curves.png"

    def __init__(self, cfg: OPSOOnlineConfig, spec: EnvSpec, device: torch.device | str = "cpu"):
        super().__init__(cfg, spec, device)
        if cfg.offline_share >= 1:
            raise ValueError(f"offline_share = {cfg.offline_share} leaves nothing of one's own to learn from")
        self.encoder.requires_grad_(False)
        self.register_buffer("acted", torch.zeros(2))  # explored steps, and those toward the goal, since the last row

    @classmethod
    def resolve_config(cls, cfg: OPSOOnlineConfig) -> OPSOOnlineConfig:
        """The settings with what `init` implies."""
        return resolve_config(cfg)

    @classmethod
    def pretraining_data(cls, cfg: OPSOOnlineConfig) -> dict | None:
        """What phase 1 learned from."""
        return cfg.before

    def load_pretrained(self) -> None:
        """Everything that phase 1 learned, the normaliser too."""
        self.load_state_dict({**read_checkpoint(self.cfg.init)["agent"], "acted": self.acted})

    def init_buffer(self, n: int, seed: int) -> None:
        """No episodes yet, of n environments; the offline data are opened."""
        cfg = self.cfg
        sizes = cfg.buffer_size, n, self.spec.state, self.spec.action, cfg.context_length, cfg.proposal_steps
        own = OnlineGoalDataset(*sizes, goals(cfg), self.device, seed)
        self.buffer = MixedBuffer(own, open_data(cfg, self.device, seed + 1)[0] if cfg.offline_share else None)

    def observe(self, step: Step) -> None:
        """Remember one step of n environments."""
        self.buffer.own.add(step)
        self.steps += len(step.reward)

    def minibatches(self) -> Iterator[GoalSegments]:
        """The batches that are due after the step just observed."""
        cfg, now, own = self.cfg, self.steps, self.buffer.own
        if now >= cfg.learn_start and len(own.starts):
            for _ in range(count_due(now - len(own.open_episodes), now, cfg.train_every) * cfg.num_updates):
                yield self.buffer.sample(cfg.batch_size, cfg.offline_share)

    def schedule_metrics(self) -> dict[str, float]:
        """Where the schedules stand, for a row of the log."""
        explored, subgoal_idx = self.acted.tolist()
        self.acted.zero_()
        own, (epsilon, sigma) = self.buffer.own, self.exploration()
        row = {"explore/epsilon": epsilon, "explore/sigma": sigma, "replay/size": float(len(own.starts))}
        return row | {"explore/goal_biased": subgoal_idx / max(explored, 1.0), "replay/episodes": float(own.episodes)}

    def exploration(self) -> tuple[float, float]:
        """ε and σ, after the episodes so far."""
        cfg, i = self.cfg, self.buffer.own.episodes
        over = min(cfg.schedule_episodes, cfg.max_episodes or cfg.schedule_episodes)
        return schedule(cfg.eps_start, cfg.eps_end, i, over), schedule(cfg.sigma_start, cfg.sigma_end, i, over)

    def progress(self) -> float:
        """The share of the run that is over."""
        return self.steps / self.cfg.env_steps

    # -- how it acts -----------------------------------------------------------------------------
    def on_env_reset(self, lost: Tensor) -> None:
        """Nothing is learned from an abandoned episode (n,)."""
        for i in lost.nonzero().flatten().tolist():
            self.buffer.own.open_episodes[i].clear()

    @torch.no_grad()
    def act(
        self, state: Tensor, reward: Tensor, memory: GoalMemory, explore: bool = False
    ) -> tuple[Tensor, GoalMemory]:
        """As phase 1 acts; exploring, with detours straight toward the goal and noise, or at random at first."""
        if not explore:
            return super().act(state, reward, memory)
        n, like = len(state), memory.goal
        z, memory = self.encode_step(state, memory)
        if self.steps < self.cfg.random_steps and not labelled_fraction(self.cfg):
            return self.action_bias + self.action_scale * (
                2 * torch.rand(n, self.spec.action, device=like.device) - 1
            ), memory
        epsilon, sigma = self.exploration()
        toward_goal = torch.rand(n, 1, device=like.device) < epsilon
        alpha = 0.2 + 0.8 * torch.rand(n, 1, device=like.device)
        goal_z = z + alpha * (memory.goal - z)
        subgoal = torch.where(toward_goal, goal_z, self.subgoal(z, memory.goal))
        action = self.action(z, subgoal, memory.goal)
        action = action + sigma * self.action_scale * torch.randn_like(action)
        self.acted += torch.stack([torch.full_like(self.acted[0], n), toward_goal.sum().to(self.acted)])
        return action.clamp(self.action_bias - self.action_scale, self.action_bias + self.action_scale), memory


def schedule(start: float, end: float, i: int, over: int) -> float:
    """Linear from `start` at 0 to `end` at `over`, and `end` from there on."""
    return max(end, start - (start - end) * i / over)


# -- where it begins -----------------------------------------------------------------------------


def resolve_config(cfg: OPSOOnlineConfig) -> OPSOOnlineConfig:
    """The settings with what `init` implies. ValueError as `find_init`, `read_checkpoint` and `adopt`."""
    path = find_init(cfg)
    ckpt = read_checkpoint(path)
    print(f"goes on from {path}, {ckpt['updates']:,} updates")
    return replace(inherit_sizes(cfg, ckpt), init=str(path), before=ckpt["run"]["data"])


def find_init(cfg: OPSOOnlineConfig) -> Path:
    """The checkpoint of phase 1 that is meant. ValueError, with the command that makes one, if there is none."""
    if cfg.init:
        return Path(cfg.init)
    base, found = split_name(name_of(cfg)).base, []
    for file in Path(cfg.output_dir).glob(f"{base}-*/config.json"):
        head = json.loads(file.read_text())["config"]
        best = [p for name in ("best", "last") if (p := file.with_name(f"{name}_checkpoint.pt")).exists()]
        if head["agent"] == OPSOConfig.agent and best:
            found.append((file.stat().st_mtime, best[0]))
    if not found:
        raise ValueError(
            f"there is no first phase on {base} in {cfg.output_dir}: run python offline_trainer.py --dataset "
            f"{cfg.dataset} first, or give --init CHECKPOINT"
        )
    return max(found)[1]


def inherit_sizes(cfg: OPSOOnlineConfig, ckpt: dict) -> OPSOOnlineConfig:
    """The settings with the sizes of the first phase's networks. part: its checkpoint's dictionary.

    ValueError if it is no first phase, of another data set, or of another size than was asked for.
    """
    if ckpt["system"] != OPSOConfig.agent:
        raise ValueError(f"--init holds a {ckpt['system']!r}; the second phase goes on from the first, an 'opso'")
    theirs, changes = config_of(ckpt, "--init"), {}
    before, now = name_of(theirs), name_of(cfg)
    if split_name(before).environment != split_name(now).environment:
        raise ValueError(f"--init was trained on {before}, which is another maze than {now}'s")
    for name in INHERITED:
        changes[name] = getattr(theirs, name)
        if getattr(cfg, name) not in (getattr(OPSOOnlineConfig, name), changes[name]):
            raise ValueError(f"--{name} {getattr(cfg, name)} contradicts --init, which has {changes[name]}")
    if cfg.max_episodes:
        changes["env_steps"] = cfg.max_episodes * STEPS[split_name(now).body]
    return replace(cfg, **changes)
