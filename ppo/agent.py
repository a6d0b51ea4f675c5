"""The agent: acts by a Gaussian around its policy, remembers an iteration, learns from it in passes.

Read it downwards: `act` draws an action, `observe` stores the step, and when the rollout is full `minibatches` is one
iteration: advantages, passes over the steps, and what moves between iterations.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from common.interface import EnvSpec, EvalEnv, OnlineAgent
from common.optim import RunningMeanStd, TargetNetwork, detach, weighted_sum
from common.plotting import Panel
from common.rollout import Step
from config import PPOConfig
from ppo import policies
from ppo.buffer import Iteration, Minibatch, OpenStep, RolloutBuffer, RolloutStep
from ppo.losses import discounted_returns, gae, gaussian_kl, gaussian_log_prob, ppo_clip_loss
from ppo.policies import bc_sampler, load_into, orthogonal, policy_of, tanh_layers

CALIBRATED, TUNED, NEW = (0.05, 0.3), (0.05, 0.5), (0.05, 2.0)  # bounds of sigma, in half ranges of the action
CALIBRATION = 64, 64  # batches, and windows in each
RATIO_SLACK = 1e-3  # float32 leaves 1e-5
REWARD_CLIP = 10.0  # of scaled rewards
KL_COEF = 1e-3, 10.0  # bounds of what adapts


PANELS = (
    Panel(
        "losses",
        {"loss/value": "value, squared error", "loss/anchor": "KL to the offline policy, weighted"},
        log=True,
    ),
    Panel("V", {"value/mean": "V(s)", "value/target": "target"}, "discounted scaled return"),
    Panel("V's fit", {"value/explained": "explained"}, "share of the target's variance"),
    Panel(
        "distances",
        {"policy/kl": "to the policy that acted", "policy/kl_offline": "to the offline policy"},
        "nats",
        log=True,
    ),
    Panel("exploration", {"sigma": "sigma"}, "half ranges of the action", log=True),
    Panel("gradient norms", {"gradient/policy": "policy", "gradient/value": "value"}, log=True),
)


class PPO(OnlineAgent):
    """A Gaussian around a `WindowPolicy`'s action, and a value, trained on their own rollouts."""

    panels = PANELS

    def __init__(self, cfg: PPOConfig, spec: EnvSpec, device: torch.device | str = "cpu"):
        validate(cfg)
        super().__init__(cfg, spec, device)
        self.is_finetuning = cfg.policy["data"] is not None
        self.policy = policy_of(cfg, spec, device)
        self.k, self.horizon = self.policy.k, self.policy.cfg.max_ep_len if self.policy.sees_time else 0
        self.ref_policy = TargetNetwork(self.policy) if self.is_finetuning and cfg.kl_coef else None
        with torch.no_grad():
            state, start = self.policy.obs_normalizer.mean[None], torch.zeros(1, dtype=torch.long, device=device)
            memory = self.policy.observe_state(state, state[:, 0], self.policy.reset(1))
            z = self.policy.forward_window(self.policy.window(memory), start)[1]
        width = z.shape[1] + spec.state + bool(self.horizon)
        last = orthogonal(nn.Linear(cfg.value_dim, 1), 1.0)
        self.value = nn.Sequential(*tanh_layers(width, cfg.value_dim, cfg.value_dim), last)
        self.log_std = nn.Parameter(torch.full((spec.action,), math.log(cfg.sigma or 1.0)))
        self.register_buffer("log_std_offline", self.log_std.detach().clone())
        self.register_buffer("kl_coef", torch.tensor(float(cfg.kl_coef if self.is_finetuning else 0.0)))
        self.register_buffer("bc_coef", torch.tensor(float(cfg.bc_coef if self.is_finetuning else 0.0)))
        self.register_buffer("value_warmup_on", torch.tensor(self.is_finetuning and cfg.value_warmup > 0))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.long))
        self.returns, self.states = RunningMeanStd(), RunningMeanStd(spec.state)
        self.to(self.device)
        self.optimizer = self.adam()
        self.capture_updates()

    def adam(self) -> torch.optim.Adam:
        """A group for each learning rate; `minibatches` writes the rates."""
        cfg, new = self.cfg, not self.is_finetuning
        encoder, head = self.policy.param_groups()
        lr_encoder, lr_head = (3e-4, 3e-4) if new else (3e-5, 1e-4)
        peaks = (
            (parameters_of(encoder), lr_encoder if cfg.lr_encoder is None else cfg.lr_encoder),
            (parameters_of(head), lr_head if cfg.lr_head is None else cfg.lr_head),
            ([self.log_std], cfg.lr_std),
            (parameters_of([self.value]), cfg.lr_value),
        )
        self.peaks = [peak for _, peak in peaks]
        groups = [{"params": p, "lr": torch.zeros((), device=self.device)} for p, _ in peaks]
        kind = self.device.type
        return torch.optim.Adam(groups, eps=1e-5, fused=kind in ("cpu", "cuda"), capturable=kind == "cuda")

    def train(self, mode: bool = True) -> "PPO":
        """The policy stays as it acts: dropout would make the one that learns another."""
        super().train(mode)
        self.policy.eval()
        return self

    # -- what it computes ------------------------------------------------------------------------
    def forward_window(
        self, view: tuple[Tensor, ...], t: Tensor, policy: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """The Gaussian's mean in half ranges (B, A), and the embedding (B, D)."""
        mean, z = (policy or self.policy).forward_window(view, t)
        return (mean - self.policy.action_bias) / self.policy.action_scale, z

    def value_input(self, z: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """What the value sees of raw states (B, S): embedding, normalised state; the time, if the policy does."""
        seen = [z, self.policy.obs_normalizer(state).clamp(-10, 10)]
        if self.horizon:
            seen.append((t / self.horizon)[:, None].to(z.dtype))
        return torch.cat(seen, -1)

    def losses(self, b: Minibatch, variant: tuple[bool, bool], noise: None) -> tuple[Tensor, dict[str, Tensor]]:
        """Everything that is minimised in one update, and what to report of it. variant: whether the value learns
        alone, whether data are cloned"""
        cfg, (value_only, cloning) = self.cfg, variant
        value_input, losses, weights, metrics = b.value_input, {}, {}, {}
        if not value_only:
            mean, z = self.forward_window(b.view, b.t)
            shared = torch.lerp(z.detach(), z, cfg.value_into_encoder) if cfg.value_into_encoder else z.detach()
            value_input = torch.cat([shared, value_input[:, z.shape[1] :]], -1)
            log_ratio = gaussian_log_prob(b.raw_action, mean, self.log_std) - b.logp
            ratio = log_ratio.exp()
            entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
            losses["policy"] = ppo_clip_loss(ratio, b.advantage, cfg.clip_eps) - cfg.entropy_coef * entropy
            weights["policy"] = 1.0
            metrics["kl"] = (ratio - 1 - log_ratio).mean()  # Schulman's estimate that is never negative
            metrics["clipped"] = ((ratio - 1).abs() > cfg.clip_eps).float().mean()
            metrics["entropy"] = entropy
            metrics["kl_offline"] = torch.zeros_like(entropy)
            if self.ref_policy:
                kl = gaussian_kl(mean, self.log_std, b.ref_action, self.log_std_offline).mean()
                losses["anchor"], weights["anchor"] = self.kl_coef * kl, 1.0
                metrics["kl_offline"] = kl
            if cloning:
                bc_error = self.policy.bc_error(b.data).mean()
                losses["clone"], weights["clone"] = self.bc_coef * bc_error, 1.0
                metrics["clone"] = bc_error
        error = (self.value(value_input).squeeze(-1) - b.target).square().mean()
        losses["value"], weights["value"] = cfg.value_coef * error, 1.0
        return weighted_sum(losses, weights), detach(losses, "loss") | detach(metrics, "policy")

    @classmethod
    def resolve_config(cls, cfg: PPOConfig) -> PPOConfig:
        """The settings with the policy that `init` names."""
        return policies.resolve_config(cfg)

    @classmethod
    def make_eval_env(cls, cfg: PPOConfig) -> EvalEnv:
        """Where the checkpoint's data were recorded; a new policy's environment."""
        return policies.make_eval_env(cfg)

    # -- before the first step -------------------------------------------------------------------
    def init_buffer(self, n: int, seed: int) -> None:
        """Room for an iteration of n environments; and, if they are needed, the data."""
        cfg, policy = self.cfg, self.policy
        zeros = policy.obs_normalizer.mean.new_zeros
        state, number = zeros(n, self.spec.state), zeros(n)
        like = RolloutStep(
            policy.window(policy.observe_state(state, number, policy.reset(n))),
            number.long(),
            state,
            zeros(n, self.spec.action),
            number,
            number,
            number.bool(),
            number,
        )
        needs_data = self.is_finetuning and (cfg.bc_coef or cfg.sigma is None)
        self.buffer = RolloutBuffer(cfg.n_steps, like, bc_sampler(cfg, self.device, seed) if needs_data else None)

    @torch.no_grad()
    def load_pretrained(self) -> None:
        """Before the first step: the checkpoint's tensors, sigma from its distance to the data, the reference."""
        if not self.is_finetuning:
            return
        load_into(self.policy, self.cfg, self.spec)
        self.policy.eval()
        if self.cfg.sigma is None:
            batches, size = CALIBRATION
            bc_error = sum(self.policy.bc_error(self.buffer.data.sample(size)) for _ in range(batches)) / batches
            self.log_std.copy_((bc_error.sqrt() / self.policy.action_scale).clamp(*CALIBRATED).log())
        self.log_std_offline.copy_(self.log_std)
        if self.ref_policy:
            self.ref_policy.net.load_state_dict(self.policy.state_dict())

    # -- how it acts -----------------------------------------------------------------------------
    def reset(self, n: int, goal: float | None = None):
        """The policy's own memory."""
        return self.policy.reset(n, goal)

    @torch.no_grad()
    def act(self, state: Tensor, reward: Tensor, memory, explore: bool = False):
        """Raw states (n, S) -> the policy's actions (n, A), or draws around them, and the memory one step on."""
        if not explore:
            return self.policy.act(state, reward, memory)
        policy = self.policy
        memory = policy.observe_state(state, reward, memory)
        view = policy.window(memory)
        mean, _ = self.forward_window(view, self.buffer.t)
        raw_action = mean + self.log_std.exp() * torch.randn_like(mean)
        action = policy.action_bias + policy.action_scale * raw_action.clamp(-1, 1)
        memory = policy.record_action(memory, action)
        logp = gaussian_log_prob(raw_action, mean, self.log_std)
        self.buffer.begin_step(OpenStep(memory, view, raw_action, logp))
        return action, memory

    @torch.no_grad()
    def observe(self, step: Step) -> None:
        """Remember one step of n environments, whose actions `act` drew with explore=True."""
        buffer = self.buffer
        done, last = step.terminated | step.truncated, buffer.count == self.cfg.n_steps - 1
        bootstrap_value = torch.zeros_like(step.reward)
        goes_on = ~step.terminated if self.bootstraps() else ~done
        if (last and goes_on.any()) or (done & goes_on).any():
            bootstrap_value = torch.where(goes_on, self.bootstrap_value(step), 0.0)
        buffer.end_step(step.state, step.reward, done, bootstrap_value)
        self.steps += len(step.reward)

    def bootstraps(self) -> bool:
        """Whether a time limit has something behind it."""
        how = self.cfg.truncation
        return how == "bootstrap" or (how == "auto" and not self.horizon)

    def bootstrap_value(self, step: Step) -> Tensor:
        """The value of the states that the open step led to. (n,)"""
        memory = self.policy.observe_state(step.next_state, step.reward, self.buffer.open.memory)
        t = self.buffer.t + 1
        z = self.forward_window(self.policy.window(memory), t)[1]
        return self.value(self.value_input(z, step.next_state, t)).squeeze(-1)

    @torch.no_grad()
    def on_env_reset(self, lost: Tensor) -> None:
        """Abandoned episodes (n,) end where they are, worth there what they were thought to be worth."""
        buffer = self.buffer
        buffer.t = torch.where(lost, 0, buffer.t)
        if not buffer.count:
            buffer.discounted = torch.where(lost, 0.0, buffer.discounted)
            return
        last = pytree.tree_map(lambda x: x[buffer.count - 1], buffer.rows)
        z = self.forward_window(last.view, last.t)[1]
        value = self.value(self.value_input(z, last.state, last.t)).squeeze(-1)
        last.bootstrap_value.copy_(torch.where(lost & ~last.done, value, last.bootstrap_value))
        last.done.logical_or_(lost)

    # -- how it learns ---------------------------------------------------------------------------
    def minibatches(self) -> Iterator[tuple[Minibatch, Iteration]]:
        """When the rollout is full, one iteration: passes over it, until the policy has moved far enough."""
        cfg, buffer = self.cfg, self.buffer
        if not buffer.full:
            return
        progress = min(1.0, max(0, self.steps - cfg.n_steps * cfg.num_envs) / cfg.env_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks):
            group["lr"].fill_(peak * (1 - progress))
        if self.is_finetuning:
            self.bc_coef.fill_(cfg.bc_coef * max(0.0, 1 - 2 * progress))

        everything, metrics = self.compute_advantages(buffer)
        cloning = bool(buffer.data and cfg.bc_coef)
        value_only = bool(self.value_warmup_on)
        iteration = Iteration(
            progress, value_only, cloning and progress < 0.5, metrics, torch.zeros(2, device=self.device)
        )
        steps = len(everything.t)
        count = steps // cfg.batch_size
        leaves, tree = pytree.tree_flatten(everything)
        for _ in range(cfg.epochs):
            iteration.kl_sums.zero_()
            rows = torch.randperm(steps, device=self.device)  # fields are put in order once a pass, not once a batch
            for parts in zip(*(x[rows].split(cfg.batch_size) for x in leaves)):
                minibatch = pytree.tree_unflatten(parts, tree)
                yield minibatch._replace(data=buffer.data.sample(cfg.bc_batch) if cloning else ()), iteration
            if not value_only and cfg.target_kl and iteration.kl_sums[0].item() > cfg.target_kl * count:
                break

        if self.ref_policy and not value_only:
            self.adapt_kl_coef(iteration.kl_sums[1] / count, progress)
        self.iterations += 1
        if value_only and (self.iterations >= cfg.value_warmup or metrics["value/explained"] > cfg.warm_enough):
            self.value_warmup_on.fill_(False)
        if not self.is_finetuning:
            self.update_normalizer(buffer.flat().state)
        buffer.clear()

    @torch.no_grad()
    def compute_advantages(self, buffer: RolloutBuffer) -> tuple[Minibatch, dict[str, Tensor]]:
        """The iteration as one minibatch, as the policy that acted sees it; and what to report of it.

        FloatingPointError if the policy that is to learn is not that one.
        """
        cfg, rows, flat = self.cfg, buffer.rows, buffer.flat()
        means, inputs, ref_actions = [], [], []
        for part in torch.arange(len(flat.t), device=self.device).split(cfg.batch_size):
            view, t = tuple(x[part] for x in flat.view), flat.t[part]
            mean, z = self.forward_window(view, t)
            means.append(mean)
            inputs.append(self.value_input(z, flat.state[part], t))
            if self.ref_policy:
                ref_actions.append(self.forward_window(view, t, self.ref_policy.net)[0])
        value_input = torch.cat(inputs)
        off = self.check_ratio(flat, torch.cat(means))

        value = self.value(value_input).squeeze(-1).unflatten(0, rows.t.shape)
        past, buffer.discounted = discounted_returns(rows.reward, rows.done, buffer.discounted, cfg.gamma)
        self.returns.add(past.flatten())
        reward = (rows.reward / (self.returns.var + 1e-8).sqrt()).clamp(-REWARD_CLIP, REWARD_CLIP)
        advantage = gae(reward, value, rows.done, rows.bootstrap_value, cfg.gamma, cfg.gae_lambda)
        target = advantage + value
        metrics = {
            "value/explained": 1 - (target - value).var() / target.var().clamp_min(1e-8),
            "value/mean": value.mean(),
            "value/target": target.mean(),
            "policy/ratio_off": torch.full_like(value.mean(), off),
            "policy/beyond_bounds": (flat.raw_action.abs() > 1).float().mean(),
        }
        if self.horizon:  # the return that was asked for and not earned; a window's first part is returns-to-go
            left = rows.view[0][..., -1] * rows.done
            metrics["policy/return_left"] = left.sum() / rows.done.sum().clamp_min(1)
        ref_action = torch.cat(ref_actions) if ref_actions else ()
        everything = Minibatch(
            flat.view,
            flat.t,
            value_input,
            flat.raw_action,
            flat.logp,
            advantage.flatten(),
            target.flatten(),
            ref_action,
            (),
        )
        return everything, metrics

    def check_ratio(self, flat: RolloutStep, mean: Tensor) -> float:
        """How far the ratio of probabilities is from 1 before the first update; FloatingPointError if too far."""
        off = (gaussian_log_prob(flat.raw_action, mean, self.log_std) - flat.logp).expm1().abs().max().item()
        if not off < RATIO_SLACK:
            raise FloatingPointError(
                f"step {self.steps}: the policy that is to learn is not the one that acted. The ratio of their "
                f"probabilities is off by {off:.2g} before the first update (up to {RATIO_SLACK:g} is rounding), so "
                "what is learned from it would mean nothing. Take --precision fp32 if it was another; else "
                "`forward_window` is wrong"
            )
        return off

    def adapt_kl_coef(self, kl: Tensor, progress: float) -> None:
        """The reference's weight rises where the last pass was further from it than the target, and falls where it
        was closer. kl: nats"""
        cfg = self.cfg
        target = (cfg.kl_start + progress * (cfg.kl_end - cfg.kl_start)) * self.spec.action
        factor = torch.where(kl > 1.5 * target, 1.5, torch.where(kl < target / 1.5, 1 / 1.5, 1.0))
        self.kl_coef.mul_(factor).clamp_(*KL_COEF)

    @torch.no_grad()
    def update_normalizer(self, states: Tensor) -> None:
        """A new policy's normaliser moves between iterations only, or the ratio would not be 1. states (N, S)"""
        self.states.add(states)
        self.policy.obs_normalizer.mean.copy_(self.states.mean)
        self.policy.obs_normalizer.std.copy_((self.states.var + 1e-6).sqrt())

    def update(self, batch: tuple[Minibatch, Iteration]) -> dict[str, Tensor]:
        """One gradient step; while the value warms up, of the value alone."""
        minibatch, iteration = batch
        metrics = self.train_step(minibatch, iteration.variant)
        self.updates += 1
        if not iteration.value_only:
            iteration.kl_sums.add_(torch.stack([metrics["policy/kl"], metrics["policy/kl_offline"]]))
        return metrics | iteration.metrics

    def clip_groups(self, variant: tuple[bool, bool]) -> dict[str, list[nn.Module]]:
        """What learns in an update of this variant, by whose gradients are clipped together."""
        encoder, head = self.policy.param_groups()
        groups = {"value": [self.value]}
        return groups if variant[0] else groups | {"policy": [*encoder, *head, nn.ParameterList([self.log_std])]}

    def train_step(self, batch: Minibatch, variant: tuple[bool, bool]) -> dict[str, Tensor]:
        metrics = super().train_step(batch, variant)
        with torch.no_grad():
            low, high = TUNED if self.is_finetuning else NEW
            self.log_std.clamp_(math.log(low), math.log(high))
        return metrics

    def describe(self) -> str:
        """Size, place, whose policy, and what a time limit is to it."""
        cfg, (encoder, head) = self.cfg, self.policy.param_groups()
        count = sum(p.numel() for net in (*encoder, *head) for p in net.parameters())
        data, system = cfg.policy["data"], cfg.policy["system"]
        whose = f"{system} of {data['name']}" if data else f"new {cfg.mixer}"
        limit = "bootstraps" if self.bootstraps() else "is an end"
        sigma = ", ".join(f"{s:.2f}" for s in self.log_std.detach().exp().tolist())
        return f"{whose}, {count:,} parameters on {self.device}; sigma {sigma}; a time limit {limit}"

    def schedule_metrics(self) -> dict[str, float]:
        """Where the schedules stand, for a row of the log."""
        return {
            "sigma": self.log_std.exp().mean().item(),
            "kl_coef": self.kl_coef.item(),
            "bc_coef": self.bc_coef.item(),
            "warming": float(self.value_warmup_on),
            "iterations": self.iterations.item(),
        }


def parameters_of(nets: list[nn.Module]) -> list[nn.Parameter]:
    return [p for net in nets for p in net.parameters()]


def validate(cfg: PPOConfig) -> None:
    """ValueError for settings that cannot be, in words."""
    if cfg.policy is None:
        raise ValueError("these settings name no policy yet: pass them through ppo.resolve_config first")
    steps = cfg.n_steps * cfg.num_envs
    if steps % cfg.batch_size:
        raise ValueError(
            f"batch_size = {cfg.batch_size} must divide n_steps * num_envs = {steps}, an iteration's steps"
        )
    if cfg.batch_size < 2:
        raise ValueError("batch_size = 1 has no spread of advantages: take 2 or more")
    if steps > cfg.env_steps:
        raise ValueError(
            f"an iteration of n_steps * num_envs = {steps} steps is longer than env_steps = {cfg.env_steps}: "
            "nothing would be learned"
        )
    low, high = TUNED if cfg.policy["data"] else NEW
    if cfg.sigma is not None and not low <= cfg.sigma <= high:
        raise ValueError(f"sigma = {cfg.sigma} is not within {low} and {high}, which bound it while it is learned")
    if cfg.precision != "fp32":
        raise ValueError(
            f"ppo compares probabilities to 1 in 1,000, which {cfg.precision} may not tell apart: take --precision fp32"
        )
    if cfg.inference != "window":
        raise ValueError(
            f"ppo acts and learns on windows; {cfg.inference} inference would be another policy: take window"
        )
