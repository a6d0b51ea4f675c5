"""Train the behaviour policies that local data are rolled from (a tool of the project's makers; users do not need it).

    python -m d4rl_utils.generate.train_behavior_policy train walker2d ppo
    python -m d4rl_utils.generate.train_behavior_policy export walker2d ppo medium --low 2700 --high 3000 --ladder 8
    python -m d4rl_utils.generate.train_behavior_policy export walker2d ppo expert --low 4592

One training gives all levels of a body. `train` evaluates the *stochastic* policy, the one that will collect the data,
every `eval_every` steps, after its weights were rounded to float16, and leaves it as a rung. `export` ships rungs, also
while the training goes on. Killed, a training continues from its last checkpoint when the same command is run again.

D4RL's own policies are soft actor-critics. Here the algorithm is a choice, and every choice ends in the same
tanh-Gaussian actor:

  ppo     Schulman et al. 2017, on many environments side by side: the cheapest in time. Its Gaussian u is squashed by
          the *environment*, action = tanh(u); likelihood ratios are the same before and after squashing. The
          normalisation of observations is folded into the first layer.
  sac     Haarnoja et al. 2018, Stable-Baselines3's
  sbx     the same in JAX (sbx-rl), several times as fast on one core

Needs requirements-dev.txt.
"""

import json
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from common.files import file_lock
from d4rl_utils.environment import IDS, MAX_EPISODE_STEPS
from d4rl_utils.generate.behavior_policy import MANIFEST, Policy, rollout_returns
from d4rl_utils.generate.vector_env import BatchedMujoco
from d4rl_utils.names import d4rl_score

LANES = {"ppo": 32, "sac": 1, "sbx": 8}  # environments side by side
SETTINGS = {  # what differs from Stable-Baselines3's defaults
    "ppo": {
        "n_steps": 128,
        "batch_size": 256,
        "learning_rate": 3e-4,
        "vf_coef": 0.25,
        "policy_kwargs": {"net_arch": [64, 64], "log_std_init": -0.5, "activation_fn": torch.nn.ReLU},
    },
    "sac": {"learning_starts": 10_000},
    "sbx": {
        "learning_starts": 10_000,
        "gradient_steps": -1,  # as many as environment steps
        "batch_size": 128,
        "learning_rate": 1e-3,
        "policy_delay": 2,
        "policy_kwargs": {"net_arch": [128, 128]},
    },
}
NAMES = {"ppo": "PPO (stable-baselines3)", "sac": "SAC (stable-baselines3)", "sbx": "SAC (sbx-rl)"}
MODULE = "python -m d4rl_utils.generate.train_behavior_policy"


@dataclass(frozen=True)
class Training:
    """Which training."""

    env: tyro.conf.Positional[str]
    """the body: hopper, walker2d, halfcheetah or ant"""
    algorithm: tyro.conf.Positional[Literal["ppo", "sac", "sbx"]]
    """how it is trained"""
    seed: int = 0
    """seed of the training"""
    work_dir: Path = Path("outputs/behaviour")
    """checkpoints, replay buffers, rungs and logs live here"""

    @property
    def folder(self) -> Path:
        """Where this training lives."""
        return self.work_dir / f"{self.env}-{self.algorithm}-{self.seed}"


@dataclass(frozen=True)
class Train(Training):
    """Begin or continue a training."""

    steps: int = 5_000_000
    """the training's length in environment steps"""
    eval_every: int = 98_304
    """steps between evaluations"""
    save_every: int = 98_304
    """steps between checkpoints"""
    fall_from: int | None = None
    """the learning rate falls linearly from these steps on, to 0 at `steps`; default: 0 for ppo, never for others"""


@dataclass(frozen=True, kw_only=True)
class Export(Training):
    """Ship a policy of a training, running or over."""

    level: tyro.conf.Positional[str]
    """the name it is kept under: medium or expert"""
    low: float
    """least mean return"""
    high: float = np.inf
    """greatest mean return: the first policy in [low, high] is kept; inf: the best one"""
    ladder: int = 0
    """also ship so many policies from the training's beginning to this one, at equal distances in steps"""


# -- the environment --------------------------------------------------------------------------------------------------


class LanesEnv(VecEnv):
    """`BatchedMujoco` as Stable-Baselines3 wants its environments: finished episodes restart by themselves."""

    def __init__(self, env: str, n: int, seed: int, squash: bool):
        """With `squash`, actions are unbounded and tanh is part of the environment."""
        rng = np.random.default_rng(seed)
        self.batched, self.squash = BatchedMujoco(env, rng.integers(2**31, size=n)), squash
        inner = self.batched.envs[0]
        self.lengths, self.lanes = np.zeros(n, np.int64), np.arange(n)
        bound = 20.0 if squash else 1.0  # Stable-Baselines3 wants bounds; tanh(20) is 1
        super().__init__(
            n,
            gym.spaces.Box(-np.inf, np.inf, self.batched.states.shape[1:], np.float32),
            gym.spaces.Box(-bound, bound, inner.action_space.shape, np.float32),
        )

    def reset(self) -> np.ndarray:
        """-> states (n, S)"""
        for lane in self.lanes:
            self.batched.reset(lane)
        self.lengths[:] = 0
        return self.batched.states.copy()

    def step_async(self, actions: np.ndarray) -> None:
        """Take actions (n, A)."""
        self.actions = np.tanh(actions) if self.squash else actions

    def step_wait(self):
        """-> states (n, S), of a new episode where one is done; rewards (n,), dones (n,), infos."""
        rewards, terminals = self.batched.step(self.lanes, self.actions)
        self.lengths += 1
        dones = terminals | (self.lengths == MAX_EPISODE_STEPS)
        infos: list[dict] = [{} for _ in self.lanes]
        for lane in np.flatnonzero(dones).tolist():
            infos[lane]["terminal_observation"] = self.batched.states[lane].copy()
            infos[lane]["TimeLimit.truncated"] = not terminals[lane]
            self.batched.reset(lane)
            self.lengths[lane] = 0
        return self.batched.states.copy(), rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Let go of the worlds."""
        self.batched.close()

    # what else a VecEnv must have
    render_mode = None

    def get_attr(self, attr_name, indices=None):
        """The same of all lanes."""
        return [getattr(self, attr_name)] * self.num_envs

    def set_attr(self, attr_name, value, indices=None):
        """Nothing here can be set."""
        raise NotImplementedError

    def env_method(self, method_name, *args, indices=None, **kwargs):
        """The environments have no methods."""
        raise NotImplementedError

    def env_is_wrapped(self, wrapper_class, indices=None):
        """The environments are bare."""
        return [False] * self.num_envs


# -- the model, and its actor as arrays -------------------------------------------------------------------------------


def make_model(cfg: Train):
    """A new model, or the one in the work folder. -> model; its `num_timesteps` says where it stands"""
    if cfg.algorithm == "sbx":
        from sbx import SAC as Model
    elif cfg.algorithm == "sac":
        from stable_baselines3 import SAC as Model
    else:
        from stable_baselines3 import PPO as Model

    state, ppo = cfg.folder / "state.json", cfg.algorithm == "ppo"
    done = json.loads(state.read_text())["steps"] if state.exists() else 0
    env = LanesEnv(cfg.env, LANES[cfg.algorithm], cfg.seed + done, squash=ppo)
    if ppo:  # nothing is clipped, so that the normalisation can be folded into the first layer
        env = VecNormalize.load(cfg.folder / "norm.pkl", env) if done else VecNormalize(env, clip_obs=np.inf)
    if not done:
        return Model("MlpPolicy", env, seed=cfg.seed, device="cpu", **SETTINGS[cfg.algorithm])
    model = Model.load(cfg.folder / "model.zip", env=env, device="cpu")
    if not ppo:
        model.load_replay_buffer(cfg.folder / "replay.pkl")
    model.set_random_seed(cfg.seed + done)  # else noise would begin anew as it began the training
    return model


def save_model(cfg: Train, model) -> None:
    """Checkpoint into the work folder."""
    _whole(cfg.folder / "model.zip", model.save)
    if cfg.algorithm == "ppo":
        _whole(cfg.folder / "norm.pkl", model.get_vec_normalize_env().save)
    else:
        _whole(cfg.folder / "replay.pkl", model.save_replay_buffer)
    _whole(cfg.folder / "state.json", lambda path: path.write_text(json.dumps({"steps": model.num_timesteps})))


def weights_of(model) -> dict[str, np.ndarray]:
    """The actor as float16 arrays under the names that D4RL's own files use. Weights are (out, in)."""
    policy = model.policy
    if hasattr(policy, "actor_state"):  # sbx
        dense = policy.actor_state.params["params"]
        layers = [(dense[f"Dense_{i}"]["kernel"].T, dense[f"Dense_{i}"]["bias"]) for i in range(4)]
    elif hasattr(policy, "actor"):  # sac
        net = policy.actor.latent_pi
        layers = [_arrays(layer) for layer in (net[0], net[2], policy.actor.mu, policy.actor.log_std)]
    else:  # ppo: W ((s - mean) / std) + b = (W / std) s + (b - (W / std) mean); the noise does not depend on the state
        net, normal = policy.mlp_extractor.policy_net, model.get_vec_normalize_env()
        (weight, bias), last = _arrays(net[0]), _arrays(policy.action_net)
        weight = weight / np.sqrt(normal.obs_rms.var + normal.epsilon)
        log_std = (np.zeros_like(last[0]), policy.log_std.detach().numpy())
        layers = [(weight, bias - weight @ normal.obs_rms.mean), _arrays(net[2]), last, log_std]
    return {
        f"{name}.{part}": np.asarray(array).astype(np.float16)
        for name, layer in zip(("fc0", "fc1", "last_fc", "last_fc_log_std"), layers)
        for part, array in zip(("weight", "bias"), layer)
    }


def _arrays(layer: torch.nn.Linear) -> tuple[np.ndarray, np.ndarray]:
    return layer.weight.detach().numpy(), layer.bias.detach().numpy()


# -- training ---------------------------------------------------------------------------------------------------------


def train(cfg: Train) -> None:
    """Train to the end of the steps, leaving a rung and a line of the log at every evaluation."""
    from stable_baselines3.common.utils import ConstantSchedule

    torch.set_num_threads(1)  # nets of this size gain nothing from a second thread
    folder = cfg.folder
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model(cfg)
    log = read_log(folder)[: -1 if model.num_timesteps == 0 else None]
    before = log[-1].get("seconds", 0.0) if log else 0.0
    print(f"{folder}: from step {model.num_timesteps} to {cfg.steps}", flush=True)
    describe(cfg, model.num_timesteps)
    fall_from = (0 if cfg.algorithm == "ppo" else cfg.steps) if cfg.fall_from is None else cfg.fall_from
    if model.num_timesteps == 0:
        evaluate_snapshot(folder, model, before)
    while model.num_timesteps < cfg.steps:
        left = (cfg.steps - model.num_timesteps) / (cfg.steps - fall_from) if fall_from < cfg.steps else 1.0
        model.lr_schedule = ConstantSchedule(SETTINGS[cfg.algorithm].get("learning_rate", 3e-4) * min(left, 1.0))
        model.learn(cfg.eval_every, reset_num_timesteps=False)
        evaluate_snapshot(folder, model, before)
        if model.num_timesteps % cfg.save_every < cfg.eval_every or model.num_timesteps >= cfg.steps:
            save_model(cfg, model)


def describe(cfg: Train, done: int) -> None:
    """Write what the manifest will say about the training. One continued by another command tells both, and when."""
    extra = ("sbx-rl", "jax") if cfg.algorithm == "sbx" else ("torch",)
    file, command = cfg.folder / "settings.json", f"{MODULE} train {cfg.env} {cfg.algorithm} --seed {cfg.seed}"
    command += f" --steps {cfg.steps} --eval_every {cfg.eval_every}"
    command += "" if cfg.fall_from is None else f" --fall_from {cfg.fall_from}"
    if done:
        before = json.loads(file.read_text())["command"]
        command = before if f"{command} " in f"{before} " else f"{before} && {command} (continued at {done})"
    text = {
        "env_id": f"{IDS[cfg.env]}-v4",
        "algorithm": NAMES[cfg.algorithm],
        "settings": {"n_envs": LANES[cfg.algorithm]} | SETTINGS[cfg.algorithm],
        "seed": cfg.seed,
        "episodes": 100,
        "versions": {p: version(p) for p in ("stable_baselines3", *extra, "gymnasium", "mujoco")},
        "command": command,
        "licence": "MIT, as the project: trained from nothing by this script",
    }
    _whole(file, lambda path: path.write_text(json.dumps(text, indent=1, default=lambda c: c.__name__)))


def evaluate_snapshot(folder: Path, model, before: float) -> None:
    """Evaluate the policy as it would be shipped; keep it as a rung."""
    weights = weights_of(model)
    returns = rollout_returns(Policy(weights), folder.name.split("-")[0], 20, model.num_timesteps)
    row = {
        "steps": model.num_timesteps,
        "return_mean": round(float(returns.mean()), 1),
        "return_std": round(float(returns.std()), 1),
        "seconds": round(before + time.process_time(), 1),  # of the processor: waiting does not count
    }
    _whole(rung_file(folder, model.num_timesteps), lambda path: np.savez_compressed(path, **weights))
    with open(folder / "log.jsonl", "a") as f:
        f.write(json.dumps(row) + "\n")
    print(row, flush=True)


def read_log(folder: Path) -> list[dict]:
    """The evaluations so far, by steps; where a resumed training repeated some, the later line counts."""
    file = folder / "log.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [row for _, row in sorted({row["steps"]: row for row in rows}.items())]


def rung_file(folder: Path, steps: int) -> Path:
    """Where the policy after so many steps lies."""
    return folder / f"rung-{steps:08d}.npz"


def _whole(target: Path, write) -> None:
    """write(path), then give the file its name: it is there whole or not at all."""
    part = target.with_name("part-" + target.name)
    write(part)
    os.replace(part, target)


# -- keeping ----------------------------------------------------------------------------------------------------------


def export(cfg: Export) -> None:
    """Write a level's policy beside this file, its line into the manifest, and with `--ladder` the way to it."""
    log = read_log(cfg.folder)
    steps, returns = choose(cfg, log)
    with np.load(rung_file(cfg.folder, steps)) as file:
        write_policy(cfg, cfg.level, dict(file), {"steps": steps, **facts(returns)})
    if cfg.ladder:
        export_snapshots(cfg, log, steps)


def export_snapshots(cfg: Export, log: list[dict], steps: int) -> None:
    """Ship the way to the policy after `steps`: arrays of a policy, stacked, rung first."""
    there = np.array([row["steps"] for row in log])
    wanted = np.linspace(there[0], steps, cfg.ladder)
    rungs = [int(there[np.abs(there - want).argmin()]) for want in wanted]
    files = [np.load(rung_file(cfg.folder, snapshot)) for snapshot in rungs]
    lines = [{"steps": n, **facts(returns_of(cfg, n, 100, seed=3 * 10**6))} for n in rungs]
    write_policy(cfg, "ladder", {k: np.stack([f[k] for f in files]) for k in files[0]}, {"rungs": lines})


def choose(cfg: Export, log: list[dict]) -> tuple[int, np.ndarray]:
    """-> steps of the rung that fits, and its returns over 100 episodes that had no say in the choice."""
    if cfg.high < np.inf:  # the first that is good enough; the log's 20 episodes are a hint, 100 decide
        hints = [row["steps"] for row in log if 0.9 * cfg.low <= row["return_mean"] <= 1.1 * cfg.high]
        fits = (n for n in hints if cfg.low <= returns_of(cfg, n, 100, seed=10**6).mean() <= cfg.high)
        steps = next(fits, None)
    else:  # the best: of those that look best over 20 episodes, the best over 100
        hints = [row["steps"] for row in sorted(log, key=lambda row: -row["return_mean"])[:4]]
        means = {n: returns_of(cfg, n, 100, seed=10**6).mean() for n in hints}
        best = max(means, key=means.get)
        steps = best if means[best] >= cfg.low else None
    if steps is None:
        raise SystemExit(f"no policy with a return in [{cfg.low}, {cfg.high}]; log: {cfg.folder / 'log.jsonl'}")
    return steps, returns_of(cfg, steps, 100, seed=2 * 10**6)


def returns_of(cfg: Export, steps: int, episodes: int, seed: int) -> np.ndarray:
    """Returns (episodes,) of a rung."""
    with np.load(rung_file(cfg.folder, steps)) as file:
        returns = rollout_returns(Policy(file), cfg.env, episodes, seed)
    print(f"{steps} steps: {returns.mean():.1f} ± {returns.std():.1f} over {episodes} episodes", flush=True)
    return returns


def facts(returns: np.ndarray) -> dict:
    """What the manifest says about returns."""
    return {"return_mean": round(float(returns.mean()), 1), "return_std": round(float(returns.std()), 1)}


def write_policy(cfg: Export, level: str, weights: dict[str, np.ndarray], found: dict) -> None:
    """The arrays into `policies/`, then their line into the manifest: no line speaks of a file that is not there."""
    name = f"{cfg.env}-{level}"
    _whole(MANIFEST.with_name(f"{name}.npz"), lambda path: np.savez_compressed(path, **weights))
    made = json.loads((cfg.folder / "settings.json").read_text())
    kept = f"export {cfg.env} {cfg.algorithm} {cfg.level} --seed {cfg.seed} --low {cfg.low:g} --high {cfg.high:g}"
    with file_lock(cfg.work_dir / MANIFEST.name):
        manifest = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else {}
        manifest[name] = made | found
        manifest[name]["command"] += f" && {MODULE} {kept}" + (f" --ladder {cfg.ladder}" if cfg.ladder else "")
        if "return_mean" in found:
            manifest[name]["d4rl_score"] = round(d4rl_score(cfg.env, found["return_mean"]), 1)
        text = json.dumps(manifest, indent=1, sort_keys=True) + "\n"
        _whole(MANIFEST, lambda path: path.write_text(text))


if __name__ == "__main__":
    settings = tyro.cli(Train | Export)
    train(settings) if isinstance(settings, Train) else export(settings)
