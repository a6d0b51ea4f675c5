"""DQN on the last L observations: embed each, mix them, read Q off the last position ("Latent Mamba-DQN").

  none          the newest observation's embedding alone: DQN (Mnih et al. 2015)
  lstm          one LSTM layer
  transformer   one post-norm encoder layer with learned positions
  mamba         one bare Mamba-1 mixer (Ryu, Sohn & Kim 2025, Applied Sciences 15(16), 8956)

One program; the four differ in networks/last_step_mixers.py and nowhere else. What the mixer says at the last position
is the latent z, and Q(s, ·) is linear in z. Learned from prioritised replay (common/prioritized_replay.py) against a
copied target network. Where we differ from the paper's code:
  1. a time limit is not a death: the target bootstraps there (`--truncation terminal`: as published)
  2. frames are stored once, the sum tree is exact, and one forward a step gives both action and latent
  3. no decay on A_log, D, biases, norms; float32 throughout
  4. every reset has a seed of its own; the score is that of greedy episodes, not of the training's
  5. a loss that is no number stops the run, with its step
  6. the baselines were never published: they are ours

Letters: B batch, L context, S observation, A actions, D = d_model, n environments. Contract: common/interface.py.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.interface import EnvSpec, EvalEnv, OnlineAgent
from common.optim import TargetNetwork, adamw, count_due, detach, fallen, set_lr, td_target
from common.plotting import Panel
from common.prioritized_replay import PrioritizedReplay, Sample
from common.rollout import Step
from common.windows import FrameStack
from config import DQNConfig
from d4rl_utils import frames_per_second
from gym_utils import baseline_returns, open_discrete
from model import mlp
from networks.last_step_mixers import MIXERS

# x * y + z in one instruction, which Inductor leaves off unless told: a fifth of the compiled scan's time on a CPU
FUSED = {"cpp.enable_floating_point_contract_flag": "fast"}


# -- the network ---------------------------------------------------------------------------------


def nature_cnn(width: int) -> nn.Sequential:
    """84 x 84 bytes, flat, as floats of 0 to 1 -> features: DQN's three convolutions. (N, 7056) -> (N, D)"""
    relu, layers = nn.ReLU(), ((1, 32, 8, 4), (32, 64, 4, 2), (64, 64, 3, 1))
    convs = [m for i, o, size, stride in layers for m in (nn.Conv2d(i, o, size, stride), relu)]
    return nn.Sequential(nn.Unflatten(1, (1, 84, 84)), *convs, nn.Flatten(), nn.Linear(3136, width))


PANELS = (
    Panel("losses", {"loss/td": "TD, weighted", "loss/td_unweighted": "TD, unweighted"}, "Huber loss", log=True),
    Panel("Q", {"critic/q": "Q(s, a) of the replay", "critic/target": "target"}, "discounted return"),
    Panel("gradient norm", {"gradient/all": "all"}, log=True),
)


class Dueling(nn.Module):
    """Q(s, a) = V(s) + A(s, a) − mean A(s, ·). (N, D) -> (N, A)"""

    def __init__(self, value: nn.Module, advantage: nn.Module):
        super().__init__()
        self.value, self.advantage = value, advantage

    def forward(self, z: Tensor) -> Tensor:
        advantage = self.advantage(z)
        return self.value(z) + advantage - advantage.mean(1, keepdim=True)


class QNet(nn.Module):
    """Windows (B, L, S) -> Q (B, A), latent (B, D)"""

    def __init__(self, cfg: DQNConfig, spec: EnvSpec):
        super().__init__()
        D, A = cfg.d_model, spec.action
        self.image, self.residual, self.last_only = spec.image, cfg.residual, cfg.mixer == "none"
        self.embed = nature_cnn(D) if spec.image else nn.Sequential(mlp(spec.state, cfg.embed_dim, D), nn.ReLU())
        self.mixer = MIXERS[cfg.mixer](cfg)
        head = (lambda out: mlp(D, D, D, out)) if spec.image else (lambda out: nn.Linear(D, out))
        self.head = Dueling(head(1), head(A)) if cfg.dueling else head(A)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        if self.last_only:
            states = states[:, -1:]
        x = states.flatten(0, 1)
        e = self.embed(x / 255 if self.image else x).unflatten(0, states.shape[:2])
        z = self.mixer(e)
        if self.residual:
            z = z + e[:, -1]
        return self.head(z), z


# -- losses --------------------------------------------------------------------------------------


def epsilon(cfg: DQNConfig, step: int) -> float:
    """Epsilon after so many environment steps."""
    return cfg.eps_start + min(1.0, step / cfg.eps_decay) * (cfg.eps_end - cfg.eps_start)


def per_beta_at(cfg: DQNConfig, step: int) -> float:
    """Beta, the power of the importance weights, after so many environment steps."""
    return min(1.0, cfg.per_beta + (1 - cfg.per_beta) * step / cfg.per_beta_steps)


class DQN(OnlineAgent):
    """Q-learning on the last L observations, from prioritised replay."""

    panels = PANELS

    def __init__(self, cfg: DQNConfig, spec: EnvSpec, device: torch.device | str = "cpu"):
        validate(cfg)
        super().__init__(cfg, spec, device)
        self.net = QNet(cfg, spec)
        self.target_net = TargetNetwork(self.net)
        self.mean_net = TargetNetwork(self.net) if cfg.eval_ema else None
        self.to(self.device)
        self.optimizer = adamw([self.net], cfg.weight_decay, self.device, cfg.amsgrad)
        self.buffer: PrioritizedReplay | None = None
        self.latent: Tensor | None = None  # (n, D) of the states that were acted in last
        if cfg.compile:
            self.net.compile(dynamic=False, options=FUSED)
            self.target_net.net.compile(dynamic=False, options=FUSED)
        self.capture_updates()

    @torch.no_grad()
    def target(self, b: Sample) -> Tensor:
        """r + γⁿ·not_done·max Q'(s', ·), by the target network; r of n steps, s' after them. (B,)"""
        q = self.target_net(b.next_states)[0]
        best = (self.net(b.next_states)[0] if self.cfg.double else q).argmax(1)
        not_done = 1 - b.terminated
        if self.cfg.truncation == "terminal":
            not_done = not_done * (1 - b.truncated)
        return td_target(b.reward, not_done, q.gather(1, best[:, None])[:, 0], b.discount)

    def losses(self, b: Sample, variant: str, noise: None) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; and the TD error and latent of every transition, beside what to report."""
        q, z = self.net(b.states)
        q = q.gather(1, b.action[:, None])[:, 0]
        target = self.target(b)
        each = F.smooth_l1_loss(q, target, reduction="none")
        loss = (b.weight * each).mean()
        metrics = detach({"td": loss, "td_unweighted": each.mean()}, "loss")
        error = (target - q).detach()
        metrics |= detach({"q": q.mean(), "q_max": q.max(), "target": target.mean()}, "critic")
        metrics |= {"critic/td_abs": error.abs().mean(), "replay/least_weight": b.weight.min()}
        if self.cfg.latent in ("refresh", "drift"):
            far = z - b.latent
            drift = (far.norm(dim=1) / b.latent.norm(dim=1).clamp_min(1e-12)).mean()
            metrics |= detach({"drift": drift, "age": b.age.mean()}, "latent")
            if self.cfg.latent == "drift":
                loss = loss + self.cfg.drift_coef * far.square().mean()
        return loss, metrics | {"error": error, "z": z.detach()}

    @classmethod
    def make_eval_env(cls, cfg: DQNConfig) -> EvalEnv:
        """Any environment of Gymnasium with discrete actions and flat observations, or with `--cnn` images."""
        discrete = open_discrete(cfg.env, cfg.cnn, cfg.time_feature, cfg.observe)
        made = discrete.make()
        fps = frames_per_second(made)
        made.close()
        return EvalEnv(
            discrete.make,
            EnvSpec(discrete.state, discrete.actions, image=discrete.image),
            None,
            fps,
            cfg.env if cfg.observe == "full" else f"{cfg.env}+{cfg.observe}",
            "",
            discrete.outcome,
            discrete.names,
            lambda: baseline_returns(cfg.env, discrete, cfg.eval_seed),
        )

    # -- update ----------------------------------------------------------------------------------
    def init_buffer(self, n: int, seed: int) -> None:
        """An empty replay for n environments."""
        cfg, dtype = self.cfg, torch.uint8 if self.spec.image else torch.float32
        self.buffer = PrioritizedReplay(
            cfg.buffer_size,
            n,
            cfg.context_length,
            torch.zeros(self.spec.state, dtype=dtype),
            0 if cfg.latent == "off" else cfg.d_model,
            seed,
            cfg.per_alpha,
            cfg.per_eps,
            self.device,
            cfg.n_step,
            cfg.gamma,
        )

    def observe(self, step: Step) -> None:
        """Remember one step of n environments, with the latents of its states."""
        self.buffer.add(step, None if self.cfg.latent == "off" else self.latent, self.updates)
        self.steps += len(step.reward)

    def minibatches(self) -> Iterator[Sample]:
        """The batches that are due after the step just observed. The target is copied behind them."""
        cfg, now, before = self.cfg, self.steps, self.steps - self.buffer.n
        if now >= cfg.learn_start and len(self.buffer) >= cfg.batch_size:
            for _ in range(count_due(max(before, cfg.learn_start - 1), now, cfg.train_every) * cfg.num_updates):
                yield self.buffer.sample(cfg.batch_size, per_beta_at(cfg, now), self.updates)
        if count_due(before, now, cfg.target_every):
            self.target_net.polyak_update(self.net, cfg.tau)

    def update(self, batch: Sample) -> dict[str, Tensor]:
        """One gradient step; the errors become priorities, and by the mode the latents are renewed."""
        cfg, metrics = self.cfg, dict(super().update(batch))
        error, z = metrics.pop("error"), metrics.pop("z")
        if self.buffer is not None:
            if cfg.per_alpha:
                self.buffer.update_priorities(
                    batch.slot, error.clamp(-cfg.td_clip, cfg.td_clip) if cfg.td_clip else error
                )
            if cfg.latent in ("refresh", "drift"):
                self.buffer.keep_latent(batch.slot, z, self.updates - 1)
        return metrics | {"gradient/clipped": (metrics["gradient/all"] > cfg.grad_clip).float()}

    def begin_update(self) -> str:
        """Set the learning rate."""
        cfg = self.cfg
        rate = fallen(cfg.learning_rate, self.steps / cfg.env_steps, cfg.lr_fall)
        set_lr(self.optimizer, rate, self.updates, cfg.warmup_steps)
        return cfg.mixer

    def clip_groups(self, variant: str) -> dict[str, list[nn.Module]]:
        return {"all": [self.net]}

    def targets_after(self, variant: str) -> list[tuple[TargetNetwork, nn.Module, float]]:
        """The running mean that acts in evaluations. The target network moves by environment steps, in `minibatches`"""
        return [(self.mean_net, self.net, 1 - self.cfg.eval_ema)] if self.mean_net else []

    def describe(self) -> str:
        """Size, place, and what mixes the window."""
        cfg, count = self.cfg, sum(p.numel() for p in self.net.parameters())
        seen = "the newest observation" if cfg.mixer == "none" else f"{cfg.context_length} observations"
        return f"{count:,} parameters on {self.device}, {cfg.mixer} of {seen}"

    @torch.no_grad()
    def schedule_metrics(self) -> dict[str, float]:
        """Where the schedules stand, for a row of the log, and the loss of transitions drawn without regard to it."""
        cfg, step = self.cfg, self.steps
        metrics = {"epsilon": epsilon(cfg, step), "beta": per_beta_at(cfg, step), "replay/size": len(self.buffer)}
        if self.updates:  # the trained loss hangs on priorities and weights: between models it compares nothing
            b = self.buffer.sample_uniform(cfg.batch_size)
            q = self.net.forward(b.states)[0].gather(1, b.action[:, None])[:, 0]  # once in a while: not compiled
            metrics["loss/td_uniform"] = F.smooth_l1_loss(q, self.target(b)).item()
        return metrics

    # -- acting ----------------------------------------------------------------------------------
    def reset(self, n: int, goal: None = None) -> FrameStack:
        self.refuse_goal(goal)
        weight = next(self.net.parameters())
        return FrameStack.init(n, self.cfg.context_length, weight.new_zeros(self.spec.state))

    def on_env_reset(self, lost: Tensor) -> None:
        """No window may reach from an abandoned episode (n,) into the next one."""
        self.buffer.forget_episode(lost)

    @torch.no_grad()
    def act(
        self, state: Tensor, reward: Tensor, memory: FrameStack, explore: bool = False
    ) -> tuple[Tensor, FrameStack]:
        """Raw states (n, S) -> greedy or ε-greedy actions (n,) long, and the memory one step on."""
        states, memory = memory.push(state.to(memory.states.dtype))
        net = self.net if explore or not self.mean_net else self.mean_net
        q, self.latent = net(states)
        action = q.argmax(1)
        if explore:
            chance = torch.rand(2, len(action), device=action.device)
            any_of = (chance[1] * self.spec.action).long().clamp_max(self.spec.action - 1)
            action = torch.where(chance[0] < epsilon(self.cfg, self.steps), any_of, action)
        return action, memory


def validate(cfg: DQNConfig) -> None:
    """ValueError for sizes that cannot be, in words."""
    if cfg.precision == "bf16":
        raise ValueError("dqn learns in float32: precision bf16 is not for it, take fp32 or tf32")
    if cfg.buffer_size < cfg.batch_size:
        raise ValueError(
            f"buffer_size = {cfg.buffer_size} never holds a batch of batch_size = {cfg.batch_size}: nothing is learned"
        )
    if cfg.learn_start > cfg.env_steps:
        raise ValueError(
            f"learn_start = {cfg.learn_start} lies behind env_steps = {cfg.env_steps}: nothing would be learned"
        )
