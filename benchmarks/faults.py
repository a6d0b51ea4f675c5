"""What goes wrong, and what becomes of it: damaged files against the readers, bad flags against the trainer.

    python benchmarks/faults.py [--checkpoints 2000] [--files 1000] [--commands 300] [--seed 0]

Small whole files are damaged at random (bits flipped, blocks zeroed, overwritten, repeated, swapped, removed, head or
tail cut) and opened: checkpoints of format 2 and 1, D4RL's layout plain, gzipped and with Fletcher's sums, OGBench's
layout stored and deflated. `refused`: a ValueError's sentence. `same`: the damage hit nothing that is read. `other`:
read with other values, which no reader can know of a file without sums; of a checkpoint it must never happen.
`traceback`: any other error, `crash` and `hang` (60 s): the process. Goals: none of the last three.

Commands train every agent for a moment on small data, with one flag at a value that is at the edge or beyond: negative,
0, huge, not finite, empty, long, other letters. `refused`: a sentence, and another exit status than 0; `accepted`: it
trained to the end, or was still training after `PATIENCE` seconds. Each has `MEMORY` bytes at most.
"""

import argparse
import json
import logging
import multiprocessing
import os
import random
import resource
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, write

import trainer
from common import checkpoint
from common.logger import put_into_page
from d4rl_utils import read_hdf5
from ogbench_utils import read_npz

PATIENCE = 60.0  # seconds for one file or command
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
OUTCOMES = ("refused", "same", "other", "accepted", "traceback", "crash", "hang")


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
    return found


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


def episodes_of(path: Path) -> list[np.ndarray]:
    return list(read_npz(path, "pointmaze-medium-navigate").episodes)


def content_of(path: Path) -> list[np.ndarray]:
    """All numbers of a checkpoint, and the rest as text."""
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

    walk(checkpoint.read_checkpoint(path))
    return [*numbers, np.frombuffer("\n".join(words).encode(), np.uint8)]


PARTS: dict[str, tuple[Callable, Callable]] = {
    "hdf5": (hdf5_files, columns_of),
    "npz": (npz_files, episodes_of),
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


def try_commands(seeds: range, folder: Path) -> tuple[Counter, dict[str, str]]:
    """Outcomes of so many bad commands, and examples of the bad ones."""
    counts, examples, known = Counter(), {}, commands(folder)
    for seed in seeds:
        argv = bad_command(seed, known)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            process = multiprocessing.get_context("fork").Process(target=train_briefly, args=(argv, Path(place)))
            process.start()
            process.join(PATIENCE)
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
        counts[outcome] += 1
        if outcome not in ("refused", "accepted"):
            examples[f"{outcome}, seed {seed}"] = f"{argv[-1][:80]} of {argv[0:2]}: {said.strip()[-200:]}"
    return counts, examples


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
    parser.add_argument("--seed", type=int, default=0, help="the first of as many seeds")
    args = parser.parse_args()
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for part, (make, _) in PARTS.items():
            count = args.checkpoints if part == "checkpoint" else args.files
            for name, path in make(Path(folder)).items():
                counts, examples = try_all(part, path, range(args.seed, args.seed + count))
                rows[name] = {"outcomes": counts, "examples": examples}
                print(name, dict(counts), json.dumps(examples, indent=1) if examples else "", flush=True)
        counts, examples = try_commands(range(args.seed, args.seed + args.commands), Path(folder))
        rows["commands"] = {"outcomes": counts, "examples": examples}
        print("commands", dict(counts), json.dumps(examples, indent=1), flush=True)
    text = markdown(rows)
    print(text)
    put_into_page("python benchmarks/faults.py", text, ROOT / "docs" / "results.md")
    print(write("faults", {"seed": args.seed, "rows": rows}))


if __name__ == "__main__":
    sys.exit(main())
