"""What a run stands on: random streams, device, memory of the C library; machine, versions, commit to write down."""

import ctypes
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # glibc's names of mallopt's options


def spawn_seeds(seed: int, *names: str) -> dict[str, int]:
    """Independent child seeds by name, stable when names are added at the end."""
    return {n: int(s.generate_state(1)[0]) for n, s in zip(names, np.random.SeedSequence(seed).spawn(len(names)))}


def pick_device(name: str) -> torch.device:
    """auto is CUDA, else the CPU; MPS has not been met by any test, so it must be asked for. The card that is picked
    becomes CUDA's current one, on which graphs are captured. ValueError for what this machine or build of torch lacks.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind = name.split(":")[0]
    have = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not have.get(kind, False):
        usable = ", ".join(k for k, v in have.items() if v)
        raise ValueError(f"device {name!r} is not there (torch {torch.__version__}); on this machine: auto, {usable}")
    device = torch.device(name)
    if kind == "cuda" and device.index is not None:
        if device.index >= torch.cuda.device_count():
            cards = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
            raise ValueError(f"device {name!r} is not there; the cards of this machine: {cards}")
        torch.cuda.set_device(device)
    return device


def set_precision(precision: str, device: torch.device) -> None:
    """How float32 matrix products and convolutions are computed on CUDA, for the rest of the process.

    auto and bf16 are tf32 there: in float32 proper a card multiplies many times slower. Nothing changes elsewhere.
    """
    tf32 = device.type == "cuda" and precision != "fp32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32  # LSTM and convolutions; torch's own default is on, whatever was asked for


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next update, for the rest of the process; only glibc can be told.

    It hands large free blocks back to the kernel and asks for them anew: 18,000 page faults in an update of the default
    agent on a CPU, a tenth of its time. Blocks above 32 MiB, glibc's own limit, still come and go.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for option, size in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, 2**26)):
            mallopt(option, size)


# module: package
SIMULATORS = {"Box2D": "box2d", "highway_env": "highway-env", "ale_py": "ale-py", "ogbench": "ogbench"}


def versions() -> dict[str, str]:
    """What a score depends on, by package; of the simulators that few need, those that were loaded."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy", "gymnasium", "mujoco", *(p for m, p in SIMULATORS.items() if m in sys.modules)):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "missing"
    return found


def processor() -> str:
    """The CPU's own name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def machine() -> dict:
    """Where this runs; cores: the CPU threads that torch may use."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": processor(), "cores": torch.get_num_threads(), "gpu": gpu, "system": platform.system()}


def commit() -> str:
    """The commit of this code, with a plus if files differ from it; "none" outside a checkout."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True)
        return done.stdout.strip()

    if not shutil.which("git") or not (Path(__file__).parents[1] / ".git").exists():  # installed, and not a checkout
        return "none"
    return (git("rev-parse", "--short", "HEAD") or "none") + ("+" if git("status", "--porcelain", "--", "*.py") else "")
