"""The studies: each is one that sweep.py takes, and the pages' tables are those of the runs that are kept."""

import importlib
import re
import shlex
from functools import cache

import pytest
from conftest import ROOT

from reporting.runs import read_runs
from sweeping.study import expand, read_study

STUDIES = sorted(path.stem for path in (ROOT / "benchmarks" / "studies").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKER = re.compile(r"<!-- python report\.py (.*) writes from here -->")
BLOCKS = [(page, words) for page in PAGES for words in MARKER.findall(page.read_text(encoding="utf-8"))]


@cache
def runs_of(study: str) -> list:
    return expand(read_study(str(ROOT / "benchmarks" / "studies" / f"{study}.yaml")))


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_is_one(study):
    runs = runs_of(study)
    assert len({run.name for run in runs}) == len(runs) and all(run.total > 0 for run in runs)


@pytest.mark.parametrize("second, first", [("opso_online", "opso_first"), ("ppo", "published")])
def test_what_goes_on_from_a_first_study_names_runs_of_it(second, first):
    there = {f"outputs/{first}/{run.name}" for run in runs_of(first)}
    begun = {run.flags["init"] for run in runs_of(second)} - {"none"}
    assert begun and begun <= there


def test_kept_runs_are_of_a_study():
    """By the names of agents; a study may grow behind runs that were kept before."""
    for folder in sorted((ROOT / "benchmarks" / "results").iterdir()):
        assert {run.label for run in read_runs([str(folder)])} <= {run.label for run in runs_of(folder.name)}


@pytest.mark.parametrize("page, words", BLOCKS, ids=lambda value: value.stem if hasattr(value, "stem") else value[:40])
def test_pages_repeat_the_kept_runs(page, words, tmp_path, monkeypatch):
    for package in ("scipy", "vl_convert"):
        pytest.importorskip(package)
    import report

    argv = shlex.split(words)
    assert argv[argv.index("--into") + 1] == page.relative_to(ROOT).as_posix()
    copy = tmp_path / page.relative_to(ROOT)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(page.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "benchmarks").symlink_to(ROOT / "benchmarks")
    assert report.main(argv) == 0
    assert copy.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    drawn = {path.name for path in (copy.parent / "figures").iterdir()}
    assert drawn <= {path.name for path in (page.parent / "figures").iterdir()}


def test_every_figure_is_on_a_page():
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert {p.name for p in (ROOT / "docs" / "figures").iterdir()} == set(re.findall(r"figures/([^)\s]+)\)", text))


def test_a_measurements_command_has_no_folder_of_the_machine_that_ran_it(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    without = importlib.import_module("harness").without_folder
    assert without(str(ROOT / "benchmarks" / "a.json")) == "benchmarks/a.json"
    assert without("/home/somebody/hopper.hdf5") == "hopper.hdf5"
    assert [without(word) for word in ("--file", "datasets/a.hdf5", "0")] == ["--file", "datasets/a.hdf5", "0"]
