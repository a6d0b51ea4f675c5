"""Take a policy away: a checkpoint as an ONNX file that needs neither PyTorch nor this project.

    python export.py --checkpoint outputs/RUN --out hopper.onnx

The graph is one step of the policy for n environments: the states, the rewards of the last actions and the memory go
in, the actions and the next memory come out. Normalisation and action bounds are inside. What the memory holds before
the first step stands in the file's metadata, with the inputs' shapes and units, the agent, its data and its score;
`examples/act_with_onnx.py` is a program that acts with NumPy and onnxruntime alone.

The file is checked against PyTorch over an episode of the agent's environment before it is kept.
Needs packages that training does not: pip install "onnx>=1.17" "onnxscript>=0.3" "onnxruntime>=1.19"
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import utils
from common import logger
from common.device import versions
from common.evaluation import source_of
from common.files import check_file_path
from common.interface import Agent, EvalEnv
from common.packages import optional

TOLERANCE = 1e-5  # of an action, against PyTorch in float32
OPSET = 20


class Step(nn.Module):
    """An agent's `act` on tensors alone: state (n, S), reward (n,), [goal (n, S),] memory -> action, the next memory.

    goal: a state to reach, of agents that are told one; what the agent keeps of it is no part of the memory then.
    """

    def __init__(self, agent: Agent, memory, has_goal: bool):
        super().__init__()
        self.agent, self.has_goal = agent, has_goal
        self.memory = memory._replace(goal=()) if has_goal else memory
        _, self.structure = pytree.tree_flatten(self.memory)

    def forward(self, state: Tensor, reward: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        leaves = list(rest)
        goal = leaves.pop(0) if self.has_goal else None
        memory = pytree.tree_unflatten(leaves, self.structure)
        if self.has_goal:
            memory = memory._replace(goal=self.agent.reset(state.shape[0], goal).goal)
        action, memory = self.agent.act(state, reward, memory)
        return action, *pytree.tree_leaves(memory._replace(goal=()) if self.has_goal else memory)


class Constants(nn.Module):
    """A module whose weights are called by numbers: the exporter writes Python, in which some of our names are words of
    the language."""

    def __init__(self, module: nn.Module):
        super().__init__()
        tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self.names, self.module = list(tensors), (module,)  # in a tuple: no part of this one
        for i, tensor in enumerate(tensors.values()):
            self.register_buffer(f"weight_{i}", tensor.detach())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        weights = {name: getattr(self, f"weight_{i}") for i, name in enumerate(self.names)}
        return torch.func.functional_call(self.module[0], weights, inputs)


def leaf_names(memory) -> list[str]:
    """A name for each tensor of a memory, such as `memory.states` or `memory.layers.0.1`."""
    paths, _ = pytree.tree_flatten_with_path(memory)
    return [
        "memory" + "".join(f".{getattr(key, 'name', getattr(key, 'idx', key))}" for key in path) for path, _ in paths
    ]


class Exported:
    """An ONNX file as a policy: `reset`, then `act` for every step, on NumPy arrays."""

    def __init__(self, path: Path, runtime):
        self.session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.about = json.loads(self.session.get_modelmeta().custom_metadata_map["policy"])

    def reset(self, n: int) -> dict[str, np.ndarray]:
        """The memory before the first step of n environments."""
        found = {}
        for name, leaf in self.about["memory"].items():
            one = np.array(leaf["before_the_first_step"], dtype=leaf["dtype"])
            found[name] = np.repeat(one, n, axis=0)
        return found

    def act(self, state: np.ndarray, reward: np.ndarray, memory: dict, goal: np.ndarray | None = None) -> tuple:
        """States (n, S), rewards (n,) -> actions, the next memory."""
        given = {"state": state.astype(np.float32), "reward": reward.astype(np.float32), **memory}
        given |= {} if goal is None else {"goal": goal.astype(np.float32)}
        known = {x.name for x in self.session.get_inputs()}
        action, *after = self.session.run(None, {k: v for k, v in given.items() if k in known})
        return action, dict(zip(self.about["memory"], after))


def told_a_goal(env: EvalEnv) -> bool:
    """Whether an episode of this environment begins with a state to reach."""
    world = env.make(None, *env.tasks[:1])
    _, info = world.reset(seed=0)
    world.close()
    return "goal" in info


def packages():
    """onnx and onnxruntime. ValueError with what to install, if one is missing."""
    install = '"onnx>=1.17" "onnxscript>=0.3" "onnxruntime>=1.19"'
    # torch's exporter needs the third
    onnx, runtime, _ = (optional(name, install, "export") for name in ("onnx", "onnxruntime", "onnxscript"))
    return onnx, runtime


def describe(agent: Agent, ckpt: dict, env: EvalEnv, step: Step, leaves: dict[str, Tensor]) -> dict:
    """What a user of the file must know, as JSON."""
    spec, run = agent.spec, ckpt["run"]
    discrete = not spec.low
    scores = run.get("scores") or []
    inputs = {
        "state": f"(n, {spec.state}) float32, the environment's own units",
        "reward": "(n,) float32, of the last action; 0 before the first step",
    }
    inputs |= {"goal": f"(n, {spec.state}) float32, the state to reach, own units"} if step.has_goal else {}
    return {
        "agent": agent.cfg.agent,
        "environment": env.name,
        "data": {k: run["data"].get(k) for k in ("name", "source", "sha256")},
        "score_name": utils.headline_name(env, source_of(run["data"])),
        "last_evaluation": scores[-1] if scores else None,
        "updates": ckpt["updates"],
        "inputs": inputs,
        "output": f"action: (n,) int64, one of {spec.action}" if discrete else f"action: (n, {spec.action}) float32",
        "action_low": list(spec.low),
        "action_high": list(spec.high),
        "memory": {
            name: {
                "shape": ["n", *leaf.shape[1:]],
                "dtype": str(leaf.numpy().dtype),
                "before_the_first_step": leaf.tolist(),
            }
            for name, leaf in leaves.items()
        },
        "versions": versions(),
    }


def write_onnx(step: Step, inputs: dict[str, Tensor], about: dict, path: Path, onnx) -> None:
    """The graph, with n free, and what is to know about it."""
    n = torch.export.Dim("n", min=1)
    names = list(inputs)
    after = [f"next.{name}" for name in names if name.startswith("memory")]
    program = torch.onnx.export(
        Constants(step),
        tuple(inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=names,
        output_names=["action", *after],
        dynamic_shapes=(tuple({0: n} for _ in names),),
        verbose=False,
    )
    model = program.model_proto
    onnx.helper.set_model_props(model, {"policy": json.dumps(about)})
    path.write_bytes(model.SerializeToString())


def differences(agent: Agent, policy: Exported, env: EvalEnv, step: Step, seed: int) -> Iterator[float]:
    """How far the file's action is from PyTorch's, at every step of an episode in which PyTorch acts."""
    world = env.make(None, *env.tasks[:1])
    state, info = world.reset(seed=seed)
    goal = np.asarray(info["goal"], dtype=np.float32)[None] if step.has_goal else None
    memory = agent.reset(1, None if goal is None else torch.from_numpy(goal))
    theirs, reward, over = policy.reset(1), 0.0, False
    while not over:
        action, memory = agent.act(
            torch.as_tensor(state, dtype=torch.float32)[None], torch.tensor([reward], dtype=torch.float32), memory
        )
        found, theirs = policy.act(np.asarray(state)[None], np.array([reward]), theirs, goal)
        yield float(np.abs(found - action.numpy()).max())
        state, reward, terminated, truncated, _ = world.step(action[0].numpy())
        over = terminated or truncated
    world.close()


def step_of(agent: Agent, has_goal: bool) -> tuple[Step, dict[str, Tensor], dict[str, Tensor]]:
    """An agent's step, its memory before the first one (1, ...) by name, and inputs to trace it with, of n = 2."""
    goal = torch.zeros(1, agent.spec.state)
    step = Step(agent, agent.reset(1, goal if has_goal else None), has_goal)
    first = dict(zip(leaf_names(step.memory), pytree.tree_leaves(step.memory)))
    inputs = {"state": torch.randn(2, agent.spec.state), "reward": torch.zeros(2)}
    inputs |= {"goal": goal.repeat(2, 1)} if has_goal else {}
    return step, first, inputs | {name: leaf.repeat_interleave(2, 0) for name, leaf in first.items()}


@torch.no_grad()
def export(checkpoint: str, out: Path, seed: int = 2_000_000, **changes) -> tuple[float, int]:
    """Write `out`; the largest difference from PyTorch over an episode, and its steps. ValueError if too large.

    changes: of the agent's settings, in how it acts.
    """
    onnx, runtime = packages()
    agent, ckpt = utils.load(checkpoint, "cpu", compile=False, cuda_graphs=False, precision="fp32", **changes)
    agent.eval()
    env = utils.agent_of(agent.cfg.agent).make_eval_env(agent.cfg)
    step, first, inputs = step_of(agent, told_a_goal(env))
    about = describe(agent, ckpt, env, step, first)
    with tempfile.TemporaryDirectory() as folder, logger.atomic_write(out) as part:
        draft = Path(folder) / "policy.onnx"
        write_onnx(step, inputs, about, draft, onnx)
        found = list(differences(agent, Exported(draft, runtime), env, step, seed))
        if max(found) > TOLERANCE:
            raise ValueError(
                f"the graph's actions differ from PyTorch's by up to {max(found):.1e} over an episode, and may by "
                f"{TOLERANCE:.0e}: it is not kept. Please report the agent, the versions and this number"
            )
        part.write_bytes(draft.read_bytes())
    return max(found), len(found)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--checkpoint", required=True, help="a .pt file that trainer.py wrote, or a run folder")
    parser.add_argument("--out", required=True, help="the .onnx file to write")
    parser.add_argument("--inference", default="", help="of a return-conditioned agent: window, recurrent, staggered")
    parser.add_argument("--target_return", type=float, help="of a return-conditioned agent, if not the trained one")
    args = parser.parse_args(argv)
    with utils.errors_as_sentences():
        check_file_path("out", args.out)
        changes = {"inference": args.inference} if args.inference else {}
        changes |= {} if args.target_return is None else {"target_return": args.target_return}
        worst, steps = export(args.checkpoint, Path(args.out), **changes)
        size = Path(args.out).stat().st_size / 1e6
        print(f"{args.out}: {size:.1f} MB, within {worst:.1e} of PyTorch's actions over an episode of {steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
