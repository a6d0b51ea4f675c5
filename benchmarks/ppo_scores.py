"""PPO from an offline checkpoint beside PPO from scratch, score against steps; and what its guards are worth.

    python benchmarks/ppo_scores.py --init RUN_OR_CHECKPOINT --file datasets/hopper-medium-reroll.hdf5 [--jobs 2]

Every run is one process on one CPU thread; an interrupted run is resumed. A finished one leaves its score and curve in
benchmarks/ppo/, from which table and picture are made, and is not repeated while they are there. `--file` is the data
that the checkpoint learned from, for the cloning beside PPO. `--rows`, `--seeds` choose some of the runs; `--table`
trains nothing and writes the table of all that is finished.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from harness import ROOT, keep, kept, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scores import evaluate, train

from common import logger
from common.files import sha256_of
from common.logger import put_into_page

FROM = ["--init", "{init}", "--dataset", "{file}"]
ROWS = {  # name -> flags of its own, seeds
    "ppo from the checkpoint": (FROM, (0, 1, 2)),
    "ppo from scratch, MLP": (["--init", "none", "--mixer", "mlp", "--env", "hopper"], (0, 1, 2)),
    "no anchor": ([*FROM, "--kl_coef", "0", "--bc_coef", "0"], (0,)),
    "no value warm-up": ([*FROM, "--value_warmup", "0"], (0,)),
}
COMMON = ["--agent", "ppo", "--threads", "1", "--no_tensorboard", "--eval_every", "10000", "--num_eval_episodes", "20"]
FIRST = 20_000  # steps in which a good policy must not be lost
COMMAND = "python benchmarks/ppo_scores.py"


def curve(folder: Path) -> list[tuple[int, float]]:
    """(environment step, score) of the run's evaluations but the last, which has other episodes."""
    rows = [r for r in logger.read_log(folder / "log.jsonl") if "eval/score" in r]
    return [(r["env_step"], r["eval/score"]) for r in rows[:-1]]


def draw(curves: dict[str, list], offline: float, name: str) -> Path:
    """Score against steps: mean over seeds, shaded from the least to the greatest of them."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, (label, runs) in enumerate(curves.items()):
        steps, scores = [s for s, _ in runs[0]], list(zip(*[[y for _, y in run] for run in runs]))
        steps = steps[: len(scores)]
        label = f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})"
        axis.plot(steps, [statistics.mean(s) for s in scores], color=f"C{i}", label=label)
        if len(runs) > 1:
            axis.fill_between(
                steps, [min(s) for s in scores], [max(s) for s in scores], color=f"C{i}", alpha=0.15, lw=0
            )
    axis.axhline(offline, color="0.4", ls="--", lw=1, label=f"the checkpoint, 100 episodes: {offline:.1f}")
    axis.set(xlabel="environment steps", ylabel="online score", title=f"{name}: 20-episode evaluations")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    path = ROOT / "benchmarks" / "ppo_scores.png"
    with logger.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)
    return path


def table_of(done: list[dict]) -> dict[str, dict]:
    """A row each: the last checkpoints' scores, and how low the evaluations of the first steps were."""
    table = {}
    for row in [row for row in ROWS if any(d["row"] == row for d in done)]:
        mine = sorted((d for d in done if d["row"] == row), key=lambda d: d["seed"])
        last, early = [d["score"] for d in mine], [[y for s, y in d["curve"] if s <= FIRST] for d in mine]
        table[row] = {
            "flags": ROWS[row][0],
            "seeds": [d["seed"] for d in mine],
            "last_score_by_seed": [round(s, 2) for s in last],
            "last_score_mean": round(statistics.mean(last), 2),
            "last_score_std_over_seeds": round(statistics.stdev(last), 2) if len(last) > 1 else None,
            "mean_of_all_evaluations_by_seed": [round(statistics.mean(y for _, y in d["curve"]), 2) for d in mine],
            "first_score_by_seed": [round(e[0], 2) for e in early],
            "least_score_in_the_first_20k_by_seed": [round(min(e), 2) for e in early],
            "env_steps_per_s_one_thread": statistics.median(d["steps_per_s"] for d in mine),
        }
    return table


def markdown(table: dict[str, dict], offline: float) -> str:
    """The table for people."""
    heads = ["", "last checkpoint", "by seed", "mean of all evaluations", "before the first step", "least until 20,000"]
    lines = [f"| {' | '.join([*heads, 'steps/s'])} |", "|---|" + "---:|" * len(heads)]
    for row, r in table.items():
        spread = r["last_score_std_over_seeds"]
        cells = [row, f"{r['last_score_mean']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")]
        keys = ["last_score_by_seed", "mean_of_all_evaluations_by_seed", "first_score_by_seed"]
        for key in [*keys, "least_score_in_the_first_20k_by_seed"]:
            cells.append(", ".join(f"{x:.1f}" for x in r[key]))
        lines.append("| " + " | ".join([*cells, f"{r['env_steps_per_s_one_thread']:,.0f}"]) + " |")
    lines.append(f"| the offline checkpoint | {offline:.1f} |" + " |" * (len(heads) - 1))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="the offline checkpoint, or its run folder")
    parser.add_argument("--file", type=Path, required=True, help="an HDF5 file in D4RL's layout")
    parser.add_argument("--env_steps", type=int, default=500_000)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "scores" / "ppo")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="train and evaluate these only")
    parser.add_argument("--seeds", nargs="+", type=int, help="train and evaluate these only")
    parser.add_argument("--table", action="store_true", help="train nothing; write the table of the finished runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = (args.init / "last_checkpoint.pt" if args.init.is_dir() else args.init).resolve()
    fill, origin = {"init": str(checkpoint), "file": str(args.file.resolve())}, sha256_of(checkpoint)

    def run(row: str, seed: int) -> None:
        start, own = time.time(), [flag.format(**fill) for flag in ROWS[row][0]]
        init = origin if str(checkpoint) in own else None
        name = f"{row} {(init or 'new')[:8]} {args.env_steps} s{seed}".replace(",", "").replace(" ", "-")
        if name in kept("ppo"):
            return
        flags = [*COMMON, "--env_steps", str(args.env_steps), *own, "--seed", str(seed)]
        folder = train(flags, args.out / name)
        result = evaluate(folder, args.episodes)
        log = logger.read_log(folder / "log.jsonl")
        rates = [r["steps_per_s"] for r in log if "steps_per_s" in r]
        told = {"row": row, "seed": seed, "init": init, "env_steps": args.env_steps, "score": result["eval/score"]}
        told |= {"trained_with": log[0]["versions"], "curve": curve(folder)}
        told |= {"steps_per_s": round(statistics.median(rates), 1)}
        keep("ppo", name, told)
        print(f"{row}, seed {seed}: {told['score']:.1f} ({time.time() - start:.0f} s)", flush=True)

    wanted = [] if args.table else [(row, seed) for row in args.rows or ROWS for seed in args.seeds or ROWS[row][1]]
    with ThreadPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(run, *which) for which in sorted(wanted, key=lambda x: x[1])]:
            job.result()
    done = [d for d in kept("ppo").values() if d["env_steps"] == args.env_steps and d["init"] in (origin, None)]
    if not done:
        raise SystemExit(f"no run of {args.env_steps:,} steps from this checkpoint is in benchmarks/ppo")

    offline = evaluate_into(args.out, checkpoint, args.episodes)
    table = table_of(done)
    result = {
        "checkpoint": {"sha256": origin} | {key: offline[key] for key in ("agent", "updates", "data")},
        "checkpoint_score": round(offline["eval/score"], 2),
        "env_steps": args.env_steps,
        "common_flags": COMMON,
        "evaluated": f"last checkpoint, {args.episodes} episodes, {offline['env']}; curves: 20 episodes",
        "rows": table,
    }
    print(text := markdown(table, result["checkpoint_score"]))
    put_into_page(COMMAND, text, ROOT / "docs" / "results.md")
    curves = {row: [d["curve"] for d in done if d["row"] == row] for row in table}
    name = f"{offline['agent']} of {offline['data']['name']}"
    print(draw(curves, offline["eval/score"], name), write("ppo_scores", result))


def evaluate_into(out: Path, checkpoint: Path, episodes: int) -> dict:
    """The offline checkpoint's score, evaluated once; the file lies among our runs and not in its own folder."""
    folder = out / "offline"
    folder.mkdir(exist_ok=True)
    link = folder / "last_checkpoint.pt"
    logger.link_latest(checkpoint, link)
    return evaluate(folder, episodes)


if __name__ == "__main__":
    main()
