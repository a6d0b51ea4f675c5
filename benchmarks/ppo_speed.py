"""Environment steps a second of PPO, collecting and learning, beside Stable-Baselines3's with as many environments.

    python benchmarks/ppo_speed.py [--envs 8 64] [--threads 1] [--init RUN_OR_CHECKPOINT ...] [--clock cpu]

Both have MLPs of two layers of 64 for policy and value, and 4096 steps, batches of 512 and 10 passes an iteration, on
hopper; the peer steps Gymnasium's own environment. They take turns; each time is the least. Threads: one and two.
`--init` adds rows for sequence policies out of checkpoints. Microseconds of one environment's step come first: the
body as it is stepped here, and by Gymnasium, resets not counted. The peer: pip install stable-baselines3.
"""

import warnings
from functools import partial

import gymnasium
import numpy as np
import torch
from harness import CLOCKS, timing_parser, write

import ppo
from common.vector_env import Envs
from config import PPOConfig
from d4rl_utils import make_env
from d4rl_utils.environment import IDS

STEPS = 4096  # an iteration
SIZES = {"batch_size": 512, "epochs": 10}


def env_steps(repeats: int, clock) -> dict:
    """Microseconds of one step of each body under random actions, resets not counted: here, and by Gymnasium."""
    rows = {}
    for body, name in IDS.items():
        made = {"ours": make_env(body), "gymnasium": gymnasium.make(f"{name}-v4")}
        action = np.random.default_rng(0).uniform(-1, 1, (2000, *made["ours"].action_space.shape)).astype(np.float32)
        times = {who: [] for who in made}
        for _ in range(repeats):
            for who, env in made.items():
                env.reset(seed=0)
                resets, start = 0.0, clock()
                for a in action:
                    if any(env.step(a)[2:4]):
                        before = clock()
                        env.reset(seed=0)
                        resets += clock() - before
                times[who].append((clock() - start - resets) / len(action) * 1e6)
        rows[body] = {who: round(min(found), 1) for who, found in times.items()}
    return rows


def ours(init: str, num_envs: int, device: str, repeats: int, clock) -> dict:
    """Least seconds of an iteration's two halves, over `repeats` iterations; the policy learns in all of them."""
    own = {"init": init, "target_kl": 0.0, "value_warmup": 0, "bc_coef": 0.0, "sigma": 0.2, "device": device}
    cfg = ppo.resolve_config(PPOConfig(**SIZES, num_envs=num_envs, n_steps=STEPS // num_envs, value_dim=64, **own))
    world = ppo.make_eval_env(cfg)
    agent = ppo.PPO(cfg, world.spec, device)
    agent.init_buffer(cfg.num_envs, 0)
    agent.load_pretrained()
    agent.train()
    envs, memory, halves = Envs(world.make, cfg.num_envs, 0, device), agent.reset(cfg.num_envs), []
    for _ in range(repeats + 1):
        times = [clock()]
        for _ in range(cfg.n_steps):
            action, memory = agent.act(envs.state, envs.reward, memory, explore=True)
            step, ended = envs.step(action)
            agent.observe(step)
            if ended:
                memory = agent.reset_where(memory, step.terminated | step.truncated)
        times.append(clock())
        for lesson in agent.minibatches():
            agent.update(lesson)
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(clock())
        halves.append((times[1] - times[0], times[2] - times[1]))
    return rates(halves[1:])


def theirs(num_envs: int, device: str, repeats: int, clock) -> dict:
    """The same of Stable-Baselines3's own two methods."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Silent(BaseCallback):
        def _on_step(self) -> bool:
            return True

    model = PPO(
        "MlpPolicy",
        DummyVecEnv([partial(gymnasium.make, "Hopper-v4")] * num_envs),
        n_steps=STEPS // num_envs,
        batch_size=SIZES["batch_size"],
        n_epochs=SIZES["epochs"],
        device=device,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}},
    )
    _, silent = model._setup_learn(STEPS * (repeats + 1), Silent())
    halves = []
    for _ in range(repeats + 1):
        times = [clock()]
        model.collect_rollouts(model.env, silent, model.rollout_buffer, STEPS // num_envs)
        times.append(clock())
        model.train()
        times.append(clock())
        halves.append((times[1] - times[0], times[2] - times[1]))
    return rates(halves)


def rates(halves: list[tuple[float, float]]) -> dict:
    collect, learn = (min(x) for x in zip(*halves))
    return {
        "collect_steps_per_s": round(STEPS / collect),
        "learn_steps_per_s": round(STEPS / learn),
        "steps_per_s": round(STEPS / (collect + learn)),
    }


def faster(rows: list[dict]) -> dict:
    return max(rows, key=lambda row: row["steps_per_s"])


def main() -> None:
    parser = timing_parser(__doc__, repeats=3)
    parser.add_argument("--init", nargs="*", default=[], help="offline checkpoints or run folders")
    parser.add_argument("--envs", nargs="+", type=int, default=[8, 64], help="environments side by side")
    args = parser.parse_args()
    try:
        import stable_baselines3  # noqa: F401
    except ImportError as error:
        raise SystemExit(f"no peer to measure beside: {error}. pip install stable-baselines3") from error
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    clock, rows = CLOCKS[args.clock], {}
    how = {"device": args.device, "repeats": args.repeats, "clock": clock}
    bodies = env_steps(args.repeats, clock)
    for body, row in bodies.items():
        print(f"a step of {body}, microseconds: {row}")
    for threads in [args.threads] if args.threads else [1, 2]:
        torch.set_num_threads(threads)
        for n in args.envs:
            turns = {"ours, MLP": partial(ours, "none", n, **how), "stable-baselines3, MLP": partial(theirs, n, **how)}
            found = [{name: run() for name, run in turns.items()} for _ in range(2)]
            where = f"{n} environments, {threads} thread(s)"
            best = {f"{name}, {where}": faster([turn[name] for turn in found]) for name in turns}
            mine, peer = (row["steps_per_s"] for row in best.values())
            rows |= best | {f"ratio, {where}": round(mine / peer, 2)}
    for init in args.init:
        agent = ppo.resolve_config(PPOConfig(init=init)).policy
        sizes = {k: agent["config"][k] for k in ("context_length", "d_model", "n_layers")}
        rows[f"ours, {agent['system']} {sizes}"] = ours(init, args.envs[0], **how)
    for name, row in rows.items():
        print(f"{name:72} {row}")
    facts = {"sizes": SIZES | {"steps": STEPS}, "env": "hopper v4", "clock": args.clock}
    print(write(f"ppo_speed_{args.device}", facts | {"least_of": args.repeats, "step_us": bodies, "rows": rows}))


if __name__ == "__main__":
    main()
