"""What every agent is, in code: the contract between agents, runs, evaluation and checkpoints.

Letters: n environments, B batch, K context, S observation, A action, D embedding.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn

from common.env_spec import EnvSpec, EvalEnv
from common.plotting import Panel
from common.rollout import Step, reset_rows
from common.train_step import TrainStep
from common.windows import FrameStack

__all__ = ["Agent", "EnvSpec", "EvalEnv", "FramePolicy", "OnlineAgent", "WindowPolicy"]


class Agent(TrainStep):
    """An nn.Module that learns by `update` (see TrainStep) and acts by `act`. What has a body here may stay as it is.

    `cfg` never changes; `updates`, and in environments `steps`, count what was done.
    """

    steps = 0  # environment steps observed
    panels: ClassVar[tuple[Panel, ...]] = ()  # which of its metrics the picture of a run shows

    def __init__(self, cfg, spec: EnvSpec, device: torch.device | str = "cpu"):
        super().__init__()
        self.cfg, self.spec, self.device = cfg, spec, torch.device(device)

    def register_action_bounds(self) -> None:
        """Buffers (A,): an action within its bounds is action_bias + action_scale * x, x within -1 and 1."""
        low, high = torch.tensor(self.spec.low), torch.tensor(self.spec.high)
        self.register_buffer("action_bias", (high + low) / 2)
        self.register_buffer("action_scale", (high - low) / 2)

    @classmethod
    def resolve_config(cls, cfg):
        """The settings with what others of them imply, such as a checkpoint to begin with. Before anything is made."""
        return cfg

    @classmethod
    def make_eval_env(cls, cfg) -> EvalEnv:
        """Where it is evaluated, and where it learns online."""
        raise NotImplementedError

    @classmethod
    def open_data(cls, cfg, device: torch.device | str, seed: int) -> tuple:
        """(sampler of batches on `device`, what the data are), if it learns from recorded data."""
        raise NotImplementedError

    @classmethod
    def check_parallel(cls, cfg) -> None:
        """ValueError unless several processes or seeds can share an update, as `losses` write nothing."""
        raise ValueError(
            f"{cfg.agent} takes one device and one seed: bamba, dt, dmamba and dm can take several of either, opso "
            "several seeds"
        )

    def fit_normalizer(self, sampler) -> None:
        """What must be known of the data before the first update."""

    def data_levels(self, sampler) -> dict[str, float]:
        """What the data say that metrics ought to be, by the metric's name: dashed lines in the curves."""
        return {}

    def describe(self) -> str:
        """One line for the start of a run."""
        raise NotImplementedError

    def reset(self, n: int, goal=None):
        """The memory of n environments in which nothing was seen. goal: a return, or a state for each, if it is told"""
        raise NotImplementedError

    def act(self, state: Tensor, reward: Tensor, memory, explore: bool = False) -> tuple:
        """Raw states (n, S), and the rewards (n,) of the last actions -> actions (n, A) or (n,), the next memory."""
        raise NotImplementedError

    def reset_where(self, memory, done: Tensor, goal=None):
        """The memory with those rows as after `reset` whose episode is over (n,), the others as they were."""
        return reset_rows(memory, self.reset(len(done), goal), done)

    def refuse_goal(self, goal) -> None:
        """ValueError if an agent is asked for something that is told nothing."""
        if goal is not None:
            raise ValueError(f"{self.cfg.agent} wants the highest return: it cannot be asked for {goal}")


class OnlineAgent(Agent):
    """An agent that learns in environments: after every step `observe`, then an `update` for each of `minibatches`."""

    is_finetuning = False  # it was trained before: it is evaluated before the first step, too
    curves = "training_curves.png"  # what the picture of a run is called
    buffer = None  # what it remembers of environments; has `state_dict` and `load_state_dict`

    @classmethod
    def pretraining_data(cls, cfg) -> dict | None:
        """What was learned from in an earlier phase, whose name the scores carry."""
        return None

    def init_buffer(self, n: int, seed: int) -> None:
        """Make `buffer`, empty, for n environments; a resume fills it."""
        raise NotImplementedError

    def load_pretrained(self) -> None:
        """Before the first step of a fresh run, behind `init_buffer`: take over what was learned elsewhere."""

    def observe(self, step: Step) -> None:
        """Take in one step of all environments."""
        raise NotImplementedError

    def minibatches(self) -> Iterable:
        """The batches that are due after this step, one `update` each."""
        raise NotImplementedError

    def on_env_reset(self, lost: Tensor) -> None:
        """Episodes (n,) were abandoned without an end: nothing may be learned across that."""
        raise NotImplementedError

    def schedule_metrics(self) -> dict[str, float]:
        """For a row of the log: where schedules stand, how full the buffer is."""
        return {}


class WindowPolicy(Agent):
    """An agent that acts on the window of its last `k` steps: what PPO can fine-tune. `act` is made of these.

    obs_normalizer: of its states.
    """

    sees_time = False  # whether it is told how many steps of the episode have passed
    k: int

    @classmethod
    def finetuning_config(cls, cfg, target_return: float | None):
        """The settings with which PPO goes on from an agent that was trained with `cfg`."""
        raise NotImplementedError

    def load_acting_weights(self, state: dict[str, Tensor]) -> None:
        """From an agent's state_dict: what acts in its evaluations."""
        raise NotImplementedError

    def observe_state(self, state: Tensor, reward: Tensor, memory):
        """Take in the present (n, S), before there is an action."""
        raise NotImplementedError

    def window(self, memory) -> tuple[Tensor, ...]:
        """What `forward_window` wants, each (n, K, ...), the newest last."""
        raise NotImplementedError

    def forward_window(self, view: tuple[Tensor, ...], t: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The action (B, A) for the present of windows, its embedding (B, D). t (B,): steps of the episode before"""
        raise NotImplementedError

    def record_action(self, memory, action: Tensor):
        """The memory one step on: `action` (n, A) was taken."""
        return memory

    def bc_error(self, batch) -> Tensor:
        """Mean squared distance from the recorded actions, by action dim. (A,)"""
        raise NotImplementedError

    def param_groups(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The nets up to the embedding, and the head on it."""
        raise NotImplementedError


class FramePolicy(WindowPolicy):
    """A policy whose memory is the last K states alone."""

    def reset(self, n: int, goal: None = None) -> FrameStack:
        self.refuse_goal(goal)
        return FrameStack.init(n, self.k, self.obs_normalizer.mean)

    def observe_state(self, state: Tensor, reward: Tensor, memory: FrameStack) -> FrameStack:
        return memory.push(state)[1]

    def window(self, memory: FrameStack) -> tuple[Tensor]:
        """Raw states (n, K, S)."""
        return (memory.read_window(),)
