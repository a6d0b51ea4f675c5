"""The table of local data sets: what it says of each, and that the page repeats the JSON."""

import json
import sys

import pytest
from conftest import ROOT

pytest.importorskip("mujoco")


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import datasets

    yield datasets
    sys.modules.pop("datasets")


MACHINE = {"command": "python benchmarks/datasets.py", "commit": "abc", "machine": {"cpu": "a CPU"}, "cores": 2}


def test_a_row_describes_a_set(tool, tmp_path):
    row = tool.row("hopper-random", 300, tmp_path)
    assert row["transitions"] == 300 and row["episodes"] > 3 and row["seconds"] > 0 and row["transitions_per_s"] > 0
    assert row["policies"] == "tanh of normal noise" and -5 < row["local_score"] < 5
    again = tool.row("hopper-random", 300, tmp_path)  # there already: nobody knows how long it took
    assert again["seconds"] is again["transitions_per_s"] is None and again["sha256"] == row["sha256"]
    assert len(tool.NAMES) == len(set(tool.NAMES)) == 20
    text = tool.section({**MACHINE, "sets": {"hopper-random": row}, "not_made": ["ant-expert"]})
    assert "| hopper-random-local | tanh of normal noise | 300 |" in text and "want of a policy: ant-expert" in text
    assert "D4RL score" not in text


def test_policies_are_named_from_the_manifest(tool):
    assert tool.policies("hopper", "medium").startswith("SAC, 195,000 steps")
    assert "8 policies of one SAC training, 5,000 to 195,000 steps" in tool.policies("hopper", "medium-replay")


def test_the_page_repeats_the_json(tool, tmp_path):
    page = tmp_path / "page.md"
    markers = f"<!-- {tool.COMMAND} writes from here -->", "<!-- to here -->"
    page.write_text("above\n{}\nold\n{}\nbelow\n".format(*markers))
    text = tool.section({**MACHINE, "sets": {}, "not_made": []})
    tool.put_into_page(tool.COMMAND, text, page)
    assert page.read_text() == f"above\n{markers[0]}\n{text}\n{markers[1]}\nbelow\n"
    with pytest.raises(ValueError, match="has no lines"):
        page.write_text("no markers")
        tool.put_into_page(tool.COMMAND, text, page)
    path = ROOT / "benchmarks" / "datasets.json"
    if path.exists():
        assert tool.section(json.loads(path.read_text())) in (ROOT / "docs" / "data.md").read_text()
