"""The documents tell the truth: links lead somewhere, commands parse, recipes work on a copy of the tree."""

import ast
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from conftest import ROOT

import utils
from common.checkpoint import AGENTS, agent_of
from config import CONFIGS, parse
from d4rl_utils.__main__ import parser as d4rl_parser
from ogbench_utils.__main__ import parser as ogbench_parser

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def prose_of(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)


def anchors_of(page: Path) -> set[str]:
    """What a forge calls the headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", h.replace("`", "").lower()).replace(" ", "-") for h in headings}


def commands_of(page: Path) -> list[str]:
    """The lines of the page's shell blocks, continued ones joined, without comments."""
    blocks = re.findall(r"^```(?:sh|bash)[^\n]*\n(.*?)^```", page.read_text(), re.S | re.M)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [found for line in lines if (found := re.sub(r"(^|\s)#.*", "", line).strip())]


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_and_anchors_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", prose_of(page)):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists() and found.is_relative_to(ROOT), f"{page.name} links to {target}"
        assert not anchor or anchor in anchors_of(found), f"{page.name} links to {target}, which has no such heading"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_commands_parse(page, capsys):
    for command in commands_of(page):
        words = shlex.split(command.split("&&")[-1].split("|")[0])
        while words and ("=" in words[0] and not words[0].startswith("-")):
            words.pop(0)
        if not words or not re.match(r"(.*/)?python3?$|torchrun$", words[0]):
            continue
        script = next((w for w in words[1:] if w.endswith(".py") or words[words.index(w) - 1] == "-m"), None)
        if script is None:
            continue
        argv = words[words.index(script) + 1 :]
        if script.endswith("trainer.py") and "--help" in argv:
            continue
        if script in ("trainer.py", "offline_trainer.py", "online_trainer.py"):
            agent = {"offline_trainer.py": ["--agent", "opso"], "online_trainer.py": ["--agent", "opso_online"]}
            known = re.search(r"--agent[ =](\w+)", command)
            if not known or known[1] in CONFIGS:  # a recipe's own agent comes below
                parse([*agent.get(script, []), *without_recipes(argv)])
        elif script == "utils.py":
            tyro.cli(utils.EvalArgs, args=argv, use_underscores=True)
        elif script == "d4rl_utils":
            d4rl_parser().parse_args(argv)
        elif script == "ogbench_utils":
            ogbench_parser().parse_args(argv)
        elif script.startswith("benchmarks/"):
            source = (ROOT / script).read_text() + (ROOT / "benchmarks" / "harness.py").read_text()
            flags = [word.split("=")[0] for word in argv if word.startswith("--")]
            assert all(f'"{flag}"' in source for flag in flags), command


def without_recipes(argv: list[str]) -> list[str]:
    """Flags and choices that only a recipe adds are left away."""
    found, skip = [], False
    for word, after in zip(argv, [*argv[1:], ""]):
        if skip or word == "--reward_scale" or (word, after) == ("--mixer", "mean"):
            skip = not skip
            continue
        found.append(word)
    return found


def test_commands_in_running_text_name_files_that_are_there():
    for page in PAGES:
        for script in re.findall(r"`python3? ((?:benchmarks/)?\w+\.py)", page.read_text()):
            assert (ROOT / script).exists(), f"{page.name}: {script}"


def test_readme_is_short_and_has_what_a_newcomer_looks_for():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    for heading in ("Start", "Train", "Evaluate", "Resume", "Results at a glance", "Beside other projects"):
        assert f"## {heading}\n" in text
    assert "python trainer.py --env hopper --dataset_type medium" in text and "python utils.py --checkpoint" in text


@pytest.mark.parametrize("agent", CONFIGS)
def test_every_agent_has_a_page_and_every_page_an_agent(agent):
    names = {"dt": "decision", "dmamba": "decision", "dm": "decision", "opso_online": "opso"}
    assert (ROOT / "docs" / "agents" / f"{names.get(agent, agent)}.md").exists()


def test_error_sentences_in_troubleshooting_are_in_the_code():
    """Literal beginnings of what a user searches for."""
    code = "\n".join(p.read_text() for p in ROOT.rglob("*.py") if ".venv" not in p.parts and "tests" not in p.parts)
    for words in (
        "could not be downloaded",
        "must name the environment that recorded the data",
        "from 3.5.0 on contacts differ",
        "draws off screen and finds neither EGL nor OSMesa",
        "is out of range: take",
        "would change what the run learns",
        "processes, each with its own data order",
        "ppo fine-tunes",
        "ppo needs --init",
        "is not finite",
        "CUDA cannot capture this update",
        "--wandb needs the wandb package",
    ):
        assert words in code and words.split(": ")[0] in (ROOT / "docs" / "troubleshooting.md").read_text(), words


# -- recipes -------------------------------------------------------------------------------------


def recipe(name: str) -> list[tuple[str, str, str]]:
    """The blocks of a recipe in CONTRIBUTING.md: language, file to write, text."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    found = re.findall(rf"^```(\w+) recipe={name}(?: file=(\S+))?\n(.*?)^```", text, re.S | re.M)
    assert found
    return found


def added(diff: str) -> int:
    """Lines that a patch adds."""
    return sum(line.startswith("+") and not line.startswith("+++") for line in diff.splitlines())


def copy_of_tree(folder: Path) -> Path:
    kept = ("agent.py", "model.py", "decision_transformer.py", "dqn.py", "trainer.py", "utils.py", "gym_utils.py")
    for name in kept:
        shutil.copy(ROOT / name, folder / name)
    for name in ("common", "config", "d4rl_utils", "ogbench_utils", "networks", "opso", "ppo"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def apply(name: str, folder: Path) -> dict[str, int]:
    """Write what the recipe says; lines by kind of block."""
    lines: dict[str, int] = {}
    for language, file, text in recipe(name):
        if file:
            (folder / file).write_text(text)
            lines[file] = len(text.splitlines())
        elif language == "diff":
            done = subprocess.run(
                ["git", "apply", "--recount", "-"],
                input=text,
                text=True,
                cwd=folder,
                capture_output=True,
            )
            assert done.returncode == 0, done.stderr
            lines["diff"] = added(text)
        elif language == "python":
            run = subprocess.run([sys.executable, "-c", text], cwd=folder, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            lines["python"] = len([line for line in text.splitlines() if line.strip()])
    return lines


def run_recipe(name: str, folder: Path) -> str:
    """Its command, made short; what it printed."""
    (command,) = [text.strip() for language, _, text in recipe(name) if language == "bash"]
    more = ["--device", "cpu", "--threads", "1", "--no_tensorboard", "--output_dir", str(folder / "out")]
    if "--agent dqn" not in command:
        small = ["--d_model", "16", "--headdim", "8", "--d_state", "4", "--n_layers", "1", "--context_length", "2"]
        more += [] if "cloner" in command else small
        more += ["--num_epochs", "1", "--updates_per_epoch", "5", "--num_eval_episodes", "1", "--batch_size", "8"]
    argv = [sys.executable, *shlex.split(command)[1:], *more]
    done = subprocess.run(argv, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, limits, words",
    [
        ("mixer", {"diff": 20}, "mean of"),
        ("flag", {"diff": 3}, "return"),  # two lines of the flag, one that reads it
        ("env", {"diff": 10}, "D4RL's scale"),
        ("agent", {"diff": 5}, "return"),
    ],
)
def test_recipes_work_and_are_as_short_as_promised(name, limits, words, tmp_path):
    folder = copy_of_tree(tmp_path)
    assert apply("data", folder)["python"] <= 16  # the file that the others learn from
    lines = apply(name, folder)
    assert all(lines[kind] <= limit for kind, limit in limits.items()), lines
    for path in folder.glob("**/*.py"):
        ast.parse(path.read_text())
    assert words in run_recipe(name, folder)


@pytest.mark.parametrize("agent", AGENTS)
def test_every_metric_that_curves_show_is_explained(agent):
    page = (ROOT / "docs" / "evaluation.md").read_text()
    for panel in agent_of(agent).panels:
        for metric, label in panel.labels.items():
            row = next(
                line for line in page.splitlines() if line.startswith(f"| `{metric}` | {label} | {panel.unit} |")
            )
            assert agent in row.rpartition(f"| {panel.unit} |")[2]
