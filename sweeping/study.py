"""What is wanted: every run of a study, each checked by trainer.py's own command line before anything runs."""

import contextlib
import io
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path

import yaml

from common import logger
from common.checkpoint import AGENTS, agent_of
from common.interface import OnlineAgent
from config import parse
from config.shared import Data

KEYS = {"name", "agents", "datasets", "seeds", "flags", "grid", "overrides", "search", "metric", "episodes"}
SHAPES = {  # key -> what YAML must make of it, in words
    "agents": ((list, dict), "a list of names, or names with settings"),
    "datasets": (list, "a list of names"),
    "flags": (dict, "settings, such as {preset: small}"),
    "grid": (dict, "settings with several values, such as {learning_rate: [0.001, 0.0003]}"),
    "overrides": (list, "a list of {agents: [...], datasets: [...], flags: {...}}"),
    "search": (dict, "settings with ranges"),
}
OURS = {"output_dir", "resume", "seed", "num_seeds", "agent"}  # trainer.py's flags that a sweep decides


@dataclass(frozen=True)
class Planned:
    """A run that is wanted. name: the combination; of its folder too. total: updates, or environment steps. label: as
    report.py calls its agent. episodes: in which utils.py evaluates the last checkpoint; 0: it does not."""

    name: str
    flags: dict
    total: int
    label: str = ""
    episodes: int = 0

    @property
    def argv(self) -> list[str]:
        return as_argv(self.flags)


def as_argv(flags: dict) -> list[str]:
    """Settings as trainer.py's command line has them."""
    found = []
    for name, value in flags.items():
        found.append(("--" if value else "--no_") + name if isinstance(value, bool) else f"--{name}={value}")
    return found


# -- what is wanted --------------------------------------------------------------------------------


class Loader(yaml.SafeLoader):
    """YAML's, to which a key that stands twice in one place is an error."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} stands here twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return node


def read_study(path: str) -> dict:
    """A study's file; "place" in it is where it came from. ValueError, with the line, for what is not one."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        study = yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = error.problem_mark
        line = mark.line + 1 if mark else "?"
        raise ValueError(f"{path}, line {line}: this cannot be read as YAML ({error.problem})") from error
    if not isinstance(study, dict):
        raise ValueError(f"{path} holds no settings: it wants agents, datasets and seeds")
    study = {key: value for key, value in study.items() if value is not None}
    for key, value in study.items():
        if key not in KEYS:
            raise ValueError(f"{path}, line {line_of(text, str(key))}: {key} is none of {', '.join(sorted(KEYS))}")
        if key in ("agents", "datasets") and isinstance(value, str):
            study[key] = as_list(value)
    for key, (kind, words) in SHAPES.items():
        if key in study and not isinstance(study[key], kind):
            raise ValueError(f"{path}, line {line_of(text, key)}: {key} wants {words}, and is {study[key]}")
    for name in [*study.get("agents", []), *study.get("datasets", [])]:
        if not isinstance(name, str):
            raise ValueError(f"{path}, line {line_of(text, str(name))}: {name} is no name")
    own = study["agents"] if isinstance(study.get("agents"), dict) else {}
    for name, flags in own.items():
        if not isinstance(flags, (dict, type(None))):
            raise ValueError(f"{path}, line {line_of(text, name)}: {name} wants settings, or {{}}, and has {flags}")
    return {"name": Path(path).stem, "place": (path, text), **study}


def located(study: dict, message: str, words: Iterable[str]) -> str:
    """A message, and before it the file's line that has the first of these words, if there is one."""
    path, text = study.get("place", ("", ""))
    _, _, said = message.partition(": ")  # the run's name has the words of its settings
    named = [(match.start(), word) for word in words if (match := re.search(whole(word), said))]
    for _, word in sorted(named):
        if re.search(whole(word), text):
            return f"{path}, line {line_of(text, word)}: {message}"
    return message


def whole(word: str) -> str:
    return rf"(?<!\w){re.escape(word)}(?!\w)"


def line_of(text: str, word: str) -> int:
    """The first line that has the word, from 1 on; 1 if none has."""
    lines = (i for i, line in enumerate(text.splitlines(), 1) if re.search(whole(word), line.partition("#")[0]))
    return next(lines, 1)


def seeds_of(text) -> list[int]:
    """`3`, `0-4`, `0,2,5-7` or a list of numbers. ValueError for anything else."""
    if isinstance(text, list) and all(type(seed) is int for seed in text):
        return text
    found = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if not match:
            raise ValueError(f"seeds {text} are none: write 3, 0-4 or 0,2,5-7")
        first, last = int(match[1]), int(match[2] or match[1])
        found += range(first, last + 1)
    return found


def expand(study: dict) -> list[Planned]:
    """Every run of a study, each checked by trainer.py's own command line. ValueError with what is wrong in which."""
    agents = study.get("agents") or ["bamba"]
    agents = agents if isinstance(agents, dict) else {name: {} for name in agents}
    grid, overrides = study.get("grid") or {}, study.get("overrides") or []
    twice = set(grid) & set(study.get("flags") or {})
    if twice:
        why = f"grid: {', '.join(sorted(twice))} stands in flags, too: which is it?"
        raise ValueError(located(study, why, sorted(twice)))
    values = [value if isinstance(value, list) else [value] for value in grid.values()]
    for rule in overrides:
        if (
            not isinstance(rule, dict)
            or not set(rule) <= {"datasets", "agents", "flags"}
            or not isinstance(rule.get("flags"), dict)
        ):
            raise ValueError(f"the override {rule} wants flags, and datasets or agents that they are for")
        for key, known in (("agents", agents), ("datasets", study.get("datasets") or [])):
            for name in as_list(rule.get(key)):
                if name not in known:
                    why = f"overrides: {name} is named, which is none of the study's {key}"
                    raise ValueError(located(study, why, [name]))
    episodes, seeds = study.get("episodes", 0), seeds_of(study.get("seeds", 42))
    if type(episodes) is not int or episodes < 0:
        raise ValueError(f"episodes {episodes} are none: how many shall evaluate each last checkpoint?")
    runs = []
    for (label, own), dataset in itertools.product(agents.items(), study.get("datasets") or [""]):
        for point in itertools.product(*values):
            chosen = dict(zip(grid, point))
            flags = {"agent": label, **(study.get("flags") or {}), **(own or {}), **chosen}
            for rule in overrides:
                where, who = (as_list(rule.get(key)) for key in ("datasets", "agents"))
                if (not where or dataset in where) and (not who or label in who):
                    flags.update(rule["flags"])
            if bad := (OURS - {"agent"}) & set(flags):
                raise ValueError(f"{', '.join(sorted(bad))} cannot be set here: a sweep decides that itself")
            if dataset:
                flags["env" if flags["agent"] == "dqn" else "dataset"] = dataset
            words = [label, Path(str(dataset)).stem, *(f"{k}={v}" for k, v in chosen.items())]
            name = re.sub(r"[^\w.=+-]+", "-", "-".join(word for word in words if word))
            called = " ".join([label, *(f"{k}={v}" for k, v in chosen.items())])
            with naming(study, flags, label):  # the other seeds differ by no flag
                first = planned(f"{name}-s{seeds[0]}", with_seed(flags, seeds[0]), called)
            first = replace(first, episodes=episodes)
            runs += [replace(first, name=f"{name}-s{seed}", flags=with_seed(flags, seed)) for seed in seeds]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} is wanted twice")
    return runs


def as_list(what) -> list:
    """A word alone is a list of one; nothing is an empty one."""
    return [what] if isinstance(what, str) else list(what or [])


def with_seed(flags: dict, seed: int) -> dict:
    """These flags of one seed; `{seed}` in a text becomes it, as in the checkpoint that a run goes on from."""
    return {k: v.replace("{seed}", str(seed)) if isinstance(v, str) else v for k, v in flags.items()} | {"seed": seed}


def planned(name: str, flags: dict, label: str = "") -> Planned:
    """A run whose flags are trainer.py's. ValueError with the sentence if they are not."""
    if flags["agent"] not in AGENTS:
        raise ValueError(f"run {name}: there is no agent {flags['agent']}; there are {', '.join(AGENTS)}")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            cfg = parse(as_argv(flags))
    except SystemExit:  # tyro's: a frame with the reason in it
        words = " ".join(re.sub(r"[│╭╮╰╯─]|-{5,}", " ", said.getvalue()).split())
        raise ValueError(f"run {name}: {words.partition('For full helptext')[0].strip()}") from None
    except ValueError as error:
        raise ValueError(f"run {name}: {error}") from error
    online = issubclass(agent_of(cfg.agent), OnlineAgent)
    return Planned(name, flags, cfg.env_steps if online else cfg.num_epochs * cfg.updates_per_epoch, label)


@contextlib.contextmanager
def naming(study: dict, flags: dict, label: str) -> Iterator[None]:
    """What is wrong with a run's settings is said with the line of the study's file that it comes from."""
    try:
        yield
    except ValueError as error:
        values = [str(flags[key]) for key in ("agent", "dataset", "env") if flags.get(key)]
        raise ValueError(located(study, str(error), [*(set(flags) - {"agent"}), *values, label])) from error


def distinct(runs: list[Planned]) -> Iterator[tuple[Planned, object]]:
    """One run, and its settings, of those that have agent, environment and data in common."""
    seen = set()
    for run in runs:
        cfg = parse(run.argv)
        key = cfg.agent, run.flags.get("init"), *(str(run.flags.get(f.name)) for f in fields(Data)), cfg.preset
        if key not in seen:
            seen.add(key)
            yield run, cfg


def check(runs: list[Planned], study: dict) -> None:
    """Every environment and data set has a name that means something. ValueError if not. Nothing is downloaded, but for
    Minari's data, which bring their environment."""
    for run, cfg in distinct(runs):
        with naming(study, run.flags, run.label):
            try:
                agent_class = agent_of(cfg.agent)
                agent_class.make_eval_env(agent_class.resolve_config(cfg))
            except ValueError as error:
                raise ValueError(f"run {run.name}: {error}") from error


def prepare(runs: list[Planned]) -> None:
    """Data are found, downloaded or made once, before a run needs them. ValueError, OSError: they cannot be."""
    for _, cfg in distinct(runs):
        if not issubclass(agent_of(cfg.agent), OnlineAgent):
            agent_of(cfg.agent).open_data(cfg, "cpu", 0)


def settle(runs: list[Planned], folder: Path) -> None:
    """A folder for each run. ValueError if one of that name was begun with other flags, or none can be made."""
    for run in runs:
        place = folder / run.name
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"{place} cannot be made ({error.strerror}): give another --output_dir") from error
        path = place / "flags.json"
        if path.exists() and (before := json.loads(path.read_text())) != run.flags:
            names = [k for k in before | run.flags if before.get(k) != run.flags.get(k)]
            raise ValueError(
                f"{place} was begun with other settings ({', '.join(names)}): give the study another --name"
            )
        if not path.exists():
            for file, what in ((place / "label.json", {"label": run.label}), (path, run.flags)):
                with logger.atomic_write(file) as part:
                    part.write_text(json.dumps(what) + "\n")
