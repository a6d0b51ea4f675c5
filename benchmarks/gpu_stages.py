"""The stages of gpu_day.py. Each fills a `Table`, row by row; a row with `ok` is a check, the others are measurements.

A row is on disk before it is computed, as "did not end": if the process dies in it (a fault on the card, a capture that
was refused), the next start of the stage goes on with the row behind it.
"""

import copy
import functools
import gc
import importlib.util
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from harness import ROOT
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import dqn
import model
from common import checkpoint as checkpoints
from common import device as devices
from common import logger, windows
from common.cuda_graph import CudaGraph, draw_by_graph
from common.interface import EnvSpec
from common.meter import Meter
from common.rollout import Step
from config import CONFIGS, PRESETS
from d4rl_utils.reader import Transitions
from networks import last_step_mixers, mamba, multi_grained
from ogbench_utils.goal_dataset import Goals, OfflineGoalDataset
from ogbench_utils.reader import Episodes
from opso.networks import StateEncoder

HOPPER = EnvSpec(state=11, action=3, low=(-1.0,) * 3, high=(1.0,) * 3)
MAZE = EnvSpec(state=4, action=2, low=(-1.0,) * 2, high=(1.0,) * 2)
# name: agent, preset, settings
AGENTS = {name: (name, "none", {}) for name in ("dm", "dmamba", "dt")}
SMALL_SIZES = {"d_model": 64, "d_state": 16, "headdim": 32, "n_layers": 2}
SEGMENTS = {"train_on": "segments", "context_length": 16, "drop_p": 0.0, "batch_size": 1024}
AGENTS["bamba"] = "bamba", "upstream", {}
AGENTS["bamba segments"] = "bamba", "upstream", SEGMENTS
AGENTS["bamba small"] = "bamba", "upstream", SMALL_SIZES
AGENTS["bamba small segments"] = "bamba", "upstream", {**SMALL_SIZES, **SEGMENTS}
AGENTS["bamba default"] = "bamba", "none", {"critic_pretrain": 0}  # what most updates are
AGENTS["opso small"] = "opso", "small", {}
AGENTS |= {f"dqn {m}": ("dqn", "none", {"mixer": m}) for m in last_step_mixers.MIXERS}
TIMED = (
    "bamba",
    "bamba default",
    "bamba small",
    "bamba segments",
    "bamba small segments",
    "dm",
    "dqn mamba",
    "opso small",
    "dmamba",
    "dt",
)
TINY = {"batch_size": 8, "d_model": 16, "n_layers": 1, "d_state": 4, "headdim": 8, "hidden_dim": 16, "embed_dim": 16}
TINY |= {"context_length": 4, "ff_dim": 16, "buffer_size": 200, "nce_bank": 16}
MODES = {
    "eager": {"cuda_graphs": False, "compile": False},
    "graph": {"cuda_graphs": True, "compile": False},
    "compile": {"cuda_graphs": False, "compile": True},
    "compile+graph": {"cuda_graphs": True, "compile": True},
}
CLOSE = 1e-4  # relative: what float32 on another device may be off


class Table:
    """What a stage has found, on disk after every row."""

    def __init__(self, path: Path, args, seconds: float):
        self.path, self.args, self.deadline = path, args, time.time() + seconds
        self.device = torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.rehearse = args.rehearse
        self.rows: dict = json.loads(path.read_text()) if path.exists() else {}

    def write(self) -> None:
        with logger.atomic_write(self.path) as part:
            part.write_text(json.dumps(self.rows, indent=1) + "\n")

    def todo(self, keys) -> Iterator:
        """Those that have no row yet, as long as there is time. The row is to be set inside the loop."""
        for key in keys:
            if str(key) in self.rows:
                continue
            if time.time() > self.deadline:
                self.rows["left out"] = "from " + str(key) + " on: out of time"
                break
            self.rows[str(key)] = {"error": "did not end"}
            self.write()
            start = time.time()
            yield key
            if isinstance(self.rows[str(key)], dict):
                self.rows[str(key)].setdefault("s", round(time.time() - start, 1))
            self.write()
            print(key, self.rows[str(key)], flush=True)
        self.write()

    def left(self) -> float:
        return self.deadline - time.time()


# -- agents, and what they learn from --------------------------------------------------------------


def config(name: str, rehearse: bool, **changes):
    agent, preset, own = AGENTS[name]
    cfg = CONFIGS[agent](**{**PRESETS[agent].get(preset, {}), **own})
    if rehearse:
        changes = TINY | changes
    return replace(cfg, **{k: v for k, v in changes.items() if k in {f.name for f in fields(cfg)}})


@lru_cache(maxsize=1)
def walk(rows: int) -> Transitions:
    """Noise in hopper's shapes, in episodes of up to 1000 steps: the time of an update does not depend on it."""
    rng = np.random.default_rng(0)
    states = rng.standard_normal((rows + 1, HOPPER.state), dtype=np.float32)
    actions = np.tanh(rng.standard_normal((rows, HOPPER.action), dtype=np.float32))
    ends = np.arange(1, rows + 1) % min(1000, rows // 2) == 0
    ends[-1] = True
    starts = np.concatenate([[0], np.flatnonzero(ends)[:-1] + 1])
    first = np.repeat(starts, np.diff(np.append(starts, rows)))
    rewards = rng.standard_normal(rows, dtype=np.float32) + 1
    return Transitions(states[:-1], actions, rewards, states[1:], ends & (np.arange(rows) % 2 == 0), ends, first)


def sampler_of(cfg, device, rows: int, seed: int = 0):
    if cfg.agent == "bamba":
        kind = windows.SegmentSampler if cfg.train_on == "segments" else windows.WindowSampler
        return kind(walk(rows), cfg.context_length, device, seed)
    if cfg.agent in ("dt", "dmamba", "dm"):
        return windows.SequenceSampler(walk(rows), cfg.context_length, device, seed)
    if cfg.agent == "opso":
        rng = np.random.default_rng(0)
        states = rng.standard_normal((rows, MAZE.state), dtype=np.float32)
        actions = rng.uniform(-1, 1, (rows, MAZE.action)).astype(np.float32)
        length = min(1000, rows // 2)
        goals = Goals(cfg.goal_current, cfg.goal_trajectory, 1.0, cfg.policy_near, cfg.gamma, 0.5)
        episodes = Episodes(states, actions, np.arange(length - 1, rows, length))
        return OfflineGoalDataset(episodes, cfg.context_length, cfg.proposal_steps, goals, device, seed)
    return None  # dqn: its own replay


def fill(agent, seed: int) -> None:
    """A full replay for dqn."""
    lanes = min(100, agent.cfg.buffer_size // 10)
    agent.init_buffer(lanes, seed)
    rng = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=rng).to(agent.device)  # noqa: E731
    width = 0 if agent.cfg.latent == "off" else agent.cfg.d_model
    never = torch.zeros(lanes, dtype=torch.bool, device=agent.device)
    for i in range(agent.cfg.buffer_size // lanes):
        action = torch.randint(agent.spec.action, (lanes,), generator=rng).to(agent.device)
        over = never if i % 50 else ~never
        step = Step(normal(lanes, 8), action, normal(lanes), normal(lanes, 8), over, never)
        agent.buffer.add(step, normal(lanes, width))


class Job:
    """An agent, its data on the device and a meter: what one turn of the trainer's loop needs."""

    def __init__(self, name: str, t: Table, device=None, seed: int = 0, rows: int = 0, sampler=None, **changes):
        device = t.device if device is None else torch.device(device)
        self.cfg = config(name, t.rehearse, **{"precision": "fp32", "device": str(device), **changes})
        devices.set_precision(self.cfg.precision, device)
        kind = checkpoints.agent_of(self.cfg.agent)
        spec = {"dqn": EnvSpec(8, 4), "opso": MAZE}.get(self.cfg.agent, HOPPER)
        torch.manual_seed(seed)
        self.agent = kind(self.cfg, spec, device).train()
        rows = rows or (1000 if t.rehearse else 20_000)
        self.sampler = sampler or sampler_of(self.cfg, device, rows, seed)
        if self.cfg.agent == "dqn":
            fill(self.agent, seed)
        else:
            self.agent.fit_normalizer(self.sampler)
            if self.cfg.cuda_graphs and sampler is None:
                draw_by_graph(self.sampler)
        self.meter = Meter()

    def draw(self):
        if self.sampler is None:
            return self.agent.buffer.sample(self.cfg.batch_size, 0.5, self.agent.updates)
        return self.sampler.sample(self.cfg.batch_size)

    def round(self) -> dict[str, Tensor]:
        metrics = self.agent.update(self.draw())
        self.meter.add(metrics, self.agent.updates)
        return metrics

    def graphs(self) -> int | None:
        """How many have been captured; None: it runs without."""
        return len(self.agent.train_step.graphs) if isinstance(self.agent.train_step, CudaGraph) else None

    def weights(self) -> Tensor:
        return torch.cat([p.detach().flatten().double().cpu() for g in groups(self.agent) for p in g["params"]])


def groups(agent) -> list[dict]:
    return agent.optimizer.param_groups


def to(batch, device):
    return pytree.tree_map(lambda x: x.to(device) if torch.is_tensor(x) else x, batch)


def scalars(metrics: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of one update, copied, as a replay overwrites them; the host does not wait."""
    return {k: v.detach().clone() for k, v in metrics.items() if v.dim() == 0}


def gap(one: list[dict], two: list[dict]) -> tuple[float, str]:
    """The greatest relative difference between two trainings' metrics, and whose it is."""
    worst, whose = 0.0, ""
    for i, (a, b) in enumerate(zip(one, two, strict=True)):
        for k in a.keys() | b.keys():
            x, y = float(a[k]), float(b[k])
            off = abs(x - y) / max(abs(x), 1e-2)
            if not np.isfinite(off):
                return float("inf"), f"{k} @ {i}"
            if off > worst:
                worst, whose = off, f"{k} @ {i}"
    return worst, whose


def relative(a: Tensor, b: Tensor, least: float = 1e-30) -> float:
    """Greatest difference, in units of the greatest value, or of `least` if that is greater."""
    a, b = a.detach().double().cpu(), b.detach().double().cpu()
    return float((a - b).abs().max() / a.abs().max().clamp_min(least))


class SameNoise(TorchFunctionMode):
    """What is drawn from PyTorch's own stream comes from a generator on the CPU, the same whatever the device."""

    def __init__(self, seed: int):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn, torch.randint) and kwargs.get("generator") is None:
            device = kwargs.pop("device", None)
            kwargs["generator"] = self.generator
            return func(*args, **kwargs).to(device or "cpu")
        if func in (torch.randn_like, torch.rand_like):
            make = torch.randn if func is torch.randn_like else torch.rand
            return make(args[0].shape, dtype=args[0].dtype, generator=self.generator).to(args[0].device)
        return func(*args, **kwargs)


def wait(t: Table) -> None:
    if t.cuda:
        torch.cuda.synchronize()


def clear(t: Table) -> None:
    """Between jobs: graphs, their pools and compiled code go."""
    gc.collect()
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    if t.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def digits(x: float) -> float:
    return float(f"{x:.2e}")


# -- facts -----------------------------------------------------------------------------------------


def rate(fn: Callable, work: float, t: Table, seconds: float = 0.3) -> float:
    """work / s of fn(), over as many calls as fill `seconds`."""
    fn()
    wait(t)
    start = time.perf_counter()
    fn()
    wait(t)
    n = max(1, min(2000, int(seconds / max(time.perf_counter() - start, 1e-6))))
    for _ in range(min(n, 20)):
        fn()
    wait(t)
    start = time.perf_counter()
    for _ in range(n):
        fn()
    wait(t)
    return work * n / (time.perf_counter() - start)


def product_rate(t: Table, precision: str, m: int, k: int, n: int, seconds: float = 0.3) -> float:
    """FLOP/s of (m, k) @ (k, n)."""
    devices.set_precision(precision, t.device)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    a, b = torch.randn(m, k, device=t.device, dtype=dtype), torch.randn(k, n, device=t.device, dtype=dtype)
    return rate(lambda: a @ b, 2.0 * m * k * n, t, seconds)


def large(t: Table) -> int:
    return 8192 if t.cuda else 256


SHAPES = {"bamba in": (1280, 256, 1160), "bamba out": (1280, 512, 256), "small in": (1280, 64, 292)}
SHAPES |= {"dm in": (3840, 128, 768), "heads": (256, 256, 256)}


def facts(t: Table) -> None:
    for key in t.todo(["machine", "copy", "launch", *(f"matmul {p}" for p in ("fp32", "tf32", "bf16"))]):
        if key == "machine":
            row = {"torch": torch.__version__, "python": sys.version.split()[0], "cpu": devices.processor()}
            row |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": devices.versions()}
            row["commit"] = devices.commit()
            for name in ("triton", "transformers", "tyro", "gymnasium", "mujoco"):
                row[name] = importlib.util.find_spec(name) is not None
            row["compiler"] = shutil.which("gcc") or shutil.which("g++") or "none"
            if t.cuda:
                p = torch.cuda.get_device_properties(0)
                row |= {"card": p.name, "multiprocessors": p.multi_processor_count, "cuda": torch.version.cuda}
                row["GiB"] = round(p.total_memory / 2**30, 1)
            t.rows[key] = row
        elif key == "copy":
            x = torch.empty(2**30 if t.cuda else 2**20, dtype=torch.uint8, device=t.device)
            y = torch.empty_like(x)
            t.rows[key] = {"TB_per_s": round(rate(lambda: y.copy_(x), 2.0 * len(x), t) / 1e12, 3)}  # noqa: B023
        elif key == "launch":
            t.rows[key] = launches_cost(t)
        else:
            p, n = key.split()[1], large(t)
            row = {f"{n}^3 TFLOP/s": round(product_rate(t, p, n, n, n) / 1e12, 2)}
            for name, (m, k, w) in SHAPES.items():
                row[f"{name} {m}x{k}x{w}"] = round(product_rate(t, p, m, k, w, 0.1) / 1e12, 2)
            t.rows[key] = row


def launches_cost(t: Table) -> dict:
    """Microseconds of one small operation: launched eagerly, and as a node of a CUDA graph."""
    x, n = torch.zeros(1024, device=t.device), 1000

    def chain():
        for _ in range(n):
            x.add_(1.0)

    row = {"eager_us": round(1e6 / rate(chain, n, t), 2)}
    if t.cuda:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            chain()
        row["graph_node_us"] = round(1e6 / rate(graph.replay, n, t), 2)
    return row


# -- is it the same function -----------------------------------------------------------------------


def cuda_tests(t: Table) -> None:
    """Those files alone that have such tests: others may import what this machine lacks."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.cuda" in p.read_text()]
    files = [str(p.relative_to(ROOT)) for p in files if p.name != "test_gpu_day.py"]
    for key in t.todo(["pytest"]):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "-p", "no:cacheprovider", "-rsfE", *files]
        try:
            ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(t.left(), 5))
        except subprocess.TimeoutExpired as error:
            said = error.stdout or ""
            said = said if isinstance(said, str) else said.decode(errors="replace")
            t.rows[key] = {"ok": False, "error": "out of time", "tail": said[-3000:]}
            continue
        lines = ran.stdout.strip().splitlines() or ["pytest said nothing: " + ran.stderr[-300:]]
        t.rows[key] = {"ok": ran.returncode == 0, "summary": lines[-1], "rc": ran.returncode}
        t.rows[key] |= {"files": ", ".join(files), "tail": ran.stdout[-3000:]}


def layers(tiny: bool) -> dict[str, tuple[Callable, tuple]]:
    """Name -> how to make a layer, shape of its input."""
    d, b = (16, 2) if tiny else (128, 16)
    at_least_fp32 = 2 if tiny else 64
    head = 8 if tiny else 64
    sizes = dict(d_state=4 if tiny else 16)
    q, enc, maze = config("dqn mamba", tiny), config("bamba", tiny), config("opso small", tiny)
    found = {
        "mamba2 L5": (lambda: mamba.Mamba2(2 * d, headdim=head), (at_least_fp32, 5, 2 * d)),
        "mamba2 L20": (lambda: mamba.Mamba2(2 * d, headdim=head), (b, 20, 2 * d)),
        "mamba2 chunked L300": (lambda: mamba.Mamba2(d, headdim=head), (2, 300, d)),
        "mamba1 L60": (lambda: mamba.Mamba1(d, **sizes), (b, 60, d)),
        "mamba1 L300": (lambda: mamba.Mamba1(d, **sizes), (2, 300, d)),
        "grained L60": (lambda: multi_grained.MultiGrained(d, **sizes), (b, 60, d)),
        "dual L60": (lambda: multi_grained.DualMamba(d, **sizes), (b, 60, d)),
        "attention": (lambda: model.Attention(d, 4), (b, 60, d)),
        "attention pool": (lambda: model.AttentionPool(d), (b, 20, d)),
        "rope": (lambda: model.RoPE(d, 20), (b, 20, d)),
        "encoder": (
            lambda: model.Encoder(enc, HOPPER.state, enc.context_length).eval(),
            (at_least_fp32, enc.context_length, HOPPER.state),
        ),
        "opso encoder": (lambda: StateEncoder(maze, MAZE.state), (at_least_fp32, maze.context_length, MAZE.state)),
        "mlp": (lambda: model.mlp(HOPPER.state, 256, 256, 3), (256, HOPPER.state)),
        "convolutions": (lambda: dqn.nature_cnn(d), (b, 84 * 84)),
    }
    for m in last_step_mixers.MIXERS:
        found[f"mixer {m}"] = (lambda m=m: last_step_mixers.MIXERS[m](q), (at_least_fp32, q.context_length, q.d_model))
    return found


def layers_agree(t: Table) -> None:
    """CPU float64 against the device: float32 proper, tf32, bf16 autocast; outputs and all gradients."""
    makes = layers(t.rehearse)
    for key in t.todo(makes):
        make, shape = makes[key]
        torch.manual_seed(0)
        ours = make()
        x, reference = torch.randn(*shape), copy.deepcopy(ours).double()
        pull = torch.randn(ours(x).shape)

        def both(net, u):
            u = u.detach().requires_grad_()
            y = net(u)
            into = [u, *net.parameters()]
            return [y, *torch.autograd.grad(y, into, pull.to(y), allow_unused=True)]  # noqa: B023

        want, net, row = both(reference, x.double()), copy.deepcopy(ours).to(t.device), {}
        for precision in ("fp32", "tf32"):
            devices.set_precision(precision, t.device)
            got = both(net, x.to(t.device))
            # gradients that are 0 but for rounding (a bias before a softmax) are measured by the largest of the others
            least = 1e-2 * max(float(a.abs().max()) for a in want[1:] if a is not None)
            row[precision] = digits(np.max([relative(a, b, least) for a, b in zip(want, got) if a is not None]))
        with torch.autocast(t.device.type, torch.bfloat16):
            row["bf16 output"] = digits(relative(want[0], net(x.to(t.device))))
        t.rows[key] = row | {"ok": row["fp32"] <= CLOSE}


def agents_agree(t: Table) -> None:
    """Five updates from the same weights on the same batches with the same noise, dropout and all."""
    for key in t.todo(AGENTS):
        sizes = {"batch_size": 32} if key == "bamba" and not t.rehearse else {}
        one = Job(key, t, "cpu", cuda_graphs=False, **sizes)
        two = Job(key, t, cuda_graphs=False, **sizes)
        two.agent.load_state_dict(one.agent.state_dict())
        one.agent.updates = two.agent.updates = start_of(one, 2)
        before, seen = one.weights(), ([], [])
        for i in range(5):
            batch = one.draw()
            for job, into in zip((one, two), seen):
                with SameNoise(i):
                    into.append(scalars(job.agent.update(to(batch, job.agent.device))))
        off, whose = gap(*seen)
        moved = float((one.weights() - before).abs().max())
        weights = float((one.weights() - two.weights()).abs().max()) / max(moved, 1e-30)
        t.rows[key] = {"ok": off <= CLOSE, "metrics": digits(off), "worst": whose, "weights_of_moved": digits(weights)}


def start_of(job: Job, before: int = 12) -> int:
    """dm: close before its labels begin to be softened, so that both kinds of update are met."""
    return max(job.cfg.refresh_every - before, 0) if job.cfg.agent == "dm" else 0


def training(key: str, t: Table, updates: int, **changes) -> tuple[list[dict], Tensor, int | None]:
    """So many rounds: metrics, weights at the end, graphs captured."""
    clear(t)
    job = Job(key, t, **changes)
    torch.manual_seed(7)
    job.agent.updates, seen = start_of(job), []
    for _ in range(updates):
        seen.append(scalars(job.round()))
    return seen, job.weights(), job.graphs()


def graph_is_eager(t: Table) -> None:
    updates = 3 if t.rehearse else 50
    for key in t.todo(AGENTS):
        one, weights, _ = training(key, t, updates, cuda_graphs=False)
        again, weights_again, _ = training(key, t, updates, cuda_graphs=False)
        graphs, weights_graphs, captured = training(key, t, updates, cuda_graphs=True)
        control, (off, whose) = gap(one, again)[0], gap(one, graphs)
        row = {"ok": off <= max(CLOSE, 10 * control) and (not t.cuda or bool(captured)), "captured": captured}
        row |= {"graph": digits(off), "control": digits(control), "worst": whose}
        row["weights_graph"] = digits(float((weights - weights_graphs).abs().max()))
        row["weights_control"] = digits(float((weights - weights_again).abs().max()))
        t.rows[key] = row


def stored(job: Job, path: Path) -> None:
    """A checkpoint as the trainer writes it."""
    rng = torch.cuda.get_rng_state(job.agent.device) if job.agent.device.type == "cuda" else None
    source = job.agent.buffer if job.sampler is None else job.sampler
    checkpoints.save(path, job.agent, {"source": source.state_dict(), "rng": torch.get_rng_state(), "cuda_rng": rng})


def woken(key: str, t: Table, path: Path, device, **changes) -> Job:
    """The job of a checkpoint, data order and noise too if it goes on on the same kind of device."""
    job = Job(key, t, device, **changes)
    names = {f.name for f in fields(job.cfg)}
    job.agent, part = checkpoints.load(path, device, **{k: v for k, v in changes.items() if k in names})
    job.agent.train()
    run = part["run"]
    if job.sampler is None:
        fill(job.agent, 0)
    source = job.agent.buffer if job.sampler is None else job.sampler
    if torch.device(part["config"]["device"]).type == torch.device(device).type:
        source.load_state_dict(run["source"])
        torch.set_rng_state(run["rng"])
        if run["cuda_rng"] is not None:
            torch.cuda.set_rng_state(run["cuda_rng"], device)
    return job


def resume(t: Table) -> None:
    """Same device: the next ten updates are the same. Another device: so are the next five, under the same noise.

    And the learning rate is a tensor where the graph reads it: at rate 0 nothing moves.
    """
    names = ("bamba small", "dm", "dqn mamba", "opso small", "dt")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "middle.pt"
        for key in t.todo(
            [f"{n}: {what}" for n in names for what in ("same device", "cpu to device", "device to cpu")]
        ):
            clear(t)
            name, what = key.split(": ")
            if what == "same device":
                t.rows[key] = same_device(name, t, path)
                continue
            there, here = ("cpu", t.device) if what == "cpu to device" else (t.device, "cpu")
            old = Job(name, t, there, cuda_graphs=False)
            for _ in range(4):
                old.round()
            stored(old, path)
            new = woken(name, t, path, here, cuda_graphs=False)
            seen, sets = ([], []), groups(new.agent)[0]
            for i in range(5):
                batch = old.draw()
                for job, into in zip((old, new), seen):
                    with SameNoise(i):
                        into.append(scalars(job.agent.update(to(batch, job.agent.device))))
            off, whose = gap(*seen)
            right = sets["lr"].device.type == torch.device(here).type
            right &= bool(sets["capturable"]) == (torch.device(here).type == "cuda")
            row = {"ok": off <= CLOSE and right, "metrics": digits(off), "worst": whose}
            t.rows[key] = row | {"lr_on": str(sets["lr"].device), "capturable": bool(sets["capturable"])}


def same_device(name: str, t: Table, path: Path) -> dict:
    old = Job(name, t, cuda_graphs=True)
    torch.manual_seed(7)
    turns = 4 if t.rehearse else 12
    for _ in range(turns):
        old.round()
    stored(old, path)
    want = [scalars(old.round()) for _ in range(turns)]
    del old
    clear(t)
    new = woken(name, t, path, t.device, cuda_graphs=True)
    got = [scalars(new.round()) for _ in range(turns)]
    off, whose = gap(want, got)
    rates = groups(new.agent)
    new.agent.cfg = replace(new.agent.cfg, learning_rate=0.0)
    before = new.weights()
    for _ in range(4):
        new.round()
    moved = float((new.weights() - before).abs().max())
    row = {"metrics": digits(off), "worst": whose, "captured": new.graphs(), "moved_at_rate_0": moved}
    row |= {"lr_on": str(rates[0]["lr"].device), "capturable": bool(rates[0]["capturable"])}
    right = moved == 0 and (not t.cuda or (bool(row["captured"]) and row["capturable"] and "cuda" in row["lr_on"]))
    return {"ok": off <= CLOSE and right} | row


def no_sync(t: Table) -> None:
    for key in t.todo([f"{n}, {mode}" for n in AGENTS for mode in ("graph", "eager")]):
        clear(t)
        name, mode = key.split(", ")
        job = Job(name, t, **MODES[mode])
        job.agent.updates = start_of(job)
        for _ in range(2 if t.rehearse else 20):
            job.round()
        wait(t)
        if t.cuda:
            torch.cuda.set_sync_debug_mode("error")  # what waits raises; the row then says where
        try:
            for _ in range(4):
                job.round()
            t.rows[key] = {"ok": True, "watched": t.cuda}
        except RuntimeError as error:
            inside, trace = [], error.__traceback__
            while trace:
                inside.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
                trace = trace.tb_next
            t.rows[key] = {"ok": False, "error": str(error).splitlines()[0][:120], "where": " > ".join(inside[-4:])}
        finally:
            if t.cuda:
                torch.cuda.set_sync_debug_mode("default")


def compile_is_eager(t: Table) -> None:
    """With its two neighbours, which run beside it: compiled updates against eager ones, and the compiler's cache."""
    compiled(t, ("bamba", "bamba segments", "bamba small"))


def compile_is_eager_2(t: Table) -> None:
    compiled(t, ("dm", "dmamba", "dt"))


def compile_is_eager_3(t: Table) -> None:
    compiled(t, ("dqn mamba", "opso small", "dqn lstm", "dqn transformer"))


def compiled(t: Table, names: tuple[str, ...]) -> None:
    """float32: the same metrics but for rounding, where the noise is drawn outside of what is compiled. As graphs, the
    same as without."""
    inside = ("dt", "opso small")  # draw noise in compiled code, whose own generator gives other numbers
    precisions = ("fp32", "bf16") if t.rehearse else ("tf32", "fp32", "bf16")
    keys = [f"{n} {p}" for p in precisions for n in names if not (p == "bf16" and n.startswith("dqn"))]
    for key in t.todo(keys):
        name, precision = key.rsplit(" ", 1)
        updates = 3 if t.rehearse else 14
        one, _, _ = training(name, t, updates, **MODES["eager"], precision=precision)
        start = time.time()
        two, _, _ = training(name, t, updates, **MODES["compile"], precision=precision)
        row = {"compile_s": round(time.time() - start, 1)}
        three, _, captured = training(name, t, updates, **MODES["compile+graph"], precision=precision)
        (off, whose), (graph, _) = gap(one, two), gap(two, three)
        right = graph <= CLOSE and (off <= 1e-3 or precision != "fp32" or name in inside)
        row |= {"metrics": digits(off), "worst": whose, "as_graphs": digits(graph), "captured": captured}
        t.rows[key] = {"ok": right} | row


# -- how fast --------------------------------------------------------------------------------------


def timing(job: Job, t: Table, seconds: float = 1.2) -> dict:
    """Updates a second of the trainer's loop: sample, update, meter. Median of five stretches."""
    start = time.perf_counter()
    for _ in range(4 if t.rehearse else 12):
        job.round()
    wait(t)
    row = {"warm_s": round(time.perf_counter() - start, 1)}

    def stretch(n: int) -> float:
        start = time.perf_counter()
        for _ in range(n):
            job.round()
        wait(t)
        return n / (time.perf_counter() - start)

    first = stretch(2 if t.rehearse else 10)
    n = 2 * max(1, int(first * seconds / 10)) if not t.rehearse else 2
    rates = [stretch(n) for _ in range(2 if t.rehearse else 5)]
    row |= {"updates_per_s": round(statistics.median(rates), 1), "best": round(max(rates), 1)}
    row |= {"ms": round(1e3 / row["updates_per_s"], 3), "captured": job.graphs()}
    if t.cuda:
        row["GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return row


def timed_job(name: str, t: Table, **changes) -> Job:
    """As most of a long training is: a million rows, dm with softened labels."""
    job = Job(name, t, rows=2000 if t.rehearse else 1_000_000, **changes)
    if job.cfg.agent == "dm":
        job.agent.updates = job.cfg.refresh_every + 1
    return job


def flops_of(name: str, t: Table) -> float:
    """FLOP of all matrix products in one update, averaged over a turn of the actor."""
    job = timed_job(name, t, cuda_graphs=False)
    turn = getattr(job.cfg, "policy_freq", 1)
    with FlopCounterMode(display=False) as counter:
        for _ in range(turn):
            job.agent.update(job.draw())
    return counter.get_total_flops() / turn


def speed_keys() -> list[tuple[str, str, str]]:
    """Agent, precision, mode: the most valuable first, every one once."""
    keys = [(n, "tf32", "compile+graph") for n in TIMED[:4]] + [(n, "tf32", "graph") for n in TIMED]
    keys += [(n, "tf32", "eager") for n in TIMED[:2]] + [(n, "tf32", "compile+graph") for n in TIMED[4:]]
    keys += [("bamba", "bf16", "compile+graph"), ("bamba", "fp32", "compile+graph"), ("bamba", "tf32", "compile")]
    keys += [(n, p, m) for p in ("tf32", "fp32", "bf16") for n in TIMED for m in MODES]
    return [k for k in dict.fromkeys(keys) if not (k[1] == "bf16" and k[0].startswith("dqn"))]


def speed(t: Table) -> None:
    rates, flops, keys = {}, {}, {"/".join(k): k for k in speed_keys()[: 27 if t.rehearse else None]}
    for key in t.todo(keys):
        name, precision, mode = keys[key]
        clear(t)
        if precision not in rates:
            n = large(t)
            rates[precision] = product_rate(t, precision, n, n, n)
        if name not in flops:
            flops[name] = flops_of(name, t)
            clear(t)
        row = {"agent": name, "precision": precision, "mode": mode}
        row |= timing(timed_job(name, t, precision=precision, **MODES[mode]), t)
        row |= {"gflop": round(flops[name] / 1e9, 3)}
        row["matmul_tflops"] = round(rates[precision] / 1e12, 2)
        row["share_of_limit"] = round(flops[name] * row["updates_per_s"] / rates[precision], 4)
        t.rows[key] = row


class Loaded(torch.utils.data.IterableDataset):
    """One window at a time, out of NumPy arrays in the loader's own processes, as the published programs have it."""

    def __init__(self, cfg, rows: int):
        self.cfg, self.data = cfg, walk(rows)
        totals = np.cumsum(self.data.rewards, dtype=np.float64)
        last = np.flatnonzero(self.data.ends)
        self.last = last[np.searchsorted(last, np.arange(rows))]
        self.rtg = (totals[self.last] - totals + self.data.rewards).astype(np.float32)

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        rng, d, k = np.random.default_rng(info.id if info else 0), self.data, self.cfg.context_length
        while True:
            row = int(rng.integers(len(d.rewards)))
            if self.cfg.agent == "bamba":
                places = np.maximum(np.arange(row - k + 1, row + 1), d.episode_start[row])
                states = d.states[places]
                after = np.concatenate([states[1:], d.next_states[row : row + 1]])
                not_done = np.float32(not d.terminals[row])
                yield windows.Window(states, d.actions[row], d.rewards[row], after, not_done)
            else:
                places = np.arange(row, row + k)
                mask = (places <= self.last[row]).astype(np.float32)
                places = np.minimum(places, self.last[row])
                steps = places - d.episode_start[row]
                yield windows.Sequence(self.rtg[places], d.states[places], d.actions[places], steps, mask)


def peer(t: Table) -> None:
    """The published agent's own way, with our sizes: eager, a DataLoader over windows, every metric read with .item().

    "ours" is our network in such a loop; "transformers" has that package's Mamba-2 blocks in it.
    """
    from update_speed import ByTransformers, patched

    keys = [(n, p, "ours") for n in ("bamba", "bamba small") for p in ("fp32", "tf32")]
    keys += [("bamba", "tf32", "transformers"), ("dt", "tf32", "ours"), ("dm", "tf32", "ours")]
    keys += [("bamba", "fp32", "transformers"), ("bamba small", "tf32", "transformers")]
    rows = 2000 if t.rehearse else 1_000_000
    named = {"/".join(k): k for k in keys}
    for key in t.todo(named):
        clear(t)
        name, precision, blocks = named[key]
        theirs = {"mamba2": lambda cfg: ByTransformers(cfg, 8)} if blocks == "transformers" else model.MIXERS
        with patched(model, MIXERS=theirs):
            job = Job(name, t, precision=precision, cuda_graphs=False)
        row = {"agent": name, "precision": precision, "blocks": blocks}
        t.rows[key] = row | published_loop(job, Loaded(job.cfg, rows), t)


def published_loop(job: Job, source: Loaded, t: Table) -> dict:
    workers = 0 if t.rehearse else 4
    loader = torch.utils.data.DataLoader(source, job.cfg.batch_size, num_workers=workers, pin_memory=t.cuda)
    batches = iter(loader)

    def once() -> None:
        metrics = job.agent.update(to(next(batches), t.device))
        assert all(np.isfinite(v.item()) for v in metrics.values() if v.dim() == 0)

    for _ in range(2 if t.rehearse else 20):
        once()
    times, end = [], time.time() + (0.2 if t.rehearse else 2)
    while time.time() < end:
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    median = 1e3 * statistics.median(times)
    return {"updates_per_s": round(len(times) / sum(times), 1), "median_ms": round(median, 2)}


def many_seeds(t: Table) -> None:
    """Stacked seeds, as graphs and compiled besides; and agents apart, each on a stream of its own."""
    from seeds_speed import measure

    counts, more = ((1, 2), ()) if t.rehearse else ((0, 1, 4, 16, 64), (0, 16))
    keys = {f"stacked small x{s}": ("upstream small", s, False) for s in counts}
    keys |= {f"stacked small x{s} compiled": ("upstream small", s, True) for s in more}
    keys |= {f"streams bamba small x{s}": ("bamba small", s, None) for s in counts if s in (1, 2, 16)}
    keys |= {f"stacked none x{s}": ("upstream", s, False) for s in counts if s in (0, 2, 16)}
    for key in t.todo(keys):
        clear(t)
        name, seeds, compiled = keys[key]
        if compiled is None:
            t.rows[key] = on_streams(name, seeds, t)
        else:
            precision, updates = ("tf32", 100) if t.cuda else ("fp32", 2)
            t.rows[key] = measure(name, seeds, str(t.device), t.cuda, compiled, precision, updates)


def on_streams(name: str, seeds: int, t: Table) -> dict:
    """Agents of different seeds, one process, each with its own graphs on its own stream."""
    shared = timed_job(name, t, precision="tf32").sampler
    jobs = [Job(name, t, seed=s, sampler=shared, precision="tf32", cuda_graphs=True) for s in range(seeds)]
    spawn_seeds = [torch.cuda.Stream() if t.cuda else None for _ in jobs]
    for job in jobs:  # captured one after another
        for _ in range(2 if t.rehearse else 10):
            job.round()
    wait(t)

    def all_once() -> None:
        for job, stream in zip(jobs, spawn_seeds):
            with torch.cuda.stream(stream):  # None: does nothing
                job.round()

    rounds = rate(all_once, 1.0, t, 0.2 if t.rehearse else 1.5)
    row = {"seeds": seeds, "ms_of_all": round(1e3 / rounds, 3), "updates_per_s_in_all": round(rounds * seeds, 1)}
    return row | ({"GiB": round(torch.cuda.max_memory_allocated() / 2**30, 2)} if t.cuda else {})


def profile(t: Table) -> None:
    """Kernels of an update, without sampling and meter, and of a whole round; the ten longest."""
    keys = [(n, m) for n in ("bamba", "bamba segments", "bamba small", "dm") for m in ("eager", "compile")]
    keys += [("dqn mamba", "eager"), ("opso small", "compile"), ("opso small", "eager"), ("dt", "eager")]
    keys += [("dmamba", "eager")]
    named = {" ".join(k): k for k in keys[: 3 if t.rehearse else None]}
    for key in t.todo(named):
        clear(t)
        name, mode = named[key]
        job = timed_job(name, t, precision="tf32", **MODES[mode])
        for _ in range(6):
            job.round()
        kernels, ms, top = kernels_of(functools.partial(job.agent.update, job.draw()), t)
        whole = kernels_of(job.round, t)[0]
        t.rows[key] = {"kernels": kernels, "kernels_with_sampler_and_meter": whole, "device_ms": ms, "top": top}


def kernels_of(fn: Callable, t: Table, calls: int = 2) -> tuple[float, float, list]:
    """Kernels of one call, milliseconds on the device, and the ten longest: (name, launches, ms)."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    kind = ProfilerActivity.CUDA if t.cuda else ProfilerActivity.CPU
    wait(t)
    with record(activities=[kind]) as seen:
        for _ in range(calls):
            fn()
        wait(t)
    spent = lambda e: e.self_device_time_total if t.cuda else e.self_cpu_time_total  # noqa: E731
    real = lambda e: not t.cuda or "CUDA" in str(e.device_type)  # noqa: E731
    spans = ("Optimizer.", "ProfilerStep", "##")  # what encloses kernels, and is none
    events = [e for e in seen.key_averages() if spent(e) > 0 and real(e) and not e.key.startswith(spans)]
    events.sort(key=lambda e: -spent(e))
    top = [(e.key[:90], e.count / calls, round(spent(e) / calls / 1e3, 4)) for e in events[:10]]
    kernels = sum(e.count for e in events if not e.key.startswith(("Memcpy", "Memset")))
    return kernels / calls, round(sum(map(spent, events)) / calls / 1e3, 3), top


def acting(t: Table) -> None:
    """Milliseconds of one evaluation step: act, as evaluations call it, and the same in float32."""
    from common.evaluation import eval_copy

    places = list(dict.fromkeys([t.device.type, "cpu"]))
    names = ("bamba", "bamba small", "dm", "dt", "dqn mamba")
    keys = {f"{n}, {c} environments, {p}": (n, c, p) for n in names for c in (10, 100) for p in places}
    for key in t.todo(keys):
        name, n, place = keys[key]
        row = {}
        for kind, dtype in (("float64", torch.float64), ("float32", torch.float32)):
            acting = eval_copy(Job(name, t, place, cuda_graphs=False).agent).to(dtype)
            state = torch.randn(n, acting.spec.state, dtype=dtype, device=place)
            reward, carried = torch.zeros(n, dtype=dtype, device=place), acting.reset(n)
            times, end = [], time.time() + (0.1 if t.rehearse else 0.4)
            while len(times) < 3 or (time.time() < end and len(times) < 60):
                start = time.perf_counter()
                action, carried = acting.act(state, reward, carried)
                action.cpu()
                times.append(time.perf_counter() - start)
            row[f"{kind}_ms"] = round(1e3 * statistics.median(times[len(times) // 3 :]), 3)
        t.rows[key] = row


# -- the product -----------------------------------------------------------------------------------


def noise_file(path: Path, rows: int) -> Path:
    """`walk` in D4RL's layout."""
    import h5py

    d = walk(rows)
    with h5py.File(path, "w") as f:
        f["observations"], f["next_observations"], f["actions"] = d.states, d.next_states, d.actions
        f["rewards"], f["terminals"], f["timeouts"] = d.rewards, d.terminals, d.ends & ~d.terminals
    return path


def train(t: Table) -> None:
    """`python trainer.py --preset small`, told to stop, resumed; or --train_updates of it, and the score."""
    missing = [n for n in ("gymnasium", "mujoco", "tyro", "tqdm", "matplotlib") if not importlib.util.find_spec(n)]
    if missing:
        raise SystemExit(f"train needs {', '.join(missing)}: carry their wheels (docs/reproducing.md)")
    args, data = t.args, t.args.train_dataset
    if data and not Path(data).is_file():
        raise SystemExit(f"--train_dataset {data}: there is no such file")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        data = Path(data).resolve() if data else noise_file(folder / "noise.hdf5", 2000 if t.rehearse else 1_000_000)
        flags = ["--preset", "small", "--env", "hopper", "--dataset", str(data), "--device", args.device]
        flags += ["--output_dir", str(folder / "runs"), "--no_tensorboard"]
        if t.cuda:
            flags += ["--compile"]
        if t.rehearse:
            tiny = {f.name for f in fields(CONFIGS["bamba"])}
            flags += [f"--{k}={v}" for k, v in TINY.items() if k in tiny]
        if args.train_updates:
            long_training(t, flags, folder / "runs")
        else:
            stop_and_resume(t, flags, folder / "runs")


def call(program: str, flags: list[str], seconds: float) -> tuple[int, str]:
    """Run it for at most so long, then tell it to stop as Ctrl-C does. (exit code, the end of what it said)"""
    child = subprocess.Popen(
        [sys.executable, program, *flags], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said = child.communicate(timeout=max(seconds, 1))[0]
    except subprocess.TimeoutExpired:
        child.send_signal(signal.SIGINT)
        try:
            said = child.communicate(timeout=20)[0]
        except subprocess.TimeoutExpired:
            child.kill()
            said = child.communicate()[0]
    return child.returncode, said[-1500:]


def run_folder(runs: Path) -> Path | None:
    return next((p for p in runs.iterdir() if p.is_dir()), None) if runs.exists() else None


def log_row(runs: Path, code: int, said: str, after: int = 0) -> dict:
    """What the log says of a training that has just ended."""
    folder = run_folder(runs)
    rows = logger.read_log(folder / "log.jsonl") if folder and (folder / "log.jsonl").exists() else []
    rows = [r for r in rows if r.get("update", 0) > after]
    rates = [r["updates_per_s"] for r in rows if r.get("updates_per_s")]
    stopped = code in (0, 128 + signal.SIGINT)
    row = {"ok": stopped and bool(rates), "code": code, "updates": max([r["update"] for r in rows], default=0)}
    if rates:
        row |= {"updates_per_s": round(statistics.median(rates[-10:]), 1), "best": max(rates)}
    losses = [{k: round(v, 5) for k, v in r.items() if k.startswith("loss/")} for r in rows]
    row["losses"] = next((x for x in reversed(losses) if x), {})
    scores = [(r["update"], r["eval/score"]) for r in rows if "eval/score" in r]
    if scores:
        row |= {"score": round(scores[-1][1], 2), "scores": scores}
    return row if row["ok"] else row | {"said": said}


def stop_and_resume(t: Table, flags: list[str], runs: Path) -> None:
    seconds = 8 if t.rehearse else t.args.train_seconds
    size = 10 if t.rehearse else 500
    flags = [*flags, f"--updates_per_epoch={size}", "--num_epochs=100000", "--eval_freq=0"]
    for key in t.todo(["first", "resumed"]):
        if key == "first":
            t.rows[key] = log_row(runs, *call("trainer.py", flags, min(seconds, t.left())))
        elif folder := run_folder(runs):
            at = checkpoints.read_checkpoint(folder)["updates"]
            again = ["--resume", str(folder), "--device", t.args.device]
            ended = call("trainer.py", again, min(max(seconds / 2, 8), t.left()))
            t.rows[key] = log_row(runs, *ended, after=at) | {"from": at}
        else:
            t.rows[key] = {"ok": False, "error": "there is nothing to resume"}


def long_training(t: Table, flags: list[str], runs: Path) -> None:
    """All updates in one go; what the trainer scored on its way, and 20 more episodes of the last checkpoint."""
    size = 10 if t.rehearse else 1000
    epochs = max(1, t.args.train_updates // size)
    flags = [*flags, f"--updates_per_epoch={size}", f"--num_epochs={epochs}", f"--eval_freq={max(1, epochs // 4)}"]
    for key in t.todo(["training", "score"]):
        if key == "training":
            start = time.time()
            code, said = call("trainer.py", flags, t.left() - 45)
            t.rows[key] = log_row(runs, code, said) | {"seconds": round(time.time() - start, 1), "said": said}
        elif folder := run_folder(runs):
            out = runs / "score.json"
            evaluated = ["--checkpoint", str(folder), "--episodes", "2" if t.rehearse else "20", "--json", str(out)]
            code, said = call("utils.py", [*evaluated, "--device", "cpu" if t.rehearse else t.args.device], t.left())
            score = json.loads(out.read_text()) if out.exists() else {}
            t.rows[key] = {"ok": code == 0, "score": score.get("eval/score"), "mean": score.get("eval/return_mean")}
            t.rows[key] |= {"said": said}
        else:
            t.rows[key] = {"ok": False, "error": "there is nothing to evaluate"}


STAGES = {f.__name__: f for f in (facts, cuda_tests, layers_agree, agents_agree, graph_is_eager, resume, no_sync)}
STAGES |= {
    f.__name__: f
    for f in (compile_is_eager, compile_is_eager_2, compile_is_eager_3, speed, peer, many_seeds, train, profile, acting)
}


def run(name: str, args, seconds: float) -> int:
    """One stage, into the file that args.out names."""
    t = Table(Path(args.out), args, seconds)
    if args.rehearse:
        torch.set_num_threads(1)
    if t.cuda:
        if not torch.cuda.is_available():
            raise SystemExit(f"device {args.device} is not there (torch {torch.__version__}); --rehearse needs none")
        t.device = devices.pick_device(args.device)
        torch.zeros((), device=t.device)  # the allocator is there from here on: its statistics can be asked for
    devices.keep_freed_memory()
    STAGES[name](t)
    return 0
