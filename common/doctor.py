"""What this machine can do for a run, and why not more: what `python utils.py --doctor` prints, to be pasted into a bug
report."""

import http.client
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from common import device as devices
from common import evaluation
from common.checkpoint import agent_of
from common.plotting import set_mujoco_gl
from common.windows import Segment
from config import PRESETS, BambaConfig
from d4rl_utils import make_env, spec_of
from d4rl_utils.names import SERVERS as D4RL_SERVERS
from networks.mamba import kernels_missing
from ogbench_utils.names import SERVERS as OGBENCH_SERVERS

OPTIONAL = {  # module -> what it is for
    "Box2D": "dqn on LunarLander-v3: pip install 'gymnasium[box2d]'",
    "highway_env": "dqn on highway-fast-v0: pip install highway-env",
    "ale_py": "dqn on Atari: pip install ale-py",
    "ogbench": "opso: pip install ogbench",
    "minari": "--dataset minari:...: pip install 'minari[hdf5,hf]'",
    "pyarrow": "--dataset lerobot:...: pip install pyarrow huggingface_hub",
    "wandb": "--wandb: pip install wandb",
    "ray": "sweep.py --on ray: pip install ray",
    "submitit": "sweep.py --on slurm: pip install submitit",
    "optuna": "sweep.py --trials: pip install optuna",
    "onnxruntime": "export.py: pip install onnx onnxscript onnxruntime",
    "scipy": "report.py: pip install scipy vl-convert-python jinja2",
}
RENDER = """
from d4rl_utils import make_env
env = make_env("hopper", render_mode="rgb_array")
env.reset(seed=0)
assert env.render().std() > 0, "the picture is empty"
"""
PATIENCE = 30.0  # seconds for a picture
TOLERANCE = 1e-4  # of a card's float32 against the CPU's, relative to the largest number

Finding = tuple[str, str, str]  # "ok", "no" (something is missing that a run may want) or "BAD"; about what; in words


def examine(servers: bool = True) -> Iterator[Finding]:
    """Every finding, as soon as it is known. servers: also ask whether those of the data sets answer."""
    yield "ok", "versions", ", ".join(f"{k} {v}" for k, v in devices.versions().items())
    yield "ok", "system", f"{platform.platform()}, commit {devices.commit()}"
    yield from accelerations()
    yield tried("simulator", simulator)
    yield tried("pictures", pictures)
    yield tried("training", training)
    if torch.cuda.is_available():
        yield tried("card", card)
    missing = {name: words for name, words in OPTIONAL.items() if importlib.util.find_spec(name) is None}
    yield "ok", "packages", f"there: {', '.join(name for name in OPTIONAL if name not in missing) or 'none'}"
    for words in missing.values():
        yield "no", "packages", words
    if servers:
        for url in (*D4RL_SERVERS, *OGBENCH_SERVERS):
            yield answer_of(url)


def tried(about: str, check: Callable[[], str]) -> Finding:
    try:
        return "ok", about, check()
    except (ArithmeticError, AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        return "BAD", about, f"{type(error).__name__}: {error}"


def accelerations() -> Iterator[Finding]:
    """What could make it faster, and whether it does."""
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()}, {devices.processor()}"
    yield "ok", "cpu", threads
    if torch.cuda.is_available():
        cards = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        yield "ok", "cuda", f"{', '.join(cards)}, CUDA {torch.version.cuda}; graphs are on (--no_cuda_graphs)"
    elif torch.version.cuda is None:
        yield "no", "cuda", f"torch {torch.__version__} is a build without CUDA"
    else:
        yield "no", "cuda", f"torch is built for CUDA {torch.version.cuda}, and no card is seen: nvidia-smi says why"
    if torch.backends.mps.is_available():
        yield "ok", "mps", "there; asked for by --device mps"
    compiler = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if compiler or torch.cuda.is_available():
        yield "ok", "compile", f"--compile can be used ({compiler or 'Triton'})"
    else:
        yield "no", "compile", "--compile on a CPU needs a C++ compiler: apt-get install g++"
    for backend, package in (("mamba_ssm", "mamba-ssm"), ("fla", "flash-linear-attention")):
        why = kernels_missing(backend)
        yield ("no", "kernels", f"{package}: {why}") if why else ("ok", "kernels", package)


def simulator() -> str:
    env = make_env("hopper")
    env.reset(seed=0)
    start = time.perf_counter()
    for _ in range(500):
        if any(env.step(env.action_space.sample())[2:4]):
            env.reset(seed=0)
    return f"hopper, {500 / (time.perf_counter() - start):,.0f} steps/s"


def pictures() -> str:
    """In a process of its own: a broken driver can take it down."""
    set_mujoco_gl()
    backend, start = os.environ["MUJOCO_GL"], time.perf_counter()
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(
            [sys.executable, "-c", RENDER], cwd=root, capture_output=True, text=True, timeout=PATIENCE
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"nothing was drawn by {backend} in {PATIENCE:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{backend} cannot draw: {(done.stderr.strip().splitlines() or ['it crashed'])[-1]}")
    return f"--video draws by {backend}; the first picture took {time.perf_counter() - start:.1f} s"


def small_agent(device: str = "cpu"):
    cfg = BambaConfig(**PRESETS["bamba"]["small"], device=device, cuda_graphs=False, critic_pretrain=0)
    torch.manual_seed(0)
    return agent_of("bamba")(cfg, spec_of(make_env("hopper")), device)


def batch_for(agent) -> Segment:
    """Noise in the shapes of data."""
    spec, (b, t) = agent.spec, (64, agent.cfg.context_length)
    g = torch.Generator().manual_seed(0)
    states, actions = torch.randn(b, t + 1, spec.state, generator=g), torch.randn(b, t, spec.action, generator=g).tanh()
    reward, one = torch.randn(b, t, generator=g), torch.ones(b, t)
    batch = Segment(states, actions, reward, one, actions, one, reward, one)
    return Segment(*(x.to(agent.device) for x in batch))


def training() -> str:
    agent = small_agent()
    agent.train()
    batch, start = batch_for(agent), time.perf_counter()
    for _ in range(10):
        metrics = agent.update(batch)
    rate = 10 / (time.perf_counter() - start)
    assert all(v.isfinite().all() for v in metrics.values()), "an update's losses are not finite"
    result = evaluation.evaluate(agent, lambda mode: make_env("hopper"), 1, 0)
    return (
        f"--preset small makes {rate:.0f} updates/s in the first 10 updates; an episode has {result.lengths[0]} steps"
    )


def card() -> str:
    """One agent's losses there and here."""
    here = small_agent()
    there = small_agent("cuda")
    there.load_state_dict(here.state_dict())
    devices.set_precision("fp32", there.device)
    noise = here.draw_noise(batch_for(here), torch.Generator().manual_seed(0))
    losses = []
    for agent in (here, there):
        moved = type(noise)(*(x if x is None else x.to(agent.device) for x in noise))
        losses.append(agent.losses(batch_for(agent), (True, False), moved)[0].item())
    difference = abs(losses[0] - losses[1]) / abs(losses[0])
    assert difference < TOLERANCE, f"a loss is {losses[0]} on the CPU and {losses[1]} on the card"
    return f"a loss differs from the CPU's by {difference:.1e} of its size"


def answer_of(url: str) -> Finding:
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=5) as reply:
            said = f"answers {reply.status}"
    except urllib.error.HTTPError as error:  # a folder that may not be listed is a server that is there
        said = f"answers {error.code}"
    except (OSError, http.client.HTTPException) as error:
        return "no", "server", f"{url} cannot be reached ({getattr(error, 'reason', error)})"
    return "ok", "server", f"{url} {said} in {time.perf_counter() - start:.1f} s"
