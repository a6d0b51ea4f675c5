"""OGBench's maze data and their local stand-ins, from the command line: list, get, make, info."""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np

from common.download import DownloadError
from ogbench_utils.datasets import download
from ogbench_utils.generate.rollout import can_generate, make_local
from ogbench_utils.names import DATASETS, DIMS, split_name
from ogbench_utils.reader import read_npz


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m ogbench_utils", description=__doc__, allow_abbrev=False)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--dataset_dir", type=Path, default=Path("./datasets"), help="where the files are (default: %(default)s)"
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="{list,get,make,info}")
    common = {"parents": [shared], "allow_abbrev": False}
    verbs.add_parser("list", **common, help="what there is, what is here, what can be made here")
    fetch = verbs.add_parser("get", **common, help="download OGBench's files, for training and for validation")
    fetch.add_argument("name", help="e.g. antmaze-medium-navigate-v0")
    make = verbs.add_parser("make", **common, help="roll out local data in OGBench's layout (points and ants)")
    make.add_argument("name", help="e.g. pointmaze-medium-navigate")
    make.add_argument("--episodes", type=int, default=0, help="how many (default: as many as OGBench's)")
    make.add_argument("--seed", type=int, default=0, help="of the rollouts (default: %(default)s)")
    make.add_argument("--workers", type=int, help="processes (default: one a core); the file does not depend on it")
    info = verbs.add_parser("info", **common, help="what is in a file")
    info.add_argument("file", help="a path, or a file's name in --dataset_dir")
    info.add_argument("--env", default="", help="the data set that it is like, where the file's name does not say")
    return top


def table(dataset_dir: Path) -> str:
    """One line a data set: its size, and whether OGBench's file and local files are here or can be made."""
    head = f"{'name':<34}{'episodes':>9}{'T':>6}  {'states':>6} {'actions':>7}  "
    rows = [f"{head}{'OGBench file':<13} local"]
    for name, facts in DATASETS.items():
        words = split_name(name)
        made = sorted(p.name for p in dataset_dir.glob(f"{words.base}-local-*.npz") if not p.stem.endswith("-val"))
        local = ", ".join(made) or ("can be made" if can_generate(name) else "-")
        present = "present" if (dataset_dir / f"{name}.npz").exists() else "-"
        states, actions = DIMS[words.body]
        rows.append(
            f"{name:<34}{facts.episodes:>9,}{facts.length:>6,}  {states:>6} {actions:>7}  {present:<13} {local}"
        )
    return "\n".join(rows)


def show(path: Path, name: str) -> str:
    """What a file holds, in lines."""
    base = name or path.stem.partition("-local")[0].removesuffix("-val")
    (states, actions, ends), identity = read_npz(path, base)
    lengths = np.diff(ends, prepend=-1) - 1
    low, high = states[:, :2].min(0), states[:, :2].max(0)
    return "\n".join(
        [
            f"name         {identity.name} ({identity.source}), SHA-256 {identity.sha256[:12]}",
            f"episodes     {len(ends):,}, of {lengths.min():,} to {lengths.max():,} transitions",
            f"transitions  {identity.transitions:,}; {states.shape[1]} state and {actions.shape[1]} action dims",
            f"places       x from {low[0]:.1f} to {high[0]:.1f}, y from {low[1]:.1f} to {high[1]:.1f}",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it did what it says, else 1 after a sentence on stderr."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        if args.verb == "list":
            print(table(args.dataset_dir))
        elif args.verb == "get":
            for part in ("", "-val"):
                print(download(args.name, args.dataset_dir, part))
        elif args.verb == "make":
            make_local(args.name, args.episodes, args.seed, args.workers, args.dataset_dir)
        else:
            path = Path(args.file)
            print(show(path if path.exists() else args.dataset_dir / path, args.env))
    except (DownloadError, ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; no half-made file counts as whole, and a download goes on from where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
