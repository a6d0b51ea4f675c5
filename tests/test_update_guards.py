"""What a CUDA graph forbids in an update, watched on a CPU: host reads, new shapes, state that grows, tensors on no
named device. Every agent makes real updates on real batches of its own sampler or loop."""

from collections import Counter

import pytest
import torch
from conftest import TINY
from test_dqn import SPEC as DISCRETE
from test_dqn import batch_of as replay_batch
from test_dqn import tiny as tiny_dqn
from test_opso import sampler as goal_sampler
from test_opso import tiny as tiny_opso
from test_ppo import TINY_TOKENS, act, begin
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.interface import EnvSpec
from common.meter import Meter
from config import CONFIGS
from dqn import DQN
from networks.last_step_mixers import MIXERS
from opso import Opso
from utils import agent_of

# what brings a tensor's value to Python, so that the host waits for the card
READS = {"item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__array__"}
READS |= {"equal", "allclose", "is_nonzero", "unique", "masked_select", "__contains__"}
FACTORIES = {torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.full, torch.empty, torch.arange, torch.rand}
FACTORIES |= {torch.randn, torch.randint, torch.randperm, torch.linspace, torch.eye, torch.from_numpy}


class HostGuard(TorchFunctionMode):
    """Raises where Python reads a tensor's value, or makes a tensor without naming the device it is to lie on."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READS:
            raise AssertionError(f"the update waits for the device: Tensor.{name}")
        if name == "to" and any(isinstance(a, str) and a == "cpu" for a in [*args[1:], *kwargs.values()]):
            raise AssertionError("the update brings a tensor to the host")
        if func in FACTORIES and kwargs.get("device") is None:
            raise AssertionError(f"torch.{name} without a device makes a CPU tensor in the update")
        return func(*args, **kwargs)


class Shapes(TorchDispatchMode):
    """Counts every operation with the shapes that it is given; raises where one hands a value to the host."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"the update waits for the device: {func}")
        leaves = torch.utils._pytree.tree_leaves((args, kwargs or {}))
        self.seen[str(func), tuple(tuple(x.shape) for x in leaves if isinstance(x, torch.Tensor))] += 1
        return func(*args, **(kwargs or {}))


def offline(name: str, file, **changes):
    sizes = TINY if name == "bamba" else TINY_TOKENS | dict(batch_size=8)
    cfg = CONFIGS[name](**{**sizes, "dataset": str(file), "device": "cpu", **changes})
    sampler, _ = agent_of(name).open_data(cfg, "cpu", 0)
    agent = agent_of(name)(cfg, EnvSpec(11, 3, (-1.0,) * 3, (1.0,) * 3), "cpu")
    agent.fit_normalizer(sampler)
    return agent, lambda: sampler.sample(cfg.batch_size)


def goals(file, **changes):
    cfg = tiny_opso(**changes)
    sampler = goal_sampler(file, cfg)
    agent = Opso(cfg, EnvSpec(2, 2, (-1.0,) * 2, (1.0,) * 2))
    agent.fit_normalizer(sampler)
    return agent, lambda: sampler.sample(cfg.batch_size)


def discrete(mixer: str):
    batch = replay_batch()  # from test_dqn, not from the replay, which other tests watch
    return DQN(tiny_dqn(mixer=mixer), DISCRETE), lambda: batch


AGENTS = {
    "bamba": lambda hopper, maze: offline("bamba", hopper),
    "bamba ema embedding": lambda hopper, maze: offline(
        "bamba", hopper, target_encoder="ema", critic_input="embedding"
    ),
    "dt": lambda hopper, maze: offline("dt", hopper),
    "dmamba": lambda hopper, maze: offline("dmamba", hopper),
    "dm": lambda hopper, maze: offline("dm", hopper, refresh_every=5),  # softened labels begin within the test
    "opso": lambda hopper, maze: goals(maze),
    **{f"dqn {m}": lambda hopper, maze, m=m: discrete(m) for m in MIXERS},
}


@pytest.mark.parametrize("name", AGENTS)
def test_an_update_can_be_captured(name, hopper_file, maze_file):
    """Sampling, updating and metering read nothing back, and repeat the same operations on the same shapes."""
    agent, sample = AGENTS[name](hopper_file, maze_file)
    agent.train()
    meter, patterns, sizes = Meter(), [], []
    for i in range(20):
        shapes = Shapes()
        with HostGuard(), shapes:
            batch = sample()
            metrics = agent.update(batch)
        meter.add(metrics, i)
        patterns.append(shapes.seen)
        sizes.append(state_of(agent))
    assert len(set(sizes[8:])) == 1, "the optimizer's state, or the agent's, still grows"
    later = patterns[8:]
    variants = [p for i, p in enumerate(later) if p not in later[:i]]
    assert len(variants) <= 2, f"{len(variants)} kinds of update after the warm-up: a graph is captured for each"
    for i, pattern in enumerate(later[:4]):  # what recurs, recurs for good
        assert pattern in later[i + 1 :]
    assert all(torch.tensor(v).isfinite() for v in meter.means().values())


def state_of(agent: nn.Module) -> tuple:
    """How many tensors, and numbers in them, the agent and its optimizers hold."""
    found = list(agent.state_dict().values())
    for optimizer in (v for v in vars(agent).values() if isinstance(v, torch.optim.Optimizer)):
        found += [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    return len(found), sum(x.numel() for x in found)


def test_ppos_updates_can_be_captured():
    """An iteration's last look at the divergence is read; what happens within an update is not."""
    agent, envs, memory = begin(init="none")
    patterns = []
    while len(patterns) < 8:
        act(agent, envs, memory)
        for lesson in agent.minibatches():
            shapes = Shapes()
            with HostGuard(), shapes:
                agent.update(lesson)
            patterns.append(shapes.seen)
    assert all(p == patterns[2] for p in patterns[3:])


@pytest.mark.parametrize("name", AGENTS)
def test_every_tensor_moves(name, hopper_file, maze_file):
    """`.to` must take along every tensor that an agent holds: what it leaves behind meets another device's tensors."""
    agent, _ = AGENTS[name](hopper_file, maze_file)
    agent.to("meta")
    for module in agent.modules():
        held = {k: v for k, v in vars(module).items() if isinstance(v, torch.Tensor)}
        assert not held, f"{type(module).__name__} holds {sorted(held)} as plain attributes: register_buffer them"
    assert all(t.device.type == "meta" for t in [*agent.parameters(), *agent.buffers()])


# -- the guards themselves -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.sum() > 0),
        lambda x: float(x[0]),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: torch.zeros(3) + x,
        lambda x: torch.tensor(1.0) + x,
        lambda x: x.nonzero(),
    ],
)
def test_the_guards_see(fault):
    with pytest.raises(AssertionError), HostGuard(), Shapes():
        fault(torch.ones(3))


def test_the_guards_let_pass():
    x = torch.ones(3)
    with HostGuard(), Shapes() as shapes:
        torch.zeros(3, device=x.device) + x.clamp(0, 1).mean()
    assert shapes.seen
