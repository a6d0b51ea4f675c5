"""PPO from an offline checkpoint beside PPO from scratch, score against steps; and what its guards are worth.

    python benchmarks/ppo_scores.py --init RUN_OR_CHECKPOINT --file datasets/hopper-medium-reroll.hdf5 [--jobs 2]

Every run is one process on one CPU thread; an interrupted run is resumed, a finished one is not repeated. `--file` is
the data that the checkpoint learned from, for the cloning beside PPO. `--rows`, `--seeds` choose some of the runs and
write no table; `--table` trains nothing and writes the table of all that is finished.
"""

import argparse
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import ROOT, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scores import judge, train

import records

FROM = ["--init", "{init}", "--dataset", "{file}"]
ROWS = {  # name -> flags of its own, seeds
    "ppo from the checkpoint": (FROM, (0, 1, 2)),
    "ppo from scratch, MLP": (["--init", "none", "--mixer", "mlp", "--env", "hopper"], (0, 1, 2)),
    "no anchor": ([*FROM, "--kl_coef", "0", "--bc_coef", "0"], (0,)),
    "no value warm-up": ([*FROM, "--value_warmup", "0"], (0,)),
}
COMMON = ["--agent", "ppo", "--threads", "1", "--no_tensorboard", "--eval_every", "10000", "--num_eval_episodes", "20"]
FIRST = 20_000  # steps in which a good policy must not be lost


def curve(folder: Path) -> list[tuple[int, float]]:
    """(environment step, score) of the run's evaluations but the last, which has other episodes."""
    rows = [r for r in records.read_log(folder / "log.jsonl") if "eval/score" in r]
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
    with records.replacing(path) as part:
        figure.savefig(part, format="png", dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, required=True, help="the offline checkpoint, or its run folder")
    parser.add_argument("--file", type=Path, required=True, help="an HDF5 file in D4RL's layout")
    parser.add_argument("--env_steps", type=int, default=500_000)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "scores" / "ppo")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="train and judge these only")
    parser.add_argument("--seeds", nargs="+", type=int, help="train and judge these only")
    parser.add_argument("--table", action="store_true", help="train nothing; write the table of the finished runs")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = (args.init / "last_checkpoint.pt" if args.init.is_dir() else args.init).resolve()
    fill = {"init": str(checkpoint), "file": str(args.file.resolve())}

    def place(row: str, seed: int) -> Path:
        return args.out / f"{''.join(c if c.isalnum() else '-' for c in row)}-s{seed}"

    def run(row: str, seed: int) -> tuple[str, int, Path, dict]:
        start, judged = time.time(), next(place(row, seed).glob(f"*/judged-{args.episodes}.json"), None)
        own = [flag.format(**fill) for flag in ROWS[row][0]]
        flags = [*COMMON, "--env_steps", str(args.env_steps), *own, "--seed", str(seed)]
        folder = judged.parent if judged else train(flags, place(row, seed))
        result = judge(folder, args.episodes)
        print(f"{row}, seed {seed}: {result['eval/score']:.1f} ({time.time() - start:.0f} s)", flush=True)
        return row, seed, folder, result

    wanted = [(row, seed) for row in args.rows or ROWS for seed in args.seeds or ROWS[row][1]]
    wanted.sort(key=lambda x: x[1])
    if args.table:
        wanted = [(r, s) for r, s in wanted if [*place(r, s).glob(f"*/judged-{args.episodes}.json")]]
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [job.result() for job in [pool.submit(run, row, seed) for row, seed in wanted]]
    if args.rows or args.seeds:
        return
    if not done:
        raise SystemExit(f"no run in {args.out} is finished")

    offline = judge_in(args.out, checkpoint, args.episodes)
    table, curves = {}, {}
    for row in dict.fromkeys(row for row, *_ in done):
        mine = [(seed, folder, result) for r, seed, folder, result in done if r == row]
        curves[row] = [curve(folder) for _, folder, _ in mine]
        last = [result["eval/score"] for *_, result in mine]
        early = [[y for s, y in c if s <= FIRST] for c in curves[row]]
        rates = [r["steps_per_s"] for _, f, _ in mine for r in records.read_log(f / "log.jsonl") if "steps_per_s" in r]
        table[row] = {
            "flags": ROWS[row][0],
            "seeds": [seed for seed, *_ in mine],
            "last_score_by_seed": [round(s, 2) for s in last],
            "last_score_mean": round(statistics.mean(last), 2),
            "last_score_std_over_seeds": round(statistics.stdev(last), 2) if len(last) > 1 else None,
            "mean_of_all_evaluations_by_seed": [round(statistics.mean(y for _, y in c), 2) for c in curves[row]],
            "least_score_in_the_first_20k_by_seed": [round(min(e), 2) for e in early],
            "the_same_as_a_share_of_the_first": [round(min(e) / e[0], 3) for e in early],
            "env_steps_per_s_one_thread": round(statistics.median(rates), 1),
        }
        print(f"{row:32} last {table[row]['last_score_mean']:6.2f}  {table[row]['last_score_by_seed']}")
    if "ppo from scratch, MLP" in table:
        del table["ppo from scratch, MLP"]["the_same_as_a_share_of_the_first"]  # it starts from nothing
    print(f"{'the checkpoint':32} last {offline['eval/score']:6.2f}")
    result = {
        "checkpoint": {"agent": offline["agent"], "updates": offline["updates"], "data": offline["data"]},
        "checkpoint_score": round(offline["eval/score"], 2),
        "env_steps": args.env_steps,
        "common_flags": COMMON,
        "judged": f"last checkpoint, {args.episodes} episodes, {offline['env']}; curves: 20 episodes",
        "rows": table,
    }
    name = f"{offline['agent']} of {offline['data']['name']}"
    print(draw(curves, offline["eval/score"], name), write("ppo_scores", result))


def judge_in(out: Path, checkpoint: Path, episodes: int) -> dict:
    """The offline checkpoint's score, judged once; the file lies among our runs and not in its own folder."""
    folder = out / "offline"
    folder.mkdir(exist_ok=True)
    link = folder / "last_checkpoint.pt"
    records.publish(checkpoint, link)
    return judge(folder, episodes)


if __name__ == "__main__":
    main()
