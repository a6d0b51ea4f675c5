"""What every benchmark says beside its figures: the machine, the versions, the commit, the command."""

import argparse
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import device as devices  # noqa: E402
from common import logger  # noqa: E402


def without_folder(word: str) -> str:
    """A path as others have it: from the project's root, or the name alone."""
    path = Path(word)
    if not path.is_absolute():
        return word
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name


def facts() -> dict:
    """Machine, versions, commit, command, date."""
    return {
        "command": "python " + shlex.join(map(without_folder, sys.argv)),
        "machine": devices.machine(),
        "versions": devices.versions(),
        "commit": devices.commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(name: str, result: dict) -> Path:
    """benchmarks/<name>.json, whole or not at all."""
    path = ROOT / "benchmarks" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    with logger.atomic_write(path) as part:
        part.write_text(json.dumps(facts() | result, indent=1) + "\n")
    return path


# Bamba's sizes and schemes that benchmarks compare: flags of trainer.py.
SMALL_SIZES = ["--d_model", "64", "--d_state", "16", "--headdim", "32", "--n_layers", "2"]
VARIANTS = {
    "small": ["--preset", "small"],  # what is trained unless told otherwise
    "base": ["--preset", "base"],
    "upstream": ["--preset", "upstream"],  # as published
    "upstream small": ["--preset", "upstream", *SMALL_SIZES],
}


def timing_parser(doc: str, repeats: int) -> argparse.ArgumentParser:
    """A command line with what every timing takes: --device, --threads, --repeats, --clock."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: PyTorch's choice")
    parser.add_argument("--repeats", type=int, default=repeats)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process; with --threads 1")
    return parser


def median_seconds(
    fn: Callable,
    warmup: int,
    repeats: int,
    device: str = "cpu",
    middle: Callable = statistics.median,
    clock: Callable = time.perf_counter,
) -> float:
    """Median (or another `action_bias`) wall time of fn(); on CUDA each call is waited for.

    clock: time.process_time counts this process alone, for one thread on a machine that others use too.
    """
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times = []
    for i in range(warmup + repeats):
        wait()
        start = clock()
        fn()
        wait()
        if i >= warmup:
            times.append(clock() - start)
    return middle(times)
