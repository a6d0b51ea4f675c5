"""What goes wrong, and what becomes of it: damaged files, bad flags, kills and a full disk.

    python benchmarks/faults.py [--checkpoints 2000] [--files 1000] [--commands 300] [--kills 200] [--full_disks 100]

Small whole files are damaged at random (bits flipped, blocks zeroed, overwritten, repeated, swapped, removed, head or
tail cut) and opened: checkpoints of format 2 and 1, D4RL's layout plain, gzipped and with Fletcher's sums, d3rlpy's,
OGBench's stored and deflated, LeRobot's Parquet. `refused`: a ValueError's sentence. `same`: the damage hit nothing
that is read. `other`: read with other values, which no reader can know of a file without sums; of a checkpoint it must
never happen.

Commands train every agent for a moment on small data, with one flag at a value that is at the edge or beyond: negative,
0, huge, not finite, empty, long, other letters. `refused`: a sentence, and another exit status than 0; `said`: it
trained, and said that the flag has no effect; `accepted`: it trained to the end, or was still training after `PATIENCE`
seconds. Each has `MEMORY` bytes at most. (`--checkpoints 0`, say, leaves those rows of the table as they are.)

Trainings of some 40 updates with a checkpoint every few are killed (SIGKILL) at random moments and resumed, or can
write to no file from a random moment on (RLIMIT_FSIZE), say so, and are resumed with room. `same`: they end with the
checkpoint, the log and the files of one that nothing happened to, to the bit; `other`: they do not; `lost`: they cannot
be gone on from.

`traceback`: any other error; `crash` and `hang` (60 s): of the process. Goals: none of these, no `lost`, and `other` of
data files alone.
"""

import argparse
import importlib
import json
import logging
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, facts, write

import trainer
from common import checkpoint, plotting
from common.logger import put_into_page, read_log
from d4rl_utils import read_hdf5
from d4rl_utils.lerobot_data import read_lerobot
from ogbench_utils import read_npz

PATIENCE = 60.0  # seconds for one file or command
SLOW = 5.0  # seconds for a refusal, imports not counted
MEMORY = 12 << 30  # of address space, for a command
VALUES = (
    "-1",
    "0",
    "0.5",
    "1000000000",
    "1e30",
    "nan",
    "-inf",
    "",
    " ",
    "x" * 3000,
    "ünïcödé ∞",
    "../..",
    "None",
    "[]",
)
OUTCOMES = ("refused", "same", "other", "accepted", "said", "lost", "traceback", "crash", "hang")


def damaged(data: bytes, rng: random.Random) -> bytes:
    """The bytes after one accident."""
    size, out = len(data), bytearray(data)
    length = min(size // 4, int(2 ** rng.uniform(0, 13)))
    at, to = rng.randrange(size - length), rng.randrange(size - length)
    match rng.choice(["bits", "zero", "noise", "repeat", "swap", "remove", "head", "tail"]):
        case "bits":
            for _ in range(rng.randint(1, 8)):
                out[rng.randrange(size)] ^= 1 << rng.randrange(8)
        case "zero":
            out[at : at + length] = bytes(length)
        case "noise":
            out[at : at + length] = rng.randbytes(length)
        case "repeat":
            out[to:to] = data[at : at + length]
        case "swap":
            out[at : at + length], out[to : to + length] = data[to : to + length], data[at : at + length]
        case "remove":
            del out[at : at + length]
        case "head":
            del out[: rng.randrange(1, size)]
        case "tail":
            del out[rng.randrange(size) :]
    return bytes(out)


# -- whole files, and what is read from them -------------------------------------------------------


def hdf5_files(folder: Path) -> dict[str, Path]:
    """D4RL's layout in several ways of storing."""
    import h5py

    rng, found = np.random.default_rng(0), {}
    ways = {"plain": {}, "gzip": {"compression": "gzip"}, "fletcher32": {"fletcher32": True, "chunks": True}}
    for name, way in ways.items():
        found[f"hdf5, {name}"] = path = folder / f"{name}.hdf5"
        ends = np.arange(1, 301) % 50 == 0
        columns = {"observations": rng.normal(size=(300, 4)), "actions": np.tanh(rng.normal(size=(300, 2)))}
        columns |= {"rewards": rng.normal(size=300), "terminals": ends, "timeouts": ~ends & False}
        with h5py.File(path, "w") as file:
            for key, values in columns.items():
                file.create_dataset(key, data=values if values.dtype == bool else values.astype(np.float32), **way)
    found["hdf5, d3rlpy's"] = path = folder / "d3rlpy.h5"
    with h5py.File(path, "w") as file:
        file["columns"], file["num_episodes"] = ["observations", "actions", "rewards", "terminated"], 6
        for i in range(6):
            file[f"observations_{i}"] = rng.normal(size=(50, 4)).astype(np.float32)
            file[f"actions_{i}"] = np.tanh(rng.normal(size=(50, 2))).astype(np.float32)
            file[f"rewards_{i}"], file[f"terminated_{i}"] = rng.normal(size=(50, 1)).astype(np.float32), i % 2 == 0
    return found


def parquet_files(folder: Path) -> dict[str, Path]:
    """LeRobot's layout, all episodes in one file."""
    import pyarrow as pa
    import pyarrow.parquet

    rng, row = np.random.default_rng(0), np.arange(300)
    columns = {"observation.state": pa.array(rng.normal(size=(300, 4)).astype(np.float32).tolist())}
    columns |= {"action": pa.array(np.tanh(rng.normal(size=(300, 2))).astype(np.float32).tolist())}
    columns |= {"episode_index": row // 50, "frame_index": row % 50, "next.reward": rng.normal(size=300)}
    columns |= {"next.done": row % 50 == 49}
    pyarrow.parquet.write_table(pa.table(columns), folder / "lerobot.parquet")
    return {"parquet, LeRobot's": folder / "lerobot.parquet"}


def npz_files(folder: Path) -> dict[str, Path]:
    """OGBench's layout, as it is written there and here."""
    rng, found = np.random.default_rng(0), {}
    arrays = {"observations": rng.normal(size=(400, 2)).astype(np.float32), "terminals": np.arange(1, 401) % 50 == 0}
    arrays["actions"] = np.tanh(rng.normal(size=(400, 2))).astype(np.float32)
    for name, save in (("stored", np.savez), ("deflated", np.savez_compressed)):
        found[f"npz, {name}"] = path = folder / f"{name}.npz"
        save(path, **arrays)
    return found


def checkpoint_files(folder: Path) -> dict[str, Path]:
    """A small checkpoint of this version, and one of format 1."""
    from config import PRESETS, BambaConfig

    sizes = dict(d_model=16, d_state=8, headdim=8, n_layers=1, hidden_dim=16, context_length=3)
    spec = checkpoint.EnvSpec(4, 2, (-1.0, -1.0), (1.0, 1.0))
    agent = checkpoint.agent_of("bamba")(BambaConfig(**{**PRESETS["bamba"]["small"], **sizes}), spec)
    checkpoint.save(folder / "last_checkpoint.pt", agent, {"note": "small"})
    old = sorted((ROOT / "tests" / "checkpoints").glob("*.pt"), key=lambda path: path.stat().st_size)
    return {"checkpoint": folder / "last_checkpoint.pt", **{f"checkpoint, {path.stem}": path for path in old[:1]}}


def columns_of(path: Path) -> list[np.ndarray]:
    return list(read_hdf5(path, cache=False).transitions)


def frames_of(path: Path) -> list[np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data").mkdir()
        shutil.copy(path, Path(folder) / "data")
        return list(read_lerobot(folder).transitions)


def episodes_of(path: Path) -> list[np.ndarray]:
    return list(read_npz(path, "pointmaze-medium-navigate").episodes)


def content_of(path: Path) -> list[np.ndarray]:
    """All numbers of a checkpoint, and the rest as text."""
    return numbers_of(checkpoint.read_checkpoint(path))


def numbers_of(ckpt: dict) -> list[np.ndarray]:
    """The tensors in a checkpoint, and the rest as text."""
    numbers, words = [], []

    def walk(what) -> None:
        if isinstance(what, torch.Tensor):
            numbers.append(what.float().numpy())
        elif isinstance(what, dict):
            for key, value in what.items():
                words.append(str(key))
                walk(value)
        elif isinstance(what, (list, tuple)):
            for value in what:
                walk(value)
        else:
            words.append(repr(what))

    walk(ckpt)
    return [*numbers, np.frombuffer("\n".join(words).encode(), np.uint8)]


PARTS: dict[str, tuple[Callable, Callable]] = {
    "hdf5": (hdf5_files, columns_of),
    "npz": (npz_files, episodes_of),
    "parquet": (parquet_files, frames_of),
    "checkpoint": (checkpoint_files, content_of),
}


# -- trying ----------------------------------------------------------------------------------------


def attempt(part: str, path: Path, whole: list[np.ndarray]) -> tuple[str, str]:
    """What becomes of a damaged file: (outcome, the error's text)."""
    try:
        found = PARTS[part][1](path)
    except (ValueError, FileNotFoundError) as error:
        return ("refused" if "\n" not in str(error) else "traceback"), str(error)
    except BaseException as error:
        return "traceback", f"{type(error).__name__}: {error}"
    same = len(found) == len(whole) and all(map(np.array_equal, found, whole))
    return ("same" if same else "other"), ""


def work(part: str, path: Path, seeds: range, pipe) -> None:
    """In a process of its own, as a damaged file may take it down: sends (seed, outcome, text)."""
    logging.disable(logging.WARNING)  # what a reader says of files that it reads
    data, whole = path.read_bytes(), PARTS[part][1](path)
    pipe.send("ready")
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            bad = Path(folder) / f"{seed}{path.suffix}"
            bad.write_bytes(damaged(data, random.Random(seed)))
            pipe.send((seed, *attempt(part, bad, whole)))
            bad.unlink()
    pipe.send(None)


def try_all(part: str, path: Path, seeds: range) -> tuple[Counter, dict[str, str]]:
    """Outcomes of so many damaged copies of a file, and an example of each bad one."""
    counts, examples, left = Counter(), {}, seeds
    while left:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=work, args=(part, path, left, theirs))
        process.start()
        theirs.close()
        try:
            ours.recv()
        except EOFError:
            raise SystemExit(f"the process that opens {path.name} did not start; its error stands above") from None
        while left:
            try:
                said = ours.recv() if ours.poll(PATIENCE) else (left[0], "hang", "")
            except EOFError:
                process.join()
                said = (left[0], "crash", f"exit status {process.exitcode}")
            if said is None:
                break
            seed, outcome, text = said
            counts[outcome] += 1
            if outcome not in ("refused", "same"):
                examples.setdefault(outcome, f"seed {seed}: {text}".replace(str(path.parent), "")[:300])
            left = left[1:]
            if outcome in ("hang", "crash"):
                process.kill()
                break
        process.join()
    return counts, examples


# -- commands --------------------------------------------------------------------------------------


def commands(folder: Path) -> dict[str, list[str]]:
    """For each agent a command that trains it for a moment."""
    import h5py

    rng, ends = np.random.default_rng(0), np.arange(1, 201) % 40 == 0
    with h5py.File(folder / "walk.hdf5", "w") as file:
        for key, dims in {"observations": 11, "actions": 3, "next_observations": 11}.items():
            file[key] = np.tanh(rng.normal(size=(200, dims))).astype(np.float32)
        file["rewards"], file["terminals"], file["timeouts"] = np.ones(200, np.float32), ends, ~ends & False
    maze = folder / "pointmaze-medium-navigate-v0.npz"
    arrays = {"observations": rng.normal(size=(400, 2)).astype(np.float32), "terminals": np.arange(1, 401) % 50 == 0}
    np.savez(maze, actions=np.tanh(rng.normal(size=(400, 2))).astype(np.float32), **arrays)
    common = ["--device=cpu", "--threads=1", "--no_tensorboard", "--num_eval_episodes=1"]
    offline = [*common, "--num_epochs=1", "--updates_per_epoch=1", "--batch_size=4"]
    recorded = [*offline, f"--dataset={folder / 'walk.hdf5'}", "--env=hopper"]
    found = {name: ["--agent", name, "--preset=small", *recorded] for name in ("bamba", "dt", "dmamba", "dm")}
    found["opso"] = ["--agent=opso", "--preset=small", *offline, f"--dataset_dir={folder}", f"--dataset={maze.stem}"]
    online = [*common, "--env_steps=64", "--num_final_episodes=1"]
    found["dqn"] = ["--agent=dqn", "--env=CartPole-v1", *online, "--learn_start=32", "--batch_size=4"]
    found["ppo"] = [
        "--agent=ppo",
        "--init=none",
        "--mixer=mlp",
        "--env=hopper",
        *online,
        "--n_steps=4",
        "--batch_size=8",
    ]
    return found


def bad_command(seed: int, known: dict[str, list[str]]) -> list[str]:
    """One of the commands with one more flag, which goes before its own."""
    from config import CONFIGS

    rng = random.Random(seed)
    agent = rng.choice(sorted(known))
    kept_away = {"agent", "resume", "output_dir", "device", "wandb"}  # not settings, or answered before anything else
    name = rng.choice([f.name for f in fields(CONFIGS[agent]) if f.name not in kept_away])
    own = [word for word in known[agent] if not word.startswith(f"--{name}=")]
    return [*own, f"--{name}={rng.choice(VALUES)}"]


def train_briefly(argv: list[str], out: Path) -> None:
    """In a forked process: what it says goes into `out`."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open(out / "said.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(trainer.main([*argv, f"--output_dir={out}"]))


def try_commands(seeds: range, folder: Path) -> tuple[Counter, dict[str, str], list[str]]:
    """Outcomes of so many bad commands, examples of the bad ones, and which were accepted."""
    counts, examples, accepted, known = Counter(), {}, [], commands(folder)
    for seed in seeds:
        argv = bad_command(seed, known)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            process = multiprocessing.get_context("fork").Process(target=train_briefly, args=(argv, Path(place)))
            start = time.perf_counter()
            process.start()
            process.join(PATIENCE)
            seconds = time.perf_counter() - start
            began = bool(list(Path(place).glob("*/log.jsonl")))
            said = (Path(place) / "said.txt").read_text(errors="replace")
            if process.is_alive():
                outcome = "accepted" if began else "hang"
                process.kill()
                process.join()
            elif process.exitcode < 0:
                outcome = "crash"
            else:
                outcome = "traceback" if "Traceback" in said else "refused" if process.exitcode else "accepted"
            if outcome == "accepted" and " has no effect here: " in said:
                outcome = "said"
        counts[outcome] += 1
        if outcome == "refused" and seconds > SLOW:
            examples[f"slow, seed {seed}"] = f"{seconds:.1f} s: {argv[-1][:80]} of {argv[0:2]}: {said.strip()[-200:]}"
        if outcome == "accepted":
            accepted.append(" ".join([argv[1] if argv[0] == "--agent" else argv[0].split("=")[1], argv[-1][:80]]))
        elif outcome not in ("refused", "said"):
            examples[f"{outcome}, seed {seed}"] = f"{argv[-1][:80]} of {argv[0:2]}: {said.strip()[-200:]}"
    return counts, examples, accepted


# -- kills, and a full disk ------------------------------------------------------------------------


def short_runs(folder: Path) -> dict[str, list[str]]:
    """For each agent a command of seconds that saves often. OPSO's second phase has its first one made here.

    What the trainer imports late is imported here, once for all the processes that are forked from this one.
    """
    folder.mkdir(exist_ok=True)
    late = ("gymnasium", "mujoco", "matplotlib.pyplot", "tyro", "h5py", "torch._dynamo")
    for module in {*late, *(module for module, _ in checkpoint.AGENTS.values())}:
        importlib.import_module(module)
    lengths = {
        "bamba": ["--num_epochs=8", "--updates_per_epoch=5", "--eval_freq=4", "--save_freq=1"],
        "dm": ["--num_epochs=8", "--updates_per_epoch=5", "--eval_freq=4", "--save_freq=1", "--refresh_every=10"],
        "dqn": ["--env_steps=400", "--save_every=40", "--eval_every=200"],
        "ppo": ["--env_steps=320", "--save_every=32", "--eval_every=160"],
    }
    known = commands(folder)
    found = {name: [*known[name], *more] for name, more in lengths.items()}
    first = folder / "first"
    train_apart(known["opso"], first)
    (init,) = first.glob("*-opso-*")
    phase_1 = ("--agent", "--num_epochs", "--updates_per_epoch")
    own = [word for word in known["opso"] if word.split("=")[0] not in phase_1]
    found["opso_online"] = ["--agent=opso_online", *own, f"--init={init}", "--env_steps=300", "--save_every=30"]
    found["opso_online"] += ["--learn_start=40", "--eval_every=150", "--num_final_episodes=1"]
    return found


def train_apart(argv: list[str], out: Path, kill: float | None = None, full: float | None = None) -> tuple[int, str]:
    """The trainer in a process of its own: (exit status, what it said). kill: SIGKILL after so many seconds. full: from
    then on no file can be written to. A hang is -999."""
    out.mkdir(parents=True, exist_ok=True)
    read, write_end = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=train_into, args=(argv, out, write_end, full))
    process.start()
    os.close(write_end)
    said: list[bytes] = []
    reader = threading.Thread(target=lambda: said.extend(iter(partial(os.read, read, 65536), b"")))
    reader.start()
    process.join(PATIENCE if kill is None else kill)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    reader.join()
    os.close(read)
    return -999 if hangs and kill is None else process.exitcode, b"".join(said).decode(errors="replace")


def train_into(argv: list[str], out: Path, pipe: int, full: float | None) -> None:
    """In a forked process: what it says goes into the pipe, which a full disk does not touch."""
    os.dup2(pipe, 1)
    os.dup2(pipe, 2)
    plotting.draw_curves = lambda rows, title, panels, file: file.write_bytes(b"a picture")  # most of the time, else
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    if full is not None:
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        threading.Timer(full, limit).start()
    sys.exit(trainer.main([*argv, f"--output_dir={out}"]))


def run_in(out: Path) -> Path | None:
    """The folder of the run that is begun in `out`: the one with a checkpoint. Others ended before their first."""
    found = sorted(out.glob("*/last_checkpoint.pt"))
    return found[-1].parent if found else None


def end_of(folder: Path) -> dict[str, list]:
    """What a finished run has come to: the numbers in its last checkpoint, the log without its times, its files."""
    ckpt = checkpoint.read_checkpoint(folder / "last_checkpoint.pt")
    timed = ("seconds", "updates_per_s", "steps_per_s")
    rows = [{k: v for k, v in row.items() if k not in timed} for row in read_log(folder / "log.jsonl")[1:]]
    return {
        "checkpoint": numbers_of({k: v for k, v in ckpt.items() if k not in ("config", "versions")}),
        "log": [json.dumps(row, sort_keys=True) for row in rows],
        "files": sorted(path.name for path in folder.iterdir()),
    }


def differing(one: dict[str, list], other: dict[str, list]) -> str:
    """Which of the parts of two runs' ends are not the same; of files, which."""
    parts = [k for k, v in one.items() if len(v) != len(other[k]) or not all(map(np.array_equal, v, other[k]))]
    return ", ".join([*parts, *({*one["files"]} ^ {*other["files"]})])


def go_on(argv: list[str], out: Path, **trouble) -> tuple[int, str]:
    """Resume what was begun in `out`, or begin it."""
    begun = run_in(out)
    return train_apart([f"--resume={begun}"] if begun else argv, out, **trouble)


def try_trouble(what: str, count: int, seed: int, folder: Path) -> Iterator[tuple[str, Counter, dict[str, str]]]:
    """For each agent, of so many kills, or so many times that the disk is full from some moment on: its row's name,
    outcomes, examples of bad ones.

    A run gets up to three of them, each followed by a resumption, and then ends undisturbed. `same`: as a run that
    nothing ever happened to. `lost`: there was a checkpoint and it cannot be gone on from.
    """
    for name, argv in short_runs(folder).items():
        counts, examples, rng = Counter(), {}, random.Random(f"{seed} {name}")
        start = time.perf_counter()
        status, said = train_apart(argv, folder / f"{name} undisturbed")
        if status:
            raise SystemExit(f"the undisturbed run of {name} failed: {said[-500:]}")
        whole, seconds = end_of(run_in(folder / f"{name} undisturbed")), time.perf_counter() - start
        while counts.total() < count:
            out = Path(tempfile.mkdtemp(dir=folder))
            troubles = [rng.uniform(0, 1.1 * seconds) for _ in range(rng.randint(1, min(3, count - counts.total())))]
            outcome, text, done = "same", "", 0
            for moment in troubles:
                status, said = go_on(argv, out, **{what: moment})
                done += status != 0  # it may have been over before
                if what == "full" and (outcome := judged_full(status, said)) != "same":
                    text = said[-300:]
                    break
                if status == 0:
                    break
            if outcome == "same":
                status, said = go_on(argv, out)
                outcome = "hang" if status == -999 else "crash" if status < 0 else "lost" if status else "same"
                text = said[-300:]
            if outcome == "same" and (text := differing(end_of(run_in(out)), whole)):
                outcome = "other"
            counts[outcome] += max(done, outcome != "same")
            if outcome != "same":
                examples.setdefault(outcome, f"{[round(t, 2) for t in troubles]} s: {text.strip()}")
            shutil.rmtree(out)
        yield f"{TROUBLES[what]}, {name}", counts, examples


def try_sweeps(count: int, seed: int, folder: Path) -> tuple[Counter, dict[str, str]]:
    """Outcomes of so many kills of a sweep of two runs; by chance of sweep.py alone, or of its trainers, too."""
    argv = short_runs(folder)["bamba"]
    dataset = next(word for word in argv if word.startswith("--dataset=")).removeprefix("--dataset=")
    flags = {word.split("=")[0]: word for word in argv[2:] if not word.startswith("--dataset=")}  # the last one counts
    command = [
        sys.executable,
        ROOT / "sweep.py",
        "--name=all",
        "--agents=bamba",
        f"--datasets={dataset}",
        "--seeds=0,1",
    ]

    def go(out: Path, kill: float | None, everyone: bool) -> tuple[int | None, str]:
        words = [*command, "--jobs=2", *flags.values(), f"--output_dir={out}"]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            said, _ = process.communicate(timeout=kill or 4 * PATIENCE)
            return process.returncode, said.decode(errors="replace")
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL) if everyone or kill is None else process.kill()
            process.wait()
            return (-999 if kill is None else None), ""

    def ends(out: Path) -> list[dict[str, list]]:
        return [end_of(path.parent) for path in sorted(out.glob("all/*/*/last_checkpoint.pt"))]

    start = time.perf_counter()
    status, said = go(folder / "sweep", None, True)
    if status:
        raise SystemExit(f"the undisturbed sweep failed: {said[-500:]}")
    whole, seconds = ends(folder / "sweep"), time.perf_counter() - start
    counts, examples, rng = Counter(), {}, random.Random(f"{seed} sweep")
    while counts.total() < count:
        out = Path(tempfile.mkdtemp(dir=folder))
        kills = [(rng.uniform(0, seconds), rng.random() < 0.5) for _ in range(min(3, count - counts.total()))]
        done = sum(go(out, moment, everyone)[0] is None for moment, everyone in kills)  # or it was over before
        status, said = go(out, None, True)
        outcome = "hang" if status == -999 else "lost" if status else "same"
        found = ends(out) if outcome == "same" else []
        if outcome == "same" and (len(found) != len(whole) or any(map(differing, found, whole))):
            outcome, said = "other", ", ".join(map(differing, found, whole))
        counts[outcome] += max(done, outcome != "same")
        if outcome != "same":
            examples.setdefault(outcome, f"{[round(t, 2) for t, _ in kills]} s: {said[-300:].strip()}")
        shutil.rmtree(out)
    return counts, examples


def judged_full(status: int, said: str) -> str:
    """Of a run whose disk is full: a sentence and an exit status, unless it was over before."""
    if status == -999:
        return "hang"
    if status < 0:
        return "crash"
    return "traceback" if "Traceback" in said or (status and "error: " not in said) else "same"


TROUBLES = {"kill": "SIGKILL", "full": "full disk"}


def markdown(rows: dict[str, dict]) -> str:
    lines = [
        f"| damaged copies of, or commands | in all | {' | '.join(OUTCOMES)} |",
        "|---|" + "---:|" * (len(OUTCOMES) + 1),
    ]
    for name, row in rows.items():
        counts = [row["outcomes"].get(outcome, 0) for outcome in OUTCOMES]
        lines.append(f"| {name} | {sum(counts):,} | {' | '.join(f'{n:,}' for n in counts)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=2000, help="damaged copies of each checkpoint")
    parser.add_argument("--files", type=int, default=1000, help="damaged copies of each data file")
    parser.add_argument("--commands", type=int, default=300, help="with a flag at or beyond its edge")
    parser.add_argument(
        "--kills", type=int, default=200, help="of each agent's training, and a tenth of that of a sweep"
    )
    parser.add_argument("--full_disks", type=int, default=100, help="in each agent's training")
    parser.add_argument("--seed", type=int, default=0, help="the first of as many seeds")
    args = parser.parse_args()
    path = ROOT / "benchmarks" / "faults.json"
    before = json.loads(path.read_text()) if path.exists() else {}  # a part with a count of 0 stays as it is
    rows, accepted, made = (
        before.get("rows", {}),
        before.get("accepted", []),
        {k: facts()[k] for k in ("command", "commit")},
    )

    def tell(name: str, counts: Counter, examples: dict[str, str]) -> None:
        rows[name] = {"outcomes": counts, "examples": examples, **made}
        print(name, dict(counts), json.dumps(examples, indent=1) if examples else "", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for part, (make, _) in PARTS.items():
            count = args.checkpoints if part == "checkpoint" else args.files
            for name, path in make(folder).items() if count else ():
                tell(name, *try_all(part, path, range(args.seed, args.seed + count)))
        if args.commands:
            *found, accepted = try_commands(range(args.seed, args.seed + args.commands), folder)
            tell("commands", *found)
        for what, count in {"kill": args.kills, "full": args.full_disks}.items():
            for found in try_trouble(what, count, args.seed, folder / what) if count else ():
                tell(*found)
        if args.kills:
            tell("SIGKILL, a sweep", *try_sweeps(args.kills // 10 + 1, args.seed, folder / "sweeps"))
    text = markdown(rows)
    print(text)
    put_into_page("python benchmarks/faults.py", text, ROOT / "docs" / "results.md")
    print(write("faults", {"seed": args.seed, "rows": rows, "accepted": accepted}))


if __name__ == "__main__":
    sys.exit(main())
