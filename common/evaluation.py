"""Evaluate an agent: play episodes side by side, and say what they earned.

It acts as a copy in float64 without dropout. In float64 the actions that reach the simulator (rounded to its
float32) do not depend on how many episodes share a forward pass, so one seed means one score, whatever the batch.
"""

from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from common.interface import Agent, EvalEnv
from d4rl_utils import SCORE_NAMES as D4RL_NAMES
from ogbench_utils import SCORE_NAMES as OGBENCH_NAMES


class Episodes(NamedTuple):
    """One entry an episode, in the order of their seeds."""

    returns: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,)
    outcomes: dict[str, np.ndarray]  # how they ended, each (n,); empty if the environment does not say
    actions: np.ndarray | None  # (A,) how often each was taken; None where they are not discrete
    tasks: dict[str, np.ndarray]  # returns by task, each (episodes,); empty where there is one alone


def eval_copy(agent: Agent) -> Agent:
    """A float64 copy of the agent in evaluation mode; the agent itself, and every random stream, stay as they are."""
    device = "cpu" if agent.device.type == "mps" else agent.device  # MPS has no float64
    with torch.random.fork_rng(devices=[]):
        twin = type(agent)(replace(agent.cfg, compile=False, cuda_graphs=False, precision="fp32"), agent.spec, device)
    twin.load_state_dict(agent.state_dict())
    return twin.double().eval()


class Player:
    """Acts for one agent in n environments, of which fewer and fewer run."""

    def __init__(self, agent: Agent, n: int, goal=None):
        self.agent, self.count = eval_copy(agent), n
        self.memory = self.agent.reset(n, self.as_tensor(goal) if isinstance(goal, np.ndarray) else goal)

    def as_tensor(self, x: np.ndarray) -> Tensor:
        return torch.as_tensor(x, dtype=torch.float64, device=self.agent.device)

    def act(self, state: np.ndarray, reward: np.ndarray) -> np.ndarray:
        """States and last rewards of those that run -> actions, float32 or whole numbers."""
        action, self.memory = self.agent.act(self.as_tensor(state), self.as_tensor(reward), self.memory)
        action = action.cpu().numpy()
        return action.astype(np.float32) if action.dtype.kind == "f" else action

    def keep(self, rows: np.ndarray) -> None:
        """Only these of the environments that ran still do."""
        rows = torch.as_tensor(rows, device=self.agent.device)
        self.memory = pytree.tree_map(lambda x: x.index_select(0, rows), self.memory)


class SeedsPlayer(Player):
    """Acts for S agents of one kind, by one forward for all: environments [i * n, i * n + n) are those of agent i.

    All environments stay in the batch; what is computed for one that has ended is not looked at.
    """

    def __init__(self, agents: list[Agent], n: int, goal: np.ndarray | None = None):
        """goal: of the environments of each agent (n, S), the same for all"""
        copies = [eval_copy(agent) for agent in agents]
        self.agent, self.acting = copies[0], Acting(copies[0])
        self.weights = torch.func.stack_module_state([Acting(copy) for copy in copies])
        goal = None if goal is None else self.as_tensor(goal)
        self.memory = pytree.tree_map(lambda *x: torch.stack(x), *(copy.reset(n, goal) for copy in copies))
        self.live, self.shape = np.arange(len(agents) * n), (len(agents), n)

    def act_as_one(self, weights: tuple[dict, dict], state: Tensor, reward: Tensor, memory) -> tuple:
        return torch.func.functional_call(self.acting, weights, (state, reward, memory))

    @torch.no_grad()
    def act(self, state: np.ndarray, reward: np.ndarray) -> np.ndarray:
        states, rewards = np.zeros((*self.shape, state.shape[1])), np.zeros(self.shape)
        states.reshape(-1, state.shape[1])[self.live], rewards.reshape(-1)[self.live] = state, reward
        inputs = self.weights, self.as_tensor(states), self.as_tensor(rewards), self.memory
        action, self.memory = torch.func.vmap(self.act_as_one)(*inputs)
        return action.flatten(0, 1).cpu().numpy()[self.live].astype(np.float32)

    def keep(self, rows: np.ndarray) -> None:
        self.live = self.live[rows]


class Acting(nn.Module):
    """An agent's `act` as what a module computes, so that it can be computed with other parameters."""

    def __init__(self, agent: Agent):
        super().__init__()
        self.agent = agent

    def forward(self, state: Tensor, reward: Tensor, memory) -> tuple:
        return self.agent.act(state, reward, memory)


SIDE_BY_SIDE = 512  # episodes at once: an environment takes megabytes, and there may be any number of episodes


class Played(NamedTuple):
    """One entry an episode, in the order of the environments."""

    returns: np.ndarray  # (n,)
    lengths: np.ndarray  # (n,)
    ends: list[dict]  # what `outcome` says of each
    actions: list[np.ndarray]  # discrete ones, as they were taken


def play(
    envs: list, player: Player, states: np.ndarray, outcome: Callable | None, frames: list | None, every: int = 1
) -> Played:
    """One episode in each of the environments, which have been reset to `states` (n, S)."""
    n, state, step = len(envs), states.copy(), 0
    returns, lengths = np.zeros(n), np.zeros(n, dtype=np.int64)
    live, reward, ends, actions = np.arange(n), np.zeros(n), [{}] * n, []
    while len(live):
        action = player.act(state, reward)
        if action.dtype.kind != "f":
            actions.append(action)
        if frames is not None and live[0] == 0 and step % every == 0:
            frames.append(envs[0].render())
        step += 1
        done = np.zeros(len(live), dtype=bool)
        for j, i in enumerate(live):
            state[j], reward[j], terminated, truncated, info = envs[i].step(action[j])
            done[j] = terminated or truncated
            if done[j] and outcome:
                ends[i] = outcome(info, reward[j])
        returns[live] += reward
        lengths[live] += 1
        if done.any():
            rest = np.flatnonzero(~done)
            live, state, reward = live[rest], state[rest], reward[rest]
            player.keep(rest)
    for env in envs:
        env.close()
    return Played(returns, lengths, ends, actions)


def evaluate(
    agent: Agent,
    make_env: Callable,
    episodes: int,
    seed: int,
    frames: list | None = None,
    goal=None,
    outcome: Callable | None = None,
    tasks: tuple[str, ...] = (),
    every: int = 1,
) -> Episodes:
    """Play `episodes` episodes (of every task), up to `SIDE_BY_SIDE` at once; each counts exactly once.

    Episode i (of a task) begins from seed + i. Deterministic actions; one batched forward a step, over the episodes
    that still run. frames: filled with pictures of the first episode, one every `every` steps. goal: what the agent is
    asked for, if not what it is used to; an environment whose reset says `info["goal"]` asks for that.
    outcome, tasks: as in `EvalEnv`.
    """
    check_episodes(episodes)
    first = "rgb_array" if frames is not None else None  # the pictures are of one episode
    places = [((task,), i) for task in tasks for i in range(episodes)] or [((), i) for i in range(episodes)]
    parts = []
    for start in range(0, len(places), SIDE_BY_SIDE):
        some = places[start : start + SIDE_BY_SIDE]
        envs = [make_env(None if start + j else first, *kind) for j, (kind, _) in enumerate(some)]
        states, infos = zip(*(env.reset(seed=seed + i) for env, (_, i) in zip(envs, some)))
        if "goal" in infos[0]:
            goal = np.stack([info["goal"] for info in infos])
        player = Player(agent, len(envs), goal)
        parts.append(play(envs, player, np.stack(states), outcome, None if start else frames, every))
    returns, lengths, ends, actions = zip(*parts)
    played = Played(np.concatenate(returns), np.concatenate(lengths), [*chain(*ends)], [*chain(*actions)])
    counts = np.bincount(np.concatenate(played.actions), minlength=agent.spec.action) if played.actions else None
    by_task = dict(zip(tasks, played.returns.reshape(-1, episodes)))
    return Episodes(played.returns, played.lengths, outcomes_of(played.ends), counts, by_task)


def evaluate_seeds(
    agents: list[Agent],
    make_env: Callable,
    episodes: int,
    seed: int,
    outcome: Callable | None = None,
    tasks: tuple[str, ...] = (),
) -> list[Episodes]:
    """`evaluate` of several agents of one kind at once: one batched forward a step for all of them."""
    check_episodes(episodes)
    kinds = [(task,) for task in tasks] or [()]
    n = len(kinds) * episodes  # of each agent
    envs = [make_env(None, *kind) for _ in agents for kind in kinds for _ in range(episodes)]
    states, infos = zip(*(env.reset(seed=seed + i % episodes) for i, env in enumerate(envs)))
    goal = np.stack([info["goal"] for info in infos[:n]]) if "goal" in infos[0] else None
    played = play(envs, SeedsPlayer(agents, n, goal), np.stack(states), outcome, None)
    found = []
    for i in range(len(agents)):
        own = slice(i * n, (i + 1) * n)
        returns, by_task = played.returns[own], dict(zip(tasks, played.returns[own].reshape(-1, episodes)))
        found.append(Episodes(returns, played.lengths[own], outcomes_of(played.ends[own]), None, by_task))
    return found


def check_episodes(episodes: int) -> None:
    if episodes < 1:
        raise ValueError(f"{episodes} episodes cannot be averaged: take 1 or more")


def outcomes_of(ends: list[dict]) -> dict[str, np.ndarray]:
    return {k: np.array([end[k] for end in ends], dtype=float) for k in ends[0]}


def summary(result: Episodes, score: Callable[[float], float] | None) -> dict[str, float]:
    """What is reported of an evaluation; without `score` returns alone.

    Scores are linear, so the score of the mean is the mean of the scores.
    """
    r = result.returns
    row = (
        {"eval/score": score(float(r.mean())), "eval/score_std": float(np.std([score(x) for x in r]))} if score else {}
    )
    row["eval/return_mean"] = float(r.mean())
    row["eval/return_std"] = float(r.std())
    row["eval/return_min"] = float(r.min())
    row["eval/return_max"] = float(r.max())
    row["eval/length_mean"] = float(result.lengths.mean())
    row["eval/episodes"] = len(r)
    for name, values in result.outcomes.items():
        row[f"eval/{name}"] = float(values.mean())
    for task, returns in result.tasks.items():
        mean = float(returns.mean())
        row[f"eval/{task}"] = score(mean) if score else mean
    if result.actions is not None:
        for i, n in enumerate(result.actions):
            row[f"eval/action_{i}"] = float(n / result.actions.sum())
    return row


def report_lines(result: Episodes, env: EvalEnv) -> list[tuple[str, str]]:
    """How the episodes ended and what was done in them, labels and words; nothing where that has no meaning."""
    lines = []
    if result.tasks:
        mean = env.score or float
        lines.append(("tasks", ", ".join(f"{k} {mean(float(v.mean())):.1f}" for k, v in result.tasks.items())))
    if result.outcomes:
        lines.append(("ends", ", ".join(f"{k} {v.mean():.0%}" for k, v in result.outcomes.items())))
    if result.actions is not None:
        names = env.action_names or [str(i) for i in range(len(result.actions))]
        shares = result.actions / result.actions.sum()
        lines.append(("actions", ", ".join(f"{name} {share:.0%}" for name, share in zip(names, shares))))
    return lines


def baseline_lines(returns: dict[str, float] | None) -> list[tuple[str, str]]:
    """What policies earn that look at nothing, in the same form."""
    return [("baseline", ", ".join(f"{k} {v:.1f}" for k, v in returns.items()))] if returns else []


def headline(row: dict[str, float]) -> float:
    """The one number of an evaluation's row: its score, or the mean return where there is no reference."""
    return row["eval/score"] if "eval/score" in row else row["eval/return_mean"]


def headline_name(env: EvalEnv, source: str) -> str:
    """What that number is called after learning from data of this source: only D4RL's own give a "D4RL score"."""
    return (D4RL_NAMES | OGBENCH_NAMES)[source] if env.score else "return"


def source_of(data: dict) -> str:
    """Where what an agent learned from came from; of one that went on from another's training, that one's."""
    return data.get("before", data)["source"]
