"""The agent: what it computes, what it wants, how it learns and acts. See the package's own words."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent import Spec
from config import OPSOConfig
from learn import Frozen, Graphed, adamw, clip, detach, set_rate, td_target, weigh
from mamba import describe_backend
from model import Compilable, Normaliser
from ogbench_utils.segments import Recorded, Segments
from opso.losses import balance, cosine_step, expectile, info_nce, masked_mean, success_error
from opso.nets import Head, StateEncoder, TwinValue

NCE_DISCOUNT = 0.8  # a positive lies Geometric(1 - this) steps behind its anchor
# Values begin as of goals this far away, as a share of the worst. Expectiles rise fast and fall slowly: from 0, or from
# half way, far goals would need most of a training to become far.
FAR = 0.85
STRAIGHT = 8  # candidates on the straight way to the goal, for --select q


class Memory(NamedTuple):
    """What is carried from step to step, for n environments."""

    states: Tensor  # (n, T, S)  the newest last; raw units
    seen: Tensor  # (n,) long  how many of them are there
    goal: Tensor  # (n, D)  latents of what is wanted


class Opso(Compilable):
    frozen = False  # the encoder

    def __init__(self, cfg: OPSOConfig, spec: Spec, device: torch.device | str = "cpu"):
        super().__init__()
        refuse(cfg)
        self.cfg, self.spec, self.updates = cfg, spec, 0
        low, high = torch.tensor(spec.low), torch.tensor(spec.high)
        self.register_buffer("middle", (high + low) / 2)
        self.register_buffer("reach", (high - low) / 2)
        self.normal = Normaliser(spec.state)
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
                nn.init.constant_(net.net[-1].bias, -FAR / (1 - cfg.gamma))
        self.slow_encoder, self.slow_q, self.slow_v = Frozen(self.encoder), Frozen(self.q), Frozen(self.v)
        self.register_buffer("pos_weight", torch.ones(()))
        self.register_buffer("bank", torch.zeros(cfg.nce_bank, D))
        self.register_buffer("bank_rows", torch.full((cfg.nce_bank,), -1, dtype=torch.long))
        self.register_buffer("bank_at", torch.zeros((), dtype=torch.long))
        self.to(device)
        self.device = torch.device(device)
        self.judges = [self.encoder, self.q, self.v, self.predict, self.success]  # learn from states alone
        self.actors = [self.propose, self.inverse]
        self.optimiser = adamw([*self.judges, *self.actors], cfg.weight_decay, self.device)
        if cfg.compile:
            self.compile_methods("losses")
        if cfg.cuda_graphs and self.device.type == "cuda":
            self.descend = Graphed(self.descend)

    # -- what it computes ------------------------------------------------------------------------
    def precision(self):
        """Autocast for the encoder. The heads stay in float32: V reaches minus a hundred."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    def latents(self, states: Tensor, encoder: nn.Module) -> Tensor:
        """Raw states (B, L, S) -> (B, L, D); of each state alone, unless histories are to be seen"""
        x = self.normal(states)
        with self.precision():
            z = encoder(x) if self.cfg.history else encoder(x.flatten(0, 1)[:, None]).view(*x.shape[:2], -1)
        return z.to(states.dtype)

    def action(self, z: Tensor, wanted: Tensor, goal: Tensor) -> Tensor:
        """Inverse dynamics: the first action of a move from z to `wanted`. (..., D) three times -> (..., A)"""
        seen = (z, wanted, goal) if self.cfg.inverse_goal else (z, wanted)
        return self.middle + self.reach * self.inverse(*seen).tanh()

    # -- what it wants ---------------------------------------------------------------------------
    def losses(self, b: Segments) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Everything that is minimised in one update, what to report of it, and InfoNCE's next wrong answers (B, D)."""
        cfg, t = self.cfg, self.cfg.context_length
        rows = lambda x: x[:, :t].flatten(0, 1)  # noqa: E731  the trained places, one under another
        goals = b.value_goals.flatten(0, 1)[:, None]
        with torch.no_grad():
            slow_all = self.latents(b.states, self.slow_encoder)
            both = torch.cat([goals, b.policy_goals.flatten(0, 1)[:, None]])
            slow_goal, aim = self.latents(both, self.slow_encoder)[:, 0].chunk(2)
        if self.frozen:
            z_all, goal = slow_all, slow_goal
        else:
            z_all, goal = self.latents(b.states, self.encoder), self.latents(goals, self.encoder)[:, 0]
        z, after = rows(z_all), rows(z_all[:, 1:])
        slow, slow_after = rows(slow_all), rows(slow_all[:, 1:])
        mask, reached = b.mask.flatten(), b.reached.flatten()

        with torch.no_grad():
            pay = reached - 1 if cfg.reward == "neg" else reached
            target = td_target(pay, 1 - reached, self.slow_v(slow_after, slow_goal).squeeze(-1), cfg.gamma)
            target = target.clamp(-1 / (1 - cfg.gamma), 0) if cfg.reward == "neg" else target.clamp(0, 1)
            slow_q = self.slow_q(slow, slow_after, slow_goal).amin(0)
            better = self.leap(b, slow_all, slow_goal, slow_q) if cfg.value_leap else slow_q
        q, v = self.q(z, after, goal), self.v(z, goal).squeeze(-1)
        logit = self.success(after, goal).squeeze(-1)
        self.pos_weight.copy_(balance(self.pos_weight, reached, mask))
        losses = {
            "critic": 2 * masked_mean(F.huber_loss(q, target.expand_as(q), reduction="none"), mask),
            "value": masked_mean(expectile(better, v, cfg.expectile), mask),
            "state": masked_mean((self.predict(z) - slow_after).square().mean(-1), mask),
            "reward": masked_mean(success_error(logit, reached, self.pos_weight, cfg), mask),
        }
        weights = {"critic": 1.0, "value": cfg.beta_v, "state": cfg.beta_s, "reward": cfg.beta_r}
        if cfg.beta_n and not self.frozen:
            losses["nce"], weights["nce"] = self.contrast(b, z_all), cfg.beta_n
        if cfg.beta_a and not self.frozen:
            cosine, long = cosine_step(z, after, goal)
            trust = (slow_q - self.slow_v(slow, slow_goal).squeeze(-1)).exp().clamp_max(1).detach()
            losses["align"] = masked_mean(trust * cosine, mask * b.future.flatten() * long)
            weights["align"] = cfg.beta_a
        imitation, metrics = self.imitation(b, slow_all, aim, mask)
        losses |= imitation
        weights |= dict.fromkeys(imitation, 1.0)
        metrics |= {"value/q": masked_mean(q, mask), "value/v": masked_mean(v, mask)}
        metrics |= {"value/target": masked_mean(target, mask), "value/reached": masked_mean(reached, mask)}
        with torch.no_grad():
            metrics["latent/std"] = z.var(0).mean().sqrt()  # 0 is collapse
            metrics["latent/cosine"] = F.cosine_similarity(z, after, dim=-1).mean()
            metrics["latent/goal_scale"] = goal.norm(dim=-1).mean() / z.norm(dim=-1).mean()
        metrics = detach(losses, "loss") | {k: x.detach() for k, x in metrics.items()}
        return weigh(losses, weights), metrics, slow_all[:, 0]

    def leap(self, b: Segments, slow: Tensor, goal: Tensor, one_step: Tensor) -> Tensor:
        """What V is to expect: K steps along the recorded way, and of near goals the better of that and one step's Q.

        Far from a goal a step is worth less than V's errors, and a jitter into one would look like a short cut for
        ever; K steps are worth K times as much. slow (B, L, D), goal (N, D), one_step (N,) -> (N,)
        """
        gamma, t = self.cfg.gamma, self.cfg.context_length
        ahead = slow.gather(1, b.ahead[..., None].expand(-1, -1, slow.shape[-1])).flatten(0, 1)
        steps = (b.ahead - torch.arange(t, device=slow.device)).flatten()
        kept = gamma ** steps.to(slow.dtype)
        paid = (kept - 1) / (1 - gamma) if self.cfg.reward == "neg" else 0.0
        leap = paid + kept * self.slow_v(ahead, goal).squeeze(-1)
        near = one_step > worth(self.cfg.proposal_steps, self.cfg)
        return torch.where(near, torch.maximum(one_step, leap), leap)

    def contrast(self, b: Segments, z: Tensor) -> Tensor:
        """InfoNCE between a latent and one a few steps later. z (B, L, D)"""
        t = self.cfg.context_length
        u = 1 - torch.rand(b.mask.shape, device=z.device)
        leap = (u.log() / math.log(NCE_DISCOUNT)).floor().long() + 1
        place = torch.minimum(torch.arange(t, device=z.device) + leap, b.ahead)
        later = z.gather(1, place[..., None].expand(-1, -1, z.shape[-1])).flatten(0, 1)
        later_rows, rows, mask = b.rows.gather(1, place).flatten(), b.rows[:, :t].flatten(), b.mask.flatten()
        return info_nce(z[:, :t].flatten(0, 1), later, rows, later_rows, mask, (self.bank, self.bank_rows), self.cfg)

    def imitation(self, b: Segments, slow: Tensor, aim: Tensor, mask: Tensor) -> tuple[dict, dict]:
        """What proposes and what acts, on latents that do not learn from it. slow (B, L, D), aim (N, D), mask (N,)"""
        cfg = self.cfg
        z = slow[:, : cfg.context_length].flatten(0, 1)
        ahead = slow.gather(1, b.toward[..., None].expand(-1, -1, slow.shape[-1])).flatten(0, 1)
        with torch.no_grad():
            gain = (self.slow_v(ahead, aim) - self.slow_v(z, aim)).squeeze(-1)
            weight = (cfg.temperature * gain).exp().clamp_max(cfg.max_weight)
        losses, metrics = {}, {"policy/gain": masked_mean(gain, mask), "policy/weight": masked_mean(weight, mask)}
        if cfg.proposer == "latent":
            star = self.propose(z, aim)
            losses["propose"] = masked_mean(weight * (star - ahead).square().mean(-1), mask)
            if cfg.lambda_q:
                still = {k: p.detach() for k, p in self.q.named_parameters()}
                climbed = torch.func.functional_call(self.q, still, (z, star, aim)).amin(0)
                losses["propose"] = losses["propose"] - cfg.lambda_q * masked_mean(climbed, mask)
        else:
            ahead = aim
        error = (self.action(z, ahead, aim) - b.actions.flatten(0, 1)).square().mean(-1)
        known = mask * b.labelled.repeat_interleave(cfg.context_length)
        losses["inverse"] = masked_mean(weight * error if cfg.weigh_inverse else error, known)
        metrics["policy/action_error"] = masked_mean(error, known)
        return losses, metrics

    # -- how it learns ---------------------------------------------------------------------------
    def update(self, batch: Segments) -> dict[str, Tensor]:
        """One gradient step."""
        set_rate(self.optimiser, self.peak(), self.updates, self.cfg.warmup_steps)
        metrics = self.descend(batch, None)
        self.updates += 1
        return metrics

    def peak(self) -> float:
        """The learning rate, but for its warm-up: acting is judged as it is last, so it comes to rest."""
        cfg = self.cfg
        left = max(0.0, 1 - self.done())
        return cfg.learning_rate * min(1.0, left / cfg.lr_fall) if cfg.lr_fall else cfg.learning_rate

    def done(self) -> float:
        """The share of the run that is over."""
        return self.updates / (self.cfg.num_epochs * self.cfg.updates_per_epoch)

    def descend(self, batch: Segments, variant: None) -> dict[str, Tensor]:
        self.optimiser.zero_grad()
        loss, metrics, keys = self.losses(batch)
        loss.backward()
        self.bank_keys(keys, batch.rows[:, 0])
        norms = {"judges": clip(self.judges, self.cfg.grad_clip), "actors": clip(self.actors, self.cfg.grad_clip)}
        self.optimiser.step()
        pairs = [(self.slow_q, self.q), (self.slow_v, self.v)]
        for slow, net in pairs if self.frozen else [(self.slow_encoder, self.encoder), *pairs]:
            slow.follow(net, self.cfg.tau)
        return metrics | detach(norms, "gradient")

    @torch.no_grad()
    def bank_keys(self, keys: Tensor, rows: Tensor) -> None:
        """Put latents (B, D) of rows (B,) in the places of the oldest. One a segment: its others are too alike."""
        if m := self.cfg.nce_bank:
            places = (self.bank_at + torch.arange(len(keys[-m:]), device=keys.device)) % m
            self.bank.index_copy_(0, places, F.normalize(keys[-m:], dim=-1))
            self.bank_rows.index_copy_(0, places, rows[-m:])
            self.bank_at.copy_((self.bank_at + len(places)) % m)

    def describe(self) -> str:
        """Size, place, and which implementation of the state-space layer runs; whose actions were used."""
        cfg, count = self.cfg, sum(p.numel() for p in self.parameters() if p.requires_grad)
        backend = describe_backend(cfg.mamba_backend, self.device, cfg.context_length + cfg.proposal_steps)
        f = labelled_share(cfg)
        blind = "" if f or self.frozen else ", so it cannot act before its second phase (--eval_freq 0 saves the time)"
        return f"{count:,} parameters on {self.device}, {backend}; f = {f:g}{blind}"

    def prepare(self, data: Recorded) -> None:
        """The normaliser's statistics come from the data, once."""
        self.normal.fit(data.states)

    # -- how it acts -----------------------------------------------------------------------------
    def reset(self, n: int, goal: Tensor | None = None) -> Memory:
        """Nothing seen; `goal`: raw states (n, S), what is wanted of each."""
        if goal is None:
            raise ValueError("opso must be told a goal: reset(n, goal) with one state for each environment")
        with torch.no_grad():
            z = self.latents(goal.to(self.normal.mean)[:, None], self.slow_encoder)[:, 0]
        states = self.normal.mean.new_zeros(n, self.cfg.context_length, self.spec.state)
        return Memory(states, torch.zeros(n, dtype=torch.long, device=self.device), z)

    @torch.no_grad()
    def act(self, state: Tensor, reward: Tensor, memory: Memory, explore: bool = False) -> tuple[Tensor, Memory]:
        """Raw states (n, S) -> actions (n, A), and the memory one step on. `reward` is not needed."""
        z, memory = self.look(state, memory)
        return self.action(z, self.wanted(z, memory.goal), memory.goal), memory

    def look(self, state: Tensor, memory: Memory) -> tuple[Tensor, Memory]:
        """Take in the present (n, S): its latent (n, D), and the memory one step on."""
        states = torch.cat([memory.states[:, 1:], state.to(memory.states)[:, None]], 1)
        seen = (memory.seen + 1).clamp_max(states.shape[1])
        return self.encode(states, seen), Memory(states, seen, memory.goal)

    def encode(self, states: Tensor, seen: Tensor) -> Tensor:
        """The latent of each row's last `seen` (n,) of states (n, T, S), as in training: nothing stands before them."""
        if not self.cfg.history:
            return self.latents(states[:, -1:], self.slow_encoder)[:, 0]
        k = states.shape[1]
        places = (torch.arange(k, device=seen.device) + k - seen[:, None]).clamp_max(k - 1)
        left = states.gather(1, places[..., None].expand_as(states))
        return self.latents(left, self.slow_encoder)[torch.arange(len(seen), device=seen.device), seen - 1]

    def wanted(self, z: Tensor, goal: Tensor) -> Tensor:
        """The latent to move to: the goal if it is near, else the proposal, with --select q Q's favourite. (n, D)"""
        cfg = self.cfg
        if cfg.proposer == "none":
            return goal
        star = self.propose(z, goal) if cfg.select == "proposer" else self.favourite(z, goal)
        if not cfg.goal_in_reach:
            return star
        return torch.where(self.slow_v(z, goal) > worth(cfg.proposal_steps, cfg), goal, star)

    def favourite(self, z: Tensor, goal: Tensor) -> Tensor:
        """Of the proposal, copies of it with noise and places on the straight way to the goal, what Q likes best."""
        star = self.propose(z, goal)
        share = torch.linspace(1 / STRAIGHT, 1, STRAIGHT, device=z.device, dtype=z.dtype)[:, None, None]
        spread = 0.1 * star.std(-1, keepdim=True)
        grid = torch.Generator(z.device).manual_seed(0)  # the same at every step: acting is a function of the state
        noise = torch.randn(self.cfg.q_candidates, 1, z.shape[-1], generator=grid, device=z.device, dtype=z.dtype)
        candidates = torch.cat([star[None], star + spread * noise, z + share * (goal - z)])
        score = self.slow_q(z.expand_as(candidates), candidates, goal.expand_as(candidates)).amin(0)  # (C, n)
        return candidates[score.argmax(0), torch.arange(len(z), device=z.device)]


def worth(steps: int, cfg) -> float:
    """The value of a goal that is reached by the last of so many steps."""
    kept = cfg.gamma ** (steps - 1)
    return kept if cfg.reward == "zero_one" else (kept - 1) / (1 - cfg.gamma)


def labelled_share(cfg) -> float:
    """f: the share of the offline episodes whose actions inverse dynamics may use."""
    return 0.0 if cfg.inverse_data == "online" else cfg.inverse_fraction


def refuse(cfg) -> None:
    """ValueError for settings that cannot be, in words."""
    if cfg.context_length < 1:
        raise ValueError(f"context_length = {cfg.context_length}, but the agent must see the present: take 1 or more")
    if cfg.gamma >= 1:
        raise ValueError(f"gamma = {cfg.gamma}: the value of a goal that is never reached has no end; take less than 1")
    if cfg.goal_current + cfg.goal_trajectory > 1:
        raise ValueError(
            f"goal_current {cfg.goal_current} and goal_trajectory {cfg.goal_trajectory} are more than all goals"
        )
    if cfg.proposal_steps != 1 and (cfg.select == "q" or cfg.lambda_q):
        raise ValueError(
            f"Q judges one-step moves: with proposal_steps {cfg.proposal_steps}, select q and lambda_q mean nothing. "
            "Take --proposal_steps 1, or leave them away"
        )
