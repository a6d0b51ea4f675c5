"""The agent: acts by a Gaussian around its policy, remembers an iteration, learns from it in passes."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from agent import Spec
from config import PPOConfig
from learn import Frozen, Graphed, Moments, clip, detach, weigh
from memory import Rollout, Step, Turn, renew
from ppo.objective import Experience, Lesson, advantages, discounted, gaussian_kl, log_density
from ppo.policies import SEES_TIME, config_in, load_into, open_cloned, orthogonal, policy_of, tanh_layers

CALIBRATED, TUNED, NEW = (0.05, 0.3), (0.05, 0.5), (0.05, 2.0)  # bounds of sigma, in half ranges of the action
CALIBRATION = 64, 64  # batches, and windows in each
RATIO_SLACK = 1e-3  # float32 leaves 1e-5
REWARD_CLIP = 10.0  # of scaled rewards
KL_COEF = 1e-3, 10.0  # bounds of what adapts


class PPO(nn.Module):
    def __init__(self, cfg: PPOConfig, spec: Spec, device: torch.device | str = "cpu"):
        super().__init__()
        refuse(cfg)
        self.cfg, self.spec, self.updates, self.steps = cfg, spec, 0, 0
        self.continues = cfg.policy["data"] is not None
        own = config_in(cfg)
        self.k, self.horizon = own.context_length, own.max_ep_len if cfg.policy["system"] in SEES_TIME else 0
        self.policy = policy_of(cfg, spec, device)
        self.anchor = Frozen(self.policy) if self.continues and cfg.kl_coef else None
        with torch.no_grad():
            state, start = self.policy.normal.mean[None], torch.zeros(1, dtype=torch.long, device=device)
            memory = self.policy.see(state, state[:, 0], self.policy.reset(1))
            z = self.policy.look(self.policy.view(memory), start)[1]
        width = z.shape[1] + spec.state + bool(self.horizon)
        last = orthogonal(nn.Linear(cfg.value_dim, 1), 1.0)
        self.value = nn.Sequential(*tanh_layers(width, cfg.value_dim, cfg.value_dim), last)
        self.log_std = nn.Parameter(torch.full((spec.action,), math.log(cfg.sigma or 1.0)))
        self.register_buffer("log_std_offline", self.log_std.detach().clone())
        self.register_buffer("kl_coef", torch.tensor(float(cfg.kl_coef if self.continues else 0.0)))
        self.register_buffer("bc_coef", torch.tensor(float(cfg.bc_coef if self.continues else 0.0)))
        self.register_buffer("warming", torch.tensor(self.continues and cfg.value_warmup > 0))
        self.register_buffer("iterations", torch.zeros((), dtype=torch.long))
        self.returns, self.states = Moments(), Moments(spec.state)
        self.to(device)
        self.device = torch.device(device)
        self.optimiser = self.adam()
        self.experience: Experience | None = None
        self.variant = True, False  # of the iteration's updates: the value learns alone; data are cloned
        self.facts: dict[str, Tensor] = {}  # of the iteration that is being learned from
        self.far = torch.zeros(2, device=self.device)  # a pass's sums of KL, to who acted and to the offline policy
        if cfg.cuda_graphs and self.device.type == "cuda":
            self.descend = Graphed(self.descend)

    def adam(self) -> torch.optim.Adam:
        """A group for each learning rate; `lessons` writes the rates."""
        cfg, new = self.cfg, not self.continues
        encoder, head = self.policy.parts()
        of = lambda nets: [p for net in nets for p in net.parameters()]  # noqa: E731
        peaks = (
            (of(encoder), (3e-4 if new else 3e-5) if cfg.lr_encoder is None else cfg.lr_encoder),
            (of(head), (3e-4 if new else 1e-4) if cfg.lr_head is None else cfg.lr_head),
            ([self.log_std], cfg.lr_std),
            (of([self.value]), cfg.lr_value),
        )
        self.peaks = [peak for _, peak in peaks]
        groups = [{"params": p, "lr": torch.zeros((), device=self.device)} for p, _ in peaks]
        kind = self.device.type
        return torch.optim.Adam(groups, eps=1e-5, fused=kind in ("cpu", "cuda"), capturable=kind == "cuda")

    def train(self, mode: bool = True) -> "PPO":
        """The policy stays as it is judged: dropout would make the one that learns another than the one that acts."""
        super().train(mode)
        self.policy.eval()
        return self

    # -- what it computes ------------------------------------------------------------------------
    def look(self, view: tuple[Tensor, ...], t: Tensor, policy: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """The Gaussian's mean in half ranges (B, A), and the embedding (B, D)."""
        mean, z = (policy or self.policy).look(view, t)
        return (mean - self.policy.middle) / self.policy.reach, z

    def sights(self, z: Tensor, state: Tensor, t: Tensor) -> Tensor:
        """What the value sees of raw states (B, S): embedding, normalised state; the time, if the policy does."""
        seen = [z, self.policy.normal(state).clamp(-10, 10)]
        if self.horizon:
            seen.append((t / self.horizon)[:, None].to(z.dtype))
        return torch.cat(seen, -1)

    def progress(self) -> float:
        """Share of the run that lay behind when this iteration began."""
        return min(1.0, max(0, self.steps - self.cfg.n_steps * self.cfg.num_envs) / self.cfg.env_steps)

    def losses(self, b: Lesson, warming: bool, cloning: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Everything that is minimised in one update, and what to report of it."""
        cfg = self.cfg
        seen, losses, weights, metrics = b.seen, {}, {}, {}
        if not warming:
            mean, z = self.look(b.view, b.t)
            if cfg.value_into_encoder:
                seen = torch.cat([torch.lerp(z.detach(), z, cfg.value_into_encoder), seen[:, z.shape[1] :]], -1)
            else:
                seen = torch.cat([z.detach(), seen[:, z.shape[1] :]], -1)
            gap = log_density(b.choice, mean, self.log_std) - b.logp
            ratio = gap.exp()
            gain = (b.advantage - b.advantage.mean()) / (b.advantage.std() + 1e-8)
            clipped = ratio.clamp(1 - cfg.clip_eps, 1 + cfg.clip_eps)
            entropy = (self.log_std + 0.5 * math.log(2 * math.pi * math.e)).sum()
            losses["policy"] = -torch.minimum(ratio * gain, clipped * gain).mean() - cfg.entropy_coef * entropy
            weights["policy"] = 1.0
            metrics |= {"kl": (ratio - 1 - gap).mean(), "clipped": ((ratio - 1).abs() > cfg.clip_eps).float().mean()}
            metrics |= {"entropy": entropy, "kl_offline": torch.zeros_like(entropy)}
            if self.anchor:
                far = gaussian_kl(mean, self.log_std, b.offline, self.log_std_offline).mean()
                losses["anchor"], weights["anchor"] = self.kl_coef * far, 1.0
                metrics["kl_offline"] = far
            if cloning:
                missed = self.policy.miss(b.data).mean()
                losses["clone"], weights["clone"] = self.bc_coef * missed, 1.0
                metrics["clone"] = missed
        error = (self.value(seen).squeeze(-1) - b.target).square().mean()
        losses["value"], weights["value"] = cfg.value_coef * error, 1.0
        return weigh(losses, weights), detach(losses, "loss") | detach(metrics, "policy")

    # -- how it learns ---------------------------------------------------------------------------
    def gather(self, n: int, seed: int) -> None:
        """Room for an iteration of n environments; and, if they are needed, the data."""
        cfg, policy = self.cfg, self.policy
        zeros = policy.normal.mean.new_zeros
        whole, flag = torch.zeros(n, dtype=torch.long, device=self.device), torch.zeros(n, dtype=torch.bool)
        turn = Turn(
            policy.trace(policy.reset(n)),
            whole,
            zeros(n, self.spec.state),
            zeros(n, self.spec.action),
            zeros(n),
            zeros(n),
            flag.to(self.device),
            zeros(n),
        )
        wanted = self.continues and (cfg.bc_coef or cfg.sigma is None)
        data = open_cloned(cfg, self.device, seed) if wanted else None
        self.experience = Experience(Rollout(cfg.n_steps, self.k, turn), data)

    @torch.no_grad()
    def prepare(self, experience: Experience) -> None:
        """Before the first step: the checkpoint's tensors, sigma from its distance to the data, the anchor."""
        if not self.continues:
            return
        load_into(self.policy, self.cfg, self.spec)
        self.policy.eval()
        if self.cfg.sigma is None:
            batches, size = CALIBRATION
            missed = sum(self.policy.miss(experience.data.sample(size)) for _ in range(batches)) / batches
            self.log_std.copy_((missed.sqrt() / self.policy.reach).clamp(*CALIBRATED).log())
        self.log_std_offline.copy_(self.log_std)
        if self.anchor:
            self.anchor.net.load_state_dict(self.policy.state_dict())

    @torch.no_grad()
    def observe(self, step: Step) -> None:
        """Remember one step of n environments, which `act` chose with explore=True."""
        seen = self.experience
        over, last = step.terminated | step.truncated, seen.rollout.count == self.cfg.n_steps - 1
        after = torch.zeros_like(step.reward)
        goes_on = ~step.terminated if self.bootstraps() else ~over
        if (last and goes_on.any()) or (over & goes_on).any():
            after = torch.where(goes_on, self.value_behind(step), 0.0)
        memory, choice, logp = self.acted
        seen.rollout.add(Turn(self.policy.trace(memory), seen.t, step.state, choice, logp, step.reward, over, after))
        seen.t = torch.where(over, 0, seen.t + 1)
        self.steps += len(step.reward)

    def bootstraps(self) -> bool:
        """Whether a time limit has something behind it."""
        how = self.cfg.truncation
        return how == "bootstrap" or (how == "auto" and not self.horizon)

    def value_behind(self, step: Step) -> Tensor:
        """The value of the states that the step led to. (n,)"""
        memory = self.policy.see(step.next_state, step.reward, self.acted[0])
        t = self.experience.t + 1
        z = self.look(self.policy.view(memory), t)[1]
        return self.value(self.sights(z, step.next_state, t)).squeeze(-1)

    def lessons(self) -> Iterator[Lesson]:
        """When an iteration is full: passes over it in minibatches, until the policy has moved far enough."""
        cfg, rollout = self.cfg, self.experience.rollout
        if not rollout.full:
            return
        progress, warming = self.progress(), bool(self.warming)
        self.variant = warming, bool(self.experience.data and cfg.bc_coef and progress < 0.5)
        for group, peak in zip(self.optimiser.param_groups, self.peaks):
            group["lr"].fill_(peak * (1 - progress))
        if self.continues:
            self.bc_coef.fill_(cfg.bc_coef * max(0.0, 1 - 2 * progress))
        whole, minibatches = self.whole(rollout), cfg.n_steps * cfg.num_envs // cfg.batch_size
        for _ in range(cfg.epochs):
            self.far.zero_()
            order = torch.randperm(len(whole.t), device=self.device)
            mixed = pytree.tree_map(lambda x: x[order], whole)  # noqa: B023  used at once
            for start in range(0, len(order), cfg.batch_size):
                here = slice(start, start + cfg.batch_size)
                yield self.lesson(pytree.tree_map(lambda x: x[here], mixed), order[here])  # noqa: B023
            if not warming and cfg.target_kl and self.far[0].item() > cfg.target_kl * minibatches:
                break
        self.finish(progress, minibatches)

    @torch.no_grad()
    def whole(self, rollout: Rollout) -> Lesson:
        """The iteration as one lesson without windows, as the policy that acted sees it.

        FloatingPointError if the policy that is to learn is not that one.
        """
        cfg, now = self.cfg, rollout.now()
        flat = pytree.tree_map(lambda x: x.flatten(0, 1), now)
        means, seen, offline = [], [], []
        for places in torch.arange(len(flat.t), device=self.device).split(cfg.batch_size):
            view, t = rollout.views(places), flat.t[places]
            mean, z = self.look(view, t)
            means.append(mean)
            seen.append(self.sights(z, flat.state[places], t))
            if self.anchor:
                offline.append(self.look(view, t, self.anchor.net)[0])
        seen = torch.cat(seen)
        worst = (log_density(flat.choice, torch.cat(means), self.log_std) - flat.logp).expm1().abs().max().item()
        if not worst < RATIO_SLACK:
            raise FloatingPointError(
                f"step {self.steps}: the policy that is to learn is not the one that acted. The ratio of their "
                f"probabilities is off by {worst:.2g} before the first update (up to {RATIO_SLACK:g} is rounding), so "
                "what is learned from it would mean nothing. Take --precision fp32 if it was another; else `look` or "
                "the rollout's windows are wrong"
            )
        value = self.value(seen).squeeze(-1).unflatten(0, now.t.shape)
        past, self.experience.discounted = discounted(now.reward, now.over, self.experience.discounted, cfg.gamma)
        self.returns.add(past.flatten())
        reward = (now.reward / (self.returns.var + 1e-8).sqrt()).clamp(-REWARD_CLIP, REWARD_CLIP)
        advantage = advantages(reward, value, now.over, now.after, cfg.gamma, cfg.gae_lambda)
        target = advantage + value
        explained = 1 - (target - value).var() / target.var().clamp_min(1e-8)
        self.facts = {"value/explained": explained, "value/mean": value.mean(), "value/target": target.mean()}
        self.facts |= {"policy/ratio_off": torch.full_like(explained, worst)}
        self.facts |= {"policy/beyond_bounds": (flat.choice.abs() > 1).float().mean()}
        if self.horizon:
            left = now.trace[0] * now.over
            self.facts["policy/return_left"] = left.sum() / now.over.sum().clamp_min(1)
        parts = flat.choice, flat.logp, advantage.flatten(), target.flatten(), torch.cat(offline) if offline else ()
        return Lesson((), flat.t, seen, *parts, ())

    def lesson(self, part: Lesson, places: Tensor) -> Lesson:
        """The minibatch that lies at these places (B,), with its windows and with data to clone."""
        data = self.experience.data
        cloned = data.sample(self.cfg.bc_batch) if data and self.cfg.bc_coef else ()
        return part._replace(view=self.experience.rollout.views(places), data=cloned)

    def update(self, batch: Lesson) -> dict[str, Tensor]:
        """One gradient step; while the value warms up, of the value alone."""
        metrics = self.descend(batch, self.variant)
        if "policy/kl" in metrics:
            self.far += torch.stack([metrics["policy/kl"], metrics["policy/kl_offline"]])
        self.updates += 1
        return metrics | self.facts

    def descend(self, batch: Lesson, variant: tuple[bool, bool]) -> dict[str, Tensor]:
        self.optimiser.zero_grad()
        loss, metrics = self.losses(batch, *variant)
        loss.backward()
        encoder, head = self.policy.parts()
        norms = {"value": clip([self.value], self.cfg.grad_clip)}
        if not variant[0]:
            norms["policy"] = clip([*encoder, *head, nn.ParameterList([self.log_std])], self.cfg.grad_clip)
        self.optimiser.step()
        with torch.no_grad():
            low, high = TUNED if self.continues else NEW
            self.log_std.clamp_(math.log(low), math.log(high))
        return metrics | detach(norms, "gradient")

    @torch.no_grad()
    def finish(self, progress: float, minibatches: int) -> None:
        """Between iterations: the anchor's weight follows its target, a warm value ends its warm-up, a new policy's
        normaliser moves, and there is room again."""
        cfg, (warming, _) = self.cfg, self.variant
        if self.anchor and not warming:
            wanted = (cfg.kl_start + progress * (cfg.kl_end - cfg.kl_start)) * self.spec.action
            far = self.far[1] / minibatches
            stronger, weaker = far > 1.5 * wanted, far < wanted / 1.5
            self.kl_coef.mul_(torch.where(stronger, 1.5, torch.where(weaker, 1 / 1.5, 1.0))).clamp_(*KL_COEF)
        self.iterations += 1
        if warming and (self.iterations >= cfg.value_warmup or self.facts["value/explained"] > cfg.warm_enough):
            self.warming.fill_(False)
        if not self.continues:
            self.states.add(self.experience.rollout.now().state.flatten(0, 1))
            self.policy.normal.mean.copy_(self.states.mean)
            self.policy.normal.std.copy_((self.states.var + 1e-6).sqrt())
        self.experience.rollout.turn_over()

    def describe(self) -> str:
        """Size, place, whose policy, and what a time limit is to it."""
        cfg, (encoder, head) = self.cfg, self.policy.parts()
        count = sum(p.numel() for net in (*encoder, *head) for p in net.parameters())
        data, system = cfg.policy["data"], cfg.policy["system"]
        whose = f"{system} of {data['name']}" if data else f"new {cfg.mixer}"
        limit = "bootstraps" if self.bootstraps() else "is an end"
        sigma = ", ".join(f"{s:.2f}" for s in self.log_std.detach().exp().tolist())
        return f"{whose}, {count:,} parameters on {self.device}; sigma {sigma}; a time limit {limit}"

    def status(self) -> dict[str, float]:
        """Where the schedules stand, for a row of the log."""
        row = {
            "sigma": self.log_std.exp().mean().item(),
            "kl_coef": self.kl_coef.item(),
            "bc_coef": self.bc_coef.item(),
        }
        return row | {"warming": float(self.warming), "iterations": self.iterations.item()}

    # -- how it acts -----------------------------------------------------------------------------
    def reset(self, n: int, goal: float | None = None):
        """The policy's own memory."""
        return self.policy.reset(n, goal)

    def restart(self, memory, over: Tensor, goal: float | None = None):
        """The memory with those rows as after `reset` whose episode is over (n,)."""
        return renew(memory, self.reset(len(over), goal), over)

    @torch.no_grad()
    def forsake(self, lost: Tensor) -> None:
        """Abandoned episodes (n,) end where they are, worth there what they were thought to be worth."""
        seen = self.experience
        seen.t = torch.where(lost, 0, seen.t)
        rollout, now = seen.rollout, seen.rollout.now()
        if rollout.count:
            i, n = rollout.count - 1, rollout.n
            z = self.look(rollout.views(torch.arange(i * n, i * n + n, device=self.device)), now.t[i])[1]
            value = self.value(self.sights(z, now.state[i], now.t[i])).squeeze(-1)
            now.after[i] = torch.where(lost & ~now.over[i], value, now.after[i])
            now.over[i] |= lost
        else:
            seen.discounted = torch.where(lost, 0.0, seen.discounted)

    @torch.no_grad()
    def act(self, state: Tensor, reward: Tensor, memory, explore: bool = False):
        """Raw states (n, S) -> the policy's actions (n, A), or draws around them, and the memory one step on."""
        if not explore:
            return self.policy.act(state, reward, memory)
        policy = self.policy
        memory = policy.see(state, reward, memory)
        mean, _ = self.look(policy.view(memory), self.experience.t)
        choice = mean + self.log_std.exp() * torch.randn_like(mean)
        action = policy.middle + policy.reach * choice.clamp(-1, 1)
        memory = policy.did(memory, action)
        self.acted = memory, choice, log_density(choice, mean, self.log_std)
        return action, memory


def refuse(cfg: PPOConfig) -> None:
    """ValueError for settings that cannot be, in words."""
    if cfg.policy is None:
        raise ValueError("these settings name no policy yet: pass them through ppo.settle first")
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
