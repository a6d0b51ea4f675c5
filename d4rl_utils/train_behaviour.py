"""Train the behaviour policies that local data are rolled from (a tool of the project's makers; users do not need it).

    python -m d4rl_utils.train_behaviour hopper --low 1281 --high 1444

D4RL's `medium` data come from a soft actor-critic stopped early, at about a third of an expert's return. This script
does the same with Stable-Baselines3: it trains SAC (Haarnoja et al. 2018), evaluates the *stochastic* policy (the one
that will collect the data) every few thousand steps, and keeps the first policy whose mean return over 100 episodes,
after rounding the weights to float16, lies in [low, high]. Killed, it continues from its last checkpoint when run
again.

Needs requirements-dev.txt.
"""

import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import tyro

from d4rl_utils.behaviour import MANIFEST, Policy, rollout_returns

ENV_IDS = {"hopper": "Hopper-v4", "walker2d": "Walker2d-v4", "halfcheetah": "HalfCheetah-v4", "ant": "Ant-v4"}


@dataclass(frozen=True)
class Training:
    """What to train, and when it is good enough."""

    env: tyro.conf.Positional[str]
    """the body: hopper, walker2d, halfcheetah or ant"""
    low: float
    """least mean return of a policy that is kept"""
    high: float
    """greatest mean return of a policy that is kept"""
    level: str = "medium"
    """the name it is kept under"""
    seed: int = 0
    """seed of the training"""
    steps: int = 1_000_000
    """give up after so many environment steps"""
    eval_every: int = 5_000
    """steps between evaluations"""
    save_every: int = 20_000
    """steps between checkpoints"""
    work_dir: Path = Path("outputs/behaviour")
    """checkpoints, replay buffer and the log live here"""


def weights_of(model) -> dict[str, np.ndarray]:
    """The actor of a Stable-Baselines3 SAC as float16 arrays under the names that D4RL's own files use."""
    actor = model.policy.actor
    layers = {
        "fc0": actor.latent_pi[0],
        "fc1": actor.latent_pi[2],
        "last_fc": actor.mu,
        "last_fc_log_std": actor.log_std,
    }
    return {
        f"{name}.{part}": getattr(layer, part).detach().cpu().numpy().astype(np.float16)
        for name, layer in layers.items()
        for part in ("weight", "bias")
    }


def keep(cfg: Training, weights: dict[str, np.ndarray], steps: int, returns: np.ndarray) -> None:
    """Write the policy beside this file, and its line into the manifest."""
    name = f"{cfg.env}-{cfg.level}"
    np.savez_compressed(MANIFEST.with_name(f"{name}.npz"), **weights)
    manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
    manifest[name] = {
        "env_id": ENV_IDS[cfg.env],
        "algorithm": "SAC (stable-baselines3, its defaults; 10,000 random steps first)",
        "steps": steps,
        "seed": cfg.seed,
        "return_mean": round(float(returns.mean()), 1),
        "return_std": round(float(returns.std()), 1),
        "episodes": len(returns),
        "versions": {p: version(p) for p in ("stable_baselines3", "torch", "gymnasium", "mujoco")},
        "command": f"python -m d4rl_utils.train_behaviour {cfg.env} --low {cfg.low:g} --high {cfg.high:g} "
        f"--seed {cfg.seed}",
        "licence": "MIT, as the project: trained from nothing by this script",
    }
    MANIFEST.write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def train(cfg: Training) -> None:
    """Train until a policy is kept or the steps run out."""
    import gymnasium as gym
    from stable_baselines3 import SAC

    torch.set_num_threads(1)  # 256-wide nets gain nothing from a second thread, and two trainings fit on two cores
    work = cfg.work_dir / f"{cfg.env}-{cfg.level}-{cfg.seed}"
    work.mkdir(parents=True, exist_ok=True)
    env = gym.make(ENV_IDS[cfg.env])
    if (work / "model.zip").exists():
        model = SAC.load(work / "model.zip", env=env)
        model.load_replay_buffer(work / "replay.pkl")
        print(f"continuing at {model.num_timesteps} steps")
    else:
        model = SAC("MlpPolicy", env, learning_starts=10_000, seed=cfg.seed)
    while model.num_timesteps < cfg.steps:
        model.learn(cfg.eval_every, reset_num_timesteps=False)
        weights = weights_of(model)
        policy = Policy(weights)
        returns = rollout_returns(policy, ENV_IDS[cfg.env], episodes=20, seed=model.num_timesteps)
        row = {"steps": model.num_timesteps, "return_mean": float(returns.mean()), "return_std": float(returns.std())}
        # one rung of a later replay-like ladder per evaluation: small, and it cannot be had again afterwards
        np.savez_compressed(work / f"rung-{model.num_timesteps:07d}.npz", **weights)
        with open(work / "log.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        print(row, flush=True)
        if cfg.low <= returns.mean() <= cfg.high:
            returns = rollout_returns(policy, ENV_IDS[cfg.env], episodes=100, seed=10**6)
            print(f"candidate: {returns.mean():.1f} ± {returns.std():.1f} over 100 episodes", flush=True)
            if cfg.low <= returns.mean() <= cfg.high:
                keep(cfg, weights, model.num_timesteps, returns)
                return
        if model.num_timesteps % cfg.save_every == 0:
            model.save(work / "model.zip")
            model.save_replay_buffer(work / "replay.pkl")
    raise SystemExit(
        f"no policy with a return in [{cfg.low}, {cfg.high}] within {cfg.steps} steps; log: {work / 'log.jsonl'}"
    )


if __name__ == "__main__":
    settings = tyro.cli(Training)
    print(asdict(settings))
    train(settings)
