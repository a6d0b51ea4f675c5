"""Named experiments: settings × seeds, trained, their last checkpoints evaluated over 100 episodes; table and picture.

    python benchmarks/scores.py hopper_medium --file datasets/hopper-medium-reroll.hdf5 [--jobs 2]
    python benchmarks/scores.py objectives_hopper --file ...      (also objectives_walker2d, objectives_halfcheetah)
    python benchmarks/scores.py long_hopper --file ...            (also long_walker2d, long_halfcheetah)
    python benchmarks/scores.py positions_hopper --file ...       (also positions_walker2d, positions_halfcheetah)
    python benchmarks/scores.py quick
    python benchmarks/scores.py choices --file ...
    python benchmarks/scores.py decision_hopper --file ...        (also decision_halfcheetah, dm_ablation)

Every run is one process on one CPU thread; an interrupted run is resumed. A finished one is kept in
benchmarks/EXPERIMENT/ and not repeated, so a table grows from day to day. `--file` is an HDF5 file in D4RL's layout;
its name and SHA-256 are in the result. `--seeds 0` trains and evaluates that seed alone, `--rows Bamba` those rows
whose name holds the word; `--table` trains nothing and writes the table of what is kept.
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
from harness import ROOT, VARIANTS, keep, kept, median_seconds, write
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import utils
from common import logger
from common.logger import put_into_page


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
    common = ["--preset", "small", "--env", env, "--num_epochs", "30", "--eval_freq", "2", "--save_freq", "5"]
    mlp = ["--encoder", "none"]
    rows = {
        "Bamba": [],
        "ReBRAC (no encoder)": mlp,
        "TD3+BC (no encoder)": [*mlp, "--objective", "td3bc"],
        "IQL (no encoder)": [*mlp, "--objective", "iql"],
        "cloning (no encoder)": [*mlp, "--objective", "bc", "--critic_pretrain", "0"],
    }
    return Experiment([*common, "--compile"], rows, [0, 1, 2])


def long(env: str) -> Experiment:
    """Bamba by default, for as long as a CPU carries: what more updates bring."""
    common = ["--preset", "small", "--env", env, "--num_epochs", "200", "--eval_freq", "10", "--save_freq", "5"]
    return Experiment([*common, "--compile"], {"Bamba": [], "ReBRAC (no encoder)": ["--encoder", "none"]}, [0, 1, 2])


def positions(env: str) -> Experiment:
    """Velocities are hidden: agents with a past beside those without."""
    common = ["--preset", "small", "--env", env, "--observe", "positions", "--num_epochs", "30", "--eval_freq", "2"]
    common += ["--save_freq", "5", "--min_beta_actor", "0.02"]
    past = ["--burn_in", "2", "--state_delta", "--critic_input", "embedding_detached"]
    rows = {
        "Bamba": past,
        "LSTM": [*past, "--encoder", "lstm"],
        "MLP on two frames": ["--encoder", "none", "--state_delta"],
        "MLP on the present": ["--encoder", "none"],
    }
    return Experiment([*common, "--compile"], rows, [0, 1, 2])


QUICK = ["--preset", "quick"]

BODIES = ("hopper", "walker2d", "halfcheetah")
EXPERIMENTS = {
    # what `make train` does, with other seeds; it rolls its own data
    "quick": Experiment(QUICK, {"Bamba": [], "cloning": ["--objective", "bc", "--critic_pretrain", "0"]}, [*range(10)]),
    **{f"objectives_{env}": objectives(env) for env in BODIES},
    **{f"long_{env}": long(env) for env in BODIES},
    **{f"positions_{env}": positions(env) for env in BODIES},
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


def record(folder: Path, result: dict) -> dict:
    """What is kept of a finished run."""
    log = logger.read_log(folder / "log.jsonl")
    rates = [row["updates_per_s"] for row in log if "updates_per_s" in row]
    return {
        "data": log[0]["data"],
        "env": log[0]["config"]["env"],
        "score_name": log[0].get("score_name", "score"),
        "behavior_score": round(log[0]["behavior_score"], 2),
        "updates": result["updates"],
        "score": round(result["eval/score"], 2),
        "curve": [[row["update"], round(row["eval/score"], 2)] for row in log if "eval/score" in row],
        "updates_per_s": round(statistics.median(rates), 1),
        "act_ms": round(act_latency(folder) * 1e3, 3),
    }


def summary(runs: dict[int, dict]) -> dict:
    """A row of the table from its runs, by seed."""
    last = [run["score"] for run in runs.values()]
    curves = [[score for _, score in run["curve"]] for run in runs.values()]
    return {
        "seeds": list(runs),
        "updates": min(run["updates"] for run in runs.values()),
        "last_score_by_seed": last,
        "last_score_mean": round(statistics.mean(last), 2),
        "last_score_std_over_seeds": round(statistics.stdev(last), 2) if len(last) > 1 else None,
        "best_of_evaluations_by_seed": [max(curve) for curve in curves],
        "mean_of_last_5_evaluations_by_seed": [round(statistics.mean(curve[-5:]), 2) for curve in curves],
        "updates_per_s_one_thread": statistics.median(run["updates_per_s"] for run in runs.values()),
        "act_ms_one_environment": statistics.median(run["act_ms"] for run in runs.values()),
    }


def minutes_to_most(run: dict, share: float = 0.9) -> float:
    """Training time, without evaluations, until an evaluation first had this share of the last checkpoint's score."""
    updates = next((update for update, score in run["curve"] if score >= share * run["score"]), run["updates"])
    return updates / run["updates_per_s"] / 60


def mean_and_std(values: list[float]) -> str:
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def table_over_bodies(family: str) -> str:
    """docs/results.md's table: a row's last checkpoint and the mean of its last five evaluations, body by body."""
    found = {env: list(kept(f"{family}_{env}").values()) for env in BODIES}
    lines = [
        "| last checkpoint; mean of the last five evaluations | "
        + " | ".join(BODIES)
        + " | mean | updates/s | min to 90 % |",
        "|---|" + "---:|" * (len(BODIES) + 3),
    ]
    for row in EXPERIMENTS[f"{family}_hopper"].rows:
        cells, means, rates, minutes = [], [], [], []
        for env in BODIES:
            runs = [run for run in found[env] if run["row"] == row]
            last = [run["score"] for run in runs]
            late = [statistics.mean(score for _, score in run["curve"][-5:]) for run in runs]
            cells.append(f"{mean_and_std(last)}; {statistics.mean(late):.1f} ({len(runs)})" if runs else "")
            means += [statistics.mean(last)] if runs else []
            rates += [run["updates_per_s"] for run in runs]
            minutes += [f"{statistics.median(map(minutes_to_most, runs)):.1f}"] if runs else []
        mean = f"{statistics.mean(means):.1f}" if len(means) == len(BODIES) else ""
        if rates:
            times = ", ".join(minutes)
            lines.append(f"| {row} | {' | '.join(cells)} | {mean} | {statistics.median(rates):.0f} | {times} |")
    levels = [f"{found[env][0]['behavior_score']:.1f}" if found[env] else "" for env in BODIES]
    return "\n".join([*lines, f"| the data | {' | '.join(levels)} | | | |"])


def draw(name: str, rows: dict[str, dict[int, dict]]) -> Path:
    """Score against updates: mean over seeds, shaded from the least to the greatest of them."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for i, (label, runs) in enumerate(rows.items()):
        curves = [run["curve"] for run in runs.values()]
        updates = [update for update, _ in min(curves, key=len)]
        scores = [[score for _, score in curve[: len(updates)]] for curve in curves]
        middle = [statistics.mean(s) for s in zip(*scores)]
        axis.plot(updates, middle, color=f"C{i}", label=f"{label} ({len(runs)} seed{'s' * (len(runs) > 1)})")
        if len(runs) > 1:
            axis.fill_between(updates, *zip(*[(min(s), max(s)) for s in zip(*scores)]), color=f"C{i}", alpha=0.15, lw=0)
    first = next(iter(next(iter(rows.values())).values()))
    level = first["behavior_score"]
    axis.axhline(level, color="0.4", ls="--", lw=1, label=f"mean of the data {level:.1f}")
    axis.set(xlabel="updates", ylabel=first["score_name"], title=f"{first['data']['name']}: 10-episode evaluations")
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
    parser.add_argument("--file", help="an HDF5 file in D4RL's layout; without it the trainer finds data by --env")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "scores")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--seeds", nargs="+", type=int, help="train and evaluate these seeds only")
    parser.add_argument("--rows", nargs="+", help="train and evaluate rows with such a word only")
    parser.add_argument("--table", action="store_true", help="train nothing; write the table of the kept runs")
    args = parser.parse_args()
    experiment, name = EXPERIMENTS[args.experiment], args.experiment

    def key(row: str, seed: int) -> str:
        return f"{''.join(c if c.isalnum() else '-' for c in row)}-s{seed}"

    def run(row: str, seed: int) -> None:
        out = args.out / name / key(row, seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        data = ["--dataset", str(Path(args.file).resolve())] if args.file else []
        flags = [*experiment.common, *data, "--threads", "1", "--no_tensorboard"]
        start = time.time()
        folder = train([*flags, *experiment.rows[row], "--seed", str(seed)], out)
        kept_ = record(folder, evaluate(folder, args.episodes))
        keep(name, key(row, seed), {"row": row, "seed": seed, "flags": experiment.rows[row], **kept_})
        print(f"{row}, seed {seed}: {kept_['score']:.1f} ({time.time() - start:.0f} s)", flush=True)

    if not args.table:
        rows = [row for row in experiment.rows if not args.rows or any(word in row for word in args.rows)]
        wanted = [(row, seed) for seed in args.seeds or experiment.seeds for row in rows]
        missing = [(row, seed) for row, seed in wanted if key(row, seed) not in kept(name)]
        with ThreadPoolExecutor(args.jobs) as pool:
            for job in [pool.submit(run, row, seed) for row, seed in missing]:
                job.result()

    finished = sorted(kept(name).values(), key=lambda run: run["seed"])
    by_row = {row: {run["seed"]: run for run in finished if run["row"] == row} for row in experiment.rows}
    by_row = {row: runs for row, runs in by_row.items() if runs}
    if not by_row:
        raise SystemExit(f"no run of {name} is kept in benchmarks/{name}")
    table = {row: {"flags": experiment.rows[row], **summary(runs)} for row, runs in by_row.items()}
    result = {
        "data": finished[0]["data"],
        "score_name": finished[0]["score_name"],
        "behavior_score": finished[0]["behavior_score"],
        "common_flags": experiment.common,
        "evaluated": f"last checkpoint, {args.episodes} episodes, {finished[0]['env']} v4; best: of 10 episodes each",
        "rows": table,
    }
    for row, r in table.items():
        print(
            f"{row:48} last {r['last_score_mean']:6.2f} ± {r['last_score_std_over_seeds']}  {r['last_score_by_seed']}"
        )
    print(f"{'the data':48} mean {result['behavior_score']:6.2f}")
    print(draw(name, by_row), write(name, result))
    family, _, body = name.rpartition("_")
    if family in ("objectives", "positions") and body in BODIES:
        page = ROOT / "docs" / "results.md"
        put_into_page(f"python benchmarks/scores.py {family}_BODY", table_over_bodies(family), page)


if __name__ == "__main__":
    main()
