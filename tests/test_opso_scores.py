"""The table of OPSO: README, table and kept runs tell the same."""

import json
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import opso_scores

    yield opso_scores
    sys.modules.pop("opso_scores")


def test_a_row_is_the_mean_over_its_seeds(tool):
    row = next(iter(tool.ROWS))
    run = {"row": row, "f": 1.0, "data": {}, "updates": 5, "updates_per_s": 1.0}
    tasks = dict.fromkeys(tool.TASKS, 50.0)
    runs = [run | {"seed": 7, "success": 30.0, "by_task": tasks | {"task1": 0.0}}]
    runs += [run | {"seed": 3, "success": 50.0, "by_task": tasks}]
    made = tool.table_of(runs)
    assert list(made) == [row] and made[row]["seeds"] == [3, 7] and made[row]["success_by_seed"] == [50.0, 30.0]
    assert made[row]["success_mean"] == 40.0 and made[row]["by_task"]["task1"] == 25.0
    assert made[row]["success_std_over_seeds"] == pytest.approx(14.1)
    assert tool.markdown(made).splitlines()[2] == f"| {row} | 1 | 40.0 ± 14.1 | 50.0, 30.0 | 25 | 50 | 50 | 50 | 50 |"
    assert tool.table_of(runs[:1])[row]["success_std_over_seeds"] is None  # one seed has no spread


def test_readme_and_table_repeat_the_kept_runs(tool):
    runs = list(tool.kept("opso").values())
    if not runs:
        pytest.skip("nothing was measured yet")
    table = tool.table_of(runs)
    assert json.loads((ROOT / "benchmarks" / "opso_pointmaze.json").read_text())["rows"] == table
    assert tool.markdown(table) in (ROOT / "README.md").read_text()
