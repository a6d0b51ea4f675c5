"""Where an OPSO agent goes in each of the five tasks, drawn on the maze: ways that arrived in colour, others in grey.

python benchmarks/opso_ways.py outputs/RUN [--episodes 8] [--out ways.png]
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from harness import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import utils
from common import evaluation, logger
from ogbench_utils import TASKS, make_task

FIRST_SEED = 3_000_000  # of the episodes; no other evaluation uses these
CELL = 4.0  # metres, of OGBench's mazes; their corner lies at -1.5 cells


def draw_ways(checkpoint: Path, path: Path, episodes: int) -> None:
    """A panel a task, with its goal as a star."""
    agent, _ = utils.load(checkpoint, compile=False, cuda_graphs=False)
    acting = evaluation.eval_copy(agent)
    environment = utils.split_name(utils.name_of(agent.cfg)).environment
    figure = Figure(figsize=(3.2 * len(TASKS), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axis, task in zip(figure.subplots(1, len(TASKS)), TASKS):
        env = make_task(environment, task)
        for seed in range(FIRST_SEED, FIRST_SEED + episodes):
            state, info = env.reset(seed=seed)
            memory = acting.reset(1, torch.as_tensor(info["goal"])[None])
            way, over, cut = [state[:2]], False, False
            while not (over or cut):
                action, memory = acting.act(torch.as_tensor(state)[None], None, memory)
                state, _, over, cut, _ = env.step(action[0].numpy().astype(np.float32))
                way.append(state[:2])
            axis.plot(*zip(*way), color="C0" if over else "0.7", lw=0.9, zorder=2 if over else 1)
            axis.plot(*info["goal"][:2], "*", color="C3", ms=9, zorder=3)
        env.close()
        maze, corner = env.env.unwrapped.maze_map, -1.5 * CELL
        extent = (corner, CELL * maze.shape[1] + corner, CELL * maze.shape[0] + corner, corner)
        axis.imshow(maze, cmap="Greys", alpha=0.35, extent=extent)
        axis.set(title=task, xticks=[], yticks=[])
        axis.invert_yaxis()
    figure.suptitle(f"{Path(agent.cfg.dataset).stem}: ways of the last checkpoint, {episodes} episodes a task")
    with logger.atomic_write(path) as part:
        figure.savefig(part, format="png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run's folder, or a checkpoint")
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "ways.png")
    args = parser.parse_args()
    draw_ways(args.run / "last_checkpoint.pt" if args.run.is_dir() else args.run, args.out, args.episodes)
    print(args.out)


if __name__ == "__main__":
    sys.exit(main())
