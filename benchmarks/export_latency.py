"""Milliseconds for one step of one environment: an exported policy beside PyTorch's eager and compiled.

    python benchmarks/export_latency.py [--threads 1 --clock cpu]

Agents of `--preset small` with random weights, hopper's sizes, float32; dqn as published. Writes its table into
docs/results.md. Times are the least of the repeats: others may be using the machine.
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
AGENTS = {
    "bamba": (["--preset", "small"], HOPPER),
    "dt": (["--agent", "dt", "--preset", "small"], HOPPER),
    "dmamba, recurrent": (["--agent", "dmamba", "--preset", "small", "--inference", "recurrent"], HOPPER),
    "dqn, mamba": (["--agent", "dqn", "--mixer", "mamba"], LANDER),
}


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
        agent = agent_of(cfg.agent)(cfg, spec, "cpu").eval()
        step, first, inputs = export.step_of(agent, has_goal=False)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "policy.onnx"
            export.write_onnx(step, inputs, {"memory": list(first)}, path, onnx)
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        one = {k: v[:1].numpy() for k, v in inputs.items()}
        given = {x.name: np.ascontiguousarray(one[x.name]) for x in session.get_inputs()}
        state, reward, memory = torch.randn(1, spec.state), torch.zeros(1), agent.reset(1)
        torch._dynamo.reset()
        compiled = torch.compile(agent.act, dynamic=False)
        rows[name] = {
            "eager": least(lambda: agent.act(state, reward, memory)),  # noqa: B023
            "compiled": least(lambda: compiled(state, reward, memory)),  # noqa: B023
            "onnx": least(lambda: session.run(None, given)),  # noqa: B023
        }
        print(name, rows[name], flush=True)
    table = ["| ms a step | eager | compiled | exported | eager / exported |", "|---|---:|---:|---:|---:|"]
    for name, r in rows.items():
        table.append(
            f"| {name} | {r['eager']:.3f} | {r['compiled']:.3f} | {r['onnx']:.3f} | {r['eager'] / r['onnx']:.0f} |"
        )
    put_into_page("python benchmarks/export_latency.py", "\n".join(table), ROOT / "docs" / "results.md")
    print(write("export_latency_cpu", {"clock": args.clock, "onnxruntime": onnxruntime.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
