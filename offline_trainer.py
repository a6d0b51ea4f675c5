"""OPSO's own door to its first phase: `python offline_trainer.py --dataset antmaze-medium-navigate-v0`.

The same as `python trainer.py --agent opso`, with all its flags.
"""

import sys

import trainer


def main(argv: list[str] | None = None) -> int:
    return trainer.main(["--agent", "opso", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    raise SystemExit(main())
