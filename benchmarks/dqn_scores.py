"""The published tables of DQN on windows, measured: models × clips × seeds, every reading of "average reward", curves.

    python benchmarks/dqn_scores.py lunar [--seeds 0 1 2] [--mixers mamba lstm transformer none] [--jobs 2]
    python benchmarks/dqn_scores.py highway [--clips 1.0 0.5 0.1]
    python benchmarks/dqn_scores.py lunar --table       # no training: the table and the figure of what is finished

Every run is one process on one CPU thread; an interrupted run is resumed. A finished one leaves its readings and curves
in benchmarks/dqn_<experiment>/, from which table and figure are made, and is not repeated while they are there. What
the "average smoothed reward" of the published tables is, their text and figures do not agree on, so all readings are
given:

    final           the last smoothed return of a training episode (ε-greedy), the reading to compare with
    mean            the mean of the smoothed returns from the first update on, as the paper says
    last 10%        the mean of the smoothed returns in the last tenth of the steps; raw: of the returns themselves
    greedy          the mean return of 50 greedy episodes after training, the one to rank by
    TD              the last smoothed TD loss; it hangs on priorities and weights, so between models it says nothing
    TD uniform      the same of transitions drawn uniformly, without weights

Smoothing is TensorBoard's, 0.9 over episodes (returns) or log rows (losses).
"""

import argparse
import re
import shlex
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from harness import ROOT, keep, kept, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from common import logger
from common.logger import put_into_page
from common.plotting import smoothed
from config import parse
from gym_utils import ACTIONS, BASELINE_RETURNS

MIXERS = ("none", "lstm", "transformer", "mamba")


class Experiment(NamedTuple):
    env: str
    clips: tuple[float, ...]
    grid: int  # environment steps between points of a curve
    published: dict[float, dict[str, tuple[float, float]]]  # clip -> model -> (reward, TD loss), 5 runs each


EXPERIMENTS = {
    "lunar": Experiment(
        "LunarLander-v3",
        (1.0,),
        500,
        {1.0: dict(zip(MIXERS, ((27.40, 0.0938), (99.60, 0.1444), (79.32, 0.7578), (224.68, 0.1183))))},
    ),
    "highway": Experiment(
        "highway-fast-v0",
        (1.0, 0.5, 0.1),
        50,
        {
            1.0: dict(zip(MIXERS, ((16.47, 0.1471), (12.90, 0.0717), (16.63, 0.1648), (17.52, 0.0207)))),
            0.5: dict(zip(MIXERS, ((17.09, 0.1368), (12.29, 0.0796), (15.82, 0.1509), (20.99, 0.0207)))),
            0.1: dict(zip(MIXERS, ((15.87, 0.1427), (12.21, 0.0711), (16.66, 0.1467), (20.06, 0.0215)))),
        },
    ),
}


def train(flags: list[str], out: Path) -> list[dict]:
    """Run the one run in `out`, or resume it, or leave it as it is if it is finished; its log."""
    if rows := finished(out):
        return rows
    folders = sorted(p for p in out.iterdir() if (p / "last_checkpoint.pt").exists()) if out.exists() else []
    argv = ["--resume", str(folders[-1])] if folders else [*flags, "--output_dir", str(out)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_name(out.name + ".log"), "a") as log:  # a clip of 0.5 is no suffix
        subprocess.run([sys.executable, "trainer.py", *argv], cwd=ROOT, stdout=log, stderr=log, check=True)
    return finished(out)


def finished(out: Path) -> list[dict]:
    """The log of the run in `out` if its last step is made and evaluated, else nothing."""
    for path in sorted(out.glob("*/log.jsonl"), reverse=True):
        rows = logger.read_log(path)
        if rows and any(r["env_step"] == rows[0]["config"]["env_steps"] and "eval/return_mean" in r for r in rows):
            return rows
    return []


def readings(rows: list[dict]) -> dict[str, float]:
    """Every reading of one finished run."""
    cfg = rows[0]["config"]
    steps, returns = zip(*[(r["env_step"], r["episode/return"]) for r in rows if "episode/return" in r])
    steps, raw, smooth = np.array(steps), np.array(returns), np.array(smoothed(returns))
    late, learning = steps >= 0.9 * cfg["env_steps"], steps >= cfg["learn_start"]
    evaluated = [r for r in rows if "eval/return_mean" in r][-1]
    chosen = {k.removeprefix("eval/"): v for k, v in evaluated.items() if k.startswith("eval/")}
    speeds = [r["steps_per_s"] for r in rows if r.get("updates_per_s")]
    return {
        "final_smoothed": smooth[-1],
        "mean_smoothed_window": smooth[learning].mean(),
        "mean_smoothed_last10pct": smooth[late].mean(),
        "raw_mean_last10pct": raw[late].mean(),
        "greedy_eval_mean": evaluated["eval/return_mean"],
        "td_final_smoothed": smoothed([r["loss/td"] for r in rows if "loss/td" in r])[-1],
        "td_unweighted_final_smoothed": smoothed([r["loss/td_unweighted"] for r in rows if "loss/td" in r])[-1],
        "td_uniform_final_smoothed": smoothed([r["loss/td_uniform"] for r in rows if "loss/td_uniform" in r])[-1],
        "gradient_clipped": statistics.mean(r["gradient/clipped"] for r in rows if "gradient/clipped" in r),
        "greedy": chosen,
        "episodes": len(raw),
        "steps_per_s_median": statistics.median(speeds),
        "seconds": rows[-1]["seconds"],
    }


def curve(rows: list[dict], key: str, grid: np.ndarray) -> list[float | None]:
    """One run's smoothed `key` on the grid; nothing before its first and behind its last point."""
    steps, values = zip(*[(r["env_step"], r[key]) for r in rows if key in r])
    line = np.interp(grid, steps, smoothed(values), left=np.nan, right=np.nan)
    return [None if np.isnan(y) else float(f"{y:.5g}") for y in line]


def kept_of(rows: list[dict], every: int) -> dict:
    """What stays of a finished run."""
    cfg = rows[0]["config"]
    grid = np.arange(0, cfg["env_steps"] + 1, every)
    curves = {key: curve(rows, key, grid) for key in ("episode/return", "loss/td")}
    own = {k: cfg[k] for k in ("mixer", "grad_clip", "seed", "compile")}
    return own | {"trained_with": rows[0]["versions"], "readings": readings(rows), "every": every, "curves": curves}


def draw(name: str, experiment: Experiment, runs: dict[tuple[str, float], list[dict]]) -> Path:
    """Reward above, TD loss below, a column a clip; mean over seeds and ± one standard deviation."""
    clips = [c for c in experiment.clips if any((m, c) in runs for m in MIXERS)]
    figure = Figure(figsize=(5.5 * len(clips) + 2, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(clips), squeeze=False, sharex=True)
    for column, clip in enumerate(clips):
        for i, mixer in enumerate(MIXERS):
            mine = runs.get((mixer, clip), [])
            for axis, key in zip(axes[:, column], ("episode/return", "loss/td")) if mine else ():
                lines = np.array([run["curves"][key] for run in mine], dtype=float)
                grid = np.arange(lines.shape[1]) * mine[0]["every"]
                there = ~np.isnan(lines).any(0)
                if not there.any():  # a run shorter than the grid is fine
                    continue
                middle, spread = lines[:, there].mean(0), lines[:, there].std(0)
                label = f"{mixer} ({len(mine)} seed{'s' * (len(mine) > 1)})"
                axis.plot(grid[there], middle, color=f"C{i}", lw=1.3, label=label)
                axis.fill_between(grid[there], middle - spread, middle + spread, color=f"C{i}", alpha=0.15, lw=0)
        axes[0, column].set_title(f"{experiment.env}, gradient clip {clip:g}")
        for policy, value in BASELINE_RETURNS[experiment.env].items():
            axes[0, column].axhline(value, color="0.5", ls=":", lw=1)
            beside = axes[0, column].get_yaxis_transform()
            axes[0, column].text(1.0, value, f" {policy}", transform=beside, fontsize=7, color="0.4", va="center")
        if axes[0, column].get_legend_handles_labels()[1]:
            axes[0, column].legend(frameon=False, fontsize=8)
        axes[1, column].set(yscale="log" if axes[1, column].lines else "linear", xlabel="environment steps")
    axes[0, 0].set_ylabel("return of training episodes, smoothed")
    axes[1, 0].set_ylabel("TD loss, smoothed")
    for axis in axes.flat:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    path = ROOT / "benchmarks" / f"{name}.png"
    with logger.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)
    return path


def row_of(experiment: Experiment, mixer: str, clip: float, runs: list[dict]) -> dict:
    """A row of the table: every reading by seed, its mean and its spread."""
    each = [run["readings"] for run in runs]
    row = {"mixer": mixer, "grad_clip": clip, "seeds": [run["seed"] for run in runs]}
    for key in each[0]:
        values = [r[key] for r in each]
        row[key] = {"by_seed": values}
        if key != "greedy":
            row[key]["mean"] = statistics.mean(values)
            row[key]["std"] = statistics.stdev(values) if len(values) > 1 else None
    row["published_reward"], row["published_td"] = experiment.published[clip][mixer]
    return row


def markdown(experiment: Experiment, rows: list[dict]) -> str:
    """The tables for people: the readings; then what the greedy policies do, beside policies that look at nothing."""
    keys = ["final_smoothed", "mean_smoothed_window", "mean_smoothed_last10pct", "raw_mean_last10pct"]
    heads = ["model", "clip", "seeds", "published", "final", "mean", "last 10%", "raw", "greedy", "published TD"]
    heads += ["TD", "TD uniform"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for r in rows:
        spread = lambda k: f" ± {r[k]['std']:.1f}" if r[k]["std"] is not None else ""  # noqa: B023, E731
        cells = [r["mixer"], f"{r['grad_clip']:g}", str(len(r["seeds"])), f"{r['published_reward']:.2f}"]
        cells += [f"{r[k]['mean']:.1f}{spread(k)}" for k in [*keys, "greedy_eval_mean"]]
        cells.append(f"{r['published_td']:.4f}")
        cells += [f"{r[k]['mean']:.4f}" for k in ("td_final_smoothed", "td_uniform_final_smoothed")]
        lines.append("| " + " | ".join(cells) + " |")
    names = ACTIONS[experiment.env]
    ends = [k for k in ("landed", "crash") if k in rows[0]["greedy"]["by_seed"][0]]
    heads = ["greedy episodes", "clip", "return by seed", *ends, "time limit", *names]
    lines += ["", f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for r in rows:
        each = r["greedy"]["by_seed"]
        share = lambda k: statistics.mean(g[k] for g in each)  # noqa: B023, E731
        shares = [*map(share, ends), 1 - sum(map(share, ends)), *(share(f"action_{i}") for i in range(len(names)))]
        cells = [r["mixer"], f"{r['grad_clip']:g}", ", ".join(f"{g['return_mean']:.1f}" for g in each)]
        cells += [f"{abs(x):.0%}" for x in shares]  # no -0%
        lines.append("| " + " | ".join(cells) + " |")
    for policy, value in BASELINE_RETURNS[experiment.env].items():
        lines.append(f"| {policy} | | {value:.1f} |" + " |" * (len(ends) + 1 + len(names)))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--mixers", nargs="+", choices=MIXERS, default=MIXERS)
    parser.add_argument("--clips", nargs="+", type=float)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "dqn_scores")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--table", action="store_true", help="train nothing")
    parser.add_argument("--flags", default="", help='more of trainer.py, --flags="--d_state 16"; a table of its own')
    args = parser.parse_args()
    experiment, table_name = EXPERIMENTS[args.experiment], f"dqn_{args.experiment}"
    if args.flags:
        table_name += "_" + re.sub(r"\W+", "_", args.flags.strip("- "))
    common = ["--agent", "dqn", "--env", experiment.env, "--threads", "1", "--device", "cpu", "--no_tensorboard"]
    common += shlex.split(args.flags)
    parse(common)  # a wrong flag is found before the first run

    def run(seed: int, clip: float, mixer: str) -> None:
        start, name = time.time(), f"{mixer}-clip{clip:g}-s{seed}"
        if name in kept(table_name):
            return
        own = ["--mixer", mixer, "--grad_clip", str(clip), "--seed", str(seed)]
        own += ["--compile"] if mixer == "mamba" else []  # the others gain nothing by it
        rows = train([*common, *own], args.out / table_name.removeprefix("dqn_") / name)
        keep(table_name, name, kept_of(rows, experiment.grid))
        print(f"{mixer}, clip {clip:g}, seed {seed}: finished ({time.time() - start:.0f} s)", flush=True)

    if not args.table:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [
                pool.submit(run, seed, clip, mixer)
                for seed in args.seeds
                for clip in args.clips or experiment.clips
                for mixer in args.mixers
            ]
            for job in jobs:
                job.result()

    runs = {}
    for clip in experiment.clips:
        for mixer in MIXERS:
            mine = [r for r in kept(table_name).values() if (r["mixer"], r["grad_clip"]) == (mixer, clip)]
            if mine:
                runs[mixer, clip] = sorted(mine, key=lambda r: r["seed"])
    if not runs:
        raise SystemExit(f"no finished run in benchmarks/{table_name}")
    table = [row_of(experiment, *key, mine) for key, mine in runs.items()]
    result = {
        "env": experiment.env,
        "flags": common,
        "trivial_policies": BASELINE_RETURNS[experiment.env],
        "rows": table,
    }
    text = markdown(experiment, table)
    print(text)
    if not args.flags:
        put_into_page(f"python benchmarks/dqn_scores.py {args.experiment}", text, ROOT / "docs" / "results.md")
    print(draw(table_name, experiment, runs), write(table_name, result))


if __name__ == "__main__":
    main()
