"""The agent: what it computes, what it wants, how it learns and acts. See the package's own words."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.interface import Agent, EnvSpec, EvalEnv
from common.optim import TargetNetwork, adamw, detach, fallen, set_lr, td_target, weighted_sum
from common.plotting import Panel
from config import OPSOConfig
from model import Normalizer
from networks.mamba import describe_backend
from ogbench_utils.goal_dataset import GoalSegments, OfflineGoalDataset
from opso import data
from opso.data import labelled_fraction
from opso.losses import cosine_step, expectile, info_nce, masked_mean, success_loss, update_pos_weight
from opso.networks import Head, StateEncoder, TwinValue

NCE_DISCOUNT = 0.8  # a positive lies Geometric(1 - this) steps behind its anchor
# Values begin as of goals this far away, as a share of the worst. Expectiles rise fast and fall slowly: from 0, or from
# half way, far goals would need most of a training to become far.
V_INIT_SHARE = 0.85
STRAIGHT = 8  # candidates on the straight way to the goal, for --select q


PANELS = (
    Panel(
        "losses",
        {
            "loss/critic": "Q, Huber loss",
            "loss/value": "V, expectile",
            "loss/state": "next latent",
            "loss/reward": "success",
            "loss/nce": "InfoNCE",
            "loss/align": "alignment",
            "loss/propose": "proposal",
            "loss/inverse": "inverse dynamics",
        },
        log=True,
    ),
    Panel(
        "values",
        {"value/q": "Q(z, z', z_g) of the data", "value/v": "V(z, z_g)", "value/target": "target"},
        "discounted steps to the goal",
    ),
    Panel(
        "actor",
        {
            "policy/action_error": "error of the action",
            "explore/epsilon": "share of steps toward the goal, wanted",
            "explore/goal_biased": "the same, done",
            "explore/sigma": "noise on actions",
        },
        log=True,
    ),
    Panel("gradient norms", {"gradient/critic": "encoder and values", "gradient/actor": "actor"}, log=True),
)


class GoalMemory(NamedTuple):
    """What is carried from step to step, for n environments."""

    states: Tensor  # (n, T, S)  the newest last; raw units
    seen: Tensor  # (n,) long  how many of them are there
    goal: Tensor  # (n, D)  latents of what is wanted


class Opso(Agent):
    """Phase 1: an encoder, values of goals, a proposer and inverse dynamics, from recorded states."""

    panels = PANELS
    learned_buffers = ("pos_weight", "bank", "bank_rows", "bank_at")

    frozen = False  # the encoder

    def __init__(self, cfg: OPSOConfig, spec: EnvSpec, device: torch.device | str = "cpu"):
        validate(cfg)
        super().__init__(cfg, spec, device)
        self.register_action_bounds()
        self.obs_normalizer = Normalizer(spec.state)
        D, h, norm = cfg.d_model, cfg.hidden_dim, cfg.head_norm
        self.encoder = StateEncoder(cfg, spec.state)
        self.q = TwinValue(D, h, norm)
        self.v = Head(2 * D, h, 2, 1, norm)
        self.predict = Head(D, h, 1, D, norm)
        self.success = Head(2 * D, h, 1, 1, norm)
        self.propose = Head(2 * D, h, 1 if not norm else 2, D, norm)
        self.inverse = Head((3 if cfg.inverse_goal else 2) * D, h, 2, spec.action, norm)
        if cfg.reward == "neg":
            for net in (self.v, *self.q.nets):
                nn.init.constant_(net.net[-1].bias, -V_INIT_SHARE / (1 - cfg.gamma))
        self.target_encoder, self.target_q, self.target_v = (
            TargetNetwork(self.encoder),
            TargetNetwork(self.q),
            TargetNetwork(self.v),
        )
        self.register_buffer("pos_weight", torch.ones(()))
        self.register_buffer("bank", torch.zeros(cfg.nce_bank, D))
        self.register_buffer("bank_rows", torch.full((cfg.nce_bank,), -1, dtype=torch.long))
        self.register_buffer("bank_at", torch.zeros((), dtype=torch.long))
        self.to(self.device)
        self.critic_nets = [self.encoder, self.q, self.v, self.predict, self.success]  # learn from states alone
        self.actor_nets = [self.propose, self.inverse]
        self.optimizer = adamw([*self.critic_nets, *self.actor_nets], cfg.weight_decay, self.device)
        if cfg.compile:
            self.compile_methods("losses")
        self.capture_updates()

    # -- what it computes ------------------------------------------------------------------------
    def precision(self):
        """Autocast for the encoder. The heads stay in float32: V reaches minus a hundred."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    def latents(self, states: Tensor, encoder: nn.Module) -> Tensor:
        """Raw states (B, L, S) -> (B, L, D); of each state alone, unless histories are to be seen"""
        x = self.obs_normalizer(states)
        with self.precision():
            z = encoder(x) if self.cfg.history else encoder(x.flatten(0, 1)[:, None]).view(*x.shape[:2], -1)
        return z.to(states.dtype)

    def action(self, z: Tensor, subgoal: Tensor, goal: Tensor) -> Tensor:
        """Inverse dynamics: the first action of a move from z to `subgoal`. (..., D) three times -> (..., A)"""
        seen = (z, subgoal, goal) if self.cfg.inverse_goal else (z, subgoal)
        return self.action_bias + self.action_scale * self.inverse(*seen).tanh()

    # -- what it wants ---------------------------------------------------------------------------
    def draw_noise(self, b: GoalSegments, generator: torch.Generator | None = None) -> Tensor | None:
        """How far ahead InfoNCE looks, (B, T) in [0, 1)."""
        if not self.cfg.beta_n or self.frozen:
            return None
        return torch.rand(b.mask.shape, device=b.mask.device, generator=generator)

    def losses(self, b: GoalSegments, variant: None, noise: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Everything that is minimised in one update, and what to report of it; with it InfoNCE's next wrong answers
        (B, D)."""
        cfg, t = self.cfg, self.cfg.context_length

        def rows(x: Tensor) -> Tensor:
            return x[:, :t].flatten(0, 1)  # the trained places, one under another

        goals = b.value_goals.flatten(0, 1)[:, None]
        with torch.no_grad():
            target_z_all = self.latents(b.states, self.target_encoder)
            both = torch.cat([goals, b.policy_goals.flatten(0, 1)[:, None]])
            target_z_goal, goal_z = self.latents(both, self.target_encoder)[:, 0].chunk(2)
        if self.frozen:
            z_all, goal = target_z_all, target_z_goal
        else:
            z_all, goal = self.latents(b.states, self.encoder), self.latents(goals, self.encoder)[:, 0]
        z, after = rows(z_all), rows(z_all[:, 1:])
        target_z, target_z_next = rows(target_z_all), rows(target_z_all[:, 1:])
        mask, success = b.mask.flatten(), b.success.flatten()

        with torch.no_grad():
            reward = success - 1 if cfg.reward == "neg" else success
            target = td_target(reward, 1 - success, self.target_v(target_z_next, target_z_goal).squeeze(-1), cfg.gamma)
            target = target.clamp(-1 / (1 - cfg.gamma), 0) if cfg.reward == "neg" else target.clamp(0, 1)
            q_target = self.target_q(target_z, target_z_next, target_z_goal).amin(0)
            better = self.n_step_value(b, target_z_all, target_z_goal, q_target) if cfg.value_leap else q_target
        q, v = self.q(z, after, goal), self.v(z, goal).squeeze(-1)
        logit = self.success(after, goal).squeeze(-1)
        pos_weight = update_pos_weight(self.pos_weight, success, mask)
        losses = {
            "critic": 2 * masked_mean(F.huber_loss(q, target.expand_as(q), reduction="none"), mask),
            "value": masked_mean(expectile(better, v, cfg.expectile), mask),
            "state": masked_mean((self.predict(z) - target_z_next).square().mean(-1), mask),
            "reward": masked_mean(success_loss(logit, success, pos_weight, cfg), mask),
        }
        weights = {"critic": 1.0, "value": cfg.beta_v, "state": cfg.beta_s, "reward": cfg.beta_r}
        if cfg.beta_n and not self.frozen:
            losses["nce"], weights["nce"] = self.info_nce_loss(b, z_all, noise), cfg.beta_n
        if cfg.beta_a and not self.frozen:
            cosine, long = cosine_step(z, after, goal)
            trust = (q_target - self.target_v(target_z, target_z_goal).squeeze(-1)).exp().clamp_max(1).detach()
            losses["align"] = masked_mean(trust * cosine, mask * b.future.flatten() * long)
            weights["align"] = cfg.beta_a
        policy_losses, metrics = self.policy_losses(b, target_z_all, goal_z, mask)
        losses.update(policy_losses)
        weights.update(dict.fromkeys(policy_losses, 1.0))
        metrics["value/q"] = masked_mean(q, mask)
        metrics["value/v"] = masked_mean(v, mask)
        metrics["value/target"] = masked_mean(target, mask)
        metrics["value/reached"] = masked_mean(success, mask)
        with torch.no_grad():
            metrics["latent/std"] = z.var(0).mean().sqrt()  # 0 is collapse
            metrics["latent/cosine"] = F.cosine_similarity(z, after, dim=-1).mean()
            metrics["latent/goal_scale"] = goal.norm(dim=-1).mean() / z.norm(dim=-1).mean()
        metrics = detach(losses, "loss") | {k: x.detach() for k, x in metrics.items()}
        return weighted_sum(losses, weights), metrics | {"_keys": target_z_all[:, 0], "_pos_weight": pos_weight}

    def n_step_value(self, b: GoalSegments, target_z: Tensor, goal: Tensor, one_step: Tensor) -> Tensor:
        """What V is to expect: K steps along the recorded way, and of near goals the better of that and one step's Q.

        Far from a goal a step is worth less than V's errors, and a jitter into one would look like a short cut for
        ever; K steps are worth K times as much. target_z (B, L, D), goal (N, D), one_step (N,) -> (N,)
        """
        gamma, t = self.cfg.gamma, self.cfg.context_length
        k_step_z = target_z.gather(1, b.k_step_idx[..., None].expand(-1, -1, target_z.shape[-1])).flatten(0, 1)
        steps = (b.k_step_idx - torch.arange(t, device=target_z.device)).flatten()
        kept = gamma ** steps.to(target_z.dtype)
        paid = (kept - 1) / (1 - gamma) if self.cfg.reward == "neg" else 0.0
        leap = paid + kept * self.target_v(k_step_z, goal).squeeze(-1)
        near = one_step > value_at_distance(self.cfg.proposal_steps, self.cfg)
        return torch.where(near, torch.maximum(one_step, leap), leap)

    def info_nce_loss(self, b: GoalSegments, z: Tensor, noise: Tensor) -> Tensor:
        """InfoNCE between a latent and one a few steps later. z (B, L, D), noise (B, T)"""
        t = self.cfg.context_length
        leap = ((1 - noise).log() / math.log(NCE_DISCOUNT)).floor().long() + 1
        place = torch.minimum(torch.arange(t, device=z.device) + leap, b.k_step_idx)
        later = z.gather(1, place[..., None].expand(-1, -1, z.shape[-1])).flatten(0, 1)
        later_rows, rows, mask = b.rows.gather(1, place).flatten(), b.rows[:, :t].flatten(), b.mask.flatten()
        return info_nce(z[:, :t].flatten(0, 1), later, rows, later_rows, mask, (self.bank, self.bank_rows), self.cfg)

    def policy_losses(self, b: GoalSegments, target_z: Tensor, goal_z: Tensor, mask: Tensor) -> tuple[dict, dict]:
        """What proposes and what acts, on latents that do not learn from it.

        target_z (B, L, D), goal_z (N, D), mask (N,)
        """
        cfg = self.cfg
        z = target_z[:, : cfg.context_length].flatten(0, 1)
        subgoal_z = target_z.gather(1, b.subgoal_idx[..., None].expand(-1, -1, target_z.shape[-1])).flatten(0, 1)
        with torch.no_grad():
            gain = (self.target_v(subgoal_z, goal_z) - self.target_v(z, goal_z)).squeeze(-1)
            weight = (cfg.temperature * gain).exp().clamp_max(cfg.max_weight)
        losses, metrics = {}, {"policy/gain": masked_mean(gain, mask), "policy/weight": masked_mean(weight, mask)}
        if cfg.proposer == "latent":
            star = self.propose(z, goal_z)
            losses["propose"] = masked_mean(weight * (star - subgoal_z).square().mean(-1), mask)
            if cfg.lambda_q:
                still = {k: p.detach() for k, p in self.q.named_parameters()}
                climbed = torch.func.functional_call(self.q, still, (z, star, goal_z)).amin(0)
                losses["propose"] = losses["propose"] - cfg.lambda_q * masked_mean(climbed, mask)
        else:
            subgoal_z = goal_z
        error = (self.action(z, subgoal_z, goal_z) - b.actions.flatten(0, 1)).square().mean(-1)
        known = mask * b.has_actions.repeat_interleave(cfg.context_length)
        losses["inverse"] = masked_mean(weight * error if cfg.weigh_inverse else error, known)
        metrics["policy/action_error"] = masked_mean(error, known)
        return losses, metrics

    # -- how it learns ---------------------------------------------------------------------------
    def begin_update(self) -> None:
        """Set the learning rate."""
        set_lr(self.optimizer, self.lr_now(), self.updates, self.cfg.warmup_steps)

    def lr_now(self) -> float:
        """The learning rate, but for its warm-up: what acts last is evaluated, so it comes to rest."""
        return fallen(self.cfg.learning_rate, self.progress(), self.cfg.lr_fall)

    def progress(self) -> float:
        """The share of the run that is over."""
        return self.updates / (self.cfg.num_epochs * self.cfg.updates_per_epoch)

    def clip_groups(self, variant: None) -> dict[str, list[nn.Module]]:
        """What learns, by whose gradients are clipped together."""
        return {"critic": self.critic_nets, "actor": self.actor_nets}

    def targets_after(self, variant: None) -> list[tuple[TargetNetwork, nn.Module, float]]:
        """What follows what after an update, and how far."""
        pairs = [(self.target_q, self.q), (self.target_v, self.v)]
        if not self.frozen:
            pairs.append((self.target_encoder, self.encoder))
        return [(target, net, self.cfg.tau) for target, net in pairs]

    def next_buffers(self, batch: GoalSegments, metrics: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weight of reached goals; the bank with this batch's latents in the places of the oldest, one a segment:
        its others are too alike."""
        found, m = {"pos_weight": metrics["_pos_weight"]}, self.cfg.nce_bank
        if m:
            keys, rows = metrics["_keys"][-m:], batch.rows[-m:, 0]
            places = (self.bank_at + torch.arange(len(keys), device=keys.device)) % m
            found["bank"] = self.bank.index_copy(0, places, F.normalize(keys, dim=-1))
            found["bank_rows"] = self.bank_rows.index_copy(0, places, rows)
            found["bank_at"] = (self.bank_at + len(places)) % m
        return found

    def describe(self) -> str:
        """Size, place, and which implementation of the state-space layer runs; whose actions were used."""
        cfg, count = self.cfg, sum(p.numel() for p in self.parameters() if p.requires_grad)
        backend = describe_backend(cfg.mamba_backend, self.device, cfg.context_length + cfg.proposal_steps)
        f = labelled_fraction(cfg)
        blind = "" if f or self.frozen else ", so it cannot act before its second phase (--eval_freq 0 saves the time)"
        return f"{count:,} parameters on {self.device}, {backend}; f = {f:g}{blind}"

    @classmethod
    def check_parallel(cls, cfg) -> None:
        """Several seeds can learn at once, if they learn from the same actions; several devices cannot."""
        if distributed.is_launched():
            super().check_parallel(cfg)
        if 0 < labelled_fraction(cfg) < 1 or cfg.drop_p:
            raise ValueError(
                "--num_seeds of opso takes --inverse_fraction 0 or 1 and --drop_p 0: in between, each seed knows the "
                "actions of other episodes; give each seed a run of its own"
            )

    @classmethod
    def make_eval_env(cls, cfg) -> EvalEnv:
        """OGBench's maze with its five tasks."""
        return data.make_eval_env(cfg)

    @classmethod
    def open_data(cls, cfg, device: torch.device | str, seed: int) -> tuple[OfflineGoalDataset, object]:
        """The sampler on the training device, and what the data are."""
        return data.open_data(cfg, device, seed)

    def fit_normalizer(self, sampler: OfflineGoalDataset) -> None:
        """The normaliser's statistics come from the data, once."""
        self.obs_normalizer.fit(sampler.states)

    # -- how it acts -----------------------------------------------------------------------------
    def reset(self, n: int, goal: Tensor | None = None) -> GoalMemory:
        """Nothing seen; `goal`: raw states (n, S), what is wanted of each."""
        if goal is None:
            raise ValueError("opso must be told a goal: reset(n, goal) with one state for each environment")
        with torch.no_grad():
            z = self.latents(goal.to(self.obs_normalizer.mean)[:, None], self.target_encoder)[:, 0]
        states = self.obs_normalizer.mean.new_zeros(n, self.cfg.context_length, self.spec.state)
        return GoalMemory(states, torch.zeros(n, dtype=torch.long, device=self.device), z)

    @torch.no_grad()
    def act(
        self, state: Tensor, reward: Tensor, memory: GoalMemory, explore: bool = False
    ) -> tuple[Tensor, GoalMemory]:
        """Raw states (n, S) -> actions (n, A), and the memory one step on. `reward` is not needed."""
        z, memory = self.encode_step(state, memory)
        return self.action(z, self.subgoal(z, memory.goal), memory.goal), memory

    def encode_step(self, state: Tensor, memory: GoalMemory) -> tuple[Tensor, GoalMemory]:
        """Take in the present (n, S): its latent (n, D), and the memory one step on."""
        states = torch.cat([memory.states[:, 1:], state.to(memory.states)[:, None]], 1)
        seen = (memory.seen + 1).clamp_max(states.shape[1])
        return self.encode(states, seen), GoalMemory(states, seen, memory.goal)

    def encode(self, states: Tensor, seen: Tensor) -> Tensor:
        """The latent of each row's last `seen` (n,) of states (n, T, S), as in training: nothing stands before them."""
        if not self.cfg.history:
            return self.latents(states[:, -1:], self.target_encoder)[:, 0]
        k = states.shape[1]
        places = (torch.arange(k, device=seen.device) + k - seen[:, None]).clamp_max(k - 1)
        left = states.gather(1, places[..., None].expand_as(states))
        return self.latents(left, self.target_encoder)[torch.arange(seen.shape[0], device=seen.device), seen - 1]

    def subgoal(self, z: Tensor, goal: Tensor) -> Tensor:
        """The latent to move to: the goal if it is near, else the proposal, with --select q Q's favourite. (n, D)"""
        cfg = self.cfg
        if cfg.proposer == "none":
            return goal
        star = self.propose(z, goal) if cfg.select == "proposer" else self.best_by_q(z, goal)
        if not cfg.goal_in_reach:
            return star
        return torch.where(self.target_v(z, goal) > value_at_distance(cfg.proposal_steps, cfg), goal, star)

    def best_by_q(self, z: Tensor, goal: Tensor) -> Tensor:
        """Of the proposal, copies of it with noise and places on the straight way to the goal, what Q likes best."""
        star = self.propose(z, goal)
        share = torch.linspace(1 / STRAIGHT, 1, STRAIGHT, device=z.device, dtype=z.dtype)[:, None, None]
        spread = 0.1 * star.std(-1, keepdim=True)
        grid = torch.Generator(z.device).manual_seed(0)  # the same at every step: acting is a function of the state
        noise = torch.randn(self.cfg.q_candidates, 1, z.shape[-1], generator=grid, device=z.device, dtype=z.dtype)
        candidates = torch.cat([star[None], star + spread * noise, z + share * (goal - z)])
        score = self.target_q(z.expand_as(candidates), candidates, goal.expand_as(candidates)).amin(0)  # (C, n)
        return candidates[score.argmax(0), torch.arange(len(z), device=z.device)]


def value_at_distance(steps: int, cfg) -> float:
    """The value of a goal that is reached by the last of so many steps."""
    kept = cfg.gamma ** (steps - 1)
    return kept if cfg.reward == "zero_one" else (kept - 1) / (1 - cfg.gamma)


def validate(cfg) -> None:
    """ValueError for settings that cannot be, in words."""
    if cfg.gamma >= 1:
        raise ValueError(f"gamma = {cfg.gamma}: the value of a goal that is never reached has no end; take less than 1")
    if cfg.goal_current + cfg.goal_trajectory > 1:
        raise ValueError(
            f"goal_current {cfg.goal_current} and goal_trajectory {cfg.goal_trajectory} are more than all goals"
        )
    if cfg.proposal_steps != 1 and (cfg.select == "q" or cfg.lambda_q):
        raise ValueError(
            f"Q values one-step moves: with proposal_steps {cfg.proposal_steps}, select q and lambda_q mean nothing. "
            "Take --proposal_steps 1, or leave them away"
        )
