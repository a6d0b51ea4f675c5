"""The zoo: small trained checkpoints that come with the project, and what is known of each (zoo/manifest.json)."""

import json
from pathlib import Path

ZOO = Path(__file__).resolve().parent.parent / "zoo"


def for_acting(ckpt: dict, half: bool = True) -> dict:
    """What an agent needs to act, and where it comes from: no optimizer, no data order, no replay.

    half: matrices as float16; biases, norms and the normaliser's statistics stay as they are.
    """
    weights = {k: v.half() if half and v.is_floating_point() and v.ndim > 1 else v for k, v in ckpt["agent"].items()}
    kept = ("data", "scores", "baseline_returns")
    run = {k: v for k, v in ckpt["run"].items() if k in kept}
    config = ckpt["config"] | {"output_dir": "./outputs", "dataset_dir": "./datasets", "resume": ""}
    if "dataset" in config:
        config["dataset"] = Path(config["dataset"]).name
    return ckpt | {"config": config, "agent": weights, "optimizer": None, "run": run}


def entries(folder: Path = ZOO) -> list[dict]:
    """What the manifest says of each checkpoint. ValueError if there is none."""
    path = folder / "manifest.json"
    if not path.is_file():
        raise ValueError(f"there is no zoo at {folder}: it comes with a clone of the project")
    return json.loads(path.read_text())["agents"]


def table(folder: Path = ZOO) -> str:
    """The zoo for people: file, agent, data, score."""
    rows = [("checkpoint", "agent", "learned from", "seed", "updates", "score", "MB")]
    for e in entries(folder):
        score = f"{e['score']:.1f} ± {e['score_std']:.1f} ({e['score_name']}, {e['episodes']} episodes)"
        size = f"{e['bytes'] / 1e6:.1f}"
        rows.append((f"zoo/{e['file']}", e["agent"], e["data"], str(e["seed"]), f"{e['updates']:,}", score, size))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(f"{word:<{w}}" for word, w in zip(row, widths)).rstrip() for row in rows)
