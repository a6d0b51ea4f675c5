"""How long a training will take here, measured on a few updates before it begins; and the largest preset that fits."""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from common.checkpoint import agent_of

ROWS = 2000  # of noise to learn from
SECONDS = 1.0  # of updates that are timed, at least ...
UPDATES = 4  # ... and so many
WORTH_SAYING = 3600.0  # seconds from which on shorter presets are named, too


def write_noise(path: Path, state: int, action: int) -> None:
    """Transitions of nothing in D4RL's layout, in episodes of 100 steps."""
    import h5py

    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file["observations"] = rng.standard_normal((ROWS, state), np.float32)
        file["next_observations"] = rng.standard_normal((ROWS, state), np.float32)
        file["actions"] = np.tanh(rng.standard_normal((ROWS, action), np.float32))
        file["rewards"] = rng.standard_normal(ROWS, np.float32)
        file["terminals"] = np.zeros(ROWS, bool)
        file["timeouts"] = np.arange(ROWS) % 100 == 99


def seconds_per_update(cfg) -> float:
    """Of an agent with these settings, uncompiled, on noise; nothing that is random elsewhere notices."""
    agent_class = agent_of(cfg.agent)
    spec = agent_class.make_eval_env(cfg).spec
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        write_noise(Path(folder) / "noise.hdf5", spec.state, spec.action)
        cfg = replace(
            cfg, compile=False, device="cpu", dataset=str(Path(folder) / "noise.hdf5"), pct_traj=1.0, observe="full"
        )
        sampler, _ = agent_class.open_data(cfg, "cpu", 0)
        agent = agent_class(cfg, spec, "cpu").train()
        agent.fit_normalizer(sampler)
        agent.updates = cfg.num_epochs * cfg.updates_per_epoch // 2  # past warm-ups and pre-training
        agent.update(sampler.sample(cfg.batch_size))
        agent.update(sampler.sample(cfg.batch_size))
        start, count = time.perf_counter(), 0
        while count < UPDATES or time.perf_counter() - start < SECONDS:
            agent.update(sampler.sample(cfg.batch_size))
            count += 1
        return (time.perf_counter() - start) / count


def can_be_measured(cfg) -> bool:
    """On a CPU, with data of an environment that the settings name."""
    return cfg.device in ("cpu", "auto") and not torch.cuda.is_available() and not cfg.dataset.startswith("minari:")


def updates_of(cfg) -> int:
    return cfg.num_epochs * cfg.updates_per_epoch * cfg.num_seeds


def sentence(cfg, presets: dict[str, Callable], done: int = 0) -> str:
    """How long the updates that are left will take here, and if that is long, how long they would with smaller presets.

    presets: name -> the same command's settings with that preset. done: updates behind it
    """
    each = seconds_per_update(cfg)
    seconds = each * max(0, updates_of(cfg) - done)
    text = f"estimate    about {duration(seconds)} on this CPU ({1 / each:.1f} updates/s), evaluations not counted"
    if seconds >= WORTH_SAYING:
        shorter = {name: seconds_per_update(make()) * updates_of(make()) for name, make in presets.items()}
        told = [f"--preset {name} about {duration(s)}" for name, s in shorter.items() if s < seconds]
        text += f"; {', '.join(told)}" if told else ""
    return text


def largest_that_fits(presets: dict[str, Callable], hours: float) -> str:
    """The preset that takes longest of those that end within so many hours here. ValueError if none does."""
    found = {name: seconds_per_update(make()) * updates_of(make()) for name, make in presets.items()}
    fitting = {name: s for name, s in found.items() if s <= 3600 * hours}
    if not fitting:
        told = ", ".join(f"{name} about {duration(s)}" for name, s in found.items())
        raise ValueError(f"no preset ends within --hours {hours:g} on this CPU: {told}")
    return max(fitting, key=fitting.get)


def duration(seconds: float) -> str:
    """For people: 40 s, 12 min, 1.5 h, 133 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 36_000 else f"{seconds / 3600:.0f} h"
