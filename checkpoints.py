"""Checkpoints: an agent as one file that needs nothing else to be woken, and the program behind a system's name."""

import importlib
import logging
import pickle
import zipfile
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from config import CONFIGS
from learn import load_optimizer
from machine import versions
from records import replacing

FORMAT = 1  # of checkpoints; raise it when old ones cannot be woken any more
SYSTEMS = {"bamba": ("agent", "Bamba")}  # name -> module and class; config.CONFIGS has the config class
SYSTEMS |= dict.fromkeys(("dt", "dmamba", "dm"), ("decision", "Decision")) | {"dqn": ("dqn", "DQN")}
SYSTEMS |= {"opso": ("opso", "Opso"), "opso_online": ("opso.online", "OpsoOnline"), "ppo": ("ppo", "PPO")}


def system_of(name: str) -> tuple:
    """(module, agent class, config class) of a system; the module has `data` and `world`."""
    module = importlib.import_module(SYSTEMS[name][0])
    return module, getattr(module, SYSTEMS[name][1]), CONFIGS[name]


def save(path: Path, agent: torch.nn.Module, run: dict) -> None:
    """All that waking needs: system, config, spec, tensors, optimisers, counter; `run`: what the trainer adds."""
    optimisers = {k: v.state_dict() for k, v in vars(agent).items() if isinstance(v, torch.optim.Optimizer)}
    part = {
        "format": FORMAT,
        "system": agent.cfg.agent,
        "config": asdict(agent.cfg),
        "spec": agent.spec._asdict(),
        "updates": agent.updates,
        "steps": getattr(agent, "steps", None),  # in environments, if it learns there
        "agent": agent.state_dict(),
        "optimisers": optimisers,
        "versions": versions(),
        "run": run,
    }
    with replacing(path) as file:
        torch.save(part, file)


def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint's dictionary, on the CPU. ValueError for what is missing, torn, foreign or too old."""
    path = Path(path)
    if path.is_dir():
        path = path / "last_checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; give a .pt file that trainer.py wrote, or its run folder")
    try:
        part = torch.load(path, map_location="cpu", weights_only=True)
    except (
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        UnicodeDecodeError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is not a whole checkpoint of this project (torn, or of another program): {reason}"
        ) from error
    if not isinstance(part, dict) or "format" not in part or "system" not in part:
        raise ValueError(f"{path} was not written by this project: it has no format and system in it")
    if part["format"] != FORMAT:
        raise ValueError(
            f"{path} is of format {part['format']}, this version reads {FORMAT}: use the version that wrote it"
        )
    if part["system"] not in SYSTEMS:
        raise ValueError(f"{path} holds a {part['system']!r}; this version knows {', '.join(SYSTEMS)}")
    return part


def config_of(part: dict, path: str | Path):
    """The config in a checkpoint's dictionary. Settings younger than it are as they were before there was a flag for
    them (`OLDER` of its class), or take their defaults, with a log line.

    ValueError if it has settings that this version does not know.
    """
    config, saved = CONFIGS[part["system"]], part["config"]
    names = [f.name for f in fields(config)]
    unknown, young = sorted(saved.keys() - set(names)), [n for n in names if n not in saved]
    if unknown:
        raise ValueError(f"{path} was written with settings that this version does not know: {', '.join(unknown)}")
    older = getattr(config, "OLDER", {})
    if young := [n for n in young if n not in older]:
        logging.info(f"{path} is older than these settings, which take their defaults: {', '.join(young)}")
    return config(**older | saved)


def load(path: str | Path, device: torch.device | str = "cpu", **changes) -> tuple[torch.nn.Module, dict]:
    """Wake an agent: (agent, the whole checkpoint). changes: of its config, in where it computes, not in what."""
    part = read_checkpoint(path)
    module, system, _ = system_of(part["system"])
    cfg = config_of(part, path)
    unknown = changes.keys() - {f.name for f in fields(cfg)}
    if unknown:
        raise ValueError(f"{path} holds a {part['system']}, which knows no {', '.join(sorted(unknown))}")
    cfg = replace(cfg, device=str(device), **changes)
    agent = system(cfg, module.Spec(**part["spec"]), device)
    agent.load_state_dict(part["agent"])
    for key, state in part["optimisers"].items():
        load_optimizer(getattr(agent, key), state)
    agent.updates = part["updates"]
    if part.get("steps") is not None:
        agent.steps = part["steps"]
    return agent, part
