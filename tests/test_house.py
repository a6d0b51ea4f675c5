"""The house stands: imports climb one staircase, every flag is read, settings.md is up to date."""

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from config import CONFIGS, groups_of, settings_page

FLOORS = [
    {"networks.selective_scan_triton"},
    {
        "config",
        "networks.selective_scan",
        "common.device",
        "common.distributed",
        "common.files",
        "common.logger",
        "common.env_spec",
        "common.packages",
        "common.zoo",
    },
    {"networks.mamba", "common.download", "common.parallel", "common.losses", "common.statistics"},
    {"common.optim", "common.meter", "common.cuda_graph"},
    {"common.train_step"},
    {
        "networks.multi_grained",
        "networks.last_step_mixers",
        "common.windows",
        "common.plotting",
    },
    {"common.rollout"},
    {"common.prioritized_replay", "common.vector_env", "common.interface"},
    {"common.stacked"},
    {"common.checkpoint"},
    {"model"},
    {"d4rl_utils"},
    {"ogbench_utils", "gym_utils"},
    {"agent", "decision_transformer", "dqn", "opso", "ppo"},  # no agent imports another
    {"common.evaluation"},
    {"common.run", "common.estimate", "common.doctor"},
    {"utils"},
    {"trainer"},
    {"reporting", "sweeping"},
    {"offline_trainer", "online_trainer", "sweep", "report", "export"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
SHELVES = ("common", "networks")  # packages whose files have floors of their own
PACKAGES = (*SHELVES, "config", "d4rl_utils", "ogbench_utils", "opso", "ppo", "reporting", "sweeping")
FILES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))])


def room_of(dotted: str) -> str:
    """What has a floor: a root file, a package, or a file of one of the shelves."""
    first, _, rest = dotted.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in SHELVES and rest else first


def imports_of(path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    for n in ast.walk(tree):
        if isinstance(n, ast.ImportFrom):
            found |= {f"{n.module}.{a.name}" for a in n.names} if n.module in SHELVES else {n.module}
    return {room_of(name) for name in found} & FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_climb(path):
    if path.name == "__init__.py" and path.parent.name in SHELVES:
        assert not imports_of(path)  # a shelf is a folder, not a door
        return
    own = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    assert own in FLOOR, f"{path.name} has no floor in this test: a new room needs one"
    lower = {name for name in imports_of(path) if name != own}
    assert all(FLOOR[name] < FLOOR[own] for name in lower), f"{own} imports {lower}"


@pytest.mark.parametrize("agent", CONFIGS)
def test_every_flag_is_read(agent):
    source = "\n".join(p.read_text() for p in FILES if p.parent.stem != "config")
    unread = [f.name for f in fields(CONFIGS[agent]) if not re.search(rf"\bcfg\.{f.name}\b", source)]
    assert set(unread) <= {"preset"}  # read by config.parse itself, before there is a cfg


def test_importing_an_agent_needs_torch_and_numpy_alone():
    program = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name in {"gymnasium", "mujoco", "ogbench", "h5py", "tyro", "tqdm", "matplotlib", "tensorboard"}:
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Wall())
import agent, common.prioritized_replay, decision_transformer, dqn, opso, opso.online_agent, ppo
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_docs_have_the_settings():
    """`python -m config > docs/settings.md` makes the page: run it again after changing a default or a help line."""
    table = settings_page()
    assert table == (ROOT / "docs" / "settings.md").read_text().strip()
    for config in CONFIGS.values():
        assert all(f"| `{f.name}` |" in table for group in groups_of(config) for f in fields(group))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_swallowed(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
            assert not names & {"Exception", "BaseException", "everything"}, f"line {node.lineno} catches {names}"
