"""What a run shows: its training curves and a video of the agent at work, both without a screen."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def draw_curves(rows: list[dict], title: str, path: Path) -> None:
    """Score, losses, Q and gradients against updates, out of the rows of a log, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    head = rows[0] if rows else {}
    unit = "env_step" if "env_step" in head else "update"
    series = lambda key: tuple(zip(*[(r[unit], r[key]) for r in rows if key in r])) or ((), ())  # noqa: E731
    figure = Figure(figsize=(11, 7.5), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=12)
    score_axis, loss_axis, q_axis, actor_axis = figure.subplots(2, 2).flat

    key, spread_key = "eval/score", "eval/score_std"
    if head.get("score_name") == "return":  # an environment without reference returns
        key, spread_key = "eval/return_mean", "eval/return_std"
    updates, scores = series(key)
    if updates:
        spread = np.array(series(spread_key)[1])
        score_axis.plot(updates, scores, "o-", ms=3, color="C0", label=f"last {scores[-1]:.1f}, best {max(scores):.1f}")
        score_axis.fill_between(
            updates, np.subtract(scores, spread), np.add(scores, spread), color="C0", alpha=0.15, lw=0
        )
    if updates and updates[0] == 0:
        score_axis.axhline(scores[0], color="0.4", ls="--", lw=1, label=f"before the first step {scores[0]:.1f}")
        score_axis.axhline(0.8 * scores[0], color="0.4", ls=":", lw=1, label="80% of that")
    if "behaviour_score" in head:
        text = f"mean of the data {head['behaviour_score']:.1f}"
        score_axis.axhline(head["behaviour_score"], color="0.4", ls="--", lw=1, label=text)
    steps, returns = series("episode/return" if key == "eval/return_mean" else "episode/score")
    if steps:
        score_axis.plot(steps, returns, ".", ms=2, color="0.75", zorder=0, label="training episodes")
        score_axis.plot(steps, smoothed(returns), lw=1.2, color="C1", label="the same, smoothed (0.9)")
    tasks = sorted({k for r in rows for k in r if k.startswith("eval/task")})
    for key in tasks:
        score_axis.plot(*series(key), lw=0.8, alpha=0.5, label=key.removeprefix("eval/"))
    if score_axis.get_legend_handles_labels()[1]:
        score_axis.legend(frameon=False)
    score_axis.set_title(f"{head.get('score_name', 'score')}, mean ± std over episodes")

    for axis, name, keys, log in (
        (
            loss_axis,
            "losses",
            [
                ("loss/critic", "critic"),
                ("loss/td", "TD, weighted"),
                ("loss/td_unweighted", "TD, unweighted"),
                ("loss/action", "action"),
                ("loss/state", "next state"),
                ("loss/reward", "reward"),
                ("loss/value", "value"),
                ("loss/anchor", "KL to the offline policy, weighted"),
                ("loss/return", "next return-to-go"),
                ("loss/nce", "InfoNCE"),
                ("loss/align", "alignment"),
                ("loss/propose", "proposal"),
                ("loss/inverse", "inverse dynamics"),
            ],
            True,
        ),
        (
            q_axis,
            "V" if any("value/mean" in r for r in rows) else "Q",
            [
                ("critic/q", "Q(s, a) of the data"),
                ("actor/q_pi", "Q(s, π(s))"),
                ("critic/target", "target"),
                ("value/q", "Q(z, z', z_g) of the data"),
                ("value/v", "V(z, z_g)"),
                ("value/mean", "V(s)"),
                ("value/target", "target"),
                ("value/explained", "share of the target's variance that V explains"),
            ],
            False,
        ),
        (
            actor_axis,
            "actor",
            [
                ("actor/clone", "cloning error"),
                ("policy/clone", "cloning error"),
                ("policy/to_past", "distance to the past policy"),
                ("policy/kl", "KL to the policy that acted"),
                ("policy/kl_offline", "KL to the offline policy"),
                ("sigma", "sigma"),
                ("gradient/policy", "gradient norm"),
                ("gradient/rest", "gradient norm"),
                ("gradient/all", "gradient norm"),
                ("gradient/judges", "gradient norm, encoder and values"),
                ("policy/action_error", "error of the action"),
                ("explore/epsilon", "share of steps toward the goal, wanted"),
                ("explore/goal_biased", "the same, done"),
                ("explore/sigma", "noise on actions"),
            ],
            True,
        ),
    ):
        for key, label in keys:
            x, y = series(key)
            if x:
                axis.plot(x, y, lw=1.2, label=label, ls=":" if key.endswith("/target") else "-")
        if axis.lines:
            axis.legend(frameon=False)
            if log:
                axis.set_yscale("log")
        axis.set_title(name)
        axis.set_visible(bool(axis.lines))
    for axis in figure.axes:
        axis.set_xlabel(f"{unit.replace('_', ' ')}s")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    figure.savefig(path, format="png", dpi=110)


def smoothed(values: Sequence[float], keep: float = 0.9) -> list[float]:
    """TensorBoard's running mean: s_k = keep s_(k-1) + (1 - keep) x_k, over what its weights sum to."""
    mean, weight, out = 0.0, 0.0, []
    for x in values:
        mean, weight = keep * mean + (1 - keep) * x, keep * weight + 1 - keep
        out.append(mean / weight)
    return out


def draw_sweep(asked: Sequence[float], returns: list[np.ndarray], title: str, path: Path) -> None:
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


def write_video(path: Path, frames: list[np.ndarray], fps: int) -> None:
    """H.264 mp4 of RGB frames (H, W, 3), through the ffmpeg that imageio-ffmpeg brings."""
    import imageio_ffmpeg

    height, width = frames[0].shape[:2]
    sink = imageio_ffmpeg.write_frames(str(path), (width, height), fps=fps, output_params=["-f", "mp4"])
    sink.send(None)
    for frame in frames:
        sink.send(np.ascontiguousarray(frame))
    sink.close()


def headless_rendering() -> None:
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
