"""The tables of OPSO and PPO: what is read off kept runs, and that page, table and kept runs tell the same."""

import importlib
import json
import sys

import pytest
from conftest import ROOT


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    names = []

    def load(name: str):
        names.append(name)
        return importlib.import_module(name)

    yield load
    for name in names:
        sys.modules.pop(name)


def test_a_row_of_opso_is_the_mean_over_its_seeds(load):
    tool = load("opso_scores")
    row = next(iter(tool.ROWS))
    run = {"row": row, "f": 1.0, "data": {}, "updates": 5, "updates_per_s": 1.0}
    tasks = dict.fromkeys(tool.TASKS, 50.0)
    runs = [run | {"seed": 7, "success": 30.0, "by_task": tasks | {"task1": 0.0}}]
    runs += [run | {"seed": 3, "success": 50.0, "by_task": tasks}]
    made = tool.table_of(runs)
    assert list(made) == [row] and made[row]["seeds"] == [3, 7] and made[row]["success_by_seed"] == [50.0, 30.0]
    assert made[row]["success_mean"] == 40.0 and made[row]["by_task"]["task1"] == 25.0
    assert made[row]["success_std_over_seeds"] == pytest.approx(14.1)
    assert (
        tool.markdown(made, {}).splitlines()[2] == f"| {row} | 1 | 40.0 ± 14.1 | 50.0, 30.0 | 25 | 50 | 50 | 50 | 50 |"
    )
    assert tool.table_of(runs[:1])[row]["success_std_over_seeds"] is None  # one seed has no spread


def test_runs_of_another_budget_do_not_enter_the_table_of_opso(load):
    tool, budget = load("opso_scores"), {"num_epochs": 30}
    tool.refuse_others(budget, {"a-s0": {"settings": budget}})
    with pytest.raises(SystemExit, match=r"b-s0.json was trained with .*60.* asked for is .*30.*move the kept runs"):
        tool.refuse_others(budget, {"a-s0": {"settings": budget}, "b-s0": {"settings": {"num_epochs": 60}}})


def test_a_row_of_ppo_tells_how_low_it_fell_at_first(load):
    tool = load("ppo_scores")
    row = next(iter(tool.ROWS))
    curve = [[0, 40.0], [10_240, 35.0], [20_480, 10.0], [30_720, 60.0]]
    runs = [{"row": row, "seed": s, "score": 50.0 + s, "curve": curve, "steps_per_s": 9.0} for s in (2, 0)]
    made = tool.table_of(runs)[row]
    assert made["seeds"] == [0, 2] and made["last_score_by_seed"] == [50.0, 52.0] and made["last_score_mean"] == 51.0
    assert made["first_score_by_seed"] == [40.0, 40.0]
    assert made["least_score_in_the_first_20k_by_seed"] == [35.0, 35.0]  # the 10 came later
    assert made["mean_of_all_evaluations_by_seed"] == [36.25, 36.25]
    line = f"| {row} | 51.0 ± 1.4 | 50.0, 52.0 | 36.2, 36.2 | 40.0, 40.0 | 35.0, 35.0 | 9 |"
    assert tool.markdown({row: made}, 45.0).splitlines()[2:] == [
        line,
        "| the offline checkpoint | 45.0 | | | | | |",
    ]


@pytest.mark.parametrize(
    "name, file", [("opso", "opso_pointmaze"), ("opso_antmaze", "opso_antmaze"), ("ppo", "ppo_scores")]
)
def test_page_and_table_repeat_the_kept_runs(load, name, file):
    tool = load(f"{name.partition('_')[0]}_scores")
    path, runs = ROOT / "benchmarks" / f"{file}.json", list(tool.kept(name).values())
    if not runs:
        pytest.skip("nothing was measured yet")
    result = json.loads(path.read_text())
    if name == "ppo":  # runs from other checkpoints, or of another length, are other tables
        mine = result["checkpoint"]["sha256"], None
        runs = [r for r in runs if r["init"] in mine and r["env_steps"] == result["env_steps"]]
    table = tool.table_of(runs)
    assert result["rows"] == table
    words = tool.markdown(table, result["checkpoint_score" if name == "ppo" else "published"])
    assert words in (ROOT / "docs" / "results.md").read_text()


def objective_run(row, seed, score, level=40.0) -> dict:
    curve = [[update, score - 5 + update // 1000] for update in range(1000, 7000, 1000)]
    run = {"row": row, "seed": seed, "score": score, "curve": curve, "updates": 6000, "updates_per_s": 50.0 + seed}
    return run | {"act_ms": 1.0, "behavior_score": level}


def test_a_row_of_objectives_is_the_last_checkpoint_over_its_seeds(load, monkeypatch):
    tool = load("scores")
    runs = {seed: objective_run("Bamba", seed, 50.0 + 2 * seed) for seed in (0, 1, 2)}
    row = tool.summary(runs)
    assert row["last_score_by_seed"] == [50.0, 52.0, 54.0] and row["last_score_mean"] == 52.0
    assert row["last_score_std_over_seeds"] == 2.0 and row["best_of_evaluations_by_seed"] == [51.0, 53.0, 55.0]
    assert row["mean_of_last_5_evaluations_by_seed"] == [49.0, 51.0, 53.0] and row["seeds"] == [0, 1, 2]
    assert tool.summary({0: runs[0]})["last_score_std_over_seeds"] is None

    found = {f"objectives_{env}": {str(s): r for s, r in runs.items()} for env in ("hopper", "walker2d")}
    monkeypatch.setattr(tool, "kept", lambda table: found.get(table, {}))
    lines = tool.table_over_bodies("objectives").splitlines()
    assert (
        lines[2] == "| Bamba | 52.0 ± 2.0; 51.0 (3) | 52.0 ± 2.0; 51.0 (3) |  |  | 51 | 0.3, 0.3 |"
    )  # no mean of two bodies
    assert lines[3:] == ["| the data | 40.0 | 40.0 |  | | | |"]
    found["objectives_halfcheetah"] = {"0": objective_run("Bamba", 0, 46.0)}
    assert "| 46.0; 45.0 (1) | 50.0 | 51 | 0.3, 0.3, 0.3 |" in tool.table_over_bodies("objectives")


@pytest.mark.parametrize("family", ["objectives", "positions"])
def test_page_has_the_table_of_the_kept_runs(load, family):
    tool = load("scores")
    if not any(tool.kept(f"{family}_{env}") for env in tool.BODIES):
        pytest.skip("nothing was measured yet")
    assert tool.table_over_bodies(family) in (ROOT / "docs" / "results.md").read_text()


def test_a_measurements_command_has_no_folder_of_the_machine_that_ran_it(load):
    without = load("harness").without_folder
    assert without(str(ROOT / "benchmarks" / "a.json")) == "benchmarks/a.json"
    assert without("/home/somebody/hopper.hdf5") == "hopper.hdf5"
    assert [without(word) for word in ("--file", "datasets/a.hdf5", "0")] == ["--file", "datasets/a.hdf5", "0"]
