"""Reports: statistics against published functions' numbers, what may stand in one table, the files, the page."""

import csv
import json
import re
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

import report
from common import statistics
from reporting import charts, tables
from reporting.runs import flags_of, read_runs

pytest.importorskip("scipy")
pytest.importorskip("vl_convert")
pytest.importorskip("jinja2")

CONFIG = {"agent": "bamba", "seed": 0, "num_epochs": 3, "updates_per_epoch": 10, "num_eval_episodes": 5, "gamma": 0.99}
VERSIONS = {"python": "3.12.1", "torch": "2.9.0", "mujoco": "3.3.0"}


def make_run(folder, scores=(10.0, 20.0, 30.0), data="hopper-medium-local", **changes):
    """A run folder as trainer.py leaves it. scores: of its evaluations, ten updates apart"""
    more = {k: changes.pop(k) for k in ("source", "sha256", "versions", "score_name") if k in changes}
    config = {**CONFIG, **changes}
    name = f"{data}-{config['agent']}-s{config['seed']}-20260101-{len(list(folder.glob('*'))):06}"
    place = folder / name
    place.mkdir(parents=True)
    identity = {"name": data, "source": more.get("source", "local"), "sha256": more.get("sha256", "ab" * 32)}
    head = {"update": 0, "seconds": 0.0, "config": config, "data": {**identity, "transitions": 1000}}
    head |= {"versions": more.get("versions", VERSIONS), "score_name": more.get("score_name", "local score")}
    rows = [head | {"behavior_score": 15.0}]
    for i, score in enumerate(scores, 1):
        rows.append({"update": 10 * i, "seconds": 2.0 * i, "loss/critic": 1 / i, "updates_per_s": 5.0})
        rows.append({"update": 10 * i, "seconds": 2.0 * i, "eval/score": score, "eval/return_mean": 30 * score})
    (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


@pytest.fixture
def study(tmp_path):
    """Three agents on two data sets with three seeds; bamba is better on both, dt has one seed on the second."""
    folder = tmp_path / "study"
    rng = np.random.default_rng(0)
    for data in ("hopper-medium-local", "walker2d-medium-local"):
        for agent, level in (("bamba", 80), ("dm", 50), ("dt", 45)):
            for seed in range(1 if agent == "dt" and data.startswith("walker") else 3):
                last = level + rng.normal(0, 1.0)
                make_run(folder, (last - 20, last + 5, last), data, agent=agent, seed=seed)
    return folder


# -- statistics ------------------------------------------------------------------------------------

OURS = np.array([[62.0, 81, 44], [71, 83, 42], [99, 79, 43], [55, 84, 46], [90, 60, 41]])
THEIRS = np.array([[52.0, 80, 42], [49, 83, 41], [69, 82, 43], [58, 70, 40]])


def test_aggregates_are_those_of_rliable():
    """Numbers that rliable 1.2.0 gives for these scores (runs × tasks)."""
    ours, theirs = list(OURS.T), list(THEIRS.T)
    assert statistics.iqm(ours) == pytest.approx(64.5555556)
    assert statistics.median(ours) == pytest.approx(75.4)
    assert statistics.mean(ours) == pytest.approx(65.3333333)
    assert statistics.optimality_gap(ours) == pytest.approx(34.6666667)
    assert statistics.probability_of_improvement(ours, theirs) == pytest.approx(0.7166667)
    profile = statistics.performance_profile(ours, np.array([40.0, 60, 80]))
    assert profile == pytest.approx([1.0, 0.5333333, 0.3333333])
    low, high = statistics.stratified_bootstrap([ours], statistics.iqm)
    assert (low, high) == pytest.approx((58.11, 72.00), abs=0.6)  # rliable's own, of 4,000 other resamples


def test_the_bootstrap_draws_seeds_within_their_data_set():
    """Data sets without spread have no interval, however far they lie from each other; it covers a known mean."""
    assert statistics.stratified_bootstrap([[np.full(3, 5.0), np.full(4, 90.0)]], statistics.mean) == (47.5, 47.5)
    rng, hits = np.random.default_rng(0), 0
    for i in range(100):
        low, high = statistics.stratified_bootstrap([[rng.normal(3, 1, 20)]], statistics.mean, 300, i)
        hits += low < 3 < high
    assert 85 <= hits <= 100


def test_an_interval_wants_three_seeds():
    assert statistics.mean_interval(np.array([1.0, 2.0])) is None
    low, high = statistics.mean_interval(np.array([1.0, 2.0, 3.0]))
    assert (low, high) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)  # t of 2 degrees


@given(st.lists(st.lists(st.floats(-50, 150), min_size=1, max_size=5), min_size=1, max_size=4))
def test_improvement_over_oneself_is_a_coin(scores):
    arrays = [np.array(x) for x in scores]
    assert statistics.probability_of_improvement(arrays, arrays) == pytest.approx(0.5)


# -- what may stand beside what --------------------------------------------------------------------


def reasons(folder) -> list[str]:
    return [run.apart for run in read_runs([str(folder)]) if run.apart]


def test_only_equals_stand_in_a_column(tmp_path):
    for seed in range(3):
        make_run(tmp_path, seed=seed)
    make_run(tmp_path, seed=3, scores=(10, 20))
    make_run(tmp_path, seed=4, scores=())
    make_run(tmp_path, seed=5, num_epochs=2, scores=(10, 20))
    make_run(tmp_path, seed=6, versions={**VERSIONS, "mujoco": "3.4.0"})
    make_run(tmp_path, seed=0)
    place = make_run(tmp_path / "failing", seed=7, scores=(10,))
    (place.parent / "failed.json").write_text('{"sentence": "killed by SIGKILL", "code": -9}')
    found = " | ".join(reasons(tmp_path))
    for words in (
        "unfinished: 20 of 30 updates",
        "was never evaluated",
        "another budget: 20 updates, others on these data have 30",
        "other versions: mujoco 3.4.0 (others 3.3.0)",
        "the same settings and seed as",
        "failed: killed by SIGKILL",
    ):
        assert words in found
    results = tables.Results(read_runs([str(tmp_path)]))
    assert [run.seed for run in results.runs] == [0, 1, 2] and len(results.apart) == 6


def test_kinds_of_scores_and_bytes_are_never_mixed(tmp_path):
    make_run(tmp_path)
    make_run(tmp_path, data="hopper-medium-v2", source="d4rl", score_name="D4RL score")
    make_run(tmp_path, seed=1, sha256="cd" * 32)
    results = tables.Results(read_runs([str(tmp_path)]))
    assert results.columns == ["hopper-medium-local (abababab)", "hopper-medium-local (cdcdcdcd)", "hopper-medium-v2"]
    assert results.kinds == ["local score", "D4RL score"]
    assert tables.overview(results, "D4RL score").head == ["D4RL score", "hopper-medium-v2"]
    assert "hopper-medium-v2" not in tables.overview(results, "local score").head


def test_one_environment_with_two_kinds_of_score_is_two_columns(tmp_path):
    make_run(tmp_path, data="hopper v4", source="online", sha256=None, score_name="online score")
    make_run(tmp_path, data="hopper v4", source="online", sha256=None, score_name="custom score", agent="dt")
    results = tables.Results(read_runs([str(tmp_path)]))
    assert results.columns == ["hopper v4 (custom score)", "hopper v4 (online score)"] and len(results.kinds) == 2


def test_agents_are_called_by_what_is_unusual_in_them(tmp_path):
    for seed in (0, 1):
        make_run(tmp_path, seed=seed, device="cpu")
        make_run(tmp_path, seed=seed, data="walker2d-medium-local", gamma=0.9)  # goes with the data: no other agent
    make_run(tmp_path, objective="bc", device="cuda")
    named = make_run(tmp_path / "named", agent="dt")
    (named.parent / "label.json").write_text('{"label": "transformer"}')
    assert {run.label for run in read_runs([str(tmp_path)])} == {"bamba", "bamba objective=bc", "transformer"}


def test_the_headline_is_the_last_checkpoint(tmp_path):
    place = make_run(tmp_path, scores=(10, 90, 30))
    (run,) = read_runs([str(tmp_path)])
    assert (run.last, run.best, run.episodes) == (30, 90, 5)
    record = {"checkpoint": "x/best_checkpoint.pt", "updates": 20, "eval/score": 95, "eval/return_mean": 1}
    (place / "best.json").write_text(json.dumps(record | {"eval/episodes": 100}))
    assert read_runs([str(tmp_path)])[0].last == 30  # of another checkpoint
    record |= {"checkpoint": str(place / "last_checkpoint.pt"), "updates": 30, "eval/score": 33.3}
    (place / "last.json").write_text(json.dumps(record | {"eval/episodes": 100}))
    (run,) = read_runs([str(tmp_path)])
    assert (run.last, run.episodes) == (33.3, 100)


# -- tables ----------------------------------------------------------------------------------------


def test_bold_where_intervals_separate(study):
    results = tables.Results(read_runs([str(study)]))
    table = tables.overview(results, "local score")
    assert table.head == ["local score", "hopper-medium-local", "walker2d-medium-local"]
    assert [row[0] for row in table.rows] == ["bamba", "dm", "dt", "the data"]
    assert table.strong == {(0, 1)}  # on walker2d dt has one seed, and no interval
    assert any("No interval with fewer than 3 seeds" in note and "dt" in note for note in table.notes)
    assert table.rows[2][2].endswith("(1)") and "±" not in table.rows[2][2]
    over = tables.aggregates(results, "local score")
    assert "[" in over.rows[0][1] and "[" not in over.rows[2][1]
    pairs = tables.improvements(results, "local score")
    assert pairs.rows[0][2].startswith("1.00 [1.00 to 1.00]") and pairs.rows[1][1].startswith("0.00")


def test_nothing_is_bold_where_intervals_touch(tmp_path):
    """The higher mean alone is no finding: 50 ± 4 beside 47 ± 4, three seeds each."""
    for agent, level in (("bamba", 50), ("dm", 47)):
        for seed, noise in enumerate((-4, 0, 4)):
            make_run(tmp_path, (level + noise,) * 3, agent=agent, seed=seed)
    assert not tables.overview(tables.Results(read_runs([str(tmp_path)])), "local score").strong


def test_files_hold_the_same_numbers(study, tmp_path, capsys):
    assert report.main([str(study), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    out = tmp_path / "out"
    with open(out / "local_scores.csv", newline="") as file:
        rows = list(csv.reader(file))
    markdown, tex = (out / "local_scores.md").read_text(), (out / "local_scores.tex").read_text()
    assert markdown in said and rows[0][1] == "hopper-medium-local"
    for row in rows[1:]:
        for cell in row:
            assert cell in markdown and tables.latex(cell) in tex
    assert rf"\textbf{{{tables.latex(rows[1][1])}}}" in tex and tex.count(r"\\") == len(rows)
    for name in ("curves_hopper-medium-local.svg", "local_score_iqm.svg", "local_score_profile.svg"):
        assert (out / name).read_text().startswith("<svg")
    assert not list(out.glob("*.part"))


def test_reproducing_commands_are_the_trainers(tmp_path):
    """The flags of a run give its settings again."""
    from config import parse

    argv = ["--agent", "dm", "--preset", "small", "--seed", "3", "--learning_rate", "0.002", "--no_tensorboard"]
    argv += ["--dataset", "a file.hdf5"]
    cfg = parse(argv)
    found = parse(flags_of(json.loads(json.dumps(vars(cfg)))))
    assert found == cfg


# -- before and after ------------------------------------------------------------------------------


def test_compare_pairs_by_data_and_seed(tmp_path, capsys):
    for seed, noise in enumerate((0, 4, -4)):
        make_run(tmp_path / "a", (50 + noise,) * 3, seed=seed)
        make_run(tmp_path / "b", (53 + noise + seed / 10,) * 3, seed=seed, gamma=0.9)
    make_run(tmp_path / "b", (99,) * 3, seed=9, gamma=0.9)  # has no partner
    assert report.main([str(tmp_path / "a"), str(tmp_path / "b"), "--compare"]) == 0
    said = capsys.readouterr().out
    assert "3.1 higher on average, in 3 pairs" in said and "it helped" in said
    assert report.main([str(tmp_path / "b"), str(tmp_path / "a"), "--compare"]) == 0
    assert "it did harm" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, words",
    [
        (["lost"], "lost does not exist"),
        (["empty"], "empty holds no run"),
        (["begun"], "can stand in a table"),
        (["damaged"], "damaged"),
        (["begun", "--compare"], "wants two folders"),
        (["one", "other", "--compare"], "nothing to compare"),
    ],
)
def test_what_cannot_be_reported_is_a_sentence(tmp_path, argv, words, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    make_run(tmp_path / "begun", scores=(1,))
    make_run(tmp_path / "one", seed=1)
    make_run(tmp_path / "other", seed=2)
    log = make_run(tmp_path / "damaged") / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"update"', b'"upd', 1))
    with pytest.raises(SystemExit):
        report.main(argv)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize(
    "package, words", [("vl_convert", "vl-convert"), ("jinja2", "jinja2"), ("scipy.stats", "scipy")]
)
def test_a_missing_package_is_a_sentence(study, tmp_path, monkeypatch, package, words, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit):
        report.main([str(study), "--out", str(tmp_path / "out")])
    assert "pip install" in capsys.readouterr().err and not (tmp_path / "out").exists()


# -- the page --------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_takes_text_as_text(tmp_path):
    words = "</script><script>alert(1)</script>"
    place = make_run(tmp_path / "named", dataset=words)
    (place.parent / "label.json").write_text(json.dumps({"label": words}))  # in tables, charts and run pages
    html = report.page(read_runs([str(tmp_path)]), "<b>title</b>")
    assert "<b>title" not in html and "alert(1)</script>" not in html
    assert not re.search(r'(src|href)="(?!data:)', html.replace(charts.bundle(), ""))


@pytest.mark.slow
def test_the_live_page_changes_nothing_and_shows_new_runs(study, monkeypatch):
    monkeypatch.setattr(report, "REFRESH", 0)
    servers = []
    real = report.http.server.HTTPServer

    def remember(address, handler):
        servers.append(real(address, handler))
        return servers[-1]

    monkeypatch.setattr(report.http.server, "HTTPServer", remember)
    thread = threading.Thread(target=report.serve, args=([str(study)], "live", "127.0.0.1", 0), daemon=True)
    thread.start()
    end = time.time() + 60
    while not servers:
        assert time.time() < end
        time.sleep(0.05)
    address = f"http://127.0.0.1:{servers[0].server_port}"
    get = lambda path="/": urllib.request.urlopen(address + path, timeout=60).read().decode()  # noqa: E731
    assert "seeds 0, 1, 2" in get()
    make_run(study, (1, 2, 3), agent="dm", seed=8)
    assert "seeds 0, 1, 2, 8" in get()
    with pytest.raises(urllib.error.HTTPError):
        get("/../../etc/passwd")
    with pytest.raises(urllib.error.HTTPError):  # nothing but GET
        urllib.request.urlopen(urllib.request.Request(address, data=b"x", method="POST"), timeout=60)
    servers[0].shutdown()
    thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.slow
def test_the_page_in_a_browser(study, tmp_path):
    """It loads from disk without an error, filters hide agents and data, hovering shows values, runs unfold."""
    sync = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("no Chromium here")
    report.write_report(read_runs([str(study)]), tmp_path / "out", "study")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport={"width": 1200, "height": 900}), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: request.url.startswith("http") and errors.append(request.url))
        page.goto((tmp_path / "out" / "index.html").as_uri())
        page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
        row = page.locator("tr[data-agent=dm]").first
        assert row.is_visible() and page.locator(".chart svg").count() == 4
        dots = ".chart[data-data=hopper-medium-local] .mark-symbol.role-mark path"
        marks = page.locator(dots)
        drawn = marks.count()
        page.locator("input[value=dm]").uncheck()
        assert not row.is_visible()
        assert drawn == 9  # three agents, three evaluations
        page.wait_for_function(f"document.querySelectorAll('{dots}').length == 6")
        page.locator("input[value=walker2d-medium-local]").uncheck()
        assert not page.locator(".chart[data-data=walker2d-medium-local]").is_visible()
        assert not page.locator("th[data-data=walker2d-medium-local]").first.is_visible()
        page.locator("#setting").fill("agent=dt")
        assert page.locator("tr[data-agent=bamba]:visible").count() == 0
        page.locator("#setting").fill("")
        marks.first.hover()
        page.wait_for_selector("#vg-tooltip-element.visible")
        assert "mean" in page.locator("#vg-tooltip-element").inner_text()
        run = page.locator(".run:visible").first
        run.locator("summary").click()
        run.locator(".curves svg").first.wait_for()
        assert "python trainer.py" in run.inner_text()
        browser.close()
    assert errors == []


# -- kept runs -------------------------------------------------------------------------------------


def test_kept_runs_give_the_tables_of_their_folders(study, tmp_path, capsys):
    make_run(study, (1.0,), agent="dt", seed=9)  # unfinished: not kept
    kept = tmp_path / "kept"
    assert report.main([str(study), "--keep", str(kept)]) == 0
    assert len(list(kept.iterdir())) == 16 and "16 finished runs" in capsys.readouterr().out
    there, here = (tables.Results(read_runs([str(place)])) for place in (study, kept))
    for make in (lambda r: tables.overview(r, "local score"), tables.details):
        assert make(there).markdown() == make(here).markdown()
    assert all(set(run.commands) == {"train"} for run in here.runs)  # there is nothing to resume or to evaluate
    report.main([str(kept), "--out", str(tmp_path / "page")])
    assert "bamba" in (tmp_path / "page" / "index.html").read_text()


def test_a_kept_run_holds_neither_folders_nor_single_episodes(tmp_path):
    place = make_run(tmp_path / "runs", output_dir="/home/me/outputs", dataset_dir="/home/me/data")
    ours = {"checkpoint": "/home/me/last_checkpoint.pt", "updates": 30, "eval/episodes": 100, "eval/return_mean": 900.0}
    (place / "eval-100.json").write_text(json.dumps({**ours, "eval/score": 31.0, "returns": [900.0] * 100}))
    report.main([str(tmp_path / "runs"), "--keep", str(tmp_path / "kept")])
    (file,) = (tmp_path / "kept").iterdir()
    assert "/home/me" not in file.read_text() and "returns" not in file.read_text()
    (run,) = read_runs([str(tmp_path / "kept")])
    assert (run.last, run.episodes) == (31.0, 100)


def test_a_damaged_kept_run_is_named(tmp_path, capsys):
    for text in ("{", "{}", '{"curve": [], "colour": 1}'):
        (tmp_path / "a.run.json").write_text(text)
        with pytest.raises(SystemExit):
            report.main([str(tmp_path), "--out", str(tmp_path / "page")])
        assert "a.run.json is no kept run" in capsys.readouterr().err


@pytest.mark.parametrize("study", sorted((ROOT / "benchmarks" / "results").iterdir()), ids=lambda path: path.name)
def test_the_runs_that_are_kept_here_can_be_reported(study):
    results = tables.Results(read_runs([str(study)]))
    assert len(results.runs) == len(list(study.iterdir())) and not results.apart


# -- pages, columns, single numbers ----------------------------------------------------------------


def test_tables_and_figures_are_written_between_a_pages_markers(study, tmp_path, capsys):
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    argv = [str(study), "--into", str(page), "--columns", "by seed", "updates_per_s"]
    page.write_text("above\n")
    with pytest.raises(SystemExit):
        report.main(argv)
    wanted = capsys.readouterr().err
    assert "has no lines" in wanted and page.read_text() == "above\n"
    first, last = re.findall(r"<!-- .*? -->", wanted)
    page.write_text(f"above\n{first}\nold\n{last}\nbelow\n")
    for _ in range(2):  # again: the same
        report.main(argv)
        text = page.read_text()
        assert text.startswith(f"above\n{first}\n") and text.endswith(f"{last}\nbelow\n") and "\nold\n" not in text
    assert "| agent | data | by seed | updates_per_s |" in text and "| bamba | hopper-medium-local | 8" in text
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 2 and all((page.parent / name).read_text().startswith("<svg") for name in pictures)
    with pytest.raises(SystemExit):
        report.main([str(study), "--into", str(tmp_path / "none.md")])
    assert "there is no such page" in capsys.readouterr().err


def test_an_unknown_column_lists_the_known(study):
    with pytest.raises(ValueError, match="no column colour; there are: score, .*minutes to 90 %.*updates_per_s"):
        tables.details(tables.Results(read_runs([str(study)])), ["colour"])


def test_columns_of_a_curve(study):
    names = ["first evaluation", "lowest evaluation", "mean of all"]
    row = next(row for row in tables.details(tables.Results(read_runs([str(study)])), names).rows if row[0] == "dm")
    first, lowest, mean = (float(cell.split()[0]) for cell in row[2:])
    assert first == lowest < 35 and mean == pytest.approx(first + 15, abs=0.2)  # last - 20, last + 5, last


def test_bands_stand_where_they_do_not_hide_each_other(tmp_path):
    for agent in range(charts.BANDS + 1):
        make_run(tmp_path, gamma=0.9 + agent / 100)
        results = tables.Results(read_runs([str(tmp_path)]))
        chart = charts.curves(results, results.columns[0])
        areas = [layer for layer in chart["layer"] if layer["mark"]["type"] == "area"]
        assert len(areas) == (len(results.labels) <= charts.BANDS)
    assert len(results.labels) == charts.BANDS + 1


def test_minutes_to_most_of_the_score(tmp_path):
    make_run(tmp_path, (10.0, 190.0, 200.0))  # six seconds in all; 180 is first passed after two thirds of them
    (run,) = read_runs([str(tmp_path)])
    assert tables.minutes_to_most([replace(run, seconds=360.0)]) == "4.0"
    below = replace(run, curve=[(10, -50.0), (30, -20.0)])  # returns can be: -18 is no share of -20
    assert tables.minutes_to_most([run, below]) == ""


def online_run(folder):
    """An agent that learned online: one hundred steps, three training episodes."""
    config = {"agent": "dqn", "seed": 3, "env_steps": 100, "learn_start": 50, "num_eval_episodes": 5}
    head = {"env_step": 0, "seconds": 0.0, "config": config, "data": {"name": "Lander", "source": "online"}}
    rows = [head | {"versions": VERSIONS, "score_name": "return"}]
    rows += [{"env_step": step, "seconds": step / 10, "episode/return": y} for step, y in ((20, 10.0), (60, 20.0))]
    rows += [{"env_step": 80, "seconds": 8.0, "loss/td": 2.0, "loss/td_uniform": 4.0, "updates_per_s": 7.0}]
    rows += [{"env_step": 95, "seconds": 9.0, "episode/return": 0.0}]
    rows += [{"env_step": 100, "seconds": 9.5, "eval/return_mean": 42.0, "eval/episodes": 5, "eval/landed": 0.6}]
    place = folder / "Lander-dqn-s3-20260101-000000"
    place.mkdir(parents=True)
    (place / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_every_reading_of_an_online_log(tmp_path):
    online_run(tmp_path / "runs")
    (run,) = read_runs([str(tmp_path / "runs")])
    found = run.numbers  # smoothed and corrected for its start: 10, 15.263, 9.631
    assert found["train_final"] == found["train_last_10pct"] == pytest.approx(9.6310, abs=1e-4)
    assert found["train_mean"] == pytest.approx((15.2632 + 9.6310) / 2, abs=1e-4)  # from the first update on
    assert found["train_raw_last_10pct"] == 0.0 and found["landed"] == 0.6 and run.last == 42.0
    assert (found["td_final"], found["td_uniform_final"], found["updates_per_s"]) == (2.0, 4.0, 7.0)
    report.main([str(tmp_path / "runs"), "--keep", str(tmp_path / "kept")])
    (kept,) = read_runs([str(tmp_path / "kept")])
    assert kept.numbers == found and set(kept.metrics) == {"episode/return", "loss/td"}
    ((_, name, chart),) = charts.all_curves(tables.Results([kept]))  # one evaluation at the end is no curve
    assert name == "training_Lander" and charts.HIDDEN in [layer["mark"] for layer in chart["layer"]]
    assert 'opacity="0"' not in charts.svg(chart)  # what is there for the mouse is not drawn
    twice = replace(kept, curve=[(50, 1.0), *kept.curve])
    names = [name for _, name, _ in charts.all_curves(tables.Results([twice]))]
    assert names == ["curves_Lander", "training_Lander"]


def test_a_version_that_one_run_does_not_name_tells_nothing(tmp_path):
    for seed, versions in enumerate(({"torch": "2.9.0"}, {"torch": "2.9.0"}, VERSIONS, {"torch": "2.8.0"}, {})):
        make_run(tmp_path, seed=seed, versions=versions)
    said = {run.seed: run.apart for run in read_runs([str(tmp_path)])}
    assert said == {0: "", 1: "", 2: "", 3: "other versions: torch 2.8.0 (others 2.9.0)", 4: "other versions: unknown"}
