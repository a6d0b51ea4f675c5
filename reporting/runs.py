"""Run folders as a report sees them: what was trained on what, its evaluations, and whether it can be compared."""

import json
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from common import evaluation, logger
from common.plotting import smoothed
from config import CONFIGS, parse

# Settings that do not make another agent: where and when it ran, on what, how it was looked at, and how long.
ASIDE = {"seed", "num_seeds", "resume", "output_dir", "tensorboard", "wandb", "hours", "device", "threads", "compile"}
ASIDE |= {"cuda_graphs", "env", "dataset", "dataset_type", "dataset_dir", "data", "local_transitions", "preset"}
ASIDE |= {"eval_freq", "save_freq", "log_freq", "num_eval_episodes", "num_final_episodes", "eval_seed", "precision"}
BUDGET = {"num_epochs", "updates_per_epoch", "env_steps"}
POINTS = 80  # of a curve of losses on the page
SUFFIX = ".run.json"  # of a finished run that was kept as a small file


@dataclass(frozen=True)
class Run:
    """One training. label: what it is called in tables; column: its data, as tables have them."""

    folder: Path
    config: dict
    data: dict
    versions: dict
    score_name: str
    unit: str  # update or env_step
    curve: list[tuple[int, float]]  # evaluations: step, score (or return, where there is no score)
    metrics: dict[str, list[tuple[int, float]]]  # curves of losses, and of an online agent's training returns
    seconds: float
    behavior: float | None
    final: dict | None = None  # what utils.py found of the last checkpoint, if it was asked with --json
    numbers: dict[str, float] = field(default_factory=dict)  # single ones beside the score: see `numbers_of`
    machine: dict = field(default_factory=dict)
    commit: str = ""
    failed: str = ""
    label: str = ""  # as a study calls its agent, else as `labelled` does
    column: str = ""
    apart: str = field(default="", compare=False)  # why it is not in the tables

    @property
    def agent(self) -> str:
        return self.config["agent"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def budget(self) -> int:
        c = self.config
        return c["num_epochs"] * c["updates_per_epoch"] if "num_epochs" in c else c["env_steps"]

    @property
    def step(self) -> int:
        steps = [points[-1][0] for points in self.metrics.values()]
        return max([*steps, *(step for step, _ in self.curve)], default=0)

    @property
    def last(self) -> float:
        """The score of the last checkpoint: by utils.py if there is its file, else of the last evaluation."""
        return evaluation.headline(self.final) if self.final else self.curve[-1][1]

    @property
    def best(self) -> float:
        return max(score for _, score in self.curve)

    @property
    def episodes(self) -> int:
        """Behind `last`."""
        return self.final["eval/episodes"] if self.final else self.config.get("num_eval_episodes", 0)

    @property
    def commands(self) -> dict[str, str]:
        """To train it again from nothing, to go on with it, to evaluate it."""
        folder, train = shlex.quote(str(self.folder)), shlex.join(["python", "trainer.py", *flags_of(self.config)])
        if self.folder.name.endswith(SUFFIX):
            return {"train": train}
        return {
            "train": train,
            "resume": f"python trainer.py --resume {folder}",
            "evaluate": f"python utils.py --checkpoint {folder} --episodes 100",
        }


def flags_of(config: dict) -> list[str]:
    """trainer.py's flags for these settings: those that differ from its defaults, behind agent, environment, preset."""
    start = [f"--{k}={config[k]}" for k in ("agent", "preset") if config.get(k, "none") not in ("none", "auto", None)]
    if config["agent"] in ("dqn", "opso_online") and "env" in config:
        start.append(f"--env={config['env']}")
    defaults = defaults_of(*start)
    if defaults is None:
        start, defaults = [f"--agent={config['agent']}"], as_json(vars(CONFIGS[config["agent"]]()))
    said = {word.partition("=")[0].removeprefix("--") for word in start} | {"resume", "output_dir", "num_seeds"}
    flags = list(start)
    for name, value in config.items():
        if name in said or name not in defaults or value == defaults[name]:
            continue
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no_{name}")
        else:
            flags += [f"--{name}", *map(str, value)] if isinstance(value, list) else [f"--{name}={value}"]
    return flags


@cache
def defaults_of(*flags: str) -> dict | None:
    """All settings by these flags; None if they are none (any more): a preset of an earlier version."""
    try:
        return as_json(vars(parse(flags)))
    except (ValueError, SystemExit):
        return None


def as_json(value):
    return json.loads(json.dumps(value))


def find_places(places: Iterable[str]) -> list[Path]:
    """The run folders and kept runs in these folders, however deep. ValueError if one does not exist or holds none."""
    found = []
    for place in places:
        path = Path(place)
        if not path.exists():
            raise ValueError(f"{place} does not exist: give folders that hold runs, such as outputs/STUDY")
        own = {log.parent for log in path.rglob("log.jsonl")} | set(path.rglob(f"*{SUFFIX}"))
        if not own:
            raise ValueError(f"{place} holds no run: a run is a folder with a log.jsonl in it, or a file *{SUFFIX}")
        found += sorted(own - set(found))
    return found


def read_kept(path: Path) -> Run:
    """A run that was kept as a file. ValueError if it is none."""
    try:
        record = json.loads(path.read_text())
        curve = [tuple(point) for point in record.pop("curve")]
        return Run(folder=path, **({"metrics": {}} | record), curve=curve)  # offline agents' curves are not kept
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no kept run ({error}): mend or move it") from error


def read_run(folder: Path) -> Run | None:
    """A run's log and what stands beside it; None if it ended before its first line."""
    if folder.name.endswith(SUFFIX):
        return read_kept(folder)
    try:
        rows = logger.read_log(folder / "log.jsonl")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / 'log.jsonl'} is damaged ({error}): mend or move it") from error
    if not rows or "config" not in rows[0] or "data" not in rows[0]:
        return None
    head, unit = rows[0], "env_step" if "env_step" in rows[0] else "update"
    curve = [(row[unit], evaluation.headline(row)) for row in rows if "eval/return_mean" in row]
    kinds = dict.fromkeys(tuple(row) for row in rows[1:])  # few: rows of one kind have the same names
    names = dict.fromkeys(name for kind in kinds for name in kind if "/" in name and not name.startswith("eval/"))
    metrics = {
        name: [(row[unit], row[name]) for row in rows[1:] if isinstance(row.get(name), (int, float))] for name in names
    }
    final = final_of(folder, curve)
    failed, label = folder.parent / "failed.json", folder.parent / "label.json"
    return Run(
        folder=folder,
        config=head["config"],
        data=head["data"],
        versions=head.get("versions", {}),
        score_name=head.get("score_name", "score"),
        unit=unit,
        curve=curve,
        metrics={name: thinned(points) for name, points in metrics.items() if points},
        seconds=max(row.get("seconds", 0.0) for row in rows),
        behavior=head.get("behavior_score"),
        final=final,
        numbers=numbers_of(rows, final),
        machine=head.get("machine", {}),
        commit=head.get("commit", ""),
        label=json.loads(label.read_text())["label"] if label.exists() else "",
        failed=json.loads(failed.read_text())["sentence"] if failed.exists() else "",
    )


def final_of(folder: Path, curve: list) -> dict | None:
    """The report of utils.py with the most episodes, of those in the folder that are of the last checkpoint."""
    found = []
    for path in folder.glob("*.json"):
        record = json.loads(path.read_text())
        is_last = str(record.get("checkpoint", "")).endswith(("last_checkpoint.pt", folder.name))
        if is_last and "eval/return_mean" in record and curve and record.get("updates", 0) >= curve[-1][0]:
            found.append(record)
    return max(found, key=lambda record: record["eval/episodes"], default=None)


def numbers_of(rows: list[dict], final: dict | None) -> dict[str, float]:
    """What a log tells beside scores, by name.

    updates_per_s, steps_per_s: medians. What the last evaluation counted, such as landed, crash, action_0 (shares);
    task1, ...: success in each task, percent. Of an agent that trains online: readings of "average reward" that papers
    use without saying which: train_final, the last smoothed return of a training episode; train_mean, their mean from
    the first update on; train_last_10pct, in the last tenth of the steps; train_raw_last_10pct, not smoothed; td_final
    and td_uniform_final, the last smoothed TD losses (of drawn, of uniform transitions). Smoothed as TensorBoard's 0.9.
    """
    found = {}
    for name in ("updates_per_s", "steps_per_s"):
        values = [row[name] for row in rows if row.get(name)]
        found |= {name: float(np.median(values))} if values else {}
    evaluated = final or next((row for row in reversed(rows) if "eval/return_mean" in row), {})
    usual = ("score", "return", "episodes")
    for name, value in evaluated.items():
        name = name.removeprefix("eval/") if name.startswith("eval/") else ""
        if name and not name.startswith(usual):
            found[name] = value
    found |= {task: 100 * float(np.mean(arrived)) for task, arrived in evaluated.get("tasks", {}).items()}
    episodes = [(row["env_step"], row["episode/return"]) for row in rows if "episode/return" in row]
    if episodes:
        steps, returns = map(np.array, zip(*episodes))
        smooth = np.array(smoothed(list(returns)))
        learning = steps >= rows[0]["config"].get("learn_start", 0)
        late = steps >= 0.9 * rows[0]["config"]["env_steps"]
        found["train_final"] = float(smooth[-1])
        readings = {
            "train_mean": smooth[learning],
            "train_last_10pct": smooth[late],
            "train_raw_last_10pct": returns[late],
        }
        found |= {name: float(values.mean()) for name, values in readings.items() if len(values)}
    for name, key in (("td_final", "loss/td"), ("td_uniform_final", "loss/td_uniform")):
        losses = [row[key] for row in rows if key in row]
        found |= {name: float(smoothed(losses)[-1])} if losses else {}
    return found


def thinned(points: list) -> list:
    """At most about `POINTS`, each the mean of as many, at the step of the last of them."""
    size = -(-len(points) // POINTS)
    steps, values = zip(*points)
    starts = np.arange(0, len(points), size)
    means = np.add.reduceat(np.array(values, dtype=float), starts) / np.diff([*starts, len(points)])
    return [(steps[min(i + size, len(points)) - 1], float(f"{y:.5g}")) for i, y in zip(starts, means)]


# -- which of them can be compared -----------------------------------------------------------------


def read_runs(places: Iterable[str]) -> list[Run]:
    """All runs, labelled; those that cannot stand beside the others say why in `apart`."""
    runs = [run for run in map(read_run, find_places(places)) if run]
    if not runs:
        raise ValueError(f"no run in {', '.join(places)} has begun yet")
    return set_apart(labelled(with_columns(runs)))


def with_columns(runs: list[Run]) -> list[Run]:
    """A column is one data set: by its name, and by its bytes and kind of score where one name stands for several."""
    sums, kinds = {}, {}
    for run in runs:
        sums.setdefault(run.data["name"], set()).add(run.data.get("sha256"))
        kinds.setdefault(run.data["name"], set()).add(run.score_name)
    found = []
    for run in runs:
        name = run.data["name"]
        more = [str(run.data.get("sha256"))[:8]] if len(sums[name]) > 1 else []
        more += [run.score_name] if len(kinds[name]) > 1 else []
        found.append(replace(run, column=f"{name} ({', '.join(more)})" if more else name))
    return found


def labelled(runs: list[Run]) -> list[Run]:
    """An agent is called as its study calls it, else by its name and by what of its settings is not the usual.

    Only settings count that differ between its runs on one data set: what goes with the data is no other agent.
    """
    values: dict[tuple, Counter] = {}
    for run in runs:
        for name, value in all_settings(run).items():
            values.setdefault((run.agent, name), Counter())[json.dumps(value)] += 1
            values.setdefault((run.agent, name, run.column), Counter())[json.dumps(value)] += 1
    varying = {key[:2] for key, found in values.items() if len(key) == 3 and len(found) > 1}
    found = []
    for run in runs:
        own = {name: value for name, value in sorted(all_settings(run).items()) if (run.agent, name) in varying}
        more = [f"{k}={v}" for k, v in own.items() if json.dumps(v) != values[run.agent, k].most_common(1)[0][0]]
        found.append(replace(run, label=run.label or " ".join([run.agent, *more])))
    return found


def all_settings(run: Run) -> dict:
    """What makes the agent, by name; a flag that is younger than the run has its default."""
    both = {**as_json(vars(CONFIGS[run.agent]())), **run.config}
    return {name: value for name, value in both.items() if name not in ASIDE | BUDGET}


def set_apart(runs: list[Run]) -> list[Run]:
    """In a column of a table stand finished runs of one budget and one set of versions, one for each seed."""
    usual = {
        column: Counter(run.budget for run in runs if run.column == column and run.curve).most_common(1)
        for column in {run.column for run in runs}
    }
    versions = dict(Counter(version_of(run) for run in runs).most_common(1)[0][0])
    found, seen = [], {}
    for run in sorted(runs, key=lambda run: run.folder.name, reverse=True):  # the newest first: names end in the time
        unit = run.unit.replace("_", " ") + "s"
        key = run.label, run.column, run.seed
        if run.failed:
            why = f"failed: {run.failed}"
        elif not run.curve:
            why = "was never evaluated"
        elif run.curve[-1][0] < run.budget:
            why = f"unfinished: {run.curve[-1][0]:,} of {run.budget:,} {unit}"
        elif run.budget != usual[run.column][0][0]:
            why = f"another budget: {run.budget:,} {unit}, others on these data have {usual[run.column][0][0]:,}"
        elif differ := other_versions(run, versions):
            why = f"other versions: {', '.join(differ)}"
        elif key in seen:
            why = f"the same settings and seed as {seen[key]}"
        else:
            why, seen[key] = "", run.folder.name
        found.append(replace(run, apart=why))
    return sorted(found, key=lambda run: (run.label, run.column, run.seed))


def version_of(run: Run) -> tuple:
    return tuple(sorted((k, v) for k, v in run.versions.items() if k != "python"))


def other_versions(run: Run, usual: dict) -> list[str]:
    """The packages that are of another version than usual; one that either side does not name tells nothing."""
    differ = [f"{k} {v} (others {usual[k]})" for k, v in version_of(run) if usual.get(k, v) != v]
    return differ if run.versions or not usual else ["unknown"]
