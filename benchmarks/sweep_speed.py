"""What sweep.py costs beside a plain loop over trainer.py, and how long report.py takes for 500 finished runs.

    python benchmarks/sweep_speed.py [--runs 6] [--rounds 2]

The loop and the sweep train the same short runs (300 updates of Bamba on local hopper data, made before), one at a
time, and take turns. The 500 runs are written here: 5 data sets, 5 agents, 20 seeds, a thousand rows of eight losses.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, write

SETTINGS = {"preset": "small", "local_transitions": 20_000, "num_epochs": 1, "updates_per_epoch": 300}
SETTINGS |= {"critic_pretrain": 100, "eval_freq": 1, "save_freq": 1, "num_eval_episodes": 3, "threads": 1}
SHORT = ["--no_tensorboard", *(f"--{name}={value}" for name, value in SETTINGS.items())]
DATA = "hopper-medium-local"
AGENTS = ("bamba", "dt", "dmamba", "dm", "opso")


def call(*argv: str) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, *argv], cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=env)


def loop(runs: int, out: Path) -> None:
    for seed in range(runs):
        call("trainer.py", f"--dataset={DATA}", f"--seed={seed}", f"--output_dir={out / str(seed)}", *SHORT)


def sweep(runs: int, out: Path) -> None:
    what = ["--agents", "bamba", "--datasets", DATA, "--seeds", f"0-{runs - 1}", "--jobs", "1"]
    call("sweep.py", *what, "--output_dir", str(out), *SHORT)


def write_runs(folder: Path) -> int:
    """Logs as trainer.py leaves them; returns how many."""
    for i in range(500):
        agent, data, seed = AGENTS[i % 5], f"body{i // 5 % 5}-medium-local", i // 25
        place = folder / f"{data}-{agent}-s{seed}-20260101-000000"
        place.mkdir(parents=True)
        config = {"agent": agent, "seed": seed, "num_epochs": 30, "updates_per_epoch": 990, "num_eval_episodes": 10}
        head = {"update": 0, "seconds": 0.0, "config": config, "data": {"name": data, "source": "local"}}
        rows = [head | {"versions": {"torch": "2.9.0"}, "score_name": "local score", "behavior_score": 40.0}]
        for update in range(30, 29_701, 30):
            rows.append({"update": update, "seconds": update / 100} | {f"loss/{k}": update**-0.5 for k in "abcdefgh"})
            if update % 990 == 0:
                score = 40 + (i * 7 + update) % 13
                rows.append(
                    {"update": update + 10, "seconds": update / 100, "eval/score": score, "eval/return_mean": 9.0}
                )
        (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return 500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=2, help="times that each way is tried")
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {"loop": [], "sweep": []}
    with tempfile.TemporaryDirectory() as folder:
        loop(1, Path(folder) / "first")  # makes the data, fills caches
        for i in range(args.rounds):
            for way in (loop, sweep) if i % 2 == 0 else (sweep, loop):
                out = Path(folder) / "out"
                start = time.perf_counter()
                way(args.runs, out)
                seconds[way.__name__].append(round(time.perf_counter() - start, 1))
                shutil.rmtree(out)
                print(way.__name__, seconds[way.__name__][-1], flush=True)
        count = write_runs(Path(folder) / "runs")
        start = time.perf_counter()
        call("report.py", str(Path(folder) / "runs"), "--out", str(Path(folder) / "report"))
        report, size = time.perf_counter() - start, (Path(folder) / "report" / "index.html").stat().st_size
    over = statistics.median(seconds["sweep"]) / statistics.median(seconds["loop"]) - 1
    print(f"sweep beside loop {over:+.1%}; report of {count} runs {report:.1f} s, {size / 1e6:.1f} MB")
    result = {"runs": args.runs, "seconds": seconds, "over": round(over, 3)}
    result |= {"report_runs": count, "report_seconds": round(report, 1), "report_bytes": size}
    print(write("sweep_speed", result))


if __name__ == "__main__":
    main()
