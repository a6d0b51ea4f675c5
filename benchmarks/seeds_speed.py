"""Stacked seeds: seconds of one update of all of them, beside one agent's, and beside as many processes.

    python benchmarks/seeds_speed.py [--presets small] [--seeds 1 2 4] [--device cpu] [--processes 4]

`measure` is also a stage of gpu_day.py. --processes N: N single agents at the same time, each in a process of its own
with one thread, on the cores that the stack has, too.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from dataclasses import replace

import torch
from harness import ROOT, VARIANTS, write
from update_speed import SPEC

from agent import Bamba
from common import device as devices
from common.cuda_graph import draw_by_graph
from common.stacked import StackedAgents
from common.windows import SegmentSampler, WindowSampler
from config import parse

SEGMENTS = ["--train_on", "segments", "--context_length", "16", "--drop_p", "0", "--batch_size", "1024"]


def make(argv: list[str], seeds: int, device: str, graphs: bool, compiled: bool, precision: str):
    """A function that makes one update: of `seeds` stacked agents, or with 0 of one as the trainer makes it."""
    from gpu_stages import walk

    cfg = replace(parse(argv), device=device, precision=precision, compile=compiled, cuda_graphs=graphs)
    devices.set_precision(precision, torch.device(device))
    agents = []
    for seed in range(max(seeds, 1)):
        torch.manual_seed(seed)
        agents.append(Bamba(replace(cfg, compile=compiled and not seeds), SPEC, device).train())
    kind = SegmentSampler if cfg.train_on == "segments" else WindowSampler
    sampler = kind(walk(100_000), agents[0].k, device, 0)
    if seeds:
        together = StackedAgents(agents, sampler, [(s, 100 + s) for s in range(seeds)], graphs, compiled)
        together.train()
        return together.update
    if graphs:
        draw_by_graph(sampler)
    return lambda: agents[0].update(sampler.sample(cfg.batch_size))


def measure(
    preset: str, seeds: int, device: str, graphs: bool, compiled: bool, precision: str, updates: int, segments=False
) -> dict:
    """Milliseconds of one update of all (median of five stretches), updates a second of each and of all together."""
    argv = [*VARIANTS[preset], *(SEGMENTS if segments else [])]
    update = make(argv, seeds, device, graphs, compiled, precision)
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None
    start = time.perf_counter()
    for _ in range(10 if device != "cpu" else 4):
        update()
    wait()
    warm = time.perf_counter() - start
    stretches = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(max(updates // 5, 2)):
            update()
        wait()
        stretches.append((time.perf_counter() - start) / max(updates // 5, 2))
    seconds = statistics.median(stretches)
    row = {"preset": preset, "seeds": seeds, "precision": precision, "graphs": graphs, "compiled": compiled}
    row |= {"segments": segments, "ms_of_all": round(1e3 * seconds, 3), "updates_per_s": round(1 / seconds, 1)}
    row |= {"updates_per_s_in_all": round(max(seeds, 1) / seconds, 1), "warm_s": round(warm, 1)}
    if device != "cpu":
        row["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def in_processes(preset: str, count: int, compiled: bool, updates: int, segments: bool) -> dict:
    """The same of `count` single agents at once, each in its own process with one thread."""
    code = f"""
import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
import torch, json; torch.set_num_threads(1)
import seeds_speed
print(json.dumps(seeds_speed.measure({preset!r}, 0, "cpu", False, {compiled}, "fp32", {updates}, {segments})))
"""
    start = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(count)]
    rows = [json.loads(p.communicate()[0].splitlines()[-1]) for p in start]
    each = statistics.mean(r["updates_per_s"] for r in rows)
    row = {"preset": preset, "processes": count, "compiled": compiled, "segments": segments}
    return row | {
        "updates_per_s": round(each, 2),
        "updates_per_s_in_all": round(sum(r["updates_per_s"] for r in rows), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["upstream small"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 4])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--segments", action="store_true")
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--updates", type=int, default=40)
    args = parser.parse_args()
    cuda, rows = args.device != "cpu", []
    precision = "tf32" if cuda else "fp32"
    for preset in args.presets:
        for seeds in args.seeds:
            precision = "tf32" if cuda else "fp32"
            rows.append(
                measure(preset, seeds, args.device, cuda, args.compiled, precision, args.updates, args.segments)
            )
            print(rows[-1], flush=True)
        if args.processes:
            rows.append(in_processes(preset, args.processes, args.compiled, args.updates, args.segments))
            print(rows[-1], flush=True)
    name = f"seeds_speed_{args.device}" + "_compiled" * args.compiled + "_segments" * args.segments
    print(write(name, {"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
