"""Make the twenty local data sets at full size, and say what they are: benchmarks/datasets.json, and a section of the
docs/data.md.

    python benchmarks/datasets.py                       # all twenty, D4RL's sizes; half an hour on two cores
    python benchmarks/datasets.py --page              # only write the page's section anew, from the JSON
    python benchmarks/datasets.py --transitions 2000    # a trial: the table on the screen, nothing written
    python benchmarks/datasets.py ant-expert            # this one anew, in its place among the others

Each file is made in a temporary folder and removed once it is described; `--dataset_dir` keeps them (a file that is
there already has no time of making).
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from harness import ROOT, facts, write

from common.device import commit
from common.logger import put_into_page
from common.parallel import cores
from d4rl_utils import read_hdf5
from d4rl_utils.generate import behavior_policy as behaviour
from d4rl_utils.generate.rollout import RECIPES, LocalDataError, make_local
from d4rl_utils.names import ENVS, d4rl_score, split_name

NAMES = [f"{env}-{kind}" for env in ENVS for kind in RECIPES]
COMMAND = "python benchmarks/datasets.py"
PAGE = ROOT / "docs" / "data.md"


def policies(env: str, kind: str) -> str:
    """Who acts in a data set, out of the manifest."""
    shipped, words = json.loads(behaviour.MANIFEST.read_text()), []
    for level in RECIPES[kind]:
        line = shipped.get(f"{env}-{level}", {})
        method = line.get("algorithm", "").partition(" ")[0]
        if level == "random":
            words.append("tanh of normal noise")
        elif level == "ladder":
            rungs = line["rungs"]
            words.append(
                f"{len(rungs)} policies of one {method} training, {rungs[0]['steps']:,} to {rungs[-1]['steps']:,} steps"
            )
        else:
            words.append(f"{method}, {line['steps']:,} steps")
    return "; ".join(words)


def row(name: str, transitions: int, folder: Path) -> dict:
    """Make one data set and describe it. LocalDataError if it cannot be made."""
    env, kind = split_name(name)
    made = make_local(env, kind, transitions, dataset_dir=folder)
    identity = read_hdf5(made.path, cache=False).identity
    rate = made.transitions_per_second
    return {
        "policies": policies(env, kind),
        "transitions": identity.transitions,
        "episodes": identity.episodes,
        "return_mean": round(identity.return_mean, 1),
        "local_score": round(d4rl_score(env, identity.return_mean), 1),
        "seconds": round(identity.transitions / rate, 1) if rate else None,
        "transitions_per_s": round(rate) if rate else None,
        "sha256": identity.sha256,
        "commit": commit(),
    }


def section(result: dict) -> str:
    """The page's section."""
    machine, rows = result["machine"], result["sets"]
    lines = [
        f"The local data sets, made by `{COMMAND}` ({machine['cpu']}, "
        f"{result['cores']} cores). Scores are on D4RL's scale, but of local data: no row belongs in D4RL's tables.",
        "",
        "| name | policies | transitions | episodes | mean return | local score | seconds | transitions/s |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, r in rows.items():
        time = (f"{r['seconds']:.0f}", f"{r['transitions_per_s']:,}") if r["seconds"] else ("", "")
        lines.append(
            f"| {name}-local | {r['policies']} | {r['transitions']:,} | {r['episodes']:,} | {r['return_mean']:,.1f} | "
            f"{r['local_score']:.1f} | {time[0]} | {time[1]} |"
        )
    if result["not_made"]:
        lines += ["", f"Not to be made yet, for want of a policy: {', '.join(result['not_made'])}."]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="these alone, e.g. hopper-medium; the JSON's other rows stay")
    parser.add_argument("--transitions", type=int, default=0, help="of each, for a trial")
    parser.add_argument("--dataset_dir", type=Path, help="keep the files here")
    parser.add_argument("--page", action="store_true", help="write the page's section from the JSON, make nothing")
    args = parser.parse_args()
    out = ROOT / "benchmarks" / "datasets.json"
    if args.page:
        put_into_page(COMMAND, section(json.loads(out.read_text())), PAGE)
        return 0

    sets, missing = {}, []
    for name in args.names or NAMES:
        with tempfile.TemporaryDirectory() as aside:
            try:
                sets[name] = row(name, args.transitions, args.dataset_dir or Path(aside))
            except LocalDataError as error:
                print(f"{name}: {error}", file=sys.stderr)
                missing.append(name)
    if args.names and not args.transitions and out.exists():
        before = json.loads(out.read_text())
        sets = before["sets"] | sets
        missing = sorted(set(before["not_made"]) - set(sets) | set(missing))
    result = {"cores": cores(), "sets": sets, "not_made": missing}
    if args.transitions:
        print(section(facts() | result))
        return 1 if missing else 0
    print(write("datasets", result))
    put_into_page(COMMAND, section(json.loads(out.read_text())), PAGE)
    return 1 if missing else 0


if __name__ == "__main__":
    raise SystemExit(main())
