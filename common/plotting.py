"""What a run shows: its training curves and a video of the agent at work, both without a screen."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Panel(NamedTuple):
    """One pair of axes: metrics that share a unit."""

    title: str
    labels: dict[str, str]  # metric -> what it is called
    unit: str = ""
    log: bool = False  # scale


def draw_curves(rows: list[dict], title: str, panels: Sequence[Panel], path: Path) -> None:
    """Scores, and the panels of whose metrics there are any, out of the rows of a log, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    head = rows[0] if rows else {}
    step = "env_step" if "env_step" in head else "update"
    panels = [panel for panel in panels if any(key in row for row in rows for key in panel.labels)]
    count = 1 + len(panels)
    width = min(2, count)
    height = -(-count // width)
    figure = Figure(figsize=(5.5 * width, 3.75 * height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(height, width, squeeze=False).flat
    draw_scores(axes[0], rows, step)
    for axis, panel in zip(axes[1:], panels):
        draw_panel(axis, panel, rows, step)
    for axis in axes[count:]:
        axis.set_visible(False)
    for axis in axes[:count]:
        axis.set_xlabel(f"{step.replace('_', ' ')}s")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    figure.savefig(path, format="png", dpi=110)


def series(rows: list[dict], step: str, key: str) -> tuple[tuple, tuple]:
    """Where a metric was written, and what it was."""
    found = [(row[step], row[key]) for row in rows if key in row]
    return tuple(zip(*found)) or ((), ())


def draw_scores(axis, rows: list[dict], step: str) -> None:
    """Evaluations, training episodes, tasks; the data's mean, or what a run began with."""
    head = rows[0] if rows else {}
    has_scores = head.get("score_name") != "return"  # an environment without reference returns has none
    kind = "score" if has_scores else "return_mean"
    x, scores = series(rows, step, f"eval/{kind}")
    if x:
        spread = np.array(series(rows, step, "eval/score_std" if has_scores else "eval/return_std")[1])
        axis.plot(x, scores, "o-", ms=3, color="C0", label=f"last {scores[-1]:.1f}, best {max(scores):.1f}")
        axis.fill_between(x, scores - spread, scores + spread, color="C0", alpha=0.15, lw=0)
    if x and x[0] == 0:
        axis.axhline(scores[0], color="0.4", ls="--", lw=1, label=f"before the first step {scores[0]:.1f}")
        axis.axhline(0.8 * scores[0], color="0.4", ls=":", lw=1, label="80% of that")
    if "behavior_score" in head:
        text = f"mean of the data {head['behavior_score']:.1f}"
        axis.axhline(head["behavior_score"], color="0.4", ls="--", lw=1, label=text)
    at, returns = series(rows, step, "episode/score" if has_scores else "episode/return")
    if at:
        axis.plot(at, returns, ".", ms=2, color="0.75", zorder=0, label="training episodes")
        axis.plot(at, smoothed(returns), lw=1.2, color="C1", label="the same, smoothed (0.9)")
    for key in sorted({k for row in rows for k in row if k.startswith("eval/task")}):
        axis.plot(*series(rows, step, key), lw=0.8, alpha=0.5, label=key.removeprefix("eval/"))
    if axis.get_legend_handles_labels()[1]:
        axis.legend(frameon=False)
    axis.set_title(f"{head.get('score_name', 'score')}, mean ± std over episodes")


def draw_panel(axis, panel: Panel, rows: list[dict], step: str) -> None:
    """A line for each metric; dashed what the data say that it ought to be."""
    levels = rows[0].get("levels", {}) if rows else {}
    for key, label in panel.labels.items():
        x, y = series(rows, step, key)
        if x:
            axis.plot(x, y, lw=1.2, label=label, ls=":" if key.endswith("/target") else "-")
        if key in levels:
            axis.axhline(
                levels[key], color="0.4", ls="--", lw=1, label=f"mean return-to-go of the data {levels[key]:.0f}"
            )
    axis.legend(frameon=False)
    if panel.log:
        axis.set_yscale("log")
    axis.set_title(f"{panel.title}, {panel.unit}" if panel.unit else panel.title)


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """TensorBoard's running mean: s_k = keep s_(k-1) + (1 - keep) x_k, over what its weights sum to."""
    mean, weight, out = 0.0, 0.0, []
    for x in values:
        mean, weight = keep * mean + (1 - keep) * x, keep * weight + 1 - keep
        out.append(mean / weight)
    return out


def plot_target_returns(asked: Sequence[float], returns: list[np.ndarray], title: str, path: Path) -> None:
    """The return that was got against the one asked for: every episode, their means, and the diagonal, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    order = np.argsort(asked)
    asked, means = np.array(asked)[order], np.array([r.mean() for r in returns])[order]
    for i, j in enumerate(order):
        axis.plot([asked[i]] * len(returns[j]), returns[j], ".", color="C0", alpha=0.25, ms=5, mew=0)
    axis.plot(asked, means, "o-", color="C0", label=f"mean of {len(returns[0])} episodes")
    axis.plot([asked[0], asked[-1]], [asked[0], asked[-1]], color="0.4", ls="--", lw=1, label="as asked")
    axis.set(xlabel="return asked for", ylabel="return", title=title)
    axis.legend(frameon=False)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, format="png", dpi=110)


def write_video(path: Path, frames: list[np.ndarray], fps: float, kind: str = ".mp4") -> None:
    """H.264 mp4 of RGB frames (H, W, 3), through the ffmpeg that imageio-ffmpeg brings; or an animated .gif."""
    if kind == ".gif":
        return write_gif(path, frames, fps)
    import imageio_ffmpeg

    height, width = frames[0].shape[:2]
    sink = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, output_params=["-f", "mp4"])
    sink.send(None)
    for frame in frames:
        sink.send(np.ascontiguousarray(frame))
    sink.close()


def write_gif(path: Path, frames: list[np.ndarray], fps: float, width: int = 240) -> None:
    """An animation of RGB frames (H, W, 3), `width` pixels wide, in 64 colours."""
    from PIL import Image

    height, before = frames[0].shape[:2]
    size = width, round(width * height / before)
    pictures = [Image.fromarray(frame).resize(size).quantize(64) for frame in frames]
    with open(path, "wb") as file:
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)


def set_mujoco_gl() -> None:
    """Choose how to draw off screen, before mujoco is imported. ValueError, with what to install, if nothing can."""
    if os.environ.get("MUJOCO_GL"):
        return
    from ctypes.util import find_library

    for backend, library in (("egl", "EGL"), ("osmesa", "OSMesa")):
        if find_library(library):
            os.environ["MUJOCO_GL"] = backend
            return
    raise ValueError(
        "--video draws off screen and finds neither EGL nor OSMesa. On Debian or Ubuntu: "
        "apt-get install libegl1 libegl-mesa0 libgl1-mesa-dri libopengl0 (or libosmesa6), and run again"
    )
