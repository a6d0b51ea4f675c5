"""Bamba: behaviour cloning plus Q-learning on a Mamba-2 summary of the last K states.

The objective is TD3+BC's (Fujimoto & Gu 2021, arXiv 2106.06860), the encoder is made of Mamba-2 blocks (Dao & Gu 2024,
arXiv 2405.21060). Where we differ from TD3+BC:
  1. the actor sees a window of K states through the encoder; what the critics see is `critic_input`
  2. the encoder is also asked for the next state and the reward (weights beta_s, beta_r), in every update
  3. critics, actor and encoder descend together, from one backward pass; the actor joins every policy_freq updates
  4. AdamW with a warm-up and clipped gradients, as sequence models like it

The contract that this agent keeps, and every other agent of the house:

    update(batch) -> metrics         learn from data; tensor work of fixed shape, no host synchronisation
    reset(n, goal=None) -> memory    forget everything, and be told what is wanted: a return, or a state for each
    act(state, reward, memory, explore=False) -> action, memory      for n environments at once
    prepare(data) -> None            what must be known of the data before the first update
    describe() -> str                one line for the start of a log
    data(cfg, device, seed) / world(cfg)     module functions: the sampler it learns from, the environment it lives in

and, if it learns online (it has no `data` then):

    gather(n, seed) -> None          make `experience`, what it will remember of n environments; a resume restores it
    observe(step) -> None            take in one step (memory.Step) of all of them
    lessons() -> batches             those that are due after this step, one `update` each: as an iterator
    restart(memory, over, goal=None) -> memory  forget the rows whose episode is over (n,)
    status() -> dict                 numbers for a row of the log: where schedules stand, how full a buffer is
    forsake(lost) -> None            episodes (n,) are abandoned without an end: nothing may be learned across that
    prepare(experience) -> None      if something is to be done before the first step of a fresh run
    continues                        True if it was trained before: it is then judged before the first step, too

Settings that imply others (a checkpoint to begin with) go through the module's `settle(cfg) -> cfg`, if it has one.

An agent is an nn.Module with `cfg`, `spec`, `updates` (how many it has made) and its optimisers as attributes; online,
also with `steps`, how many environment steps it has observed. Acting in a loop happens in training mode.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import d4rl_utils
from config import BambaConfig
from learn import Frozen, Graphed, adamw, clip, detach, set_rate, td_target, weigh
from mamba import describe_backend
from memory import Memory, Window, Windows, forget, recall, remember
from model import Compilable, Encoder, Normaliser, TwinQ, mlp


class Spec(NamedTuple):
    """What the world fixes and no flag can change."""

    state: int
    action: int
    low: tuple[float, ...]  # bounds of the action, one number a dimension
    high: tuple[float, ...]


class World(NamedTuple):
    """Where an agent is judged."""

    make: Callable  # make(render_mode=None) -> a fresh gymnasium environment
    spec: Spec
    score: Callable[[float], float] | None  # return -> score; None: no reference returns, so returns are all there is
    fps: int  # steps in a second of its time, for videos
    name: str  # for people, e.g. "hopper v4"
    scale: str  # of the score: "D4RL's scale", "Minari's scale × 100", or "" without one
    outcome: Callable | None = None  # (info, reward) of an episode's last step -> {"crash": 0 or 1, ...}
    actions: tuple[str, ...] = ()  # names of discrete actions
    trivial: Callable | None = None  # () -> returns of policies that look at nothing, by name; may play to find out
    tasks: tuple[str, ...] = ()  # several to be judged in, each an environment of its own: make(render_mode, task)


class Noise(NamedTuple):
    """What is random in one update."""

    bits: Tensor | None  # (n_layers, B, K, D) int16  of the encoder's dropout; None: it drops nothing
    action: Tensor  # (B, A)  standard normal, for the target action


def bc_q_loss(pi: Tensor, action: Tensor, q: Tensor, alpha: float) -> tuple[Tensor, dict]:
    """TD3+BC's actor objective (eq. 5): BC − λ·Q with λ = α / mean|Q|. pi, action: (B, A); q: (B,), a critic on pi."""
    trust = alpha / q.abs().mean().clamp_min(1e-6).detach()
    clone = F.mse_loss(pi, action)
    return clone - trust * q.mean(), {"clone": clone, "q_pi": q.mean(), "trust": trust}


class Bamba(Compilable):
    def __init__(self, cfg: BambaConfig, spec: Spec, device: torch.device | str = "cpu"):
        super().__init__()
        self.cfg, self.spec, self.updates = cfg, spec, 0
        low, high = torch.tensor(spec.low), torch.tensor(spec.high)
        self.register_buffer("middle", (high + low) / 2)
        self.register_buffer("reach", (high - low) / 2)
        self.normal = Normaliser(spec.state)
        self.encoder = Encoder(cfg, spec.state)
        self.actor = mlp(cfg.d_model, cfg.hidden_dim, cfg.hidden_dim, spec.action)
        self.critic = TwinQ(spec.state if cfg.critic_input == "state" else cfg.d_model, spec.action, cfg.hidden_dim)
        self.next_state = mlp(cfg.d_model + spec.action, cfg.hidden_dim, spec.state)
        self.reward = mlp(cfg.d_model + spec.action, cfg.hidden_dim, 1)
        self.slow_actor, self.slow_critic = Frozen(self.actor), Frozen(self.critic)
        self.slow_encoder = Frozen(self.encoder) if cfg.target_encoder == "ema" else None
        self.to(device)
        self.device = torch.device(device)
        # these nets learn together, the critics apart
        self.seeing = [self.encoder, self.actor, self.next_state, self.reward]
        self.optimiser = adamw([self.critic, *self.seeing], cfg.weight_decay, self.device)
        if cfg.compile:
            self.compile_methods("objective")
            if self.slow_encoder:
                self.slow_encoder.net.compile_blocks()
        if cfg.cuda_graphs and self.device.type == "cuda":
            self.descend = Graphed(self.descend)

    # -- what it computes ------------------------------------------------------------------------
    def policy(self, z: Tensor, actor: nn.Module | None = None) -> Tensor:
        """Embedding (B, D) -> action within its bounds (B, A)."""
        return self.middle + self.reach * (actor or self.actor)(z).tanh()

    def judged(self, states: Tensor, z: Tensor) -> Tensor:
        """What the critics are shown: the present of normalised states (B, K, S), or the embedding (B, D)."""
        match self.cfg.critic_input:
            case "state":
                return states[:, -1]
            case "embedding":
                return z
            case "embedding_detached":
                return z.detach()

    @torch.no_grad()
    def target(self, b: Window, next_states: Tensor, z: Tensor, noise: Tensor) -> Tensor:
        """r + γ·alive·min Q'(s', ã'), ã' the slow actor's action plus clipped noise (TD3). (B,)

        next_states (B, K, S) normalised, z (B, D) their embedding, noise (B, A) standard normal.
        """
        noise = noise * self.cfg.action_noise
        noise = noise.clamp(-self.cfg.action_noise_clip, self.cfg.action_noise_clip) * self.reach
        action = self.policy(z, self.slow_actor) + noise
        action = action.clamp(self.middle - self.reach, self.middle + self.reach)
        next_q = self.slow_critic(self.judged(next_states, z), action).amin(0)
        return td_target(b.reward, b.alive, next_q, self.cfg.gamma)

    def precision(self):
        """Autocast for the encoder. The heads stay in float32: at Q in the hundreds bfloat16 counts in ones."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.precision == "bf16")

    # -- what it wants ---------------------------------------------------------------------------
    def draw_noise(self, b: Window) -> Noise:
        """All that is random in one update, drawn before it: no loss draws anything."""
        return Noise(self.encoder.draw_bits(b.states), torch.randn_like(b.action))

    def losses(self, b: Window, actors_turn: bool, noise: Noise) -> tuple[Tensor, dict[str, Tensor]]:
        """Everything that is minimised in one update, and what to report of it."""
        states, next_states = self.normal(b.states), self.normal(b.next_states)
        with self.precision():
            z = self.encoder(states, noise.bits)
            with torch.no_grad():
                next_z = (self.slow_encoder or self.encoder)(next_states)
        return self.objective(b, states, next_states, z.float(), next_z.float(), noise.action, actors_turn)

    def objective(
        self,
        b: Window,
        states: Tensor,
        next_states: Tensor,
        z: Tensor,
        next_z: Tensor,
        noise: Tensor,
        actors_turn: bool,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """`losses` behind the encoder. states, next_states (B, K, S) normalised; z, next_z (B, D); noise (B, A)"""
        target = self.target(b, next_states, next_z, noise)
        q = self.critic(self.judged(states, z), b.action)
        za = torch.cat([z, b.action], -1)
        losses = {
            "critic": F.mse_loss(q[0], target) + F.mse_loss(q[1], target),
            "state": F.mse_loss(self.next_state(za), next_states[:, -1]),
            "reward": F.mse_loss(self.reward(za).squeeze(-1), b.reward),
        }
        weights = {"critic": 1.0, "state": self.cfg.beta_s, "reward": self.cfg.beta_r}
        metrics = detach(losses, "loss") | detach({"q": q.mean(), "target": target.mean()}, "critic")
        if actors_turn:
            pi = self.policy(z)
            # The actor climbs Q. Q's own weights must not feel that, nor may z change to please a Q that looks at z.
            still = {k: v.detach() for k, v in self.critic.named_parameters()}
            q_pi = torch.func.functional_call(self.critic, still, (self.judged(states, z).detach(), pi))[0]
            losses["actor"], info = bc_q_loss(pi, b.action, q_pi, self.cfg.alpha)
            weights["actor"] = 1.0
            metrics |= detach({"loss": losses["actor"], **info}, "actor")
        return weigh(losses, weights), metrics

    # -- how it learns ---------------------------------------------------------------------------
    def update(self, batch: Window) -> dict[str, Tensor]:
        """One gradient step; the actor takes part in every policy_freq-th."""
        set_rate(self.optimiser, self.cfg.learning_rate, self.updates, self.cfg.warmup_steps)
        metrics = self.descend(batch, self.updates % self.cfg.policy_freq == 0)
        self.updates += 1
        return metrics

    def descend(self, batch: Window, actors_turn: bool) -> dict[str, Tensor]:
        self.optimiser.zero_grad()
        loss, metrics = self.losses(batch, actors_turn, self.draw_noise(batch))
        loss.backward()
        norms = {"critic": clip([self.critic], self.cfg.grad_clip), "rest": clip(self.seeing, self.cfg.grad_clip)}
        self.optimiser.step()
        if actors_turn:
            self.slow_actor.follow(self.actor, self.cfg.tau)
            self.slow_critic.follow(self.critic, self.cfg.tau)
            if self.slow_encoder:
                self.slow_encoder.follow(self.encoder, self.cfg.tau)
        return metrics | detach(norms, "gradient")

    def describe(self) -> str:
        """Size, place, and which implementation of the state-space layer runs."""
        count = sum(p.numel() for p in self.parameters() if p.requires_grad)
        backend = describe_backend(self.cfg.mamba_backend, self.device, self.cfg.context_length)
        return f"{count:,} parameters on {self.device}, {backend}"

    def prepare(self, data: Windows) -> None:
        """The normaliser's statistics come from the data, once. ValueError if the data are of another body."""
        check_body(self.cfg.env, self.spec, data.states.shape[1], data.widths[0])
        self.normal.fit(data.states)

    # -- how it acts -----------------------------------------------------------------------------
    def reset(self, n: int, goal: None = None) -> Memory:
        if goal is not None:
            raise ValueError(f"{self.cfg.agent} wants the highest return: it cannot be asked for {goal}")
        return forget(n, self.cfg.context_length, self.normal.mean)

    @torch.no_grad()
    def act(self, state: Tensor, reward: Tensor, memory: Memory, explore: bool = False) -> tuple[Tensor, Memory]:
        """Raw states (n, S) -> deterministic actions (n, A), and the memory one step on. `reward` is not needed."""
        memory = self.see(state, reward, memory)
        action, _ = self.look(self.view(memory))
        return action, self.did(memory, action)

    def see(self, state: Tensor, reward: Tensor, memory: Memory) -> Memory:
        """Take in the present."""
        return remember(memory, state)[1]

    def view(self, memory: Memory) -> tuple[Tensor]:
        """The window that `look` wants: raw states (n, K, S)."""
        return (recall(memory),)

    def look(self, view: tuple[Tensor], t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The action (B, A) for the present of windows, and its embedding (B, D). The time `t` is not looked at."""
        z = self.encoder(self.normal(view[0]))
        return self.policy(z), z

    def did(self, memory: Memory, action: Tensor) -> Memory:
        """Actions leave no trace."""
        return memory

    def trace(self, memory: Memory) -> tuple[Tensor]:
        """What the step just done, (n, S), adds to views."""
        return (memory.states[:, -1],)

    def miss(self, b: Window) -> Tensor:
        """Mean squared distance from the recorded actions, by action dim. (A,)"""
        return (self.look((b.states,))[0] - b.action).square().mean(0)

    def parts(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """What an action comes from: the nets up to the embedding, and the head on it."""
        return [self.encoder], [self.actor]


def check_body(env: str, spec: Spec, state: int, action: int) -> None:
    """ValueError if data with these dims were recorded in another environment."""
    if (state, action) != (spec.state, spec.action):
        raise ValueError(
            f"the data have {state} state and {action} action dims, {env} has {spec.state} and {spec.action}: "
            "--env must name the environment that recorded the data (a body, or one of Gymnasium's ids)"
        )


def data(cfg: BambaConfig, device: torch.device | str, seed: int) -> tuple[Windows, d4rl_utils.Identity]:
    """The sampler on the training device, and what the data are."""
    transitions, identity = d4rl_utils.open_data(cfg)
    return Windows(transitions, cfg.context_length, device, seed), identity


def world(cfg) -> World:
    """The environment that the data were recorded in."""
    return world_on(d4rl_utils.open_environment(cfg))


def world_on(stage: d4rl_utils.Stage) -> World:
    """What there is to know of it."""
    env = stage.make()
    spec, fps = Spec(*d4rl_utils.boxes_of(env)), d4rl_utils.frames_per_second(env)
    env.close()
    return World(stage.make, spec, stage.score, fps, stage.name, stage.scale)
