"""The dataclasses as a command line, and as the README's tables."""

import sys
from collections.abc import Sequence
from dataclasses import fields, make_dataclass

from config import bamba, decision, dqn, opso, ppo
from config.bamba import BambaConfig
from config.decision import DMambaConfig, DMConfig, DTConfig
from config.dqn import DQNConfig
from config.opso import OPSOConfig, OPSOOnlineConfig
from config.ppo import PPOConfig

CONFIGS = {"bamba": BambaConfig, "dt": DTConfig, "dmamba": DMambaConfig, "dm": DMConfig, "dqn": DQNConfig}
CONFIGS |= {"opso": OPSOConfig, "opso_online": OPSOOnlineConfig, "ppo": PPOConfig}
PRESETS = bamba.PRESETS | decision.PRESETS | dqn.PRESETS | opso.PRESETS | ppo.PRESETS
WORLDS = {"dqn": dqn.WORLDS}  # agent -> environment -> where its settings start from


def groups_of(config: type) -> list[type]:
    """The sections that an agent's settings come in."""
    return [g for g in reversed(config.__mro__) if g.__bases__ == (object,)]


def parse(argv: Sequence[str] | None = None, prog: str = "trainer.py"):
    """The config of the agent that the command line (default: sys.argv) names. An undeclared flag ends the program."""
    import tyro  # here, so that an agent can be imported and used without it

    argv = list(sys.argv[1:] if argv is None else argv)
    agent, preset = word_after("--agent", argv) or "bamba", word_after("--preset", argv) or "none"
    config = CONFIGS.get(agent, BambaConfig)  # unknown names are refused below, with the choices
    known = PRESETS.get(agent, {})
    if preset in {name for names in PRESETS.values() for name in names} and agent in CONFIGS and preset not in known:
        raise ValueError(f"{agent} has no preset {preset!r}; it has {', '.join(known)}")
    world = WORLDS.get(agent, {}).get(word_after("--env", argv), {})
    defaults = {f.name: f.default for f in fields(config)} | world | known.get(preset, {})
    # The groups are flat in use and nested only here: that is what makes each one a section of --help.
    groups = {g.__name__: g(**{f.name: defaults[f.name] for f in fields(g)}) for g in groups_of(config)}
    nested = make_dataclass(config.__name__, [(name, type(g), g) for name, g in groups.items()], frozen=True)
    marks = (tyro.conf.OmitArgPrefixes,)
    parts = tyro.cli(nested, args=argv, prog=prog, description=config.__doc__, use_underscores=True, config=marks)
    return config(**{f.name: getattr(getattr(parts, name), f.name) for name, g in groups.items() for f in fields(g)})


def word_after(flag: str, argv: Sequence[str]) -> str:
    """What the command line says behind `flag`, as `--flag word` or `--flag=word`; the last one counts, as for tyro."""
    found = [b for a, b in zip(argv, argv[1:]) if a == flag] + [
        a.split("=", 1)[1] for a in argv if a.startswith(flag + "=")
    ]
    return found[-1] if found else ""


def readme_table() -> str:
    """Every flag as Markdown, a table a group, out of the dataclasses' own words; then what each agent starts from."""
    import inspect
    import re

    lines = []
    users = {g: [name for name, config in CONFIGS.items() if g in groups_of(config)] for g in all_groups()}
    for group in all_groups():
        words = dict(re.findall(r'    (\w+): .*\n    """((?:.|\n)*?)"""', inspect.getsource(group)))
        whose = "" if len(users[group]) == len(CONFIGS) else f" ({', '.join(users[group])})"
        lines += [f"\n**{group.__name__}**{whose}: {group.__doc__}\n", "| flag | default | |", "|---|---|---|"]
        for f in fields(group):
            lines.append(f"| `{f.name}` | {shown(f.default)} | {' '.join(words[f.name].split())} |")
    lines += ["\n**Where an agent starts from other defaults**\n", "| agent | |", "|---|---|"]
    for name, config in CONFIGS.items():
        groups = {f.name: f.default for g in groups_of(config) for f in fields(g)}
        flags = [f for f in fields(config) if f.name in groups]
        own = [f"`{f.name}` {shown(f.default)}" for f in flags if f.default != groups[f.name]]
        lines += [f"| `{name}` | {', '.join(w for w in own if not w.startswith('`agent`'))} |"] if own else []
    lines += [
        "\n**Where an environment makes an agent start from other defaults**\n",
        "| agent, environment | |",
        "|---|---|",
    ]
    for name, worlds in WORLDS.items():
        for env, changes in worlds.items():
            lines += [f"| `{name}`, {env} | {', '.join(f'`{k}` {shown(v)}' for k, v in changes.items())} |"]
    return "\n".join(lines).strip()


def all_groups() -> list[type]:
    """Every section of every agent, each once."""
    return list(dict.fromkeys(g for config in CONFIGS.values() for g in groups_of(config)))


def shown(default) -> str:
    return "none" if default in ("", None) else str(default)
