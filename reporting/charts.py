"""Charts as Vega-Lite specifications (version 5): dicts that the page draws, and that become SVG files."""

import numpy as np

from common import statistics
from common.packages import optional
from common.plotting import smoothed
from reporting.tables import Results

SCHEMA = "https://vega.github.io/schema/vega-lite/v5.json"  # a name, not something that is fetched
WIDTH, HEIGHT = 420, 260


def base(labels: list[str], values: dict[str, list[dict]], title: str, layer: list[dict]) -> dict:
    params = [{"name": "shown", "value": labels}]
    return {
        "$schema": SCHEMA,
        "title": {"text": title, "anchor": "start", "fontSize": 13},
        "width": WIDTH,
        "height": HEIGHT,
        "datasets": values,
        "params": params,
        "layer": layer,
        "config": {"view": {"stroke": None}, "axis": {"gridColor": "#e6e6e6", "domainColor": "#888"}},
    }


def colour(labels: list[str], legend: bool = True) -> dict:
    scheme = "tableau10" if len(labels) <= 10 else "tableau20"
    shown = {"orient": "bottom", "columns": 2, "title": None, "labelLimit": 320, "symbolOpacity": 1} if legend else None
    return {"field": "agent", "type": "nominal", "scale": {"domain": labels, "scheme": scheme}, "legend": shown}


def layer(data: str, mark: dict, encoding: dict, **more) -> dict:
    keep = {"filter": "indexof(shown, datum.agent) >= 0"}
    return {"data": {"name": data}, "transform": [keep], "mark": mark, "encoding": encoding, **more}


RETURNS = "episode/return"  # of an online agent's training
GRID = 60  # points of a curve that runs have at different steps
BANDS = 6
HIDDEN = {"type": "point", "filled": True, "size": 45, "opacity": 0}  # is there for the mouse alone


def on_one_grid(lines: list[list[tuple[int, float]]]) -> list[list[tuple[int, float]]]:
    """Smoothed, and interpolated where all of them have points."""
    grid = np.linspace(max(line[0][0] for line in lines), min(line[-1][0] for line in lines), GRID).round()
    found = []
    for line in lines:
        steps, values = zip(*line)
        found.append([(int(x), float(y)) for x, y in zip(grid, np.interp(grid, steps, smoothed(values, 0.6)))])
    return found


def curves(results: Results, column: str, training: bool = False) -> dict:
    """Evaluations against training: seeds thin, their mean bold, a 95 % band where there are three seeds or more.

    More than `BANDS` agents have none: their bands would hide each other.

    training: the returns of an online agent's training episodes instead.
    """
    labels = [label for label in results.labels if results.of(label, column)]
    if training:
        labels = [label for label in labels if all(RETURNS in run.metrics for run in results.of(label, column))]
    seeds, means = [], []
    for label in labels:
        runs = results.of(label, column)
        lines = on_one_grid([run.metrics[RETURNS] for run in runs]) if training else [run.curve for run in runs]
        for run, line in zip(runs, lines):
            seeds += [{"agent": label, "seed": run.seed, "x": x, "y": round(y, 2)} for x, y in line]
        shared = sorted(set.intersection(*({x for x, _ in line} for line in lines)))
        by_step = [dict(line) for line in lines]
        for x in shared:
            values = np.array([curve[x] for curve in by_step])
            low, high = statistics.mean_interval(values) or (values.mean(), values.mean())
            means.append(
                {"agent": label, "x": x, "y": round(values.mean(), 2), "low": low, "high": high, "seeds": len(runs)}
            )
    first = next(run for run in results.runs if run.column == column)
    unit = "environment steps" if first.unit == "env_step" else "updates"
    x = {"field": "x", "type": "quantitative", "title": unit, "axis": {"format": "~s"}}
    name = "return of training episodes" if training else results.score_name[column]
    y = {"field": "y", "type": "quantitative", "title": name, "scale": {"zero": False}}
    tooltip = [
        {"field": "agent"},
        {"field": "x", "title": unit, "format": ","},
        {"field": "y", "title": "mean", "format": ".1f"},
        {"field": "seeds"},
    ]
    band = {"x": x, "y": {**y, "field": "low"}, "y2": {"field": "high"}, "color": colour(labels)}
    layers = [layer("means", {"type": "area", "opacity": 0.15}, band)] if len(labels) <= BANDS else []
    layers += [
        layer(
            "seeds",
            {"type": "line", "opacity": 0.4, "strokeWidth": 0.8},
            {"x": x, "y": y, "color": colour(labels), "detail": {"field": "seed"}},
        ),
        layer("means", {"type": "line", "strokeWidth": 2.5}, {"x": x, "y": y, "color": colour(labels)}),
        layer(
            "means",
            HIDDEN if training else {**HIDDEN, "opacity": 1},
            {"x": x, "y": y, "color": colour(labels), "tooltip": tooltip},
        ),
    ]
    values = {"seeds": seeds, "means": means}
    if first.behavior is not None and not training:
        values["level"] = [{"y": round(first.behavior, 2)}]
        rule = {"type": "rule", "strokeDash": [5, 4], "color": "#666"}
        text = {"y": {"field": "y", "type": "quantitative"}, "tooltip": [{"field": "y", "title": "mean of the data"}]}
        layers.append({"data": {"name": "level"}, "mark": rule, "encoding": text})
    return base(labels, values, column, layers)


def all_curves(results: Results) -> list[tuple[str, str, dict]]:
    """(column, name of its own, chart) of every data set, and of the training where agents learned online."""
    found = []
    for column in results.columns:
        runs = [run for run in results.runs if run.column == column]
        trained = any(RETURNS in run.metrics for run in runs)
        if not trained or any(len(run.curve) > 1 for run in runs):  # one evaluation at the end is no curve
            found.append((column, f"curves_{column}", curves(results, column)))
        if trained:
            found.append((column, f"training_{column}", curves(results, column, training=True)))
    return found


def profile(results: Results, kind: str) -> dict | None:
    """Share of runs above each score, over the data sets of a kind; None where no two agents are complete."""
    columns, labels = results.complete(kind)
    if len(labels) < 2:
        return None
    scores = {label: [results.scores(label, column) for column in columns] for label in labels}
    every = np.concatenate([x for parts in scores.values() for x in parts])
    levels = np.linspace(min(0.0, every.min()), every.max(), 101)
    rows = []
    for label in labels:
        shares = statistics.performance_profile(scores[label], levels)
        rows += [{"agent": label, "x": round(x, 2), "y": round(y, 4)} for x, y in zip(levels, shares)]
    x = {"field": "x", "type": "quantitative", "title": f"{kind} τ"}
    y = {"field": "y", "type": "quantitative", "title": "share of runs above τ", "axis": {"format": ".0%"}}
    tooltip = [{"field": "agent"}, {"field": "x", "title": "τ"}, {"field": "y", "title": "share", "format": ".0%"}]
    encoding = {"x": x, "y": y, "color": colour(labels), "tooltip": tooltip}
    return base(
        labels,
        {"rows": rows},
        f"Performance profile: {kind}",
        [layer("rows", {"type": "line", "strokeWidth": 2, "interpolate": "step-after"}, encoding)],
    )


def intervals(results: Results, kind: str) -> dict | None:
    """The IQM over data sets with its interval, an agent a line; None where nothing is complete."""
    columns, labels = results.complete(kind)
    if not labels:
        return None
    rows = []
    for label in labels:
        scores = [results.scores(label, column) for column in columns]
        value = statistics.iqm(scores)
        low, high = (
            statistics.stratified_bootstrap([scores], statistics.iqm)
            if statistics.has_interval(scores)
            else (value, value)
        )
        rows.append({"agent": label, "x": round(value, 2), "low": round(low, 2), "high": round(high, 2)})
    y = {"field": "agent", "type": "nominal", "title": None, "sort": labels, "axis": {"labelLimit": 260}}
    x = {"field": "x", "type": "quantitative", "title": f"IQM, {kind}", "scale": {"zero": False}}
    tooltip = [{"field": "agent"}, {"field": "x", "title": "IQM"}, {"field": "low"}, {"field": "high"}]
    bars = {"x": {**x, "field": "low"}, "x2": {"field": "high"}, "y": y, "color": colour(labels, legend=False)}
    points = {"x": x, "y": y, "color": colour(labels, legend=False), "tooltip": tooltip}
    chart = base(
        labels,
        {"rows": rows},
        f"Interquartile mean: {kind}",
        [
            layer("rows", {"type": "rule", "strokeWidth": 5, "opacity": 0.4}, bars),
            layer("rows", {"type": "point", "filled": True, "size": 70}, points),
        ],
    )
    return {**chart, "height": {"step": 26}}


def metrics(run) -> dict[str, list]:
    """A run's logged curves for the page: name -> points, smoothed as in training_curves.png, of four digits."""
    found = {}
    for name, points in run.metrics.items():
        steps, values = zip(*points)
        found[name] = [[x, float(f"{y:.4g}")] for x, y in zip(steps, smoothed(values, 0.6))]
    return found


def svg(spec: dict) -> str:
    """The drawn chart. ValueError if the package that draws is missing."""
    spec = {**spec, "layer": [part for part in spec["layer"] if part["mark"] != HIDDEN]}
    return renderer().vegalite_to_svg(spec, vl_version="5.20")


def bundle() -> str:
    """The JavaScript that draws the charts in a page: Vega, Vega-Lite and vega-embed."""
    return renderer().javascript_bundle(vl_version="5.20")


def renderer():
    return optional("vl_convert", '"vl-convert-python>=1.7"', "a chart")
