"""Bamba: behaviour cloning plus Q-learning on a Mamba-2 summary of the last K states.

The objective is TD3+BC's (Fujimoto & Gu 2021, arXiv 2106.06860), the encoder is made of Mamba-2 blocks (Dao & Gu 2024,
arXiv 2405.21060). Where we differ from TD3+BC:
  1. the actor sees a window of K states through the encoder; what the critics see is `critic_input`
  2. the encoder is also asked for the next state and the reward (weights beta_s, beta_r), in every update
  3. critics, actor and encoder descend together, from one backward pass; the actor joins every policy_freq updates
  4. AdamW with a warm-up and clipped gradients, as sequence models like it

Letters: B batch, K context, S state, A action, D = d_model, n environments. Contract: common/interface.py.
"""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

import d4rl_utils
from common.cuda_graph import SideStream
from common.interface import EnvSpec, EvalEnv, FramePolicy
from common.losses import (
    average,
    awr_loss,
    bc_q_loss,
    expectile_loss,
    explained_variance,
    mse,
    rebrac_actor_loss,
    rebrac_betas,
)
from common.optim import TargetNetwork, adamw, detach, set_lr, td_target, weighted_sum
from common.plotting import Panel
from common.windows import FrameStack, Segment, SegmentSampler, Window, WindowSampler
from config import BambaConfig
from model import Encoder, Normalizer, Present, TwinQ, mlp
from networks.mamba import describe_backend

Q_WEIGHT_RATE = 0.01  # of the running mean of the share of variance that Q explains


PANELS = (
    Panel(
        "losses",
        {
            "loss/critic": "critic, squared error",
            "loss/value": "value, expectile",
            "loss/state": "next state, squared error in std",
            "loss/reward": "reward, squared error",
        },
        log=True,
    ),
    Panel(
        "Q",
        {
            "critic/q": "Q(s, a) of the data",
            "actor/q_pi": "Q(s, π(s))",
            "critic/target": "target",
            "value/v": "V(s)",
        },
        "discounted return",
    ),
    Panel("actor", {"actor/bc_loss": "cloning error"}, "squared action units", log=True),
    Panel("gradient norms", {"gradient/rest": "encoder and actor", "gradient/critic": "critics"}, log=True),
)


class Noise(NamedTuple):
    """What is random in one update."""

    mask_bits: Tensor | None  # (n_layers, B, K, D) int16  of the encoder's dropout; None: it drops nothing
    action: Tensor  # (B, A)  standard normal, for the target action


class Rows(NamedTuple):
    """A batch as its losses see it: N steps, of windows or of all places of segments. States are normalised."""

    present: Tensor  # (N, S)
    z: Tensor  # (N, D)  the embedding of what was seen up to here
    next_present: Tensor  # (N, S)
    next_z: Tensor  # (N, D)  without gradient and without dropout
    action: Tensor  # (N, A)
    reward: Tensor  # (N,)
    not_done: Tensor  # (N,)
    next_action: Tensor | tuple  # (N, A)
    has_next: Tensor | tuple  # (N,)
    returns: Tensor | tuple  # (N,)
    mask: Tensor | None  # (N,)  None: all count


class Bamba(FramePolicy):
    """Encoder, actor, twin critics and two predictions, trained together on recorded data."""

    panels = PANELS

    def __init__(self, cfg: BambaConfig, spec: EnvSpec, device: torch.device | str = "cpu"):
        validate(cfg)
        super().__init__(cfg, spec, device)
        self.k = context_of(cfg)
        self.register_action_bounds()
        self.obs_normalizer = Normalizer(spec.state)
        self.delta_normalizer = Normalizer(spec.state) if cfg.state_delta else None
        self.burn_in = burn_in_of(cfg)
        width = spec.state * (1 + cfg.state_delta)
        if cfg.encoder == "none":
            self.encoder = Present(width)
        else:
            self.encoder = Encoder(cfg, width, self.k + (cfg.train_on == "segments"))
        D, hidden = self.encoder.dim, [cfg.hidden_dim] * cfg.head_depth
        seen = width if cfg.critic_input == "state" else D
        self.actor = mlp(D, *hidden, spec.action)
        self.critic = TwinQ(seen, spec.action, cfg.hidden_dim, cfg.head_depth, cfg.critic_layernorm)
        self.next_state = mlp(D + spec.action, cfg.hidden_dim, width)
        self.reward = mlp(D + spec.action, cfg.hidden_dim, 1)
        self.value = mlp(seen, *hidden, 1, layer_norm=cfg.critic_layernorm) if cfg.objective == "iql" else None
        self.target_actor, self.target_critic = TargetNetwork(self.actor), TargetNetwork(self.critic)
        self.target_encoder = TargetNetwork(self.encoder) if cfg.target_encoder == "ema" else None
        self.mean_encoder = TargetNetwork(self.encoder) if cfg.eval_ema else None
        self.mean_actor = TargetNetwork(self.actor) if cfg.eval_ema else None
        betas = rebrac_betas(*d4rl_utils.body_and_type(cfg))
        self.beta_actor = max(betas[0], cfg.min_beta_actor) if cfg.beta_actor is None else cfg.beta_actor
        self.beta_critic = betas[1] if cfg.beta_critic is None else cfg.beta_critic
        # the weight of Q in the actor's loss: 1, or the share of the returns' variance that Q explains
        adaptive = cfg.trust == "explained"
        self.register_buffer("q_weight", torch.tensor(0.0 if adaptive else 1.0), persistent=adaptive)
        self.to(self.device)
        self.side = SideStream(self.device)  # for the targets' pass through the encoder
        # gradients of these nets are clipped together, those of the critics apart
        predictors = [] if cfg.encoder == "none" else [self.next_state, self.reward]
        self.encoder_actor_nets = [self.encoder, self.actor, *predictors]
        self.critic_nets = [self.critic] + ([self.value] if self.value else [])
        self.optimizer = adamw([*self.critic_nets, *self.encoder_actor_nets], cfg.weight_decay, self.device)
        if cfg.compile:
            self.compile_methods("objective")
            if self.target_encoder:
                self.target_encoder.net.compile_blocks()
        self.capture_updates()

    # -- networks --------------------------------------------------------------------------------
    def normalize(self, states: Tensor) -> Tensor:
        """Raw states (B, L, S) -> what the nets see of them, (B, L, S); with `state_delta` (B, L, 2S): beside each the
        change since the one before, in its own units of spread, 0 at the first."""
        x = self.obs_normalizer(states)
        if self.delta_normalizer is None:
            return x
        delta = x.diff(dim=1) / self.delta_normalizer.std  # their mean stays: nothing has changed is always 0
        return torch.cat([x, nn.functional.pad(delta, (0, 0, 1, 0))], -1)

    def policy(self, z: Tensor, actor: nn.Module | None = None) -> Tensor:
        """Embedding (B, D) -> action within its bounds (B, A)."""
        return self.action_bias + self.action_scale * (actor or self.actor)(z).tanh()

    def critic_obs(self, present: Tensor, z: Tensor) -> Tensor:
        """What the critics are shown: the present, normalised (N, S), or the embedding (N, D)."""
        match self.cfg.critic_input:
            case "state":
                return present
            case "embedding":
                return z
            case "embedding_detached":
                return z.detach()

    @torch.no_grad()
    def target(self, b: Rows, noise: Tensor) -> Tensor:
        """r + γ·not_done·min Q'(s', ã'), ã' the target actor's action plus clipped noise (TD3). (N,). noise (N, A):
        normal

        ReBRAC takes beta_critic·|ã' − a'|² off Q', a' being the recorded next action, where there is one. IQL has
        r + γ·not_done·V(s').
        """
        cfg, seen = self.cfg, self.critic_obs(b.next_present, b.next_z)
        if cfg.objective == "iql":
            return td_target(b.reward, b.not_done, self.value(seen).squeeze(-1), cfg.gamma)
        noise = noise * cfg.action_noise
        noise = noise.clamp(-cfg.action_noise_clip, cfg.action_noise_clip) * self.action_scale
        action = self.policy(b.next_z, self.target_actor) + noise
        action = action.clamp(self.action_bias - self.action_scale, self.action_bias + self.action_scale)
        next_q = self.target_critic(seen, action).amin(0)
        if cfg.objective == "rebrac" and self.beta_critic:
            next_q = next_q - self.beta_critic * b.has_next * (action - b.next_action).square().sum(-1)
        return td_target(b.reward, b.not_done, next_q, cfg.gamma)

    def precision(self):
        """Autocast for the encoder. The heads stay in float32: at Q in the hundreds bfloat16 counts in ones."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    # -- losses ----------------------------------------------------------------------------------
    def draw_noise(self, b: Window | Segment, generator: torch.Generator | None = None) -> Noise:
        """All that is random in one update, drawn before it: no loss draws anything. generator: if not torch's own"""
        action = torch.randn(b.action.shape, device=b.action.device, generator=generator)
        return Noise(self.encoder.draw_mask_bits(b.states, generator), action.view(-1, self.spec.action))

    def losses(self, b: Window | Segment, variant: tuple[bool, bool], noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """Everything that is minimised in one update, and what to report of it. variant: as of `objective`"""
        rows = self.segment_rows(b, noise) if isinstance(b, Segment) else self.window_rows(b, noise)
        return self.objective(rows, noise.action, variant)

    def window_rows(self, b: Window, noise: Noise) -> Rows:
        """Each window one step: the encoder reads it, and the one that a step later ends in s'."""
        states, next_states = self.normalize(b.states), self.normalize(b.next_states)
        # two autocast regions: the weights that one has cast know of no gradient, or lie on the other's stream
        with self.side, torch.no_grad(), self.precision():
            next_z = (self.target_encoder or self.encoder)(next_states)
        with self.precision():
            z = self.encoder(states, noise.mask_bits)
        self.side.join()
        rest = b.action, b.reward, b.not_done, b.next_action, b.has_next, b.returns, None
        return Rows(states[:, -1], z.float(), next_states[:, -1], next_z.float(), *rest)

    def segment_rows(self, b: Segment, noise: Noise) -> Rows:
        """Every place of a segment is a step, and the next place is the next step: one pass through the encoder does
        for both, unless there is dropout or a target encoder, whose targets want a pass of their own."""
        states = self.normalize(b.states)
        apart = noise.mask_bits is not None or self.target_encoder
        if apart:
            with self.side, torch.no_grad(), self.precision():
                target_encoder = self.target_encoder.net if self.target_encoder else self.encoder
                target_z = target_encoder.sequence(states)
        with self.precision():
            z = self.encoder.sequence(states, noise.mask_bits)
        self.side.join()
        states, z, next_z = (x[:, self.burn_in :] for x in (states, z, target_z if apart else z.detach()))
        pairs = states[:, :-1], z[:, :-1].float(), states[:, 1:], next_z[:, 1:].float()
        return Rows(*(x.flatten(0, 1) if torch.is_tensor(x) else x for x in (*pairs, *b[1:])))

    def objective(self, b: Rows, noise: Tensor, variant: tuple[bool, bool]) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses` behind the encoder. noise (N, A). variant: whether the actor takes part; whether this is the
        critics' pre-training, on returns instead of targets, in which the actor clones (Jelley et al. 2024)."""
        cfg, (update_actor, pretraining) = self.cfg, variant
        seen = self.critic_obs(b.present, b.z)
        losses, metrics = {}, {}
        if cfg.objective != "bc":
            target = b.returns if pretraining else self.target(b, noise)
            q = self.critic(seen, b.action)
            losses["critic"] = mse(q[0], target, b.mask) + mse(q[1], target, b.mask)
            metrics |= detach({"q": average(q.mean(0), b.mask), "target": average(target, b.mask)}, "critic")
            if cfg.objective == "iql":
                target_q = target if pretraining else self.target_critic(seen.detach(), b.action).amin(0)
                losses["value"] = expectile_loss(self.value(seen).squeeze(-1), target_q, cfg.expectile, b.mask)
            if cfg.trust == "explained":
                explained = explained_variance(q.detach().mean(0), b.returns, b.mask)
                with torch.no_grad():
                    self.q_weight.lerp_(explained.clamp(0, 1), Q_WEIGHT_RATE)
                metrics |= detach({"explained": explained, "q_weight": self.q_weight.clone()}, "critic")
        if cfg.encoder != "none":
            za = torch.cat([b.z, b.action], -1)
            losses["state"] = mse(self.next_state(za), b.next_present, b.mask)
            losses["reward"] = mse(self.reward(za).squeeze(-1), b.reward, b.mask)
        weights = dict.fromkeys(losses, 1.0) | {"state": cfg.beta_s, "reward": cfg.beta_r}
        report = detach(losses, "loss") | metrics
        if update_actor:
            losses["actor"], info = self.actor_loss(b, seen.detach(), pretraining)
            weights["actor"] = 1.0
            report |= detach({"loss": losses["actor"], **info}, "actor")
        return weighted_sum(losses, {k: weights[k] for k in losses}), report

    def actor_loss(self, b: Rows, seen: Tensor, pretraining: bool) -> tuple[Tensor, dict]:
        """What the actor minimises. seen (N, X): what the critics see, without gradient"""
        cfg, pi = self.cfg, self.policy(b.z)
        if cfg.objective == "bc" or pretraining:
            bc_loss = mse(pi, b.action, b.mask)
            return bc_loss, {"bc_loss": bc_loss}
        if cfg.objective == "iql":
            with torch.no_grad():
                advantage = self.target_critic(seen, b.action).amin(0) - self.value(seen).squeeze(-1)
            return awr_loss(pi, b.action, advantage, cfg.iql_temperature, b.mask)
        # The actor climbs Q. Q's own weights must not feel that, nor may z change to please a Q that looks at z.
        frozen_params = {k: v.detach() for k, v in self.critic.named_parameters()}
        q = torch.func.functional_call(self.critic, frozen_params, (seen, pi))
        if cfg.objective == "rebrac":
            return rebrac_actor_loss(pi, b.action, q.amin(0), self.beta_actor, self.q_weight, b.mask)
        alpha = cfg.alpha * self.q_weight if cfg.trust == "explained" else cfg.alpha
        return bc_q_loss(pi, b.action, q[0], alpha, b.mask)

    # -- update ----------------------------------------------------------------------------------
    def begin_update(self) -> tuple[bool, bool]:
        """Set the learning rate; the variant of `objective` that is due."""
        cfg = self.cfg
        peak = cfg.learning_rate
        if cfg.lr_schedule == "cosine":
            peak *= 0.5 + 0.5 * math.cos(math.pi * self.updates / (cfg.num_epochs * cfg.updates_per_epoch))
        set_lr(self.optimizer, peak, self.updates, cfg.warmup_steps)
        # without a critic the actor waits for none
        update_actor = self.updates % cfg.policy_freq == 0 or cfg.objective == "bc"
        return update_actor, self.updates < cfg.critic_pretrain

    def clip_groups(self, variant: tuple[bool, bool]) -> dict[str, list[nn.Module]]:
        """What learns in an update of this variant, by whose gradients are clipped together."""
        groups = {} if self.cfg.objective == "bc" else {"critic": self.critic_nets}
        return groups | {"rest": [net for net in self.encoder_actor_nets if net is not self.actor or variant[0]]}

    def targets_after(self, variant: tuple[bool, bool]) -> list[tuple[TargetNetwork, nn.Module, float]]:
        """What follows what, and how far, after an update of this variant."""
        tau, mean_tau = self.cfg.tau, 1 - self.cfg.eval_ema
        pairs = [
            (self.target_actor, self.actor, tau),
            (self.target_critic, self.critic, tau),
            (self.target_encoder, self.encoder, tau),
            (self.mean_encoder, self.encoder, mean_tau),
            (self.mean_actor, self.actor, mean_tau),
        ]
        return [pair for pair in pairs if pair[0] and variant[0]]

    def describe(self) -> str:
        """Size, place, which implementation of the state-space layer runs; and if all of the run is pre-training."""
        cfg, count = self.cfg, sum(p.numel() for p in self.parameters() if p.requires_grad)
        if cfg.encoder.startswith("mamba"):
            encoder = describe_backend(cfg.mamba_backend, self.device, cfg.context_length)
        else:
            encoder = "no encoder" if cfg.encoder == "none" else f"encoder {cfg.encoder}"
        updates, text = cfg.num_epochs * cfg.updates_per_epoch, f"{count:,} parameters on {self.device}, {encoder}"
        if cfg.critic_pretrain >= updates:
            text += (
                f"\nnotice      all {updates:,} updates are pre-training, in which the actor clones (--critic_pretrain)"
            )
        return text

    @classmethod
    def make_eval_env(cls, cfg: BambaConfig) -> EvalEnv:
        """The environment that the data were recorded in."""
        return d4rl_utils.make_eval_env(cfg)

    @classmethod
    def open_data(
        cls, cfg: BambaConfig, device: torch.device | str, seed: int
    ) -> tuple[WindowSampler | SegmentSampler, d4rl_utils.DatasetInfo]:
        """The sampler on the training device, and what the data are."""
        transitions, identity = d4rl_utils.open_data(cfg)
        gamma = None if cfg.objective == "bc" else cfg.gamma
        if cfg.train_on == "segments" and cfg.encoder != "none":
            return SegmentSampler(transitions, cfg.context_length, device, seed, gamma, burn_in_of(cfg)), identity
        return WindowSampler(transitions, context_of(cfg), device, seed, gamma), identity

    @classmethod
    def check_parallel(cls, cfg: BambaConfig) -> None:
        """All but a weight of Q that is measured on the way can."""
        if cfg.num_seeds > 1 and cfg.trust != "always":
            raise ValueError("--trust explained measures one agent's Q: it cannot be had with --num_seeds")

    def fit_normalizer(self, data: WindowSampler | SegmentSampler) -> None:
        """The normaliser's statistics come from the data, once. ValueError if the data are of another body."""
        d4rl_utils.check_recorded(self.cfg.env, self.spec, data.states.shape[1], data.actions.cpu().numpy())
        self.obs_normalizer.fit(data.states)
        if self.delta_normalizer:
            self.delta_normalizer.fit(self.obs_normalizer(data.next_states) - self.obs_normalizer(data.states))

    def data_levels(self, sampler: WindowSampler | SegmentSampler) -> dict[str, float]:
        """The mean discounted return-to-go of the data: where Q of the data would be if it were the recorder's."""
        return {} if self.cfg.objective == "bc" else {"critic/q": sampler.columns[:, -1].mean().item()}

    # -- acting ----------------------------------------------------------------------------------
    @torch.no_grad()
    def act(
        self, state: Tensor, reward: Tensor, memory: FrameStack, explore: bool = False
    ) -> tuple[Tensor, FrameStack]:
        """Raw states (n, S) -> deterministic actions (n, A), and the memory one step on. `reward` is not needed."""
        memory = self.observe_state(state, reward, memory)
        nets = (self.mean_encoder.net, self.mean_actor.net) if self.mean_actor else None
        action, _ = self.forward_window(self.window(memory), memory.seen - 1, nets)
        return action, memory

    def forward_window(
        self, view: tuple[Tensor], t: Tensor | None = None, nets: tuple[nn.Module, nn.Module] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The action (B, A) for the present of windows, and its embedding (B, D).

        t (B,): steps of the episode before the present. An agent of segments wants it: in training no more than
        `burn_in` states stand before an episode's start, so what the window repeats there beyond is left away. nets:
        encoder and actor that act in place of its own.
        """
        states = self.normalize(view[0])
        encoder, actor = nets or (self.encoder, self.actor)
        if self.cfg.train_on == "segments" and self.cfg.encoder != "none":
            seen = (t + 1 + self.burn_in).clamp_max(self.k)[:, None]
            places = (torch.arange(self.k, device=seen.device) + self.k - seen).clamp_max(self.k - 1)
            states = states.gather(1, places[..., None].expand_as(states))
            z = encoder.sequence(states)
            z = z.gather(1, (seen - 1)[..., None].expand(-1, 1, z.shape[-1])).squeeze(1)
        else:
            z = encoder(states)
        return self.policy(z, actor), z

    def bc_error(self, b: Window | Segment) -> Tensor:
        """Mean squared distance from the recorded actions, by action dim. (A,)"""
        if isinstance(b, Segment):
            pi = self.policy(self.encoder.sequence(self.normalize(b.states[:, :-1]))[:, self.burn_in :])
            return ((pi - b.action).square() * b.mask[..., None]).sum((0, 1)) / b.mask.sum()
        return (self.forward_window((b.states,))[0] - b.action).square().mean(0)

    @classmethod
    def finetuning_config(cls, cfg: BambaConfig, target_return: float | None) -> BambaConfig:
        """The same; if the mean of its nets acted, that is what goes on."""
        return replace(cfg, eval_ema=0.0)

    def load_acting_weights(self, state: dict[str, Tensor]) -> None:
        """The encoder and the actor that acted in evaluations, and the rest."""
        own = {k: v for k, v in state.items() if not k.startswith("mean_")}
        for net in ("encoder", "actor"):
            mean = f"mean_{net}.net."
            own |= {f"{net}.{k.removeprefix(mean)}": v for k, v in state.items() if k.startswith(mean)}
        self.load_state_dict(own)

    def param_groups(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """What an action comes from: the nets up to the embedding, and the head on it."""
        return [self.encoder], [self.actor]


def context_of(cfg: BambaConfig) -> int:
    """How many states are seen at once."""
    return 1 + cfg.state_delta if cfg.encoder == "none" else cfg.context_length + burn_in_of(cfg)


def burn_in_of(cfg: BambaConfig) -> int:
    """States before a segment. A change of state wants one."""
    return max(cfg.burn_in, cfg.state_delta) if cfg.train_on == "segments" else 0


def validate(cfg: BambaConfig) -> None:
    """ValueError for settings that do not go together, in words."""
    if cfg.objective == "bc" and (cfg.critic_pretrain or cfg.trust != "always"):
        raise ValueError("--objective bc has no critic: leave --critic_pretrain and --trust away")
    if cfg.objective == "iql" and cfg.trust != "always":
        raise ValueError("--objective iql weighs actions, not Q: --trust has nothing to do there; leave it away")
    if cfg.encoder == "none" and cfg.target_encoder == "ema":
        raise ValueError("--encoder none has nothing to copy slowly: leave --target_encoder away")
    if cfg.burn_in and cfg.encoder != "none" and cfg.train_on == "windows":
        raise ValueError("--burn_in belongs to --train_on segments: every place of a window has its past already")
