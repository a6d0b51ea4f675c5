"""The dataclasses as a command line, and as the page of settings in docs/."""

import inspect
import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import field, fields, make_dataclass, replace
from functools import cache
from typing import Annotated

from config import bamba, decision, dqn, opso, ppo
from config.bamba import BambaConfig
from config.decision import DMambaConfig, DMConfig, DTConfig
from config.dqn import DQNConfig
from config.opso import OPSOConfig, OPSOOnlineConfig
from config.ppo import PPOConfig
from config.shared import Only, marks_of, ranges_of

CONFIGS = {
    "bamba": BambaConfig,
    "dt": DTConfig,
    "dmamba": DMambaConfig,
    "dm": DMConfig,
    "dqn": DQNConfig,
    "opso": OPSOConfig,
    "opso_online": OPSOOnlineConfig,
    "ppo": PPOConfig,
}
PRESETS = {**bamba.PRESETS, **decision.PRESETS, **dqn.PRESETS, **opso.PRESETS, **ppo.PRESETS}
ENV_DEFAULTS = {"dqn": dqn.ENV_DEFAULTS}  # agent -> environment -> where its settings start from

# The flags that most runs set come first in --help, whatever group they belong to.
MAIN = ("agent", "env", "dataset_type", "dataset", "init", "preset", "objective", "encoder", "mixer", "num_epochs")
MAIN += ("env_steps", "seed", "num_seeds", "device", "output_dir", "resume")


def groups_of(config: type) -> list[type]:
    """The sections that an agent's settings come in: the dataclasses that it is made of, and itself if it adds a flag.
    What says of itself that it is LAST comes last."""
    groups = [g for g in reversed(config.__mro__) if g.__bases__ == (object,)]
    shared = {f.name for g in groups for f in fields(g)}
    if any(f.name not in shared for f in flags_of(config)):
        groups.append(config)
    return sorted(groups, key=lambda g: "LAST" in vars(g))


def flags_of(config: type) -> list:
    """The fields that the command line sets."""
    return [f for f in fields(config) if f.metadata.get("flag", True)]


def own_flags(group: type, config: type) -> list:
    """What a section shows: all of a group's fields; of the agent's own class those that no group has."""
    if group is not config:
        return flags_of(group)
    shared = {f.name for g in config.__mro__ if g.__bases__ == (object,) for f in fields(g)}
    return [f for f in flags_of(config) if f.name not in shared]


def words_of(config: type) -> dict[str, str]:
    """What is written below each field of a config and its bases, by the field's name."""
    found = {}
    for kind in config.__mro__[:-1]:
        for name, text in re.findall(
            r'    (\w+): .*\n(?:    \)\n)?    """((?:.|\n)*?)"""', textwrap.dedent(inspect.getsource(kind))
        ):
            found.setdefault(name, " ".join(text.split()))
    return found


def parse(argv: Sequence[str] | None = None, prog: str = "trainer.py"):
    """The config of the agent that the command line (default: sys.argv) names. An undeclared flag ends the program."""
    import tyro  # here, so that an agent can be imported and used without it

    argv = list(sys.argv[1:] if argv is None else argv)
    agent, preset = argv_value("--agent", argv) or "bamba", argv_value("--preset", argv) or "none"
    config = CONFIGS.get(agent, BambaConfig)  # unknown names are refused below, with the choices
    known = PRESETS.get(agent, {})
    if preset == "auto":
        raise ValueError("--preset auto is for the offline agents on a CPU (bamba, dt, dmamba, dm)")
    if preset in {name for names in PRESETS.values() for name in names} and agent in CONFIGS and preset not in known:
        raise ValueError(f"{agent} has no preset {preset!r}; it has {', '.join(known)}")
    defaults = {f.name: f.default for f in flags_of(config)}
    defaults.update(ENV_DEFAULTS.get(agent, {}).get(argv_value("--env", argv), {}))
    defaults.update(known.get(preset, {}))

    whole, sections = form_of(config, tuple(defaults.items()))
    marks = (tyro.conf.OmitArgPrefixes,)
    found = tyro.cli(whole, args=argv, prog=prog, description=config.__doc__, use_underscores=True, config=marks)
    return config(**{name: getattr(getattr(found, title), name) for title, names in sections.items() for name in names})


@cache
def form_of(config: type, defaults: tuple[tuple[str, object], ...]) -> tuple[type, dict[str, list[str]]]:
    """The settings as tyro wants them, a dataclass of sections, and which flags each section has.

    They are flat in use and nested only here: that is what makes a section of --help. Kept, as a sweep asks for the
    same form many times.
    """
    import tyro

    defaults = dict(defaults)
    words, ranges, types = words_of(config), ranges_of(config), {f.name: f.type for f in fields(config)}
    main = [name for name in MAIN if name in defaults]
    sections = {"main": main}
    for group in groups_of(config):
        names = [f.name for f in own_flags(group, config) if f.name not in main]
        if names:
            sections[title_of(group)] = names
    nested = []
    for title, names in sections.items():
        parts = []
        for name in names:
            bounded = name in ranges and ranges[name].high is not None
            text = f"{words[name]} ({ranges[name]})" if bounded else words[name]
            parts.append((name, Annotated[types[name], tyro.conf.arg(help=text)], field(default=defaults[name])))
        section = make_dataclass(title, parts, frozen=True)
        # a help of its own, if an empty one: tyro would search the source for it, for longer than all else takes
        nested.append((title, Annotated[section, tyro.conf.arg(help="")], section()))
    return make_dataclass(config.__name__, nested, frozen=True), sections


def title_of(group: type) -> str:
    """A group's name in --help: OptimConfig -> optim, UpdateSchedule -> update-schedule."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", group.__name__.removesuffix("Config")).lower()


def is_given(name: str, argv: Sequence[str]) -> bool:
    """Whether the command line sets a flag, by whatever spelling."""
    words = {word.split("=", 1)[0].replace("-", "_") for word in argv if word.startswith("--")}
    return f"__{name}" in words or f"__no_{name}" in words


def idle_flags(cfg, argv: Sequence[str]) -> list[str]:
    """A sentence for each flag of the command line that changes nothing in this run, because of other settings.

    cfg: as the run has it, after `resolve_config`.
    """
    if argv_value("--preset", argv) == "auto":  # by now the name of what it chose
        cfg = replace(cfg, preset="auto")
    idle = {name: mark for name, mark in marks_of(type(cfg), Only).items() if is_given(name, argv)}
    return [f"--{name} has no effect here: it counts only {m.words}" for name, m in idle.items() if not m.holds(cfg)]


def argv_value(flag: str, argv: Sequence[str]) -> str:
    """What the command line says behind `flag`, as `--flag word` or `--flag=word`; the last one counts, as for tyro."""
    found = [b for a, b in zip(argv, argv[1:]) if a == flag] + [
        a.split("=", 1)[1] for a in argv if a.startswith(flag + "=")
    ]
    return found[-1] if found else ""


# -- the page of settings ------------------------------------------------------------------------


def settings_page() -> str:
    """Every flag as Markdown, a table a group, out of the dataclasses' own words; then what each agent starts from."""
    lines = [
        "# Settings",
        "",
        "`python trainer.py --help` prints the same; `python -m config` makes this page. A group names its agents",
        "where it does not belong to all. A preset is a set of overrides, and flags win over it.",
    ]
    for group in all_groups():
        users = [name for name, config in CONFIGS.items() if group in groups_of(config)]
        whose = "" if len(users) == len(CONFIGS) else f" ({', '.join(users)})"
        lines += [f"\n## {title_of(group).replace('_', ' ').capitalize()}{whose}\n", f"{sentence(group.__doc__)}\n"]
        lines += ["| flag | default | range | |", "|---|---|---|---|"]
        words, ranges = words_of(group), ranges_of(group)
        for f in own_flags(group, group if group in CONFIGS.values() else None):
            lines.append(f"| `{f.name}` | {shown(f.default)} | {ranges.get(f.name, '')} | {words[f.name]} |")
    lines += ["\n## Where an agent starts from other defaults\n", "| agent | |", "|---|---|"]
    for name, config in CONFIGS.items():
        inherited = {f.name: f.default for g in groups_of(config) if g is not config for f in fields(g)}
        changed = [f for f in flags_of(config) if f.default != inherited.get(f.name, f.default) and f.name != "agent"]
        if changed:
            lines.append(f"| `{name}` | {', '.join(f'`{f.name}` {shown(f.default)}' for f in changed)} |")
    lines += ["\n## Where an environment makes an agent start from other defaults\n"]
    lines += ["| agent, environment | |", "|---|---|"]
    for name, envs in ENV_DEFAULTS.items():
        for env, changes in envs.items():
            lines.append(f"| `{name}`, {env} | {', '.join(f'`{k}` {shown(v)}' for k, v in changes.items())} |")
    lines += ["\n## Presets\n", "| agent, preset | |", "|---|---|"]
    for name, presets in PRESETS.items():
        for preset, changes in presets.items():
            told = ", ".join(f"`{k}` {shown(v)}" for k, v in changes.items()) or "as without one"
            lines.append(f"| `{name}`, {preset} | {told} |")
    return "\n".join(lines).strip()


def all_groups() -> list[type]:
    """Every section of every agent, each once."""
    groups = list(dict.fromkeys(g for config in CONFIGS.values() for g in groups_of(config)))
    return sorted(groups, key=lambda g: "LAST" in vars(g))


def sentence(text: str) -> str:
    """A group's words as a sentence."""
    return text[0].upper() + text[1:].rstrip(".") + "."


def shown(default) -> str:
    return "none" if default in ("", None) else str(default)
