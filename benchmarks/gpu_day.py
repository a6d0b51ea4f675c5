"""Everything that is to be known of a CUDA card, in one command.

    python benchmarks/gpu_day.py [--budget 540] [--stages facts speed] [--rehearse]

Stages run in order of value, each in a process of its own with its own limit, so that a fault on the card in one of
them cannot break the next. Those that check run side by side, those that time run alone. What a stage has found is on
disk as soon as it is found, and merged into one file; a stage that fails is told, with its last words, and the others
go on. The stages themselves are in gpu_stages.py. `--rehearse` runs all of them in miniature on the CPU.
"""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common.logger import atomic_write  # noqa: E402

POLL = 0.2  # seconds between looks at running stages
SPARE = 6  # seconds before its limit in which a stage stops of its own
TRIES = 8  # starts of one stage: after a fault it goes on behind the row that broke it


class Stage(NamedTuple):
    limit: float  # seconds
    alone: bool  # it measures time
    about: str


STAGES = {
    "facts": Stage(45, True, "the card, versions, bandwidth, rates of matrix products, cost of a launch"),
    "cuda_tests": Stage(120, False, "pytest -m cuda"),
    "layers_agree": Stage(100, False, "every layer and its gradients, CPU float64 against the device"),
    "agents_agree": Stage(100, False, "five updates of every agent with the same noise, CPU against the device"),
    "graph_is_eager": Stage(120, False, "50 updates eager, eager again, and as CUDA graphs"),
    "resume": Stage(120, False, "a checkpoint in the middle, on the same and on another device; rate 0 moves nothing"),
    "no_sync": Stage(90, False, "sampling, updating and metering never wait for the device"),
    "compile_is_eager": Stage(120, False, "bamba compiled and eager, also as graphs; fills the compiler's cache"),
    "compile_is_eager_2": Stage(120, False, "the same: dm, dmamba, dt"),
    "compile_is_eager_3": Stage(120, False, "the same: dqn, opso"),
    "speed": Stage(145, True, "updates a second: agents x precisions x eager, graph, compile"),
    "peer": Stage(55, True, "the published way: eager, a DataLoader, .item() in every update"),
    "many_seeds": Stage(70, True, "several agents in one process"),
    "train": Stage(105, True, "trainer.py itself, stopped and resumed"),
    "profile": Stage(60, True, "kernels of an update, and the ten longest"),
    "acting": Stage(45, True, "milliseconds of an evaluation's step, card and CPU"),
}


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540, help="seconds in all; no stage runs beyond them")
    parser.add_argument("--stages", nargs="+", choices=STAGES, help="which, and in which order (default: all)")
    parser.add_argument("--limits", nargs="+", default=[], metavar="STAGE=SECONDS", help="in place of a stage's own")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", help="the merged file (default: gpu_day.json in the folder $OUT, or in benchmarks/)")
    parser.add_argument("--jobs", type=int, help="stages that check side by side (default: 9; rehearsing 1)")
    parser.add_argument("--rehearse", action="store_true", help="everything in miniature on the CPU")
    parser.add_argument("--train_seconds", type=float, default=40, help="train: for how long, before it is resumed")
    parser.add_argument("--train_updates", type=int, default=0, help="train: so many updates instead, and the score")
    parser.add_argument("--train_dataset", default="", help="train: a .hdf5 file of hopper (default: noise)")
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=1e9, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rehearse:
        args.device = "cpu"
    args.jobs = args.jobs or (1 if args.rehearse else 9)
    return args


def default_out(args) -> Path:
    if os.environ.get("OUT"):
        return Path(os.environ["OUT"]) / "gpu_day.json"
    if args.rehearse:  # nothing to keep
        return Path(tempfile.gettempdir()) / "gpu_day_rehearsal.json"
    return ROOT / "benchmarks" / "gpu_day.json"


def write(path: Path, found: dict) -> None:
    with atomic_write(path) as part:
        part.write_text(json.dumps(found, indent=1) + "\n")


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def last_words(log: Path, lines: int = 12) -> str:
    """The end of what a stage printed."""
    text = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return "\n".join(line[:300] for line in text[-lines:])


def reason(log: Path, code: int) -> str:
    """Why a stage ended, in one line: of what it printed last, the line that names an error."""
    lines = last_words(log, 60).splitlines()
    named = [
        line
        for line in lines
        if re.match(r"[\w.]*(Error|Exception|Exit|Interrupt|Failed|Unsupported|OutOfResources)\b", line)
    ]
    if code < 0:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    return (named or lines or [f"exit code {code}"])[-1]


class Forked:
    """A stage as a fork of this process, with what of `subprocess.Popen` is needed of it.

    For rehearsals: PyTorch is loaded once, and not sixteen times.
    """

    def __init__(self, argv: list[str], log: Path):
        self.code = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            code = gpu_stage(arguments(argv))
        except SystemExit as end:
            print(end.code)
        finally:
            if sys.exc_info()[0]:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        return self.code

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.code


class Running:
    """One stage, from its first start to its end."""

    def __init__(self, name: str, args, folder: Path, seconds: float, together: bool):
        self.name, self.args, self.seconds, self.together = name, args, seconds, together
        self.part, self.log = folder / f"{name}.json", folder / f"{name}.log"
        self.begun, self.tries, self.known = time.time(), 0, -1
        self.status, self.error = "running", None
        self.start()

    def start(self) -> None:
        self.tries += 1
        left = self.seconds - (time.time() - self.begun)
        args = self.args
        command = ["--stage", self.name, "--out", str(self.part), "--device", args.device]
        command += ["--seconds", str(left), "--train_seconds", str(args.train_seconds)]
        command += ["--train_updates", str(args.train_updates), "--train_dataset", args.train_dataset]
        command += ["--rehearse"] * args.rehearse
        if args.rehearse:
            self.process = Forked(command, self.log)
            return
        env = {**os.environ, **({"OMP_NUM_THREADS": "2"} if self.together else {})}
        command = [sys.executable, __file__, *command]
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
            )

    def kill(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def over(self) -> bool:
        """Whether it has come to an end; after a fault it is started again if it had come further than before."""
        code = self.process.poll()
        spent = time.time() - self.begun
        if code is None:
            if spent < self.seconds:
                return False
            self.kill()
            self.status, self.error = "out of time", f"killed after {spent:.0f} s"
            self.blame("killed at the limit")
            return True
        if code == 0:
            self.status = "ok"
            return True
        why = reason(self.log, code)
        print(f"  {self.name}: ended with {code}: {why}", flush=True)
        row = self.blame(why)
        known = len(read(self.part))
        if row and known > self.known and self.tries < TRIES and self.seconds - spent > 15:
            self.known = known
            self.start()
            return False
        self.status, self.error = "failed", f"{last_words(self.log)}\n{why}".strip()
        return True

    def blame(self, why: str) -> bool:
        """Write the reason into the row that did not end. False if there is none."""
        found = read(self.part)
        open_rows = [row for row in found.values() if isinstance(row, dict) and row.get("error") == "did not end"]
        for row in open_rows:
            row |= {"error": why[:300], "ok": False}
        if open_rows:
            write(self.part, found)
        return bool(open_rows)

    def told(self) -> dict:
        record = {"status": self.status, "seconds": round(time.time() - self.begun, 1), "starts": self.tries}
        return record | ({"error": self.error} if self.error else {}) | {"result": read(self.part)}


def batches(names: list[str]) -> list[list[str]]:
    """Neighbours that may run side by side, in one list each."""
    found = []
    for name in names:
        if found and not STAGES[name].alone and not STAGES[found[-1][-1]].alone:
            found[-1].append(name)
        else:
            found.append([name])
    return found


def run(args) -> dict:
    """All the stages; returns the merged record, which is on disk too."""
    begun, out = time.time(), Path(args.out) if args.out else default_out(args)
    out.parent.mkdir(parents=True, exist_ok=True)
    names = args.stages or list(STAGES)
    record = {"command": "python " + shlex.join(sys.argv), "date": time.strftime("%Y-%m-%d %H:%M"), "stages": {}}
    record |= {"rehearsal": args.rehearse, "device": args.device, "budget": args.budget}
    left = lambda: args.budget - (time.time() - begun)  # noqa: E731
    running: list[Running] = []
    written = 0.0

    def merge() -> None:
        nonlocal written
        record["stages"] |= {r.name: r.told() for r in running}
        record["seconds"] = round(time.time() - begun, 1)
        write(out, record)
        written = time.time()

    with tempfile.TemporaryDirectory() as folder:
        try:
            for batch in batches(names):
                waiting = list(batch)
                while waiting or running:
                    while waiting and len(running) < args.jobs:
                        name = waiting.pop(0)
                        own = dict(pair.split("=") for pair in args.limits).get(name, STAGES[name].limit)
                        limit = min(float(own), left())
                        if name == "train" and args.train_updates:
                            limit = left()
                        if limit < 10:
                            record["stages"][name] = {"status": "left out", "error": "the budget is spent"}
                            print(f"{name}: left out, the budget is spent", flush=True)
                            continue
                        running.append(Running(name, args, Path(folder), limit, len(batch) > 1))
                    time.sleep(POLL)
                    ended = [r for r in running if r.over()]
                    if ended or time.time() - written > 5:
                        merge()
                    for r in ended:
                        running.remove(r)
                        told = record["stages"][r.name]
                        print(f"{r.name}: {told['status']} in {told['seconds']} s", flush=True)
                        if told["status"] == "failed":
                            print("    " + told["error"].replace("\n", "\n    "), flush=True)
        finally:
            for r in running:
                r.kill()
            merge()
    print(f"wrote {out}", flush=True)
    return record


# -- what is printed at the end -------------------------------------------------------------------


def number(x) -> str:
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return str(x)


def short(row) -> str:
    """A row in a few words."""
    if not isinstance(row, dict):
        return number(row)
    shown = {k: v for k, v in row.items() if not isinstance(v, (dict, list)) and k not in ("tail", "said")}
    return " ".join(f"{k}={number(v)}" for k, v in shown.items())


def worst(rows: dict) -> str:
    """Of a stage of checks, its greatest differences."""
    found = []
    for name in ("fp32", "tf32", "metrics", "graph", "control", "as_graphs", "moved_at_rate_0"):
        values = [(r[name], k) for k, r in rows.items() if isinstance(r, dict) and name in r]
        if values:
            found.append(f"{name} at most {number(max(values)[0])} ({max(values)[1]})")
    return ", ".join(found)


def speed_table(rows: dict) -> list[str]:
    modes = ("eager", "graph", "compile", "compile+graph")
    found: dict = {}
    for row in rows.values():
        if isinstance(row, dict) and "mode" in row:
            found.setdefault((row["agent"], row["precision"]), {})[row["mode"]] = row
    lines = [f"  {'updates/s':24}" + "".join(f"{m:>15}" for m in modes) + "   of the matmul limit (best)"]
    for (agent, precision), by_mode in found.items():
        cell = lambda m: by_mode.get(m, {}).get("updates_per_s")  # noqa: B023, E731
        cells = [number(cell(m)) if cell(m) else ("error" if m in by_mode else "-") for m in modes]
        shares = [r["share_of_limit"] for r in by_mode.values() if r.get("share_of_limit")]
        best = f"{max(shares):.1%}" if shares else "-"
        lines.append(f"  {agent + ' ' + precision:24}" + "".join(f"{c:>15}" for c in cells) + f"   {best}")
    return lines


def best_of(rows: dict, agent: str) -> float:
    rates = [r.get("updates_per_s") or 0 for r in rows.values() if isinstance(r, dict) and r.get("agent") == agent]
    return max(rates, default=0.0)


def table(record: dict) -> str:
    """The record in at most 12,000 characters."""
    lines, stages = [], record["stages"]
    speed = stages.get("speed", {}).get("result", {})
    for name, told in stages.items():
        rows = told.get("result", {})
        verdicts = [r["ok"] for r in rows.values() if isinstance(r, dict) and r.get("ok") is not None]
        count = f", {sum(verdicts)} of {len(verdicts)} ok" if verdicts else ""
        lines.append(f"{name} [{told['status']}, {told.get('seconds', 0)} s{count}]")
        if told.get("error"):
            lines.append("  " + told["error"].splitlines()[-1][:200])
        if name == "speed":
            lines += speed_table(rows)
            broken = {k: r for k, r in rows.items() if isinstance(r, dict) and r.get("error")}
            lines += [f"  {k}: {r['error'][:140]}" for k, r in broken.items()]
            lines += [f"  {k}: {r}" for k, r in rows.items() if isinstance(r, str)]
            continue
        if verdicts and name not in ("train", "cuda_tests"):
            lines.append("  " + worst(rows))
            rows = {k: r for k, r in rows.items() if not (isinstance(r, dict) and r.get("ok"))}
        for key, row in rows.items():
            text = short(row)
            if name == "peer" and isinstance(row, dict) and row.get("updates_per_s") and best_of(speed, row["agent"]):
                text += f" (ours, best: {best_of(speed, row['agent']) / row['updates_per_s']:.1f} times)"
            lines.append(f"  {key}: {text}"[:210])
            if name == "profile" and isinstance(row, dict):
                lines += [f"      {ms:8.3f} ms {n:7g} x {what[:60]}" for what, n, ms in row.get("top", [])[:4]]
    return "\n".join(lines)[-11_500:]


def gpu_stage(args) -> int:
    """One stage, in a process of its own."""
    sys.path.insert(0, str(Path(__file__).parent))
    import gpu_stages

    return gpu_stages.run(args.stage, args, max(args.seconds - SPARE, 4))


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if args.stage:
        return gpu_stage(args)
    if args.train_dataset and not Path(args.train_dataset).is_file():
        print(f"--train_dataset {args.train_dataset}: there is no such file; the stage will say so", file=sys.stderr)
    for name, value in (("PYTHONUNBUFFERED", "1"), ("HF_HUB_OFFLINE", "1"), ("MUJOCO_GL", "disable")):
        os.environ.setdefault(name, value)
    if args.rehearse:
        os.environ |= {"OMP_NUM_THREADS": "1", "TORCH_COMPILE_DISABLE": "1", "TORCHDYNAMO_DISABLE": "1"}
        sys.path.insert(0, str(Path(__file__).parent))
        import gpu_stages  # noqa: F401
        import torch._dynamo  # noqa: F401  the first optimizer would load it, in every fork
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the stages are killed and what they found is merged
    record = run(args)
    print(table(record))
    return int(any(told["status"] != "ok" for told in record["stages"].values()))


if __name__ == "__main__":
    raise SystemExit(main())
