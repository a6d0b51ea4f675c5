"""`python -m bamba VERB ...`, or `bamba VERB ...` where it is installed: the scripts' verbs."""

import importlib
import sys

VERBS = {  # verb -> script
    "train": "trainer",
    "evaluate": "utils",
    "sweep": "sweep",
    "report": "report",
    "export": "export",
    "data": "d4rl_utils.__main__",
    "mazes": "ogbench_utils.__main__",
}


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in {*VERBS, "doctor"}:
        print(f"usage: bamba {{{','.join(VERBS)},doctor}} ...; bamba VERB --help says more", file=sys.stderr)
        return 0 if argv[:1] in (["-h"], ["--help"]) else 2
    if argv[0] == "doctor":
        argv = ["evaluate", "--doctor"]
    return importlib.import_module(f"bamba.{VERBS[argv[0]]}").main(argv[1:]) or 0


if __name__ == "__main__":
    raise SystemExit(main())
