"""The numbers of a report, and tables as Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from common import statistics
from reporting.runs import Run


@dataclass(frozen=True)
class Table:
    """Texts under a heading. strong: cells (row, column) that are set in bold."""

    title: str
    head: list[str]
    rows: list[list[str]]
    strong: frozenset[tuple[int, int]] = frozenset()
    notes: tuple[str, ...] = ()

    def is_strong(self, row: int, column: int) -> bool:
        return (row, column) in self.strong

    def markdown(self) -> str:
        cells = [[f"**{t}**" if self.is_strong(i, j) else t for j, t in enumerate(r)] for i, r in enumerate(self.rows)]
        escaped = [[text.replace("|", "\\|") for text in row] for row in [self.head, *cells]]
        rule = "|---|" + "---:|" * (len(self.head) - 1)
        lines = ["| " + " | ".join(row) + " |" for row in escaped]
        return "\n".join([f"**{self.title}**", "", lines[0], rule, *lines[1:], "", *self.notes]).rstrip() + "\n"

    def latex(self) -> str:
        """A tabular for the booktabs package."""
        cells = [
            [rf"\textbf{{{latex(t)}}}" if self.is_strong(i, j) else latex(t) for j, t in enumerate(r)]
            for i, r in enumerate(self.rows)
        ]
        lines = [f"% {self.title}", rf"\begin{{tabular}}{{l{'r' * (len(self.head) - 1)}}}", r"\toprule"]
        lines += [" & ".join(map(latex, self.head)) + r" \\", r"\midrule"]
        lines += [" & ".join(row) + r" \\" for row in cells]
        return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", *(f"% {note}" for note in self.notes)]) + "\n"

    def csv(self) -> str:
        out = io.StringIO()
        csv.writer(out, lineterminator="\n").writerows([self.head, *self.rows])
        return out.getvalue()


def latex(text: str) -> str:
    for char in "&%$#_{}":
        text = text.replace(char, "\\" + char)
    return text.replace("±", r"$\pm$").replace("≥", r"$\geq$")


class Results:
    """The runs that can be compared, by label and column."""

    def __init__(self, runs: list[Run]):
        self.runs = [run for run in runs if not run.apart]
        self.apart = [run for run in runs if run.apart]
        self.labels = list(dict.fromkeys(run.label for run in self.runs))
        self.columns = list(dict.fromkeys(run.column for run in sorted(self.runs, key=lambda run: run.column)))
        self.score_name = {run.column: run.score_name for run in self.runs}
        self.kinds = list(dict.fromkeys(self.score_name[column] for column in self.columns))

    def of(self, label: str, column: str) -> list[Run]:
        return [run for run in self.runs if run.label == label and run.column == column]

    def scores(self, label: str, column: str, kind: Callable[[Run], float] = lambda run: run.last) -> np.ndarray:
        return np.array([kind(run) for run in self.of(label, column)])

    def complete(self, kind: str) -> tuple[list[str], list[str]]:
        """The columns of one kind of score, and the labels that have runs in all of them."""
        columns = [column for column in self.columns if self.score_name[column] == kind]
        return columns, [label for label in self.labels if all(self.of(label, column) for column in columns)]


def mean_std(values: np.ndarray) -> str:
    if not len(values):
        return ""
    return f"{values.mean():.1f}" + (f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else "") + f" ({len(values)})"


def interval(bounds: tuple[float, float] | None) -> str:
    return f"{bounds[0]:.1f} to {bounds[1]:.1f}" if bounds else ""


def overview(results: Results, kind: str) -> Table:
    """Agents × data sets of one kind of score: mean ± std (seeds) of the last checkpoint. Bold: the best, where its
    interval lies above every other's."""
    columns, _ = results.complete(kind)
    labels = [label for label in results.labels if any(results.of(label, column) for column in columns)]
    rows, strong = [], set()
    for label in labels:
        rows.append([label, *(mean_std(results.scores(label, column)) for column in columns)])
    for j, column in enumerate(columns, 1):
        bounds = [
            statistics.mean_interval(values) if len(values := results.scores(label, column)) else () for label in labels
        ]
        there = [b for b in bounds if b != ()]
        if len(there) > 1 and all(there):
            best = max(range(len(labels)), key=lambda i: bounds[i][0] if bounds[i] else -np.inf)
            if all(bounds[best][0] > b[1] for i, b in enumerate(bounds) if b and i != best):
                strong.add((best, j))
    levels = [next((run.behavior for run in results.runs if run.column == c and run.behavior), None) for c in columns]
    if any(level is not None for level in levels):
        rows.append(["the data", *(f"{level:.1f}" if level is not None else "" for level in levels)])
    notes = [
        "Last checkpoint; mean ± standard deviation over seeds (number of seeds). "
        "Bold: its 95 % interval lies above all others'."
    ]
    few = [label for label in labels if any(0 < len(results.of(label, c)) < statistics.LEAST_SEEDS for c in columns)]
    if few:
        notes.append(
            f"No interval with fewer than {statistics.LEAST_SEEDS} seeds, and so nothing bold: {', '.join(few)}."
        )
    return Table(f"{kind}s", [kind, *columns], rows, frozenset(strong), tuple(notes))


def minutes_to_most(runs: list[Run], share: float = 0.9) -> str:
    """Median time, evaluations included, until one first had this share of the last checkpoint's score; nothing where
    a score is not above 0, of which a share says nothing."""
    if min(run.last for run in runs) <= 0:
        return ""
    minutes = []
    for run in runs:
        first = next((step for step, score in run.curve if score >= share * run.last), run.budget)
        minutes.append(run.seconds / 60 * first / run.budget)
    return f"{np.median(minutes):.1f}"


def late(run: Run) -> float:
    return float(np.mean([score for _, score in run.curve[-5:]]))


def counts(values) -> str:
    return "/".join(str(n) for n in sorted(set(values)))


DETAILS: dict[str, Callable[[list[Run]], str]] = {  # name -> cell, from the runs of an agent on a data set
    "score": lambda runs: runs[0].score_name,
    "last checkpoint": lambda runs: mean_std(each(runs, lambda run: run.last)),
    "by seed": lambda runs: ", ".join(f"{run.last:.1f}" for run in runs),
    "95 % interval": lambda runs: interval(statistics.mean_interval(each(runs, lambda run: run.last))),
    "mean of last 5": lambda runs: mean_std(each(runs, late)),
    "best evaluation (optimistic)": lambda runs: (
        f"{mean_std(each(runs, lambda run: run.best))} of {counts(len(run.curve) for run in runs)}"
    ),
    "first evaluation": lambda runs: mean_std(each(runs, lambda run: run.curve[0][1])),
    "lowest evaluation": lambda runs: mean_std(each(runs, lambda run: min(score for _, score in run.curve))),
    "mean of all": lambda runs: mean_std(each(runs, lambda run: np.mean([score for _, score in run.curve]))),
    "episodes": lambda runs: counts(run.episodes for run in runs),
    "budget": lambda runs: f"{runs[0].budget:,} {runs[0].unit}s",
    "minutes": lambda runs: f"{each(runs, lambda run: run.seconds).mean() / 60:.1f}",
    "minutes to 90 %": minutes_to_most,
}
USUAL = [name for name in DETAILS if name not in ("by seed", "first evaluation", "lowest evaluation", "mean of all")]


def each(runs: list[Run], kind: Callable[[Run], float]) -> np.ndarray:
    return np.array([kind(run) for run in runs])


def number(runs: list[Run], name: str) -> str:
    """Mean ± standard deviation of one of the runs' `numbers`."""
    values = np.array([run.numbers[name] for run in runs if name in run.numbers])
    if not len(values):
        return ""
    digits = 1 if abs(values.mean()) >= 2 else 3
    return f"{values.mean():.{digits}f}" + (f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else "")


def details(results: Results, columns: Sequence[str] = ()) -> Table:
    """One line for each agent on each data set. columns: of `DETAILS`, or of the runs' `numbers`; none: the usual.

    ValueError for a column that is none of them.
    """
    columns, known = list(columns) or USUAL, {name for run in results.runs for name in run.numbers}
    for name in columns:
        if name not in DETAILS and name not in known:
            raise ValueError(f"there is no column {name}; there are: {', '.join([*DETAILS, *sorted(known)])}")
    rows = []
    for label in results.labels:
        for data in results.columns:
            if runs := results.of(label, data):
                cells = [DETAILS[name](runs) if name in DETAILS else number(runs, name) for name in columns]
                rows.append([label, data, *cells])
    return Table("Each agent on each data set", ["agent", "data", *columns], rows)


def aggregates(results: Results, kind: str, resamples: int = statistics.RESAMPLES) -> Table | None:
    """IQM, median, mean and optimality gap over the data sets of one kind of score; None where nothing is complete."""
    columns, labels = results.complete(kind)
    if not labels:
        return None
    statistic = {k: v for k, v in statistics.AGGREGATES.items() if kind != "return" or k != "optimality gap"}
    rows, short = [], []
    for label in labels:
        scores = [results.scores(label, column) for column in columns]
        cells = [label]
        for compute in statistic.values():
            text = f"{compute(scores):.1f}"
            if statistics.has_interval(scores):
                text += f" [{interval(statistics.stratified_bootstrap([scores], compute, resamples))}]"
            cells.append(text)
        short += [] if statistics.has_interval(scores) else [label]
        rows.append(cells)
    missing = [label for label in results.labels if label not in labels and any(results.of(label, c) for c in columns)]
    notes = [f"Over {', '.join(columns)}; 95 % intervals by a bootstrap of the seeds within each data set."]
    notes += [f"No interval with fewer than {statistics.LEAST_SEEDS} seeds: {', '.join(short)}."] if short else []
    notes += [f"Not on every one of them, so not here: {', '.join(missing)}."] if missing else []
    return Table(f"Over data sets: {kind}", ["agent", *statistic], rows, notes=tuple(notes))


def improvements(results: Results, kind: str) -> Table | None:
    """How likely the row's agent is better than the column's, with an interval where there are seeds for one."""
    columns, labels = results.complete(kind)
    if len(labels) < 2:
        return None
    scores = {label: [results.scores(label, column) for column in columns] for label in labels}
    rows = []
    for ours in labels:
        cells = [ours]
        for theirs in labels:
            if ours == theirs:
                cells.append("")
                continue
            pair = [scores[ours], scores[theirs]]
            text = f"{statistics.probability_of_improvement(*pair):.2f}"
            if all(map(statistics.has_interval, pair)):
                low, high = statistics.stratified_bootstrap(pair, statistics.probability_of_improvement, 500)
                text += f" [{low:.2f} to {high:.2f}]"
            cells.append(text)
        rows.append(cells)
    return Table(f"Probability that the row is better than the column: {kind}", ["", *labels], rows)


def apart(results: Results) -> Table | None:
    """Runs that stand in no table above, and why."""
    rows = [
        [run.label, run.column, str(run.seed), f"{run.last:.1f}" if run.curve else "", run.apart]
        for run in results.apart
    ]
    head = ["agent", "data", "seed", "score so far", "why it is not above"]
    return Table("Shown apart", head, rows) if rows else None


# -- before and after ------------------------------------------------------------------------------


def compare(before: list[Run], after: list[Run]) -> tuple[Table, str]:
    """Runs of two places paired by agent, data set and seed: differences, and in words whether the change helped.

    ValueError if nothing can be paired.
    """
    sides = []
    for runs in (before, after):
        names = short_names(runs)
        sides.append({(names[run.label], run.column, run.seed): run for run in runs if not run.apart})
    shared = sorted(sides[0].keys() & sides[1].keys())
    if not shared:
        raise ValueError("no run of the one has the agent, data set and seed of a run of the other: nothing to compare")
    rows, differences, kinds = [], {}, set()
    for agent, column in dict.fromkeys((agent, column) for agent, column, _ in shared):
        keys = [key for key in shared if key[:2] == (agent, column)]
        old, new = (np.array([side[key].last for key in keys]) for side in sides)
        differences[agent, column] = new - old
        kinds.add(sides[0][keys[0]].score_name)
        bounds = statistics.mean_interval(new - old)
        rows.append([agent, column, mean_std(old), mean_std(new), f"{(new - old).mean():+.1f}", interval(bounds)])
    parts = list(differences.values())
    by = statistics.mean(parts)
    words = f"The second is {abs(by):.1f} {'higher' if by >= 0 else 'lower'} on average, in {len(shared)} pairs"
    if len(kinds) > 1:
        words += f" (of different kinds of score: {', '.join(sorted(kinds))}; look at the rows)"
    if statistics.has_interval(parts):
        low, high = statistics.stratified_bootstrap([parts], statistics.mean)
        verdict = "it helped" if low > 0 else "it did harm" if high < 0 else "no difference is shown"
        words += f", 95 % interval {low:+.1f} to {high:+.1f}: {verdict}."
    else:
        words += f". Fewer than {statistics.LEAST_SEEDS} seeds somewhere: no interval, so nothing is shown."
    head = ["agent", "data", "first", "second", "difference", "95 % interval"]
    return Table("Before and after, paired by data set and seed", head, rows), words


def short_names(runs: list[Run]) -> dict[str, str]:
    """What a label is called when two sides are compared: the agent alone, where a side has one setting of it."""
    labels: dict[str, set[str]] = {}
    for run in runs:
        labels.setdefault(run.agent, set()).add(run.label)
    return {run.label: run.agent if len(labels[run.agent]) == 1 else run.label for run in runs}
