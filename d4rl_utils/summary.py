"""What is in a data set, for people: whose it is, its episodes and returns, as text and as a picture."""

from pathlib import Path

import numpy as np

from d4rl_utils.names import DIMS, REGISTRY, SCORE_NAMES, d4rl_score
from d4rl_utils.reader import Dataset, Transitions, episode_returns

WHOSE = {
    "d4rl": "D4RL's own file",
    "local": "LOCAL data, not D4RL's file",
    "minari": "Minari's data, not D4RL's file",
    "custom": "not D4RL's file",
}
BAR = 40  # characters of the longest bar


def describe(place: str | Path, dataset: Dataset) -> str:
    """A data set and the place it was read from -> lines of text."""
    t, identity = dataset
    returns, lengths = episode_returns(t), episode_lengths(t)
    dims = t.states.shape[1], t.actions.shape[1]
    body = identity.name.partition("-")[0]
    lines = [
        f"{place}: {identity.name}, {WHOSE[identity.source]}",
        f"sha256       {identity.sha256}{_checksum(dataset)}",
        f"transitions  {identity.transitions:,}, of which {int(t.terminals.sum()):,} terminal",
        f"episodes     {identity.episodes:,}, {lengths.min()} to {lengths.max()} steps long, mean {lengths.mean():.1f}",
        f"dims         {dims[0]} state, {dims[1]} action; actions from {t.actions.min():.2f} to {t.actions.max():.2f}",
        f"return       {returns.mean():.1f} ± {returns.std():.1f}, from {returns.min():.1f} to {returns.max():.1f}",
    ]
    if identity.source in ("d4rl", "local") and DIMS.get(body) == dims:
        score = d4rl_score(body, returns.mean())
        lines.append(f"{SCORE_NAMES[identity.source]:<12} {score:.1f} of the behaviour, on D4RL's scale")
    return "\n".join([*lines, "", histogram(returns)])


def _checksum(dataset: Dataset) -> str:
    """Whether the SHA-256 is D4RL's, where the file's name or bytes claim so."""
    identity = dataset.identity
    if identity.source == "d4rl":
        return f"\n             which is D4RL's for {identity.name}"
    for name, entry in REGISTRY.items():
        if entry.file == identity.file:
            return f"\n             NOT D4RL's, whose {name} has {entry.sha256}"
    return ""


def episode_lengths(transitions: Transitions) -> np.ndarray:
    """Steps (E,) int64 of every episode, in order."""
    return np.diff(np.flatnonzero(transitions.ends), prepend=-1)


def histogram(returns: np.ndarray, bins: int = 12) -> str:
    """How many episodes (E,) earned how much, a line a bin."""
    counts, edges = np.histogram(returns, bins if np.ptp(returns) else 1)
    digits = 0 if np.ptp(returns) > 100 else 2
    width = max(len(f"{e:,.{digits}f}") for e in edges)
    rows = [f"{'return':>{2 * width + 4}}  episodes"]
    for count, low, high in zip(counts, edges, edges[1:]):
        bar = "#" * round(BAR * count / counts.max()) or "." * bool(count)
        rows.append(f"{low:>{width},.{digits}f} to {high:>{width},.{digits}f}  {bar} {count:,}".rstrip())
    return "\n".join(rows)


def plot(dataset: Dataset, path: Path) -> None:
    """The returns' histogram, the returns in recorded order and the lengths' histogram, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    t, identity = dataset
    returns, lengths = episode_returns(t), episode_lengths(t)
    figure = Figure(figsize=(11, 3.6), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    whose = WHOSE[identity.source]
    figure.suptitle(f"{identity.name} ({whose}): {identity.transitions:,} transitions, {identity.episodes:,} episodes")
    spread, order, steps = figure.subplots(1, 3)
    spread.hist(returns, 40, color="C0")
    spread.axvline(returns.mean(), color="0.3", ls="--", lw=1, label=f"mean {returns.mean():.0f} ± {returns.std():.0f}")
    spread.legend(frameon=False)
    spread.set(title="returns", xlabel="return", ylabel="episodes")
    order.plot(returns, ".", ms=2, alpha=0.5, rasterized=True)
    order.set(title="returns as recorded", xlabel="episode", ylabel="return")
    steps.hist(lengths, 40, color="C2")
    steps.set(title="lengths", xlabel="steps", ylabel="episodes")
    for axis in figure.axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=110)
