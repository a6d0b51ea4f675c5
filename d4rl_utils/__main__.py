"""D4RL's files and their local stand-ins, from the command line: list, get, make, info."""

import argparse
import logging
import sys
from pathlib import Path

import numpy as np

from d4rl_utils.download import DownloadError, download
from d4rl_utils.local import local_levels, make_local
from d4rl_utils.names import DIMS, REGISTRY, check_name, d4rl_score, split_name
from d4rl_utils.reader import episode_returns, read_hdf5


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m d4rl_utils", description=__doc__, allow_abbrev=False)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument(
        "--dataset_dir", type=Path, default=Path("./datasets"), help="where the files are (default: %(default)s)"
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="{list,get,make,info}")
    common = {"parents": [shared], "allow_abbrev": False}
    verbs.add_parser("list", **common, help="what there is, what is here, what can be made here")
    get = verbs.add_parser("get", **common, help="download D4RL's file")
    get.add_argument("name", help="e.g. hopper-medium-v2")
    make = verbs.add_parser("make", **common, help="roll out local data in D4RL's layout")
    make.add_argument("name", help="e.g. hopper-medium")
    make.add_argument("--transitions", type=int, default=1_000_000, help="how many (default: %(default)s)")
    make.add_argument("--seed", type=int, default=0, help="of the rollouts (default: %(default)s)")
    make.add_argument("--workers", type=int, help="processes (default: one a core); the file does not depend on it")
    info = verbs.add_parser("info", **common, help="what is in a file")
    info.add_argument("file", type=Path, help="a path, or a file's name in --dataset_dir")
    return top


def table(dataset_dir: Path) -> str:
    """One line a data set: its size, and whether D4RL's file and local files are here or can be made."""
    rows = [f"{'name':<28}{'MB':>6}  {'D4RL file':<10} local"]
    for name, entry in REGISTRY.items():
        env, kind = split_name(name)
        made = sorted(p.name for p in dataset_dir.glob(f"{env}-{kind}-local-*.hdf5"))
        local = ", ".join(made) or ("can be made" if local_levels(env, kind) else "-")
        present = "present" if (dataset_dir / entry.file).exists() else "-"
        rows.append(f"{name:<28}{entry.size / 1e6:>6.0f}  {present:<10} {local}")
    return "\n".join(rows)


def describe(path: Path) -> str:
    """What a file holds, and whose it is."""
    t, identity = read_hdf5(path)
    returns, lengths = episode_returns(t), np.diff(np.flatnonzero(np.concatenate(([True], t.ends))))
    dims = t.states.shape[1], t.actions.shape[1]
    whose = {"d4rl": "D4RL's own file", "local": "LOCAL data, not D4RL's file", "custom": "not D4RL's file"}[
        identity.source
    ]
    body = identity.name.partition("-")[0]
    lines = [
        f"{path}: {identity.name}, {whose}",
        f"sha256       {identity.sha256}",
        f"transitions  {identity.transitions}, of which {int(t.terminals.sum())} terminal",
        f"episodes     {identity.episodes}, {lengths.min()} to {lengths.max()} steps long, mean {lengths.mean():.1f}",
        f"dims         {dims[0]} state, {dims[1]} action",
        f"return       {returns.mean():.1f} ± {returns.std():.1f}, from {returns.min():.1f} to {returns.max():.1f}",
    ]
    if DIMS.get(body) == dims:
        lines.append(f"D4RL score   {d4rl_score(body, returns.mean()):.1f} of the behaviour")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it did what it says, else 1 after a sentence on stderr."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        if args.verb == "list":
            print(table(args.dataset_dir))
        elif args.verb == "get":
            print(download(f"{check_name(*split_name(args.name))}-v2", args.dataset_dir))
        elif args.verb == "make":
            make_local(*split_name(args.name), args.transitions, args.seed, args.workers, args.dataset_dir)
        else:
            print(describe(args.file if args.file.exists() else args.dataset_dir / args.file))
    except (DownloadError, ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; no half-made file counts as whole, and a download goes on from where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
