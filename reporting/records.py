"""Finished runs as small files: all that tables and curves need of one, without its checkpoints, to be kept in git."""

import json
import re
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path

from common import logger
from reporting.runs import SUFFIX, Run

LEFT_AWAY = {"folder", "column", "apart", "failed"}  # what a report finds out anew
CURVES = {"episode/return", "loss/td"}  # that stay of a log's: an online agent's training
PLACES = {"output_dir", "resume", "dataset_dir"}  # of the machine that trained it
EPISODES = {"checkpoint", "returns", "lengths", "tasks"}  # of an evaluation: one number each episode


def keep(runs: Iterable[Run], folder: Path) -> list[Path]:
    """Write a file for each finished run; one of the same agent, data and seed that is there already is replaced."""
    kept = []
    for run in runs:
        if run.apart:
            continue
        record = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in LEFT_AWAY}
        record["config"] = {k: v for k, v in run.config.items() if k not in PLACES}
        record["final"] = {k: v for k, v in (run.final or {}).items() if k not in EPISODES} or None
        record["metrics"] = {name: points for name, points in run.metrics.items() if name in CURVES}
        record["curve"] = [(step, round(score, 2)) for step, score in run.curve]
        stem = re.sub(r"[^\w.=+-]+", "-", f"{run.label}-{run.column}-s{run.seed}")
        kept.append(folder / f"{stem}{SUFFIX}")
        folder.mkdir(parents=True, exist_ok=True)
        with logger.atomic_write(kept[-1]) as part:
            part.write_text(json.dumps(record) + "\n")
    return kept
