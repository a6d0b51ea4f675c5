"""How fast DQN on windows learns on LunarLander-v3, beside the published loop (dqn_plain.py) and other scans.

    python benchmarks/dqn_speed.py [--steps 40] [--d_state 64] [--skip_peers]

One thread, milliseconds of the process's own time, as others may use the machine; each figure is the least of its
repeats. A step is: act, step the environment, remember, one update of 64 windows.
"""

import argparse
import time
from types import SimpleNamespace

import gymnasium
import torch
from common import median_seconds, write
from dqn_plain import PlainDQN, PlainMamba

import dqn
import machine
from config import DQNConfig
from envs import Envs
from scan import selective_scan, selective_scan_last, selective_scan_loop


def least(fn, repeats: int) -> float:
    """Milliseconds of one call, the quickest of them."""
    return round(median_seconds(fn, 2, repeats, middle=min, clock=time.process_time) * 1e3, 2)


def ours(cfg: DQNConfig, steps: int, filled: int) -> dict:
    """Milliseconds of a step and of its parts."""
    world = dqn.world(cfg)
    agent = dqn.DQN(cfg, world.spec, "cpu").train()
    agent.gather(1, 0)
    envs, memory = Envs(world.make, 1, 0), agent.reset(1)

    def step() -> None:
        nonlocal memory
        action, memory = agent.act(envs.state, envs.reward, memory, explore=True)
        seen, ended = envs.step(action)
        agent.observe(seen)
        if ended:
            memory = agent.restart(memory, seen.terminated | seen.truncated)
        for batch in agent.lessons():
            agent.update(batch)

    for _ in range(filled):
        step()
    assert agent.updates == 0
    agent.steps = cfg.learn_start
    batch = agent.experience.sample(cfg.batch_size, 0.5)
    return {"step": least(step, steps), "update": least(lambda: agent.update(batch), steps // 2)}


def plain(cfg: DQNConfig, steps: int, filled: int) -> dict:
    """The same of the published loop."""
    spec = dqn.world(cfg).spec
    dqn.MIXERS = {**dqn.MIXERS, "mamba": PlainMamba}
    agent = PlainDQN(dqn.QNet(cfg, spec), dqn.QNet(cfg, spec), cfg)
    dqn.MIXERS["mamba"] = dqn.Mamba
    env = gymnasium.make(cfg.env)
    begin = lambda: torch.from_numpy(env.reset()[0]).repeat(cfg.context_length, 1)  # noqa: E731
    window, learning = begin(), False

    def step() -> None:
        nonlocal window
        action, latent = agent.act(window, spec.actions, 0.5)
        state, reward, terminated, truncated, _ = env.step(action)
        after = torch.cat([window[1:], torch.from_numpy(state)[None]])
        agent.push(window, action, float(reward), after, float(terminated or truncated), latent)
        window = begin() if terminated or truncated else after
        if learning:
            agent.update(0.5)

    for _ in range(filled):
        step()
    learning = True
    return {"step": least(step, steps), "update": least(lambda: agent.update(0.5), steps // 2)}


def layers(cfg: DQNConfig, repeats: int) -> dict:
    """Forward and backward of the scan, and of the layer, read at the last position."""
    B, L, E, N = cfg.batch_size, cfg.context_length, cfg.expand * cfg.d_model, cfg.d_state
    leaf = lambda *shape: torch.rand(*shape).requires_grad_()  # noqa: E731
    x, dt, A, b, c = leaf(B, L, E), leaf(B, L, E), leaf(E, N), leaf(B, L, N), leaf(B, L, N)

    def back(fn):
        return lambda: torch.autograd.grad(fn().sum(), (x, dt, A, b, c))

    found = {
        "scan, last output": least(back(lambda: selective_scan_last(x, dt, -A, b, c[:, -1])), repeats),
        "scan, all outputs": least(back(lambda: selective_scan(x, dt, -A, b, c)[:, -1]), repeats),
        "scan, plain loop": least(back(lambda: selective_scan_loop(x, dt, -A, b, c)[:, -1]), repeats),
    }
    e = torch.randn(B, L, cfg.d_model)
    peers = {"layer, last output": dqn.Mamba(cfg), "layer, plain loop": PlainMamba(cfg)}
    for name, layer in peers.items():
        found[name] = least(lambda: layer(e).sum().backward(), repeats)  # noqa: B023
    try:
        from transformers.models.mamba.modeling_mamba import MambaMixer
    except ImportError:
        return found
    config = SimpleNamespace(
        hidden_size=cfg.d_model,
        state_size=N,
        conv_kernel=cfg.d_conv,
        intermediate_size=E,
        time_step_rank=-(-cfg.d_model // 16),
    )
    config.use_conv_bias, config.use_bias, config.hidden_act, config.use_mambapy = True, False, "silu", False
    mixer = MambaMixer(config, 0)
    found["layer, transformers"] = least(lambda: mixer.slow_forward(e)[:, -1].sum().backward(), repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--filled", type=int, default=2000, help="transitions in the replay before anything is timed")
    parser.add_argument("--d_state", type=int, default=64)
    parser.add_argument("--mixers", nargs="+", default=list(dqn.MIXERS), choices=dqn.MIXERS)
    parser.add_argument("--skip_peers", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    machine.hold_memory()
    result = {"sizes": {}, "milliseconds": {}}
    for mixer in args.mixers:
        cfg = DQNConfig(mixer=mixer, d_state=args.d_state, device="cpu", eps_start=0.5, eps_end=0.5)
        torch.manual_seed(0)
        row = {"ours": ours(cfg, args.steps, args.filled)}
        if not args.skip_peers:
            row["published loop"] = plain(cfg, max(args.steps // 4, 4), args.filled)
            row["times"] = round(row["published loop"]["step"] / row["ours"]["step"], 1)
        result["milliseconds"][mixer] = row
        print(f"{mixer:12} {row}", flush=True)
    cfg = DQNConfig(d_state=args.d_state)
    result["sizes"] = {k: getattr(cfg, k) for k in ("batch_size", "context_length", "d_model", "expand", "d_state")}
    if not args.skip_peers:
        result["layers"] = layers(cfg, 6)
        print(result["layers"])
        print(write("dqn_speed_cpu", result))


if __name__ == "__main__":
    main()
