"""OPSO's own door to its second phase: `python online_trainer.py --dataset antmaze-medium-navigate-v0`.

The same as `python trainer.py --agent opso_online`, with all its flags; it goes on from the newest first phase on that
data set in `--output_dir`, or from `--init`.
"""

import sys

import trainer


def main(argv: list[str] | None = None) -> int:
    return trainer.main(["--agent", "opso_online", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
