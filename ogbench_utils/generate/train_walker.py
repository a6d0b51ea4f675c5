"""Train the policy that walks OGBench's ant where it is told (a tool of the project's makers; users do not need it).

    python -m ogbench_utils.generate.train_walker train
    python -m ogbench_utils.generate.train_walker keep

OGBench's recipe (Park et al. 2024, arXiv 2410.20092): soft actor-critic on its ant without (x, y) but with a direction
that changes every 100 steps; the reward is the way made in that direction. Where we differ: sbx-rl's SAC in place of
theirs, eight environments side by side with as many updates as steps; Adam's step is 3e-4 in place of 1e-4, and falls
over the second half; and an ant that lies on its back has its episode ended at a cost. Of a policy trained without
these two, two of ten ants lay there before a thousand steps were over, and did not get up again.

A rung is looked at as it will walk in a maze: the mean of its Gaussian, with the noise that `local` adds. Checkpoints,
rungs and their log are those of `d4rl_utils.generate.train_behavior_policy`; killed, a training continues when the
command is run again. Needs requirements-dev.txt.
"""

import json
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Literal

import gymnasium as gym
import numpy as np
import tyro
from stable_baselines3.common.vec_env import DummyVecEnv

from common.logger import atomic_write
from d4rl_utils.generate.behavior_policy import Policy
from d4rl_utils.generate.train_behavior_policy import read_log, rung_file, save_model, weights_of
from ogbench_utils.generate.rollout import NOISE, WALKER

MODULE = "python -m ogbench_utils.generate.train_walker"
ENV = "online-ant-v0"
ENVS = 8
SETTINGS = {  # what differs from Stable-Baselines3's defaults
    "learning_rate": 3e-4,
    "learning_starts": 10_000,
    "gradient_steps": -1,  # as many as environment steps
    "batch_size": 128,
    "policy_delay": 2,
    "target_entropy": -4.0,  # half as many as there are actions
    "policy_kwargs": {"net_arch": [256, 256]},
}
ON_ITS_BACK = -10.0  # reward; a step in the right direction earns about 0.15
LOOK = 20, 500  # ants, and steps of each, in one look ...
JUDGED = 100, 1000  # ... and before one is shipped


@dataclass(frozen=True)
class Walker:
    """A training, or the keeping of what it led to."""

    verb: tyro.conf.Positional[Literal["train", "keep"]]
    """train: begin or continue; keep: ship the rung that makes the most way"""
    seed: int = 0
    """seed of the training"""
    steps: int = 500_000
    """its length in environment steps"""
    eval_every: int = 20_000
    """steps between looks and checkpoints"""
    work_dir: Path = Path("outputs/behaviour")
    """checkpoints, replay, rungs and log live here"""
    algorithm: ClassVar[str] = "sbx"  # decides what a checkpoint consists of

    @property
    def folder(self) -> Path:
        """Where this training lives."""
        return self.work_dir / f"antmaze-sbx-{self.seed}"


class Upright(gym.Wrapper):
    """The episode ends, at a cost, when the ant lies on its back."""

    def step(self, action):
        state, reward, over, cut, info = self.env.step(action)
        _, x, y, _ = state[1:5]  # the torso's quaternion
        if x * x + y * y > 0.5:  # its vertical axis, 1 - 2 (x² + y²), points down
            return state, reward + ON_ITS_BACK, True, cut, info
        return state, reward, over, cut, info


def make_ant() -> gym.Env:
    """OGBench's ant on a plane; its states end with the direction that it is to walk in."""
    import ogbench.online_locomotion  # noqa: F401  it registers it
    from ogbench.online_locomotion.wrappers import GymXYWrapper

    return Upright(GymXYWrapper(gym.make(ENV)))


def train(cfg: Walker) -> None:
    """Train to the end of the steps, leaving a rung and a line of the log at every look."""
    from sbx import SAC
    from stable_baselines3.common.utils import ConstantSchedule

    folder = cfg.folder
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / "state.json"
    done = json.loads(state.read_text())["steps"] if state.exists() else 0
    np.random.seed(cfg.seed + done)  # directions come from NumPy's global generator
    envs = DummyVecEnv([make_ant] * ENVS)
    envs.seed(cfg.seed + done)
    if done:
        model = SAC.load(folder / "model.zip", env=envs, device="cpu")
        model.load_replay_buffer(folder / "replay.pkl")
        model.set_random_seed(cfg.seed + done)
    else:
        model = SAC("MlpPolicy", envs, seed=cfg.seed, device="cpu", **SETTINGS)
    log = read_log(folder)
    before = log[-1]["seconds"] if log else 0.0
    while model.num_timesteps < cfg.steps:
        left = min(1.0, 2 * (1 - model.num_timesteps / cfg.steps))
        model.lr_schedule = ConstantSchedule(SETTINGS["learning_rate"] * left)
        model.learn(cfg.eval_every, reset_num_timesteps=False)
        look(cfg, model, before)
        save_model(cfg, model)


def look(cfg: Walker, model, before: float) -> None:
    """Let the policy walk as it would be shipped; keep it as a rung."""
    weights = weights_of(model)
    way, fell = walk(Policy(weights), model.num_timesteps, *LOOK)
    row = {
        "steps": model.num_timesteps,
        "metres_a_step": round(way, 4),
        "fell": fell,
        "seconds": round(before + time.process_time(), 1),
    }
    with atomic_write(rung_file(cfg.folder, model.num_timesteps)) as part, open(part, "wb") as file:
        np.savez_compressed(file, **weights)
    with open(cfg.folder / "log.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(row, flush=True)


def walk(policy: Policy, seed: int, ants: int, steps: int) -> tuple[float, int]:
    """-> metres a step in the direction asked for, none after a fall; and how many fell of the ants."""
    before, way, fell = np.random.get_state(), 0.0, 0
    np.random.seed(seed % 2**32)
    env = make_ant()
    for i in range(ants):
        state, _ = env.reset(seed=seed + i)
        for _ in range(steps):
            mean = policy(state[None].astype(np.float32), np.zeros((1, 8), np.float32))[0]
            state, made, over, _, _ = env.step(np.clip(mean + np.random.normal(0, NOISE["antmaze"], 8), -1, 1))
            if over:
                fell += 1
                break
            way += made
    env.close()
    np.random.set_state(before)
    return way / (ants * steps), fell


def keep(cfg: Walker) -> None:
    """Ship the rung that makes the most way: of the six that looked best, the best when evaluated anew."""
    hints = [row["steps"] for row in sorted(read_log(cfg.folder), key=lambda row: -row["metres_a_step"])[:6]]
    if not hints:
        raise SystemExit(f"no rung in {cfg.folder}: train first")
    policies = {}
    for steps in hints:
        with np.load(rung_file(cfg.folder, steps)) as file:
            policies[steps] = dict(file)
    looks = {steps: walk(Policy(weights), 10**6, *JUDGED) for steps, weights in policies.items()}
    best = max(hints, key=lambda steps: looks[steps][0])
    way, fell = walk(Policy(policies[best]), 2 * 10**6, *JUDGED)
    told = {
        "env_id": f"{ENV}, with OGBench's GymXYWrapper",
        "algorithm": "SAC (sbx-rl)",
        "settings": {"n_envs": ENVS} | SETTINGS,
        "seed": cfg.seed,
        "steps": best,
        "metres_a_step": round(way, 4),
        "ants": JUDGED[0],
        "steps_of_each": JUDGED[1],
        "fell": fell,
        "versions": {p: version(p) for p in ("stable_baselines3", "sbx-rl", "jax", "gymnasium", "mujoco", "ogbench")},
        "command": f"{MODULE} train --seed {cfg.seed} --steps {cfg.steps} && {MODULE} keep --seed {cfg.seed}",
        "licence": "MIT, as the project: trained from nothing by this script",
    }
    with atomic_write(WALKER) as part, open(part, "wb") as file:
        np.savez_compressed(file, **policies[best], made=np.array(json.dumps(told)))
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    settings = tyro.cli(Walker)
    train(settings) if settings.verb == "train" else keep(settings)
