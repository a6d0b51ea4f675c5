"""Checkpoints: an agent as one file that needs nothing else to be woken, and the program behind a system's name."""

import hashlib
import io
import logging
import pickle
import struct
import zipfile
import zlib
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from common.device import versions
from common.interface import Agent, EnvSpec
from common.logger import atomic_write
from common.optim import load_optimizer
from config import CONFIGS

FORMAT = 2  # of checkpoints; raise it when keys change, and teach `upgrade` the old ones
SEAL = b"\nsha256 of the above: "  # and 32 bytes more, at the end of a file of format 2 and later
DAMAGED = (  # what PyTorch, zip and pickle say of bytes that are no checkpoint
    RuntimeError,
    EOFError,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    AssertionError,
    NotImplementedError,
    OverflowError,
    UnicodeDecodeError,
    OSError,
)
# Names in the weights' keys of format 1, between dots, and what they are called now.
FORMAT_1_KEYS = {
    "normal": "obs_normalizer",
    "middle": "action_bias",
    "reach": "action_scale",
    "slow": "target_net",
    "slow_actor": "target_actor",
    "slow_critic": "target_critic",
    "slow_encoder": "target_encoder",
    "slow_q": "target_q",
    "slow_v": "target_v",
    "place": "pos_embedding",
    "past": "teacher",
    "anchor": "ref_policy",
    "warming": "value_warmup_on",
}
FORMAT_1_BUFFER = {
    "frame": "frame_idx",
    "first": "episode_start",
    "facts": "scalars",
    "start": "current_start",
    "fresh": "needs_reset",
    "greatest": "max_priority",
}
AGENTS = {  # name -> module and class; config.CONFIGS has the class of its settings
    "bamba": ("agent", "Bamba"),
    "dt": ("decision_transformer", "DecisionAgent"),
    "dmamba": ("decision_transformer", "DecisionAgent"),
    "dm": ("decision_transformer", "DecisionAgent"),
    "dqn": ("dqn", "DQN"),
    "opso": ("opso", "Opso"),
    "opso_online": ("opso.online_agent", "OpsoOnline"),
    "ppo": ("ppo", "PPO"),
}


def agent_of(name: str) -> type[Agent]:
    """The class of an agent; config.CONFIGS has that of its settings."""
    module, agent = AGENTS[name]
    return vars(__import__(module, fromlist=[agent]))[agent]  # by this module's own import: see bamba/flat_modules.py


def save(path: Path, agent: Agent, run: dict) -> None:
    """All that waking needs: system, config, spec, tensors, optimisers, counter; `run`: what the trainer adds."""
    ckpt = {
        "format": FORMAT,
        "system": agent.cfg.agent,
        "config": asdict(agent.cfg),
        "spec": agent.spec._asdict(),
        "updates": agent.updates,
        "steps": agent.steps,  # in environments, if it learns there
        "agent": agent.state_dict(),
        "optimizer": agent.optimizer.state_dict(),
        "versions": versions(),
        "run": run,
    }
    write(path, ckpt)


def write(path: Path, ckpt: dict) -> None:
    """The dictionary as a file, with the SHA-256 of its content at the end, whole or not at all. OSError: disk full"""
    with atomic_write(path) as file:
        try:
            torch.save(ckpt, file)
        except RuntimeError as error:  # PyTorch has no other word for a disk that takes no more
            if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
                raise
            raise OSError(f"{path} could not be written: is the disk full?") from error
        with open(file, "rb+") as whole:
            digest = hashlib.file_digest(whole, "sha256").digest()
            whole.write(SEAL + digest)  # behind what was read


def read_checkpoint(path: str | Path) -> dict:
    """The checkpoint's dictionary, on the CPU. ValueError for what is missing, damaged, foreign or of another version.

    Nothing in it is unpickled before its SHA-256 was found right; of format 1, which has none, the archive's own sums.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "last_checkpoint.pt"
    if not path.is_file():
        raise ValueError(f"no checkpoint at {path}; give a .pt file that trainer.py wrote, or its run folder")
    try:
        sealed = check_seal(path)
        ckpt = torch.load(path, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is not a whole checkpoint of this project (damaged, or of another program): {reason}"
            f"{instead_of(path)}"
        ) from error
    if not isinstance(ckpt, dict) or not {"format", "system", "config", "agent", "run"} <= ckpt.keys():
        raise ValueError(f"{path} was not written by this project: it has no format and system in it")
    if ckpt["format"] not in (1, FORMAT):
        raise ValueError(
            f"{path} is of format {ckpt['format']}, this version reads 1 to {FORMAT}: use the version that wrote it"
        )
    if ckpt["format"] > 1 and not sealed:
        raise ValueError(f"{path} is damaged: its end is missing{instead_of(path)}")
    if ckpt["system"] not in AGENTS:
        raise ValueError(f"{path} holds a {ckpt['system']!r}; this version knows {', '.join(AGENTS)}")
    bad = [k for k, v in ckpt["agent"].items() if v.is_floating_point() and not v.isfinite().all()]
    if bad:
        raise ValueError(f"{path} holds weights that are not finite ({bad[0]}): its training failed{instead_of(path)}")
    return upgrade(ckpt) if ckpt["format"] == 1 else ckpt


def check_seal(path: Path) -> bool:
    """Whether the file has a seal; ValueError if it is not that of its content, or if there is none, of the archive."""
    length = len(SEAL) + 32
    with open(path, "rb") as file:
        end = file.seek(0, io.SEEK_END)
        file.seek(max(0, end - length))
        seal = file.read()
        if seal.startswith(SEAL):
            file.seek(0)
            found, left = hashlib.sha256(), end - length
            while left:
                block = file.read(min(left, 1 << 20))
                found.update(block)
                left -= len(block)
            if found.digest() != seal[len(SEAL) :]:
                raise ValueError("its content is not that of its SHA-256")
            return True
    with zipfile.ZipFile(path) as archive:
        if name := archive.testzip():
            raise ValueError(f"its part {name} does not have its sum")
        for entry in archive.infolist():
            if entry.external_attr:  # PyTorch writes none, and reads a part that seems to be a folder as empty
                raise ValueError(f"its part {entry.filename} is not as PyTorch writes it")
    return False


def instead_of(path: Path) -> str:
    """What else of the run there is to go on from."""
    others = [p.name for p in sorted(path.parent.glob("*_checkpoint*.pt")) if p.name != path.name]
    return f". Beside it: {', '.join(others)}" if others else ""


def upgrade(ckpt: dict) -> dict:
    """A checkpoint of format 1 under the names of format 2; what it holds stays the same."""

    def rename(key: str) -> str:
        return ".".join(FORMAT_1_KEYS.get(word, word) for word in key.split("."))

    ckpt = {**ckpt, "format": FORMAT, "agent": {rename(k): v for k, v in ckpt["agent"].items()}}
    (ckpt["optimizer"],) = ckpt.pop("optimisers").values()
    ckpt["spec"] = {"action" if k == "actions" else k: v for k, v in ckpt["spec"].items()}
    ckpt["steps"] = ckpt.get("steps") or 0
    ckpt["run"] = dict(ckpt["run"])
    if "trivial" in ckpt["run"]:
        ckpt["run"]["baseline_returns"] = ckpt["run"].pop("trivial")
    if "experience" in ckpt["run"]:
        buffer = ckpt["run"].pop("experience")
        ckpt["run"]["buffer"] = {FORMAT_1_BUFFER.get(k, k): v for k, v in buffer.items()}
    return ckpt


def config_of(ckpt: dict, path: str | Path):
    """The config in a checkpoint's dictionary. Settings younger than it are as they were before there was a flag for
    them (`LEGACY_DEFAULTS` of its class), or take their defaults, with a log line.

    ValueError if it has settings that this version does not know.
    """
    config, saved = CONFIGS[ckpt["system"]], ckpt["config"]
    names = [f.name for f in fields(config)]
    unknown, young = sorted(saved.keys() - set(names)), [n for n in names if n not in saved]
    if unknown:
        raise ValueError(f"{path} was written with settings that this version does not know: {', '.join(unknown)}")
    older = config.LEGACY_DEFAULTS
    if young := [n for n in young if n not in older]:
        logging.info(f"{path} is older than these settings, which take their defaults: {', '.join(young)}")
    return config(**older | saved)


def load(path: str | Path, device: torch.device | str = "cpu", **changes) -> tuple[Agent, dict]:
    """Wake an agent: (agent, the whole checkpoint). changes: of its config, in where it computes, not in what."""
    ckpt = read_checkpoint(path)
    cfg = config_of(ckpt, path)
    unknown = changes.keys() - {f.name for f in fields(cfg)}
    if unknown:
        raise ValueError(f"{path} holds a {ckpt['system']}, which knows no {', '.join(sorted(unknown))}")
    cfg = replace(cfg, device=str(device), **changes)
    agent = agent_of(ckpt["system"])(cfg, EnvSpec(**ckpt["spec"]), device)
    agent.load_state_dict(ckpt["agent"])
    if ckpt["optimizer"] is not None:  # of a checkpoint that is only to act (common/zoo.py)
        load_optimizer(agent.optimizer, ckpt["optimizer"])
    agent.updates, agent.steps = ckpt["updates"], ckpt["steps"]
    return agent, ckpt
