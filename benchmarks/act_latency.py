"""Milliseconds for one environment step of a return-conditioned agent, and whether that grows with the episode.

    python benchmarks/act_latency.py [--preset small] [--rows 1 16 256] [--contexts 20 100] [--threads 1 --clock cpu]

`act` as evaluations call it, in float32: windows eager and compiled, the carried state eager, compiled and (on CUDA) as
a captured graph, and dt's window. Times are the least of the repeats: others may be using the machine.
"""

from dataclasses import replace

import torch
from harness import CLOCKS, median_seconds, timing_parser, write
from torch.utils import _pytree as pytree

from common.interface import EnvSpec
from config import parse
from decision_transformer import DecisionAgent

SPEC = EnvSpec(state=11, action=3, low=(-1.0,) * 3, high=(1.0,) * 3)  # hopper
STEPS = 150  # into the episode, so that every window is full


def graphed(agent: DecisionAgent, n: int, state, reward):
    """`act` as one CUDA graph on a memory of its own."""
    static = agent.reset(n)

    def step():
        action, after = agent.act(state, reward, static)
        for mine, theirs in zip(pytree.tree_leaves(static), pytree.tree_leaves(after)):
            mine.copy_(theirs)
        return action

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main() -> None:
    parser = timing_parser(__doc__, repeats=15)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16, 256])
    parser.add_argument("--contexts", nargs="+", type=int, default=[20, 100])
    parser.add_argument("--agents", nargs="+", default=["dt", "dmamba", "dm"])
    parser.add_argument("--no_compile", action="store_true")
    args = parser.parse_args()
    device, rows, clock = args.device, [], CLOCKS[args.clock]
    if args.threads:
        torch.set_num_threads(args.threads)

    def measure(name: str, inference: str, how: str, k: int, n: int) -> None:
        cfg = replace(parse(["--agent", name, "--preset", args.preset]), context_length=k, inference=inference)
        agent = DecisionAgent(cfg, SPEC, device).eval()
        state, reward = torch.randn(n, SPEC.state, device=device), torch.ones(n, device=device)
        run = agent.act
        if how == "compiled":
            torch._dynamo.reset()
            run = torch.compile(agent.act, dynamic=False)
        early, late = agent.reset(n), agent.reset(n)._replace(t=torch.full((n,), STEPS, device=device))
        if how == "graph":
            times = [median_seconds(graphed(agent, n, state, reward), 3, args.repeats, device, min, clock)] * 2
        else:
            times = [
                median_seconds(lambda m=m: run(state, reward, m), 3, args.repeats, device, min, clock)
                for m in (early, late)
            ]
        rows.append({"agent": name, "inference": inference, "how": how, "context": k, "environments": n})
        rows[-1] |= {"ms": round(times[1] * 1e3, 3), "ms_at_the_first_step": round(times[0] * 1e3, 3)}
        print(
            "{agent:7} {inference:10} {how:9} K {context:<4} n {environments:<4} {ms:>9} ms".format(**rows[-1]),
            flush=True,
        )

    ways = ["eager", *([] if args.no_compile else ["compiled"])]
    for name in args.agents:
        for k in args.contexts:
            for n in args.rows:
                for how in ways if name != "dt" else ["eager"]:
                    measure(name, "window", how, k, n)
        if name != "dt":
            for n in args.rows:
                for how in [*ways, *(["graph"] if device == "cuda" else [])]:
                    measure(name, "recurrent", how, args.contexts[0], n)
                measure(name, "staggered", "eager", args.contexts[0], n)
    print(write(f"act_latency_{device}", {"preset": args.preset, "clock": args.clock, "rows": rows}))


if __name__ == "__main__":
    main()
