"""Milliseconds for one step of one environment: an exported policy beside PyTorch's eager and compiled; and whether
both act alike.

    python benchmarks/export_latency.py [--threads 1 --clock cpu]

Agents of `--preset small` with random weights, hopper's sizes, float32; dqn as published, opso in a maze of four state
dims. Differences: of actions, the largest over 200 steps of three environments whose states are a random walk; of dqn,
how many of the 600 actions are others. Writes its table into docs/results.md. Times are the least of the repeats:
others may be using the machine.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from harness import CLOCKS, ROOT, median_seconds, timing_parser, write

import export
from common.checkpoint import agent_of
from common.interface import EnvSpec
from common.logger import put_into_page
from config import parse

HOPPER = EnvSpec(state=11, action=3, low=(-1.0,) * 3, high=(1.0,) * 3)
LANDER = EnvSpec(state=8, action=4, low=(), high=())
MAZE = EnvSpec(state=4, action=2, low=(-1.0,) * 2, high=(1.0,) * 2)
RECURRENT = ["--inference", "recurrent"]
AGENTS = {
    "bamba": (["--preset", "small"], HOPPER),
    "dt": (["--agent", "dt", "--preset", "small"], HOPPER),
    "dmamba": (["--agent", "dmamba", "--preset", "small"], HOPPER),
    "dmamba, recurrent": (["--agent", "dmamba", "--preset", "small", *RECURRENT], HOPPER),
    "dm": (["--agent", "dm", "--preset", "small"], HOPPER),
    "dm, recurrent": (["--agent", "dm", "--preset", "small", *RECURRENT], HOPPER),
    "ppo, MLP": (["--agent", "ppo", "--init", "none"], HOPPER),
    "dqn, mamba": (["--agent", "dqn", "--mixer", "mamba"], LANDER),
    "dqn, transformer": (["--agent", "dqn", "--mixer", "transformer"], LANDER),
    "opso": (["--agent", "opso", "--preset", "small"], MAZE),
}


def parity(agent, session, first: dict[str, torch.Tensor], has_goal: bool, n: int = 3, steps: int = 200) -> float:
    """The largest difference of an action from PyTorch's; of discrete ones, how many differ."""
    rng = np.random.default_rng(0)
    state, goal = rng.normal(size=(n, agent.spec.state)), rng.normal(size=(n, agent.spec.state)).astype(np.float32)
    memory = agent.reset(n, torch.from_numpy(goal) if has_goal else None)
    theirs = {name: leaf.repeat_interleave(n, 0).numpy() for name, leaf in first.items()}
    known, worst = {x.name for x in session.get_inputs()}, 0.0
    for _ in range(steps):
        seen, reward = state.astype(np.float32), rng.normal(size=n).astype(np.float32)
        action, memory = agent.act(torch.from_numpy(seen), torch.from_numpy(reward), memory)
        given = {"state": seen, "reward": reward, "goal": goal, **theirs}
        found, *after = session.run(None, {k: v for k, v in given.items() if k in known})
        theirs = dict(zip(first, after))
        apart = np.abs(found - action.numpy())
        worst = worst + float((apart > 0).sum()) if action.dtype == torch.long else max(worst, float(apart.max()))
        state = state + 0.1 * rng.normal(size=state.shape)
    return worst


@torch.no_grad()
def main() -> None:
    args = timing_parser(__doc__, repeats=15).parse_args()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    rows, clock = {}, CLOCKS[args.clock]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()

    def least(run) -> float:
        return round(median_seconds(run, 20, args.repeats, "cpu", min, clock) * 1e3, 4)

    for name, (argv, spec) in AGENTS.items():
        cfg = parse(argv)
        kind, goal = agent_of(cfg.agent), cfg.agent == "opso"
        agent = kind(kind.resolve_config(cfg), spec, "cpu").eval()
        step, first, inputs = export.step_of(agent, has_goal=goal)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "policy.onnx"
            export.write_onnx(step, inputs, {"memory": list(first)}, path, onnx)
            size = path.stat().st_size
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        one = {k: v[:1].numpy() for k, v in inputs.items()}
        given = {x.name: np.ascontiguousarray(one[x.name]) for x in session.get_inputs()}
        apart = parity(agent, session, first, goal)
        memory = agent.reset(1, torch.zeros(1, spec.state) if goal else None)
        state, reward = torch.randn(1, spec.state), torch.zeros(1)
        torch._dynamo.reset()
        compiled = torch.compile(agent.act, dynamic=False)
        rows[name] = {
            "eager": least(lambda: agent.act(state, reward, memory)),  # noqa: B023
            "compiled": least(lambda: compiled(state, reward, memory)),  # noqa: B023
            "onnx": least(lambda: session.run(None, given)),  # noqa: B023
            "difference": apart,
            "kilobytes": round(size / 1e3),
        }
        print(name, rows[name], flush=True)
    table = ["| ms a step | eager | compiled | exported | eager / exported | largest difference | kB |"]
    table.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, r in rows.items():
        apart = f"{r['difference']:.0f} of 600" if "dqn" in name else f"{r['difference']:.1e}"
        times = f"{r['eager']:.3f} | {r['compiled']:.3f} | {r['onnx']:.3f} | {r['eager'] / r['onnx']:.1f}"
        table.append(f"| {name} | {times} | {apart} | {r['kilobytes']:,} |")
    put_into_page("python benchmarks/export_latency.py", "\n".join(table), ROOT / "docs" / "results.md")
    print(write("export_latency_cpu", {"clock": args.clock, "onnxruntime": onnxruntime.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
