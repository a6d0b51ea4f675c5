"""Return-conditioned agents: they are told which return is wanted, and act so that it comes true.

  dt       Decision Transformer (Chen et al. 2021, arXiv 2106.01345): causal attention
  dmamba   the same with Mamba-1 blocks (Ota 2024, arXiv 2403.19925; JVP15's DecisionMamba)
  dm       multi-grained Decision Mamba (Lv et al. 2024, arXiv 2406.05427): a second, finer scan in every block
           (grained.py), two more predictions, and labels softened by an older policy ("self-evolution")

One program. The three differ in `MIXER` below and in the defaults of their config classes, and nowhere else.

A step is three tokens, (R_t, s_t, a_t), R_t being the return still wanted. The action is read at s_t, the next state
and the next R at a_t. Where we differ from the papers and their code:
  1. windows are right-padded under a mask; a Mamba block sees what it is given, and left padding would be input
  2. the past policy is a frozen copy (dm's release sets its weight to 0, and its "past" is the live network)
  3. groups of the fine scan end in s_t, and a step's output returns to its own tokens (the release leaks labels)
  4. no weight decay on norms, biases, A_log, D, and the time table, which starts at 0.02 N(0, 1) as CORL's
  5. actions end in a tanh within their bounds for all three, and one target return per dataset is fixed beforehand
  6. state statistics are the house's (std + 1e-3); AdamW's eps is PyTorch's

Letters: B batch, K context, S state, A action, D = d_model, n environments. Contract: agent.py.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import d4rl_utils
from agent import Spec, check_body, world  # noqa: F401  world: of every agent on D4RL's bodies
from config import DMambaConfig, DMConfig, DTConfig
from learn import Frozen, Graphed, adamw, clip, detach, set_rate, weigh
from mamba import describe_backend
from memory import Span, Spans, renew
from model import MIXERS, Compilable, Normaliser, Trunk, small_linear

MIXER = {"dt": "attention", "dmamba": "mamba1", "dm": {"p": "grained", "dual": "dual", "coarse": "mamba1"}}

# The return asked for when acting, fixed before anything was trained: what the Decision Transformer's code asks for,
# halfcheetah's halved where no expert was among those who collected the data; ant's is Online DT's.
TARGETS = {"hopper": 3600.0, "walker2d": 5000.0, "halfcheetah": 12000.0, "ant": 5000.0}
HALFCHEETAH_UNEXPERT = 6000.0
INFERENCE = ("window", "recurrent", "staggered")
SCALE = 1000.0  # returns are divided by this on their way into the network
EMA = 1e-3  # share of the policy that enters its running mean in each update


def target_of(cfg, goal: float | None = None) -> float:
    """The return to ask for: `goal`, or the settings', or the table's. ValueError for one that is no number."""
    goal = cfg.target_return if goal is None else goal
    if goal is not None:
        if not math.isfinite(goal):
            raise ValueError(f"target_return = {goal} cannot be asked for: take a finite return")
        return goal
    want = d4rl_utils.wanted(cfg)
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
                    small_linear(cfg.d_model, 4 * cfg.d_model), nn.ReLU(), small_linear(4 * cfg.d_model, cfg.d_model)
                )
            )
    return found


class Policy(Compilable):
    """Tokens → trunk → heads. Takes normalised states and scaled returns; gives actions before their tanh."""

    def __init__(self, cfg, spec: Spec):
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

    def token(self, kind: str, x: Tensor, steps: Tensor) -> Tensor:
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
        r = self.token("return", rtg[..., None], steps)
        return interleave(r, self.token("state", states, steps), self.token("action", actions, steps))

    def compile_parts(self) -> None:
        """The blocks and what stands before them."""
        self.trunk.compile_blocks()
        self.compile_methods("tokens")

    def advance(self, rtg: Tensor, state: Tensor, action: Tensor, t: Tensor, layers: tuple, alone: Tensor) -> tuple:
        """One step on from `layers`: a_{t-1}, R_t, s_t -> what is known at s_t (n, D), the next layers.

        rtg and t (n,), state (n, S), action (n, A); alone (n,): 1 where nothing came before, so that no a_{t-1} is.
        """
        kinds = (("action", action, t - 1), ("return", rtg[:, None], t), ("state", state, t))
        x = torch.stack([self.token(*kind) for kind in kinds], 1)
        real = torch.stack([1 - alone, torch.ones_like(alone), torch.ones_like(alone)], 1)
        h, layers = self.trunk.advance(x, layers, real)
        return h[:, 2], layers


def push(past: Tensor, new: Tensor) -> Tensor:
    """(n, k, ...) with the oldest out and `new` (n, ...) in."""
    return torch.cat([past[:, 1:], new[:, None]], 1)


class Memory(NamedTuple):
    """What is carried from step to step, for n environments. k is K with windows, 1 with states."""

    wanted: Tensor  # (n,)  the return still wanted before the last reward
    t: Tensor  # (n,)  steps taken
    rtg: Tensor  # (n, k)  of the last k steps, the newest last, and so below
    states: Tensor  # (n, k, S)  normalised
    actions: Tensor  # (n, k, A)
    layers: tuple  # of the trunk's blocks, each (n, ...); staggered: (n, 2, ...); windows: ()


# -- what it wants -------------------------------------------------------------------------------


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean over real places and features. error (B, K, X), mask (B, K)"""
    return (error * mask[..., None]).sum() / (mask.sum() * error.shape[-1]).clamp_min(1.0)


def evolve(action: Tensor, teacher: Tensor, share: Tensor) -> Tensor:
    """A recorded action, softened toward what an older copy of the policy would have done. share 0 is cloning."""
    if teacher.requires_grad:
        raise ValueError("the teacher must be frozen: a live one only rescales the loss by (1 - share)^2")
    return torch.lerp(action, teacher, share)


class Decision(Compilable):
    def __init__(self, cfg: DTConfig | DMambaConfig | DMConfig, spec: Spec, device: torch.device | str = "cpu"):
        super().__init__()
        refuse(cfg)
        self.cfg, self.spec, self.updates, self.target = cfg, spec, 0, target_of(cfg)
        low, high = torch.tensor(spec.low), torch.tensor(spec.high)
        self.register_buffer("middle", (high + low) / 2)
        self.register_buffer("reach", (high - low) / 2)
        self.register_buffer("beta", torch.zeros(()), persistent=False)  # the older policy's share, of this update
        self.normal = Normaliser(spec.state)
        self.policy = Policy(cfg, spec)
        self.past = Frozen(self.policy) if cfg.self_evolution != "off" else None
        if cfg.compile:
            for net in [self.policy, *([self.past.net] if self.past else [])]:
                net.compile_parts()
            self.compile_methods("objective")
        self.to(device)
        self.device = torch.device(device)
        self.optimiser = adamw([self.policy], cfg.weight_decay, self.device)
        if cfg.cuda_graphs and self.device.type == "cuda":
            self.descend = Graphed(self.descend)

    def bounded(self, x: Tensor) -> Tensor:
        """Any (..., A) -> actions within their bounds."""
        return self.middle + self.reach * x.tanh()

    def read(self, b: Span, policy: nn.Module) -> tuple[Tensor, Tensor]:
        """What `policy` knows at every token (B, K, 3, D), and the actions that it reads at s_t (B, K, A)."""
        h = self.hidden(b, policy)
        return h, self.bounded(policy.action(h[:, :, 1]))

    def hidden(self, b: Span, policy: nn.Module) -> Tensor:
        """The first of these."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            h = policy(b.rtg / SCALE, self.normal(b.states), b.actions, b.steps)
        return h.to(b.rtg.dtype)

    def losses(self, b: Span, evolving: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Everything that is minimised in one update, and what to report of it."""
        h, old = self.hidden(b, self.policy), None
        if evolving:
            with torch.no_grad():
                old = self.hidden(b, self.past.net)
        return self.objective(b, h, old)

    def objective(self, b: Span, h: Tensor, old: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses` behind the trunk. h (B, K, 3, D); old: the same of the older policy, where labels are softened"""
        pi = self.bounded(self.policy.action(h[:, :, 1]))
        clone = masked_mean((pi - b.actions).square(), b.mask)
        label, metrics = b.actions, {"policy/clone": clone}
        if old is not None:
            with torch.no_grad():
                old = self.bounded(self.past.net.action(old[:, :, 1]))
            label = evolve(b.actions, old, self.beta)
            metrics["policy/to_past"] = masked_mean((pi - old).square(), b.mask)
            metrics["policy/past_clone"] = masked_mean((old - b.actions).square(), b.mask)
        losses = {"action": masked_mean((pi - label).square(), b.mask)}
        weights = {"action": self.cfg.w_a}
        both = b.mask[:, 1:]  # a step and its successor
        if self.policy.next_state:
            error = F.smooth_l1_loss(
                self.policy.next_state(h[:, :-1, 2]), self.normal(b.states[:, 1:]), reduction="none"
            )
            losses["state"], weights["state"] = masked_mean(error, both), self.cfg.w_s
        if self.policy.next_return:
            error = F.smooth_l1_loss(
                self.policy.next_return(h[:, :-1, 2]), b.rtg[:, 1:, None] / SCALE, reduction="none"
            )
            losses["return"], weights["return"] = masked_mean(error, both), self.cfg.w_r
        return weigh(losses, weights), detach(losses, "loss") | {k: v.detach() for k, v in metrics.items()}

    # -- how it learns ---------------------------------------------------------------------------
    def update(self, batch: Span) -> dict[str, Tensor]:
        """One gradient step, toward the data and, later in training, toward an older self."""
        cfg = self.cfg
        set_rate(self.optimiser, cfg.learning_rate, self.updates, cfg.warmup_steps)
        share = self.share()
        self.beta.fill_(share)
        if cfg.self_evolution == "snapshot" and self.updates % cfg.refresh_every == 0:
            self.past.follow(self.policy, 1.0)
        metrics = self.descend(batch, share > 0)
        if cfg.self_evolution == "ema":
            self.past.follow(self.policy, EMA)
        self.updates += 1
        return metrics

    def share(self) -> float:
        """β_k = min(cap, α_T k / k_last) in the k-th stretch of refresh_every updates, and 0 in the first."""
        cfg = self.cfg
        k, last = self.updates // cfg.refresh_every + 1, cfg.num_epochs * cfg.updates_per_epoch / cfg.refresh_every
        return min(cfg.beta_cap, cfg.alpha_T * min(1.0, k / last)) if self.past and k > 1 else 0.0

    def descend(self, batch: Span, evolving: bool) -> dict[str, Tensor]:
        self.optimiser.zero_grad()
        loss, metrics = self.losses(batch, evolving)
        loss.backward()
        norm = clip([self.policy], self.cfg.grad_clip)
        self.optimiser.step()
        return metrics | {"policy/beta": self.beta.clone(), "gradient/all": norm.detach()}

    def describe(self) -> str:
        """Size, place, what mixes the tokens, and what is asked for."""
        cfg, count = self.cfg, sum(p.numel() for p in self.policy.parameters())
        mixing = "attention"
        if cfg.agent != "dt":
            mixing = describe_backend(cfg.mamba_backend, self.device, 3 * cfg.context_length, kernel_min=0)
        return f"{count:,} parameters on {self.device}, {mixing}; asked for {self.target:g}, {cfg.inference} inference"

    def prepare(self, data: Spans) -> None:
        """The normaliser's statistics come from the data, once. ValueError if the data are of another body."""
        _, _, action, state = data.widths
        check_body(self.cfg.env, self.spec, state, action)
        self.normal.fit(data.states)

    # -- how it acts -----------------------------------------------------------------------------
    def reset(self, n: int, goal: float | None = None) -> Memory:
        """Nothing seen; `goal` is the return wanted, and without one the dataset's target."""
        zeros, k = self.normal.mean.new_zeros, self.cfg.context_length if self.cfg.inference == "window" else 1
        layers = () if self.cfg.inference == "window" else self.policy.trunk.start(n)
        if self.cfg.inference == "staggered":
            layers = pytree.tree_map(lambda x: torch.stack([x, x], 1), layers)
        return Memory(
            torch.full_like(zeros(n), target_of(self.cfg, goal)),
            torch.zeros(n, dtype=torch.long, device=self.device),
            zeros(n, k),
            zeros(n, k, self.spec.state),
            zeros(n, k, self.spec.action),
            layers,
        )

    def restart(self, memory: Memory, over: Tensor, goal: float | None = None) -> Memory:
        """The memory with those rows as after `reset` whose episode is over (n,), the others as they were."""
        return renew(memory, self.reset(len(over), goal), over)

    @torch.no_grad()
    def act(self, state: Tensor, reward: Tensor, memory: Memory, explore: bool = False) -> tuple[Tensor, Memory]:
        """Raw states (n, S), and the rewards (n,) of the last actions -> actions (n, A), the memory one step on."""
        memory = self.see(state, reward, memory)
        if self.cfg.inference == "window":
            action, _ = self.look(self.view(memory), memory.t)
        else:
            h, layers = self.go_on(memory)
            action, memory = self.bounded(self.policy.action(h)), memory._replace(layers=layers)
        return action, self.did(memory, action)

    def see(self, state: Tensor, reward: Tensor, memory: Memory) -> Memory:
        """Take in the present, before there is an action."""
        paid = (memory.t > 0) & (not self.cfg.delayed_reward)  # late rewards leave the return-to-go as it was
        wanted = torch.where(paid, memory.wanted - reward, memory.wanted)
        rtg, states = push(memory.rtg, wanted / SCALE), push(memory.states, self.normal(state))
        return memory._replace(wanted=wanted, rtg=rtg, states=states)

    def view(self, memory: Memory) -> tuple[Tensor, ...]:
        """The window that `look` wants (n, K, ...): returns-to-go, states, actions, the newest last.

        Places before the episode's start, and that of the action to come, hold anything.
        """
        return memory.rtg, memory.states, push(memory.actions, torch.zeros_like(memory.actions[:, 0]))

    def look(self, view: tuple[Tensor, ...], t: Tensor) -> tuple[Tensor, Tensor]:
        """The action (B, A) for the present of windows, and what is known there (B, D). t (B,): steps of the episode"""
        h = self.look_back(*view, t)
        return self.bounded(self.policy.action(h)), h

    def did(self, memory: Memory, action: Tensor) -> Memory:
        """The memory one step on: `action` (n, A) was taken."""
        return memory._replace(t=memory.t + 1, actions=push(memory.actions, action))

    def trace(self, memory: Memory) -> tuple[Tensor, ...]:
        """What the step just done, each (n, ...), adds to views."""
        return memory.rtg[:, -1], memory.states[:, -1], memory.actions[:, -1]

    def miss(self, b: Span) -> Tensor:
        """Mean squared distance from the recorded actions, by action dim. (A,)"""
        error = (self.read(b, self.policy)[1] - b.actions).square()
        return (error * b.mask[..., None]).sum((0, 1)) / b.mask.sum().clamp_min(1.0)

    def parts(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """What an action comes from: the nets up to the embedding that `look` gives, and the head on it."""
        p = self.policy
        return [p.embeds, p.refine, p.time, p.norm, p.trunk], [p.action]

    def look_back(self, rtg: Tensor, states: Tensor, actions: Tensor, t: Tensor) -> Tensor:
        """The last K steps anew: what is known at s_t (n, D). The windows are left-aligned, as in training."""
        k = rtg.shape[1]
        seen, place = (t + 1).clamp_max(k)[:, None], torch.arange(k, device=t.device)
        rows, places = torch.arange(len(t), device=t.device)[:, None], (place + k - seen).clamp_max(k - 1)
        steps = t[:, None] + 1 - seen + place
        h = self.policy(rtg[rows, places], states[rows, places], actions[rows, places], steps)
        return h[rows[:, 0], seen[:, 0] - 1, 1]

    def go_on(self, memory: Memory) -> tuple[Tensor, tuple]:
        """From the carried layers: what is known at s_t (n, D), the next layers."""
        t, k = memory.t, self.cfg.context_length
        now = memory.rtg[:, 0], memory.states[:, 0], memory.actions[:, 0], t
        if self.cfg.inference == "recurrent":
            return self.policy.advance(*now, memory.layers, (t == 0).to(now[0].dtype))
        # Staggered: two states run side by side, each begun anew every K steps, half of K apart; the older one is read.
        alone = torch.stack([t % k == 0, (t == 0) | (t % k == k // 2)], 1).flatten()  # (2n,)
        forget = lambda x: torch.where(alone.view(-1, *[1] * (x.dim() - 2)), 0.0, x.flatten(0, 1))  # noqa: E731
        twice = [x.repeat_interleave(2, 0) for x in now]
        h, layers = self.policy.advance(*twice, pytree.tree_map(forget, memory.layers), alone.to(now[0].dtype))
        h, layers = h.unflatten(0, (-1, 2)), pytree.tree_map(lambda x: x.unflatten(0, (-1, 2)), layers)
        return torch.where((t % k < k // 2)[:, None], h[:, 1], h[:, 0]), layers


def refuse(cfg) -> None:
    """ValueError for sizes that cannot be, in words."""
    if not 1 <= cfg.context_length <= cfg.max_ep_len:
        raise ValueError(
            f"context_length = {cfg.context_length} must be from 1 to max_ep_len = {cfg.max_ep_len}: "
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


def data(cfg, device: torch.device | str, seed: int) -> tuple[Spans, d4rl_utils.Identity]:
    """The sampler on the training device, and what the data are."""
    transitions, identity = d4rl_utils.open_data(cfg)
    if cfg.delayed_reward:
        transitions = d4rl_utils.delayed(transitions)
    return Spans(transitions, cfg.context_length, device, seed), identity
