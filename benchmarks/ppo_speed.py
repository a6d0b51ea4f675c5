"""Environment steps a second of PPO, collecting and learning, beside Stable-Baselines3's with as many environments.

    python benchmarks/ppo_speed.py [--init RUN_OR_CHECKPOINT ...] --threads 1 --clock cpu

Both have MLPs of two layers of 64 for policy and value, the same steps, batch and passes, on hopper. `--init` adds
rows for sequence policies out of checkpoints. The peer: pip install stable-baselines3.
"""

from functools import partial

import gymnasium
import torch
from harness import CLOCKS, timing_parser, write

import ppo
from common.vector_env import Envs
from config import PPOConfig

SIZES = {"num_envs": 8, "n_steps": 512, "batch_size": 512, "epochs": 10}


def ours(init: str, device: str, repeats: int, clock) -> dict:
    """Least seconds of an iteration's two halves, over `repeats` iterations; the policy learns in all of them."""
    own = {"init": init, "target_kl": 0.0, "value_warmup": 0, "bc_coef": 0.0, "sigma": 0.2, "device": device}
    cfg = ppo.resolve_config(PPOConfig(**SIZES, value_dim=64, **own))
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


def theirs(device: str, repeats: int, clock) -> dict:
    """The same of Stable-Baselines3's own two methods."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import DummyVecEnv

    class Silent(BaseCallback):
        def _on_step(self) -> bool:
            return True

    model = PPO(
        "MlpPolicy",
        DummyVecEnv([partial(gymnasium.make, "Hopper-v4")] * SIZES["num_envs"]),
        n_steps=SIZES["n_steps"],
        batch_size=SIZES["batch_size"],
        n_epochs=SIZES["epochs"],
        device=device,
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}},
    )
    steps = SIZES["n_steps"] * SIZES["num_envs"]
    _, silent = model._setup_learn(steps * (repeats + 1), Silent())
    halves = []
    for _ in range(repeats + 1):
        times = [clock()]
        model.collect_rollouts(model.env, silent, model.rollout_buffer, SIZES["n_steps"])
        times.append(clock())
        model.train()
        times.append(clock())
        halves.append((times[1] - times[0], times[2] - times[1]))
    return rates(halves)


def rates(halves: list[tuple[float, float]]) -> dict:
    steps, (collect, learn) = SIZES["n_steps"] * SIZES["num_envs"], (min(x) for x in zip(*halves))
    return {
        "collect_steps_per_s": round(steps / collect),
        "learn_steps_per_s": round(steps / learn),
        "steps_per_s": round(steps / (collect + learn)),
    }


def main() -> None:
    parser = timing_parser(__doc__, repeats=3)
    parser.add_argument("--init", nargs="*", default=[], help="offline checkpoints or run folders")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    time_it = partial(ours, device=args.device, repeats=args.repeats, clock=CLOCKS[args.clock])
    rows = {"ours, MLP": time_it("none")}
    try:
        rows["stable-baselines3, MLP"] = theirs(args.device, args.repeats, CLOCKS[args.clock])
    except ImportError as error:
        print(f"no peer: {error}. pip install stable-baselines3")
    for init in args.init:
        agent = ppo.resolve_config(PPOConfig(init=init)).policy
        sizes = {k: agent["config"][k] for k in ("context_length", "d_model", "n_layers")}
        rows[f"ours, {agent['system']} {sizes}"] = time_it(init)
    for name, row in rows.items():
        print(f"{name:72} {row}")
    facts = {"sizes": SIZES, "env": "hopper v4", "clock": args.clock}
    print(write(f"ppo_speed_{args.device}", facts | {"least_of": args.repeats, "rows": rows}))


if __name__ == "__main__":
    main()
