"""D4RL's files and their local stand-ins, from the command line: list, get, make, info."""

import argparse
import logging
import sys
from pathlib import Path

from common.download import DownloadError
from d4rl_utils.datasets import download
from d4rl_utils.generate.rollout import RECIPES, LocalDataError, local_levels, make_local
from d4rl_utils.names import ENVS, REGISTRY, check_name, split_name
from d4rl_utils.reader import read_hdf5
from d4rl_utils.summary import describe, plot


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
    make.add_argument("name", help="e.g. hopper-medium; all: everything that can be made")
    make.add_argument(
        "--transitions", type=int, default=0, help="how many (default: as many as D4RL's; medium-expert 1M)"
    )
    make.add_argument("--seed", type=int, default=0, help="of the rollouts (default: %(default)s)")
    make.add_argument("--workers", type=int, help="processes (default: one a core); the file does not depend on it")
    info = verbs.add_parser("info", **common, help="what is in a data set")
    info.add_argument("file", help="a path, a file's name in --dataset_dir, minari:NAME, lerobot:NAME")
    info.add_argument("--plot", type=Path, metavar="OUT.png", help="draw its returns and lengths")
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


def make_all(transitions: int, seed: int, workers: int | None, dataset_dir: Path) -> int:
    """Make everything that can be made; returns how many could not.

    What is wrong with one name (no policies, a file in the way) is told at the end and does not keep the others from
    being made. What is wrong for all of them (a full disk, a dying worker) ends it at once.
    """
    wrong = []
    for env in ENVS:
        for kind in RECIPES:
            try:
                make_local(env, kind, transitions, seed, workers, dataset_dir)
            except LocalDataError as error:
                wrong.append(f"{env}-{kind}: {error}")
    print(f"{len(ENVS) * len(RECIPES) - len(wrong)} are in {dataset_dir}, {len(wrong)} could not be made")
    for line in wrong:
        print(line.partition(" Local data exist")[0], file=sys.stderr)
    return len(wrong)


def show(file: str, dataset_dir: Path, picture: Path | None) -> None:
    """Print what a data set holds; draw it too, if wanted."""
    if file.startswith("minari:"):
        from d4rl_utils.minari_data import read_minari

        dataset = read_minari(file.removeprefix("minari:"))
    elif file.startswith("lerobot:"):
        from d4rl_utils.lerobot_data import read_lerobot

        dataset = read_lerobot(file.removeprefix("lerobot:"))
    else:
        file = file if Path(file).exists() else dataset_dir / file
        dataset = read_hdf5(file)
    print(describe(file, dataset))
    if picture:
        plot(dataset, picture)
        print(f"\npicture      {picture}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it did what it says, else 1 after a sentence on stderr."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(message)s")
    try:
        if args.verb == "list":
            print(table(args.dataset_dir))
        elif args.verb == "get":
            print(download(f"{check_name(*split_name(args.name))}-v2", args.dataset_dir))
        elif args.verb == "make" and args.name == "all":
            return 1 if make_all(args.transitions, args.seed, args.workers, args.dataset_dir) else 0
        elif args.verb == "make":
            make_local(*split_name(args.name), args.transitions, args.seed, args.workers, args.dataset_dir)
        else:
            show(args.file, args.dataset_dir, args.plot)
    except (DownloadError, ImportError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; no half-made file counts as whole, and a download goes on from where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
