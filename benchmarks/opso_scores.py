"""OPSO in OGBench's mazes: success by task for f = 1, for f = 0 with its second phase, ablations, baselines.

    python -m ogbench_utils make pointmaze-medium-navigate
    python benchmarks/opso_scores.py pointmaze --dataset_dir datasets [--jobs 2] [--rows "OPSO, f = 1" ...]
    python benchmarks/opso_scores.py antmaze --rows "OPSO, f = 1" "GCBC: no proposer, no values"

Every run is one process on one CPU thread; an interrupted run is resumed. A finished one leaves its successes and curve
in benchmarks/opso/ (opso_antmaze/), from which table and curves are made, and is not repeated while they are there
(`--table`: train nothing). The last checkpoint is evaluated over 50 episodes a task; ways on the maze are drawn of the
first seed of f = 1, if it was trained in this folder. The data are rolled out on this machine by OGBench's own
controller, the ant's by a walker of this project's too, so rows are compared with each other, and with the published
ones (which learned from OGBench's file, for a million updates of 1,024 transitions) only as a landmark. The baselines
are made of the same parts: GCBC clones toward goals, GCIVL-style weighs the cloning by the advantage of V; neither
proposes latents, looks ahead more than a step, nor has leaps of V.
"""

import argparse
import json
import shlex
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, keep, kept, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scores import evaluate, train

import utils
from common import evaluation, logger
from common.logger import put_into_page
from ogbench_utils import TASKS, make_task

COMMON = ["--preset", "small", "--threads", "1", "--no_tensorboard", "--device", "cpu", "--compile"]
FLAT = ["--proposer", "none", "--proposal_steps", "1", "--no_value_leap", "--temperature"]
ROWS = {
    "OPSO, f = 1": [],
    "no expectile (least squares)": ["--expectile", "0.5"],
    "expectile 0.1 (the published code's sign)": ["--expectile", "0.1"],
    "no InfoNCE": ["--beta_n", "0"],
    "with alignment": ["--beta_a", "0.05"],
    "no proposer": ["--proposer", "none"],
    "near goals by proposals too": ["--no_goal_in_reach"],
    "inverse dynamics sees the goal": ["--inverse_goal"],
    "no leaps of V (Q alone)": ["--no_value_leap"],
    "one step ahead, not weighed (published)": [
        *("--proposal_steps", "1", "--temperature", "0", "--no_weigh_inverse", "--no_value_leap", "--inverse_goal"),
        "--no_goal_in_reach",
    ],
    "GCIVL-style: no proposer": [*FLAT, "10"],
    "GCBC: no proposer, no values": [*FLAT, "0"],
    "GCBC, none of its goals drawn near": [*FLAT, "0", "--policy_near", "0"],
}
SECOND = {  # rows of two phases
    "OPSO, f = 0, then its own steps": [],
    "f = 0, inverse dynamics sees the goal": ["--inverse_goal"],
}
PUBLISHED = {  # OGBench's paper, ...-medium-navigate
    "pointmaze": {"GCBC": 9, "GCIVL": 63, "GCIQL": 53, "QRL": 82, "CRL": 29, "HIQL": 79},
    "antmaze": {"GCBC": 29, "GCIVL": 72, "GCIQL": 71, "QRL": 88, "CRL": 95, "HIQL": 96},
}
KEPT = {"pointmaze": "opso", "antmaze": "opso_antmaze"}  # where finished runs are kept


def name_of(row: str, seed: int) -> str:
    return f"{''.join(c if c.isalnum() else '-' for c in row)}-s{seed}"


def run(row: str, seed: int, out: Path, common: list[str], epochs: int, env_steps: int, episodes: int) -> dict:
    """Train (both phases, if the row has two) and evaluate; what stays of it."""
    flags, name = [*common, "--seed", str(seed)], name_of(row, seed)
    offline = ["--num_epochs", str(epochs)]
    online = ["--env_steps", str(env_steps), "--eval_every", str(env_steps // 6)]
    if row in SECOND:
        alone = [*offline, "--inverse_data", "online", "--eval_freq", "0", *SECOND[row]]
        first = train(["--agent", "opso", *flags, *alone], out / f"first-{name}")
        online += ["--init", str(first / "last_checkpoint.pt")]
        folder = train(["--agent", "opso_online", *flags, *online], out / name)
    else:
        folder = train(["--agent", "opso", *flags, *offline, *ROWS[row]], out / name)
    result, log = evaluate(folder, episodes), logger.read_log(folder / "log.jsonl")
    return {
        "row": row,
        "seed": seed,
        "f": 0.0 if row in SECOND else 1.0,
        "trained_with": log[0]["versions"],
        "data": json.loads((folder / "config.json").read_text())["data"],
        "updates": result["updates"],
        "success": result["eval/score"],
        "by_task": {k: round(100 * statistics.mean(v), 1) for k, v in result["tasks"].items()},
        "curve": [(r.get("update", r.get("env_step")), r["eval/score"]) for r in log if "eval/score" in r],
        "updates_per_s": round(statistics.median(r["updates_per_s"] for r in log if "updates_per_s" in r), 1),
    }


def refuse_others(settings: dict, runs: dict[str, dict], where: str = "opso") -> None:
    """SystemExit if a kept run had another budget or other flags: a table compares rows, so they must agree."""
    for name, told in runs.items():
        if told["settings"] != settings:
            raise SystemExit(
                f"benchmarks/{where}/{name}.json was trained with {told['settings']}, and asked for is {settings}: "
                "give the same flags, or move the kept runs away and begin another table"
            )


def draw_ways(folder: Path, path: Path, episodes: int = 8) -> None:
    """Where the agent went in each task, on the maze: ways that arrived in colour, others in grey."""
    agent, _ = utils.load(folder / "last_checkpoint.pt", compile=False, cuda_graphs=False)
    acting, name = evaluation.eval_copy(agent), Path(agent.cfg.dataset).stem
    words = utils.split_name(utils.name_of(agent.cfg))
    figure = Figure(figsize=(3.2 * len(TASKS), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, task in zip(figure.subplots(1, len(TASKS)), TASKS):
        for seed in range(3_000_000, 3_000_000 + episodes):
            env = make_task(words.environment, task)
            state, info = env.reset(seed=seed)
            memory = acting.reset(1, torch.as_tensor(info["goal"])[None])
            way, over, cut = [state[:2]], False, False
            while not (over or cut):
                action, memory = acting.act(torch.as_tensor(state)[None], None, memory)
                state, _, over, cut, _ = env.step(action[0].numpy().astype(np.float32))
                way.append(state[:2])
            axis.plot(*zip(*way), color="C0" if over else "0.7", lw=0.9, zorder=2 if over else 1)
            axis.plot(*info["goal"][:2], "*", color="C3", ms=9, zorder=3)
        maze = env.env.unwrapped.maze_map
        axis.imshow(maze, cmap="Greys", alpha=0.35, extent=(-6, 4 * maze.shape[1] - 6, 4 * maze.shape[0] - 6, -6))
        axis.set(title=task, xticks=[], yticks=[])
        axis.invert_yaxis()
        env.close()
    figure.suptitle(f"{name}: {episodes} episodes a task; blue arrived\n", fontsize=10)
    with logger.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)


def draw_curves(done: list[dict], published: dict[str, int], path: Path) -> None:
    """Success, mean over seeds: against updates in phase 1, against own steps in phase 2 if any run has one."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    two = any(d["row"] in SECOND for d in done)
    axes = figure.subplots(1, 1 + two, sharey=True, squeeze=False, width_ratios=(3, 2)[: 1 + two])[0]
    for i, row in enumerate(row for row in (*ROWS, *SECOND) if any(d["row"] == row for d in done)):
        points = [d["curve"] for d in done if d["row"] == row]
        steps, scores = [u for u, _ in points[0]], [[s for _, s in p] for p in points]
        means = [statistics.mean(s) for s in zip(*scores)]
        line = "o-" if i < 10 else "o:"  # there are ten colours
        axes[int(row in SECOND)].plot(steps, means, line, ms=3, color=f"C{i}", label=f"{row} ({len(points)})")
    for axis in axes:
        for name, color in (("HIQL", "0.3"), ("GCIVL", "0.6")):
            label = f"{name}, published {published[name]}" if axis is axes[0] else None
            axis.axhline(published[name], color=color, ls="--", lw=1, label=label)
        axis.grid(alpha=0.25)
    axes[0].set(xlabel="updates", ylabel="success, %", ylim=(-2, 102), title="phase 1, from data")
    if two:
        axes[1].set(xlabel="own environment steps", title="phase 2, from own steps")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    with logger.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)


def table_of(done: list[dict]) -> dict[str, dict]:
    """A row each: success of the last checkpoints by seed and by task, in percent."""
    table = {}
    for row in [row for row in (*ROWS, *SECOND) if any(d["row"] == row for d in done)]:
        mine = sorted((d for d in done if d["row"] == row), key=lambda d: d["seed"])
        scores = [d["success"] for d in mine]
        table[row] = {
            "flags": ROWS[row] if row in ROWS else ["--inverse_data", "online", *SECOND[row]],
            "f": mine[0]["f"],
            "seeds": [d["seed"] for d in mine],
            "data": mine[0]["data"],
            "updates": mine[0]["updates"],
            "success_mean": round(statistics.mean(scores), 1),
            "success_std_over_seeds": round(statistics.stdev(scores), 1) if len(scores) > 1 else None,
            "success_by_seed": [round(s, 1) for s in scores],
            "by_task": {t: round(statistics.mean(d["by_task"][t] for d in mine), 1) for t in TASKS},
            "updates_per_s": statistics.median(d["updates_per_s"] for d in mine),
        }
    return table


def markdown(table: dict[str, dict], published: dict[str, int]) -> str:
    """The table for people; published figures below."""
    heads = ["", "f", "success, %", "by seed", *(t.replace("task", "task ") for t in TASKS)]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for row, r in table.items():
        spread = r["success_std_over_seeds"]
        cells = [row, f"{r['f']:g}", f"{r['success_mean']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")]
        cells += [", ".join(f"{s:.1f}" for s in r["success_by_seed"]), *(f"{s:.0f}" for s in r["by_task"].values())]
        lines.append("| " + " | ".join(cells) + " |")
    for name, success in published.items():
        lines.append(f"| {name}, published, OGBench's own file | | {success} |" + " |" * (len(heads) - 3))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=KEPT)
    parser.add_argument("--dataset", default="", help="default: EXPERIMENT-medium-navigate-local")
    parser.add_argument("--dataset_dir", default="datasets")
    parser.add_argument("--out", type=Path, help="default: outputs/scores/ and where it is kept")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--episodes", type=int, default=50, help="a task")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *SECOND], default=[*ROWS, *SECOND])
    parser.add_argument("--num_epochs", type=int, default=20, help="of 500 updates")
    parser.add_argument("--env_steps", type=int, default=60_000, help="of the second phase")
    parser.add_argument("--flags", default="", help='more of trainer.py for every run, --flags="--compile"')
    parser.add_argument("--table", action="store_true", help="train nothing; the table of what is finished")
    args = parser.parse_args()
    where, published = KEPT[args.experiment], PUBLISHED[args.experiment]
    args.dataset = args.dataset or f"{args.experiment}-medium-navigate-local"
    args.out = args.out or ROOT / "outputs" / "scores" / where
    args.out.mkdir(parents=True, exist_ok=True)
    data = ["--dataset", args.dataset, "--dataset_dir", str(Path(args.dataset_dir).resolve())]
    common = [*COMMON, *data, *shlex.split(args.flags)]
    settings = {key: vars(args)[key] for key in ("dataset", "num_epochs", "env_steps", "episodes", "flags")}
    refuse_others(settings, kept(where), where)

    def job(row: str, seed: int) -> None:
        name, began = name_of(row, seed), time.time()
        if name in kept(where):
            return
        told = run(row, seed, args.out, common, args.num_epochs, args.env_steps, args.episodes)
        keep(where, name, {"settings": settings} | told)
        print(f"{name}: {told['success']:.1f} {told['by_task']} ({time.time() - began:.0f} s)", flush=True)

    wanted = [] if args.table else [(row, seed) for seed in args.seeds for row in args.rows]
    with ThreadPoolExecutor(args.jobs) as pool:
        for j in [pool.submit(job, *which) for which in wanted]:
            j.result()
    done = list(kept(where).values())
    if not done:
        raise SystemExit(f"no finished run in benchmarks/{where}")
    table = table_of(done)
    print(text := markdown(table, published))
    put_into_page(f"python benchmarks/opso_scores.py {args.experiment}", text, ROOT / "docs" / "results.md")
    pictures = ROOT / "benchmarks"
    draw_curves(done, published, pictures / f"opso_{args.experiment}.png")
    for folder in sorted((args.out / name_of(next(iter(ROWS)), args.seeds[0])).glob("*/last_checkpoint.pt"))[-1:]:
        draw_ways(folder.parent, pictures / f"opso_{args.experiment}_ways.png")
    print(write(f"opso_{args.experiment}", {"episodes_a_task": args.episodes, "rows": table, "published": published}))


if __name__ == "__main__":
    sys.exit(main())
