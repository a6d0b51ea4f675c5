"""The tables of DQN: what is read off a log, and that page, table and kept runs tell the same."""

import json
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import dqn_scores

    yield dqn_scores
    sys.modules.pop("dqn_scores")


CONFIG = {"mixer": "none", "grad_clip": 1.0, "seed": 3, "compile": False, "env_steps": 100, "learn_start": 50}
LOG = [
    {"env_step": 0, "seconds": 0.0, "config": CONFIG, "versions": {}},
    {"env_step": 20, "seconds": 1.0, "episode/return": 10.0},
    {"env_step": 60, "seconds": 2.0, "episode/return": 20.0},
    {"env_step": 80, "seconds": 3.0, "loss/td": 2.0, "loss/td_unweighted": 3.0, "loss/td_uniform": 4.0}
    | {"steps_per_s": 7.0, "updates_per_s": 7.0, "gradient/clipped": 0.75},
    {"env_step": 90, "seconds": 3.5, "gradient/clipped": 0.25},
    {"env_step": 95, "seconds": 4.0, "episode/return": 0.0},
    {"env_step": 100, "seconds": 5.0, "eval/return_mean": 42.0},
]


def test_every_reading_of_a_log(tool):
    r = tool.readings(LOG)  # smoothed and corrected for its start: 10, 15.263, 9.631
    assert r["final_smoothed"] == r["mean_smoothed_last10pct"] == pytest.approx(9.6310, abs=1e-4)
    assert r["mean_smoothed_window"] == pytest.approx((15.2632 + 9.6310) / 2, abs=1e-4)  # from the first update on
    assert r["raw_mean_last10pct"] == 0.0 and r["greedy_eval_mean"] == 42.0 and r["episodes"] == 3
    assert (r["td_final_smoothed"], r["td_uniform_final_smoothed"]) == (2.0, 4.0) and r["gradient_clipped"] == 0.5


def test_a_curve_ends_where_its_run_does(tool):
    run = tool.kept_of(LOG, 20)
    line = run["curves"]["episode/return"]
    assert line[0] is None and line[1] == 10.0 and line[5] is None  # nothing before step 20 and behind 95
    assert line[2] == pytest.approx((10 + 15.2632) / 2, abs=1e-3)
    assert run["seed"] == 3 and json.loads(json.dumps(run)) == run


@pytest.mark.parametrize("name", ["lunar", "highway"])
def test_page_and_table_repeat_the_kept_runs(tool, name):
    path, runs = ROOT / "benchmarks" / f"dqn_{name}.json", tool.kept(f"dqn_{name}")
    if not runs:
        pytest.skip("nothing was measured yet")
    rows = json.loads(path.read_text())["rows"]
    assert {(r["mixer"], r["grad_clip"], s) for r in rows for s in r["seeds"]} == {
        (r["mixer"], r["grad_clip"], r["seed"]) for r in runs.values()
    }
    for row in rows:
        mine = [r for r in runs.values() if (r["mixer"], r["grad_clip"]) == (row["mixer"], row["grad_clip"])]
        scores = [r["readings"]["greedy_eval_mean"] for r in sorted(mine, key=lambda r: r["seed"])]
        assert row["greedy_eval_mean"]["by_seed"] == scores
        assert row["greedy_eval_mean"]["mean"] == pytest.approx(sum(scores) / len(scores))
    assert tool.markdown(tool.EXPERIMENTS[name], rows) in (ROOT / "docs" / "results.md").read_text()
