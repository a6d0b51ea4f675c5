"""Named experiments: settings × seeds, trained, their last checkpoints evaluated over 100 episodes; table and picture.

    python benchmarks/scores.py hopper_medium --file datasets/hopper-medium-reroll.hdf5 [--jobs 2]
    python benchmarks/scores.py objectives_hopper --file ...      (also objectives_walker2d, objectives_halfcheetah)
    python benchmarks/scores.py choices --file ...
    python benchmarks/scores.py decision_hopper --file ...        (also decision_halfcheetah, dm_ablation)

Every run is one process on one CPU thread; an interrupted run is resumed, a finished one is not repeated. `--file` is
an HDF5 file in D4RL's layout; its name and SHA-256 are in the result. `--seeds 0` trains and evaluates that seed alone,
`--rows bamba` those rows whose name holds the word; `--table` trains nothing and writes the table of all that is
finished.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from harness import ROOT, VARIANTS, median_seconds, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import utils
from common import logger


class Experiment(NamedTuple):
    """What is compared."""

    common: list[str]  # flags of every run
    rows: dict[str, list[str]]  # name -> flags of its own
    seeds: list[int]


SEQUENCE = ["--preset", "small", "--eval_freq", "5", "--save_freq", "5", "--num_epochs", "30"]
SMALL = [*VARIANTS["upstream small"], "--eval_freq", "2", "--save_freq", "2", "--compile"]


def cloning(env: str) -> Experiment:
    """Behaviour cloning on a body's medium data, beside what the literature reports for it."""
    flags = [*SMALL, "--num_epochs", "16", "--env", env]
    return Experiment(flags, {"cloning (alpha 0)": ["--alpha", "0"]}, [0])


def decision(env: str) -> Experiment:
    """dt, dmamba and dm, and on the same data Bamba and cloning (which on hopper are the experiment hopper_medium)."""
    bamba = [*SMALL, "--num_epochs", "30"]
    rows = {agent: [*SEQUENCE, "--agent", agent] for agent in ("dt", "dmamba", "dm")}
    if env != "hopper":
        rows |= {"bamba": bamba, "cloning (alpha 0)": [*bamba, "--alpha", "0"]}
    return Experiment(["--env", env], rows, [0, 1, 2])


def objectives(env: str) -> Experiment:
    """Bamba as it is trained by default, beside the same code without an encoder and with other objectives."""
    common = ["--preset", "small", "--env", env, "--num_epochs", "30", "--eval_freq", "2", "--save_freq", "2"]
    mlp = ["--encoder", "none"]
    rows = {
        "Bamba": [],
        "ReBRAC (no encoder)": mlp,
        "TD3+BC (no encoder)": [*mlp, "--objective", "td3bc"],
        "IQL (no encoder)": [*mlp, "--objective", "iql"],
        "cloning (no encoder)": [*mlp, "--objective", "bc", "--critic_pretrain", "0"],
    }
    return Experiment(common, rows, [0, 1, 2])


EXPERIMENTS = {
    **{f"objectives_{env}": objectives(env) for env in ("hopper", "walker2d", "halfcheetah")},
    "cloning_walker2d": cloning("walker2d"),
    "cloning_halfcheetah": cloning("halfcheetah"),
    # do local data teach what D4RL's policy, rolled again, does? (its row: hopper_medium, bamba, seed 0)
    "local_hopper_medium": Experiment([*SMALL, "--env", "hopper", "--num_epochs", "30"], {"bamba": []}, [0]),
    # section 6.2 of the main job: is Bamba better than cloning, and than the policy that collected the data?
    "hopper_medium": Experiment(
        [*SMALL, "--env", "hopper", "--num_epochs", "30"],
        {"bamba": [], "cloning (alpha 0)": ["--alpha", "0"]},
        [0, 1, 2],
    ),
    # what the critics are shown, and which encoder reads the next window for the target
    "choices": Experiment(
        [*SMALL, "--env", "hopper", "--num_epochs", "20"],
        {
            "critic on the state": ["--critic_input", "state"],
            "critic on the embedding": ["--critic_input", "embedding"],
            "critic on the embedding, detached": ["--critic_input", "embedding_detached"],
            "critic on the state, EMA encoder in the target": ["--critic_input", "state", "--target_encoder", "ema"],
        },
        [0],
    ),
    # the return-conditioned agents beside Bamba and cloning
    "decision_hopper": decision("hopper"),
    "decision_halfcheetah": decision("halfcheetah"),
    # what each of dm's three ideas is worth
    "dm_ablation": Experiment(
        [*SEQUENCE, "--agent", "dm", "--env", "hopper"],
        {
            "dm": [],
            "no fine branch": ["--block", "coarse"],
            "no self-evolution": ["--self_evolution", "off"],
            "no auxiliary losses": ["--w_a", "1", "--w_s", "0", "--w_r", "0"],
        },
        [0, 1, 2],
    ),
}


def train(flags: list[str], out: Path) -> Path:
    """Run or resume the one run in `out`; returns its folder."""
    folders = sorted(p for p in out.iterdir() if (p / "last_checkpoint.pt").exists()) if out.exists() else []
    argv = ["--resume", str(folders[-1])] if folders else [*flags, "--output_dir", str(out)]
    with open(out.with_suffix(".log"), "a") as log:
        subprocess.run([sys.executable, "trainer.py", *argv], cwd=ROOT, stdout=log, stderr=log, check=True)
    return folders[-1] if folders else next(p for p in out.iterdir() if p.is_dir())


def evaluate(folder: Path, episodes: int) -> dict:
    """The last checkpoint's score, from the file that utils.py writes."""
    out = folder / f"eval-{episodes}.json"
    if not out.exists():
        argv = ["--checkpoint", str(folder / "last_checkpoint.pt"), "--episodes", str(episodes), "--json", str(out)]
        subprocess.run([sys.executable, "utils.py", *argv], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    return json.loads(out.read_text())


def act_latency(folder: Path) -> float:
    """Seconds of one environment step, one environment, one thread, float32, in the middle of an episode."""
    torch.set_num_threads(1)
    agent, _ = utils.load(folder / "last_checkpoint.pt", compile=False, cuda_graphs=False)
    agent.eval()
    state, reward, memory = torch.zeros(1, agent.spec.state), torch.zeros(1), agent.reset(1)
    for _ in range(50):
        _, memory = agent.act(state, reward, memory)
    return median_seconds(lambda: agent.act(state, reward, memory), 5, 50)


def draw(name: str, curves: dict[str, list[list[dict]]], first: dict) -> Path:
    """Score against updates: mean over seeds, shaded from the least to the greatest of them. first: a log's head."""
    behaviour, data = first["behavior_score"], first["data"]["name"]
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, (label, runs) in enumerate(curves.items()):
        updates = [r["update"] for r in runs[0] if "eval/score" in r]
        scores = [[r["eval/score"] for r in run if "eval/score" in r] for run in runs]
        middle = [statistics.mean(s) for s in zip(*scores)]
        axis.plot(updates, middle, color=f"C{i}", label=f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})")
        if len(runs) > 1:
            axis.fill_between(updates, *zip(*[(min(s), max(s)) for s in zip(*scores)]), color=f"C{i}", alpha=0.15, lw=0)
    axis.axhline(behaviour, color="0.4", ls="--", lw=1, label=f"mean of the data {behaviour:.1f}")
    axis.set(xlabel="updates", ylabel=first.get("score_name", "score"), title=f"{data}: 10-episode evaluations")
    axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    path = ROOT / "benchmarks" / f"{name}.png"
    with logger.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--file", required=True, help="an HDF5 file in D4RL's layout")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "scores")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", type=int, help="train and evaluate these seeds only, write no table")
    parser.add_argument("--rows", nargs="+", help="train and evaluate rows with such a word only, write no table")
    parser.add_argument("--table", action="store_true", help="train nothing; write the table of the finished runs")
    args = parser.parse_args()
    experiment, (out, name) = EXPERIMENTS[args.experiment], (args.out / args.experiment, args.experiment)
    out.mkdir(parents=True, exist_ok=True)
    common = [
        *experiment.common,
        "--dataset",
        str(Path(args.file).resolve()),
        "--threads",
        "1",
        "--no_tensorboard",
    ]

    def place(row: str, seed: int) -> Path:
        return out / f"{''.join(c if c.isalnum() else '-' for c in row)}-s{seed}"

    def run(row: str, seed: int) -> tuple[str, int, Path, dict]:
        start = time.time()
        finished = next(place(row, seed).glob(f"*/eval-{args.episodes}.json"), None)
        flags = [*common, *experiment.rows[row], "--seed", str(seed)]
        folder = finished.parent if finished else train(flags, place(row, seed))
        result = evaluate(folder, args.episodes)
        print(f"{row}, seed {seed}: {result['eval/score']:.1f} ({time.time() - start:.0f} s)", flush=True)
        return row, seed, folder, result

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = [row for row in experiment.rows if not args.rows or any(word in row for word in args.rows)]
        wanted = [(row, seed) for seed in args.seeds or experiment.seeds for row in rows]
        if args.table:
            wanted = [(r, s) for r, s in wanted if [*place(r, s).glob(f"*/eval-{args.episodes}.json")]]
        jobs = [pool.submit(run, row, seed) for row, seed in wanted]
        done = [job.result() for job in jobs]
    if args.seeds or args.rows:
        return

    table, curves = {}, {}
    for row in dict.fromkeys(row for row, *_ in done):
        mine = [(seed, folder, result) for r, seed, folder, result in done if r == row]
        logs = [logger.read_log(folder / "log.jsonl") for _, folder, _ in mine]
        last = [result["eval/score"] for *_, result in mine]
        scores = [[r["eval/score"] for r in log if "eval/score" in r] for log in logs]
        rates = [r["updates_per_s"] for log in logs for r in log if "updates_per_s" in r]
        table[row] = {
            "flags": experiment.rows[row],
            "seeds": [seed for seed, *_ in mine],
            "updates": mine[0][2]["updates"],
            "last_score_by_seed": [round(s, 2) for s in last],
            "last_score_mean": round(statistics.mean(last), 2),
            "last_score_std_over_seeds": round(statistics.stdev(last), 2) if len(last) > 1 else None,
            "best_of_evaluations_by_seed": [round(max(s), 2) for s in scores],
            "mean_of_last_5_evaluations_by_seed": [round(statistics.mean(s[-5:]), 2) for s in scores],
            "updates_per_s_one_thread": round(statistics.median(rates), 1),
            "act_ms_one_environment": round(act_latency(mine[0][1]) * 1e3, 3),
        }
        curves[row] = logs
    if not table:
        raise SystemExit(f"no run in {out} is finished")
    first = curves[next(iter(curves))][0][0]
    env = first["config"]["env"]
    result = {
        "data": first["data"],
        "score_name": first.get("score_name", "score"),
        "behavior_score": round(first["behavior_score"], 2),
        "common_flags": experiment.common,
        "evaluated": f"last checkpoint, {args.episodes} episodes, {env} v4; best: of the run's 10-episode evaluations",
        "rows": table,
    }
    for row, r in table.items():
        print(
            f"{row:48} last {r['last_score_mean']:6.2f} ± {r['last_score_std_over_seeds']}  {r['last_score_by_seed']}"
        )
    print(f"{'the data':48} mean {result['behavior_score']:6.2f}")
    print(draw(name, curves, first), write(name, result))


if __name__ == "__main__":
    main()
