"""How fast DQN on windows learns on LunarLander-v3, beside the published loop (dqn_plain.py) and other scans.

    python benchmarks/dqn_speed.py [--steps 40] [--compile]

One thread, milliseconds of the process's own time, as others may use the machine; each figure is the least of its
repeats. A step is: act, step the environment, remember, one update of 64 windows.
"""

import argparse
import time
from dataclasses import replace

import gymnasium
import torch
from dqn_plain import PlainDQN, PlainMamba, plain_scan
from harness import median_seconds, write

import dqn
from common import device as devices
from common.vector_env import Envs
from config import DQNConfig
from networks.last_step_mixers import MIXERS, Mamba
from networks.selective_scan import selective_scan_last, selective_scan_loop


def least(fn, repeats: int) -> float:
    """Milliseconds of one call, the quickest of them."""
    return round(median_seconds(fn, 2, repeats, middle=min, clock=time.process_time) * 1e3, 2)


def ours(cfg: DQNConfig, steps: int, filled: int) -> dict:
    """Milliseconds of a step and of its parts."""
    world = dqn.DQN.make_eval_env(cfg)
    agent = dqn.DQN(cfg, world.spec, "cpu").train()
    agent.init_buffer(1, 0)
    envs, memory = Envs(world.make, 1, 0), agent.reset(1)

    def step() -> None:
        nonlocal memory
        action, memory = agent.act(envs.state, envs.reward, memory, explore=True)
        seen, ended = envs.step(action)
        agent.observe(seen)
        if ended:
            memory = agent.reset_where(memory, seen.terminated | seen.truncated)
        for batch in agent.minibatches():
            agent.update(batch)

    for _ in range(filled):
        step()
    assert agent.updates == 0
    agent.steps = cfg.learn_start
    batch = agent.buffer.sample(cfg.batch_size, 0.5)
    return {"step": least(step, steps), "update": least(lambda: agent.update(batch), steps // 2)}


def plain(cfg: DQNConfig, steps: int, filled: int) -> dict:
    """The same of the published loop."""
    spec = dqn.DQN.make_eval_env(cfg).spec
    dqn.MIXERS = {**MIXERS, "mamba": PlainMamba}
    agent = PlainDQN(dqn.QNet(cfg, spec), dqn.QNet(cfg, spec), cfg)
    dqn.MIXERS = MIXERS
    env = gymnasium.make(cfg.env)
    begin = lambda: torch.from_numpy(env.reset()[0]).repeat(cfg.context_length, 1)  # noqa: E731
    window, learning = begin(), False

    def step() -> None:
        nonlocal window
        action, latent = agent.act(window, spec.action, 0.5)
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


def scans(cfg: DQNConfig, repeats: int, peers: bool) -> dict:
    """Forward and backward of the scan, and of the whole layer, read at the last position."""
    B, L, E, N = cfg.batch_size, cfg.context_length, cfg.expand * cfg.d_model, cfg.d_state
    leaf = lambda *shape: torch.rand(*shape).requires_grad_()  # noqa: E731
    x, dt, A, b, c = leaf(B, L, E), leaf(B, L, E), leaf(E, N), leaf(B, L, N), leaf(B, L, N)
    e = torch.randn(B, L, cfg.d_model)
    layers = {"layer, plain loop": PlainMamba(cfg)} if peers else {"layer, ours": Mamba(cfg)}
    calls = {"scan, ours": lambda: selective_scan_last(x, dt, -A, b, c[:, -1])}
    if peers:
        calls = {
            "scan, plain loop": lambda: plain_scan(x, dt, -A, b, c)[:, -1],
            "scan, lean loop": lambda: selective_scan_loop(x, dt, -A, b, c)[:, -1],
        }
        from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

        sizes = dict(hidden_size=cfg.d_model, state_size=N, conv_kernel=cfg.d_conv, expand=cfg.expand)
        mixer = MambaMixer(MambaConfig(**sizes, num_hidden_layers=1), layer_idx=0)
        layers["layer, transformers"] = lambda e: mixer(e)[:, -1]
    found = {k: least(lambda: torch.autograd.grad(f().sum(), (x, dt, A, b, c)), repeats) for k, f in calls.items()}  # noqa: B023
    return found | {k: least(lambda: f(e).sum().backward(), repeats) for k, f in layers.items()}  # noqa: B023


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--filled", type=int, default=2000, help="transitions in the replay before anything is timed")
    parser.add_argument("--mixers", nargs="+", default=list(MIXERS), choices=MIXERS)
    parser.add_argument("--compile", action="store_true", help="compile our networks")
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = DQNConfig(device="cpu", eps_start=0.5, eps_end=0.5, compile=args.compile)
    sizes = {k: getattr(cfg, k) for k in ("batch_size", "context_length", "d_model", "expand", "d_state")}
    peers = {m: plain(replace(cfg, mixer=m), max(args.steps // 4, 4), args.filled) for m in args.mixers}
    layers = scans(cfg, 6, peers=True)
    devices.keep_freed_memory()  # as trainer.py does, and for the rest of the process, so the peers come first
    layers |= scans(cfg, 6, peers=False)
    rows = {}
    for mixer in args.mixers:
        torch.manual_seed(0)
        mine = ours(replace(cfg, mixer=mixer), args.steps, args.filled)
        times = round(peers[mixer]["step"] / mine["step"], 1)
        rows[mixer] = {"ours": mine, "published loop": peers[mixer], "times": times}
        print(f"{mixer:12} {rows[mixer]}", flush=True)
    print(layers)
    name = "dqn_speed_cpu_compiled" if args.compile else "dqn_speed_cpu"
    print(write(name, {"sizes": sizes, "milliseconds": rows, "forward_and_backward_ms": layers}))


if __name__ == "__main__":
    main()
