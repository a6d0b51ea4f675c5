"""Return-conditioned agents: they are told which return is wanted, and act so that it comes true.

  dt       Decision Transformer (Chen et al. 2021, arXiv 2106.01345): causal attention
  dmamba   the same with Mamba-1 blocks (Ota 2024, arXiv 2403.19925; JVP15's DecisionMamba)
  dm       multi-grained Decision Mamba (Lv et al. 2024, arXiv 2406.05427): a second, finer scan in every block
           (networks/multi_grained.py), two more predictions, and labels softened by an older policy ("self-evolution")

One program. The three differ in `MIXER` below and in the defaults of their config classes, and nowhere else.

A step is three tokens, (R_t, s_t, a_t), R_t being the return still wanted. The action is read at s_t, the next state
and the next R at a_t. Where we differ from the papers and their code:
  1. windows are right-padded under a mask; a Mamba block sees what it is given, and left padding would be input
  2. the past policy is a frozen copy (dm's release sets its weight to 0, and its "past" is the live network)
  3. groups of the fine scan end in s_t, and a step's output returns to its own tokens (the release leaks labels)
  4. no weight decay on norms, biases, A_log, D, and the time table, which starts at 0.02 N(0, 1) as CORL's
  5. actions end in a tanh within their bounds for all three, and one target return per dataset is fixed beforehand
  6. state statistics are the house's (std + 1e-3); AdamW's eps is PyTorch's

Letters: B batch, K context, S state, A action, D = d_model, n environments. Contract: common/interface.py.
"""

import logging
import math
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import d4rl_utils
from common import distributed
from common.interface import EnvSpec, EvalEnv, WindowPolicy
from common.optim import TargetNetwork, adamw, detach, set_lr, weighted_sum
from common.plotting import Panel
from common.train_step import Compilable
from common.windows import Sequence, SequenceSampler
from config import DMambaConfig, DMConfig, DTConfig
from model import MIXERS, Normalizer, Trunk, gpt2_linear
from networks.mamba import describe_backend

log = logging.getLogger(__name__)

MIXER = {"dt": "attention", "dmamba": "mamba1", "dm": {"p": "grained", "dual": "dual", "coarse": "mamba1"}}

# The return asked for when acting, fixed before anything was trained: what the Decision Transformer's code asks for,
# halfcheetah's halved where no expert was among those who collected the data; ant's is Online DT's.
TARGETS = {"hopper": 3600.0, "walker2d": 5000.0, "halfcheetah": 12000.0, "ant": 5000.0}
HALFCHEETAH_UNEXPERT = 6000.0
INFERENCE = ("window", "recurrent", "staggered")
RTG_SCALE = 1000.0  # returns are divided by this on their way into the network
EMA = 1e-3  # share of the policy that enters its running mean in each update


def target_of(cfg, goal: float | None = None) -> float:
    """The return to ask for: `goal`, or the settings', or the table's. ValueError for one that is no number."""
    goal = cfg.target_return if goal is None else goal
    if goal is not None:
        if not math.isfinite(goal):
            raise ValueError(f"target_return = {goal} cannot be asked for: take a finite return")
        return goal
    want = d4rl_utils.resolve_dataset(cfg)
    if want.env == "halfcheetah" and "expert" not in want.dataset_type:
        return HALFCHEETAH_UNEXPERT
    if want.env not in TARGETS:
        raise ValueError(f"no target return is known for {want.env or cfg.dataset}: give --target_return")
    return TARGETS[want.env]


# -- the network ---------------------------------------------------------------------------------


def interleave(rtg: Tensor, state: Tensor, action: Tensor) -> Tensor:
    """Three (B, K, D) streams -> (B, 3K, D) in reading order r0 s0 a0 r1 s1 a1 ..."""
    return torch.stack([rtg, state, action], 2).flatten(1, 2)


def mixers_of(cfg) -> list[nn.Module]:
    """What stands in the trunk, in order."""
    name = MIXER[cfg.agent] if cfg.agent != "dm" else MIXER["dm"][cfg.block]
    found = []
    for _ in range(cfg.n_layers):
        found.append(MIXERS[name](cfg))
        for layer in found[-1].modules():
            if hasattr(layer, "out_proj"):
                nn.init.kaiming_uniform_(layer.out_proj.weight, math.sqrt(5))
                layer.out_proj.weight.data /= math.sqrt(cfg.n_layers)
        if cfg.channel_mlp:
            found.append(
                nn.Sequential(
                    gpt2_linear(cfg.d_model, 4 * cfg.d_model), nn.ReLU(), gpt2_linear(4 * cfg.d_model, cfg.d_model)
                )
            )
    return found


class SequenceModel(Compilable):
    """Tokens → trunk → heads. Takes normalised states and scaled returns; gives actions before their tanh."""

    def __init__(self, cfg, spec: EnvSpec):
        super().__init__()
        D, widths = cfg.d_model, {"return": 1, "state": spec.state, "action": spec.action}
        self.time_after_norm, self.last_step = cfg.time_after_norm, cfg.max_ep_len - 1
        self.embeds = nn.ModuleDict({k: nn.Linear(width, D) for k, width in widths.items()})
        self.refine = nn.ModuleDict({k: nn.Linear(D, D) for k in widths if cfg.mlp_embedding})
        self.time = nn.Embedding(cfg.max_ep_len, D)
        nn.init.normal_(self.time.weight, std=0.02)
        self.time.weight._no_weight_decay = True
        self.norm = nn.LayerNorm(D)
        norm = nn.LayerNorm if cfg.agent == "dt" else nn.RMSNorm
        self.trunk = Trunk(mixers_of(cfg), D, norm, cfg.drop_p)
        hidden = [nn.Linear(D, D), nn.GELU()] if cfg.mlp_embedding else []
        self.action = nn.Sequential(*hidden, nn.Linear(D, spec.action))
        self.next_state = nn.Linear(D, spec.state) if cfg.w_s else None
        self.next_return = nn.Linear(D, 1) if cfg.w_r else None

    def embed_token(self, kind: str, x: Tensor, steps: Tensor) -> Tensor:
        """x (..., width of the kind), steps of the episode (...) -> (..., D)"""
        e, time = self.embeds[kind](x), self.time(steps.clamp(0, self.last_step))
        if self.refine:
            e = e + self.refine[kind](F.gelu(e))
        return self.norm(e) + time if self.time_after_norm else self.norm(e + time)

    def forward(self, rtg: Tensor, states: Tensor, actions: Tensor, steps: Tensor) -> Tensor:
        """(B, K), (B, K, S), (B, K, A), (B, K) -> what is known at R_t, s_t and a_t, (B, K, 3, D)"""
        return self.trunk(self.tokens(rtg, states, actions, steps)).unflatten(1, (-1, 3))

    def tokens(self, rtg: Tensor, states: Tensor, actions: Tensor, steps: Tensor) -> Tensor:
        """What enters the trunk, (B, 3K, D)."""
        r = self.embed_token("return", rtg[..., None], steps)
        return interleave(r, self.embed_token("state", states, steps), self.embed_token("action", actions, steps))

    def compile_parts(self) -> None:
        """The blocks and what stands before them."""
        self.trunk.compile_blocks()
        self.compile_methods("tokens")

    def step_tokens(
        self, rtg: Tensor, state: Tensor, action: Tensor, t: Tensor, layers: tuple, is_first: Tensor
    ) -> tuple:
        """One step on from `layers`: a_{t-1}, R_t, s_t -> what is known at s_t (n, D), the next layers.

        rtg and t (n,), state (n, S), action (n, A); alone (n,): 1 where nothing came before, so that no a_{t-1} is.
        """
        kinds = (("action", action, t - 1), ("return", rtg[:, None], t), ("state", state, t))
        x = torch.stack([self.embed_token(*kind) for kind in kinds], 1)
        real = torch.stack([1 - is_first, torch.ones_like(is_first), torch.ones_like(is_first)], 1)
        h, layers = self.trunk.step_tokens(x, layers, real)
        return h[:, 2], layers


def roll_in(past: Tensor, new: Tensor) -> Tensor:
    """(n, k, ...) with the oldest out and `new` (n, ...) in."""
    return torch.cat([past[:, 1:], new[:, None]], 1)


PANELS = (
    Panel(
        "losses",
        {
            "loss/action": "action, squared error",
            "loss/state": "next state, squared error in std",
            "loss/return": "next return-to-go",
        },
        log=True,
    ),
    Panel(
        "policy",
        {"policy/bc_loss": "cloning error", "policy/to_teacher": "distance to the teacher"},
        "squared action units",
        log=True,
    ),
    Panel("gradient norm", {"gradient/all": "all"}, log=True),
)


class DecisionMemory(NamedTuple):
    """What is carried from step to step, for n environments. k is K with windows, 1 with states."""

    rtg_now: Tensor  # (n,)  the return still wanted before the last reward
    t: Tensor  # (n,)  steps taken
    rtg: Tensor  # (n, k)  of the last k steps, the newest last, and so below
    states: Tensor  # (n, k, S)  normalised
    actions: Tensor  # (n, k, A)
    layers: tuple  # of the trunk's blocks, each (n, ...); staggered: (n, 2, ...); windows: ()


# -- losses --------------------------------------------------------------------------------------


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean over real places and features. error (B, K, X), mask (B, K); of several processes, this one's part in it"""
    return (error * mask[..., None]).sum() / (distributed.mean(mask.sum()) * error.shape[-1]).clamp_min(1.0)


def soften_labels(action: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """A recorded action, softened toward what an older copy of the policy would have done. share 0 is cloning."""
    if teacher.requires_grad:
        raise ValueError("the teacher must be frozen: a live one only rescales the loss by (1 - share)^2")
    return torch.lerp(action, teacher, weight)


class DecisionAgent(WindowPolicy):
    """dt, dmamba and dm: a sequence model of returns-to-go, states and actions, that imitates under a wanted return."""

    panels = PANELS

    sees_time = True

    def __init__(self, cfg: DTConfig | DMambaConfig | DMConfig, spec: EnvSpec, device: torch.device | str = "cpu"):
        validate(cfg)
        super().__init__(cfg, spec, device)
        self.k, self.target_return = cfg.context_length, target_of(cfg)
        self.register_action_bounds()
        self.register_buffer("beta", torch.zeros(()), persistent=False)  # the older policy's share, of this update
        self.obs_normalizer = Normalizer(spec.state)
        self.policy = SequenceModel(cfg, spec)
        self.teacher = TargetNetwork(self.policy) if cfg.self_evolution != "off" else None
        if cfg.compile:
            for net in [self.policy, *([self.teacher.net] if self.teacher else [])]:
                net.compile_parts()
            self.compile_methods("objective")
        self.to(self.device)
        self.optimizer = adamw([self.policy], cfg.weight_decay, self.device)
        self.capture_updates()

    def squash(self, x: Tensor) -> Tensor:
        """Any (..., A) -> actions within their bounds."""
        return self.action_bias + self.action_scale * x.tanh()

    def predict(self, b: Sequence, policy: nn.Module) -> tuple[Tensor, Tensor]:
        """What `policy` knows at every token (B, K, 3, D), and the actions that it reads at s_t (B, K, A)."""
        h = self.hidden(b, policy)
        return h, self.squash(policy.action(h[:, :, 1]))

    def hidden(self, b: Sequence, policy: nn.Module) -> Tensor:
        """The first of these."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            h = policy(b.rtg / RTG_SCALE, self.obs_normalizer(b.states), b.actions, b.steps)
        return h.to(b.rtg.dtype)

    def losses(self, b: Sequence, variant: tuple[bool, bool], noise: None = None) -> tuple[Tensor, dict]:
        """Everything that is minimised in one update, and what to report of it. variant: as of `begin_update`; dropout
        draws where it drops."""
        h, teacher_h = self.hidden(b, self.policy), None
        if variant[0]:
            with torch.no_grad():
                teacher_h = self.hidden(b, self.teacher.net)
        loss, metrics = self.objective(b, h, teacher_h)
        return loss, metrics | {"policy/beta": self.beta.clone()}

    def objective(self, b: Sequence, h: Tensor, teacher_h: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses` behind the trunk. h (B, K, 3, D); old: the same of the older policy, where labels are softened"""
        pi = self.squash(self.policy.action(h[:, :, 1]))
        bc_loss = masked_mean((pi - b.actions).square(), b.mask)
        label, metrics = b.actions, {"policy/bc_loss": bc_loss}
        if teacher_h is not None:
            with torch.no_grad():
                teacher_h = self.squash(self.teacher.net.action(teacher_h[:, :, 1]))
            label = soften_labels(b.actions, teacher_h, self.beta)
            metrics["policy/to_teacher"] = masked_mean((pi - teacher_h).square(), b.mask)
            metrics["policy/teacher_bc_loss"] = masked_mean((teacher_h - b.actions).square(), b.mask)
        losses = {"action": masked_mean((pi - label).square(), b.mask)}
        weights = {"action": self.cfg.w_a}
        both = b.mask[:, 1:]  # a step and its successor
        if self.policy.next_state:
            error = F.smooth_l1_loss(
                self.policy.next_state(h[:, :-1, 2]), self.obs_normalizer(b.states[:, 1:]), reduction="none"
            )
            losses["state"], weights["state"] = masked_mean(error, both), self.cfg.w_s
        if self.policy.next_return:
            error = F.smooth_l1_loss(
                self.policy.next_return(h[:, :-1, 2]), b.rtg[:, 1:, None] / RTG_SCALE, reduction="none"
            )
            losses["return"], weights["return"] = masked_mean(error, both), self.cfg.w_r
        return weighted_sum(losses, weights), detach(losses, "loss") | {k: v.detach() for k, v in metrics.items()}

    # -- update ----------------------------------------------------------------------------------
    def begin_update(self) -> tuple[bool, bool]:
        """Set the learning rate and the teacher's weight; whether it softens labels, whether it is renewed."""
        cfg = self.cfg
        set_lr(self.optimizer, cfg.learning_rate, self.updates, cfg.warmup_steps)
        weight = self.teacher_weight()
        self.beta.fill_(weight)
        return weight > 0, cfg.self_evolution == "snapshot" and self.updates % cfg.refresh_every == 0

    def clip_groups(self, variant: tuple[bool, bool]) -> dict[str, list[nn.Module]]:
        """What learns in an update of this variant, by whose gradients are clipped together."""
        return {"all": [self.policy]}

    def targets_before(self, variant: tuple[bool, bool]) -> list[tuple[TargetNetwork, nn.Module, float]]:
        """What follows what, and how far, before an update of this variant."""
        return [(self.teacher, self.policy, 1.0)] if variant[1] else []

    def targets_after(self, variant: tuple[bool, bool]) -> list[tuple[TargetNetwork, nn.Module, float]]:
        """The same after it."""
        return [(self.teacher, self.policy, EMA)] if self.cfg.self_evolution == "ema" else []

    def teacher_weight(self) -> float:
        """β_k = min(cap, α_T k / k_last) in the k-th stretch of refresh_every updates, and 0 in the first."""
        cfg = self.cfg
        k, last = self.updates // cfg.refresh_every + 1, cfg.num_epochs * cfg.updates_per_epoch / cfg.refresh_every
        return min(cfg.beta_cap, cfg.alpha_T * min(1.0, k / last)) if self.teacher and k > 1 else 0.0

    def describe(self) -> str:
        """Size, place, what mixes the tokens, and what is asked for."""
        cfg, count = self.cfg, sum(p.numel() for p in self.policy.parameters())
        mixing = "attention"
        if cfg.agent != "dt":
            mixing = describe_backend(cfg.mamba_backend, self.device, 3 * cfg.context_length, kernel_min=0)
        asked = f"asked for {self.target_return:g}, {cfg.inference} inference"
        return f"{count:,} parameters on {self.device}, {mixing}; {asked}"

    @classmethod
    def make_eval_env(cls, cfg) -> EvalEnv:
        """The environment that the data were recorded in."""
        return d4rl_utils.make_eval_env(cfg)

    @classmethod
    def open_data(cls, cfg, device: torch.device | str, seed: int) -> tuple[SequenceSampler, d4rl_utils.DatasetInfo]:
        """The sampler on the training device, and what the data are."""
        transitions, identity = d4rl_utils.open_data(cfg)
        if cfg.delayed_reward:
            transitions = d4rl_utils.delayed(transitions)
        return SequenceSampler(transitions, cfg.context_length, device, seed), identity

    @classmethod
    def check_parallel(cls, cfg) -> None:
        """They can."""

    def fit_normalizer(self, data: SequenceSampler) -> None:
        """The normaliser's statistics come from the data, once. ValueError if the data are of another body."""
        d4rl_utils.check_recorded(self.cfg.env, self.spec, data.states.shape[1], data.actions.cpu().numpy())
        self.obs_normalizer.fit(data.states)

    # -- acting ----------------------------------------------------------------------------------
    def reset(self, n: int, goal: float | None = None) -> DecisionMemory:
        """Nothing seen; `goal` is the return wanted, and without one the dataset's target."""
        zeros, k = self.obs_normalizer.mean.new_zeros, self.cfg.context_length if self.cfg.inference == "window" else 1
        layers = () if self.cfg.inference == "window" else self.policy.trunk.init_state(n)
        if self.cfg.inference == "staggered":
            layers = pytree.tree_map(lambda x: torch.stack([x, x], 1), layers)
        return DecisionMemory(
            torch.full_like(zeros(n), target_of(self.cfg, goal)),
            torch.zeros(n, dtype=torch.long, device=self.device),
            zeros(n, k),
            zeros(n, k, self.spec.state),
            zeros(n, k, self.spec.action),
            layers,
        )

    @torch.no_grad()
    def act(
        self, state: Tensor, reward: Tensor, memory: DecisionMemory, explore: bool = False
    ) -> tuple[Tensor, DecisionMemory]:
        """Raw states (n, S), and the rewards (n,) of the last actions -> actions (n, A), the memory one step on."""
        memory = self.observe_state(state, reward, memory)
        if self.cfg.inference == "window":
            action, _ = self.forward_window(self.window(memory), memory.t)
        else:
            h, layers = self.forward_recurrent(memory)
            action, memory = self.squash(self.policy.action(h)), memory._replace(layers=layers)
        return action, self.record_action(memory, action)

    def observe_state(self, state: Tensor, reward: Tensor, memory: DecisionMemory) -> DecisionMemory:
        """Take in the present, before there is an action."""
        paid = (memory.t > 0) & (not self.cfg.delayed_reward)  # late rewards leave the return-to-go as it was
        rtg_now = torch.where(paid, memory.rtg_now - reward, memory.rtg_now)
        rtg, states = roll_in(memory.rtg, rtg_now / RTG_SCALE), roll_in(memory.states, self.obs_normalizer(state))
        return memory._replace(rtg_now=rtg_now, rtg=rtg, states=states)

    def window(self, memory: DecisionMemory) -> tuple[Tensor, ...]:
        """The window that `forward_window` wants (n, K, ...): returns-to-go, states, actions, the newest last.

        Places before the episode's start, and that of the action to come, hold anything.
        """
        return memory.rtg, memory.states, roll_in(memory.actions, torch.zeros_like(memory.actions[:, 0]))

    def forward_window(self, view: tuple[Tensor, ...], t: Tensor) -> tuple[Tensor, Tensor]:
        """The action (B, A) for the present of windows, and what is known there (B, D). t (B,): steps of the episode"""
        h = self.forward_context(*view, t)
        return self.squash(self.policy.action(h)), h

    def record_action(self, memory: DecisionMemory, action: Tensor) -> DecisionMemory:
        """The memory one step on: `action` (n, A) was taken."""
        return memory._replace(t=memory.t + 1, actions=roll_in(memory.actions, action))

    def bc_error(self, b: Sequence) -> Tensor:
        """Mean squared distance from the recorded actions, by action dim. (A,)"""
        error = (self.predict(b, self.policy)[1] - b.actions).square()
        return (error * b.mask[..., None]).sum((0, 1)) / b.mask.sum().clamp_min(1.0)

    @classmethod
    def finetuning_config(cls, cfg, target_return: float | None):
        """It goes on with windows, as it was trained, toward the same return unless told another."""
        if cfg.inference != "window":
            log.info(f"this {cfg.agent} acts by {cfg.inference} inference; ppo goes on with windows, as it was trained")
        target = cfg.target_return if target_return is None else target_return
        return replace(cfg, inference="window", target_return=target, self_evolution="off")

    def load_acting_weights(self, state: dict[str, Tensor]) -> None:
        """All but the teacher's."""
        self.load_state_dict({k: v for k, v in state.items() if not k.startswith("teacher.")})

    def param_groups(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """What an action comes from: the nets up to the embedding that `forward_window` gives, and the head on it."""
        p = self.policy
        return [p.embeds, p.refine, p.time, p.norm, p.trunk], [p.action]

    def forward_context(self, rtg: Tensor, states: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        """The last K steps anew: what is known at s_t (n, D). The windows are left-aligned, as in training."""
        k = rtg.shape[1]
        seen, place = (t + 1).clamp_max(k)[:, None], torch.arange(k, device=t.device)
        rows, places = torch.arange(t.shape[0], device=t.device)[:, None], (place + k - seen).clamp_max(k - 1)
        steps = t[:, None] + 1 - seen + place
        h = self.policy(rtg[rows, places], states[rows, places], actions[rows, places], steps)
        return h[rows[:, 0], seen[:, 0] - 1, 1]

    def forward_recurrent(self, memory: DecisionMemory) -> tuple[Tensor, tuple]:
        """From the carried layers: what is known at s_t (n, D), the next layers."""
        t, k = memory.t, self.cfg.context_length
        now = memory.rtg[:, 0], memory.states[:, 0], memory.actions[:, 0], t
        if self.cfg.inference == "recurrent":
            return self.policy.step_tokens(*now, memory.layers, (t == 0).to(now[0].dtype))
        # Staggered: two states run side by side, each begun anew every K steps, half of K apart; the older one is read.
        is_first = torch.stack([t % k == 0, (t == 0) | (t % k == k // 2)], 1).flatten()  # (2n,)

        def forget(x: Tensor) -> Tensor:
            return torch.where(is_first.view(-1, *[1] * (x.dim() - 2)), 0.0, x.flatten(0, 1))

        twice = [x.repeat_interleave(2, 0) for x in now]
        h, layers = self.policy.step_tokens(*twice, pytree.tree_map(forget, memory.layers), is_first.to(now[0].dtype))
        h, layers = h.unflatten(0, (-1, 2)), pytree.tree_map(lambda x: x.unflatten(0, (-1, 2)), layers)
        return torch.where((t % k < k // 2)[:, None], h[:, 1], h[:, 0]), layers


def validate(cfg) -> None:
    """ValueError for sizes that cannot be, in words."""
    if cfg.context_length > cfg.max_ep_len:
        raise ValueError(
            f"context_length = {cfg.context_length} must be at most max_ep_len = {cfg.max_ep_len}: "
            "a window is a stretch of one episode"
        )
    if cfg.inference not in INFERENCE:
        raise ValueError(f"inference must be one of {', '.join(INFERENCE)}, not {cfg.inference!r}")
    if cfg.agent == "dt" and cfg.inference != "window":
        raise ValueError(
            f"dt cannot act by {cfg.inference} inference: attention has no state to carry, and cached keys of deep "
            "layers remember more than a window. Take --inference window, or the agents dmamba and dm"
        )
    if cfg.inference == "staggered" and cfg.context_length < 2:
        raise ValueError("staggered inference needs context_length 2 or more: its states begin half of that apart")
    if not any((cfg.w_a, cfg.w_s, cfg.w_r)):
        raise ValueError("w_a, w_s and w_r are all 0: there is nothing to learn")
