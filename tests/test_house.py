"""The house stands: imports climb one staircase, every flag is read, the README tells the truth."""

import ast
import re
import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from config import CONFIGS, groups_of, parse, readme_table

FLOORS = [
    {"config", "machine", "records", "files"},
    {"scan", "learn", "memory", "downloads", "workers"},
    {"mamba", "replay", "envs", "checkpoints"},
    {"grained", "mixers"},
    {"model"},
    {"d4rl_utils"},
    {"ogbench_utils"},
    {"agent", "discrete"},
    {"decision", "dqn", "opso"},
    {"ppo"},
    {"pictures"},
    {"utils"},
    {"runs"},
    {"trainer"},
    {"offline_trainer", "online_trainer"},
]
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
PACKAGES = ("config", "d4rl_utils", "ogbench_utils", "opso", "ppo")
FILES = sorted([*ROOT.glob("*.py"), *(path for package in PACKAGES for path in (ROOT / package).glob("*.py"))])


def imports_of(path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    return {name.split(".")[0] for name in found} & FLOOR.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_climb(path):
    own = path.parent.name if path.parent != ROOT else path.stem
    assert own in FLOOR, f"{path.name} has no floor in this test: a new room needs one"
    lower = {name for name in imports_of(path) if name != own}
    assert all(FLOOR[name] < FLOOR[own] for name in lower), f"{own} imports {lower}"


@pytest.mark.parametrize("agent", CONFIGS)
def test_every_flag_is_read(agent):
    source = "\n".join(p.read_text() for p in FILES if p.parent.stem != "config")
    unread = [f.name for f in fields(CONFIGS[agent]) if not re.search(rf"\bcfg\.{f.name}\b", source)]
    assert unread == ["preset"]  # read by config.parse itself, before there is a cfg


def test_importing_an_agent_needs_torch_and_numpy_alone():
    program = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name in {"gymnasium", "mujoco", "ogbench", "h5py", "tyro", "tqdm", "matplotlib", "tensorboard"}:
            raise ImportError(f"{name} was imported")
sys.meta_path.insert(0, Wall())
import agent, decision, dqn, opso, opso.online, ppo, replay
"""
    run = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return [line.split("#")[0].strip() for block in blocks for line in block.splitlines() if line.strip()]


def test_readme_commands_parse():
    commands = [c for c in readme_commands() if re.search(r"\btrainer\.py", c)]
    assert len(commands) >= 3
    for command in commands:
        parse(command.split("trainer.py", 1)[1].split())


def test_readme_has_the_settings():
    """The tables are made by `python -m config`; run it again after changing a default or a help line."""
    table = readme_table()
    assert table in (ROOT / "README.md").read_text()
    for config in CONFIGS.values():
        assert all(f"| `{f.name}` |" in table for group in groups_of(config) for f in fields(group))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_swallowed(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)} if node.type else {"everything"}
            assert not names & {"Exception", "BaseException", "everything"}, f"line {node.lineno} catches {names}"
