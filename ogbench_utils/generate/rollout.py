"""Local data: files in OGBench's layout, rolled out on this machine by OGBench's scripted controller.

At every step the controller heads for the next cell on the shortest way to its goal, with noise. `navigate` draws a new
goal whenever one is reached; `stitch` has goals four cells away; `explore` heads for nowhere, but anew every ten steps.
A point moves as it is told. An ant is walked by a policy that was trained for it (`train_walker`) and is shipped; it is
not OGBench's own, and walks otherwise. The humanoid's takes a hundred times as long to train, and is not there.

Every episode follows from its own child of the seed, so the file does not depend on how many processes worked on it,
and its bytes are the same each time on the same kind of processor. Where we differ from OGBench's script: seeds are
ours, so that the episodes are others of the same distribution.
"""

import json
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import file_lock, sha256_of
from common.logger import atomic_write
from common.parallel import cores, run_jobs
from ogbench_utils.environment import make_maze, seeded
from ogbench_utils.names import DATASETS, DIMS, POSITIONS, Name, local_name, split_name

SHARD = 10  # episodes that one process rolls in one go
NOISE = {"pointmaze": 0.5, "antmaze": 0.2}  # standard deviation of what is added to actions ...
EXPLORING = 1.0  # ... and in `explore`
HOLD = 10  # steps in one direction in `explore`
NEAR = 4  # cells between start and goal in `stitch`
WALKER = Path(__file__).parent / "ant.npz"  # the policy that walks the ant, and how it was made


class Shard(NamedTuple):
    """One piece of work: `first` is the place of its first episode, one seed an episode."""

    name: Name
    length: int
    first: int
    seeds: list[np.random.SeedSequence]


def local_file(name: str, episodes: int) -> str:
    """The base name of a local file."""
    return f"{local_name(name)}-{episodes}.npz"


def usual_episodes(name: str) -> int:
    """As many as OGBench's own file has."""
    return DATASETS[f"{split_name(name).base}-v0"].episodes


def can_generate(name: str) -> bool:
    return split_name(name).body in NOISE


def make_local(
    name: str,
    episodes: int = 0,
    seed: int = 0,
    workers: int | None = None,
    dataset_dir: str | Path = "./datasets",
    length: int = 0,
) -> Path:
    """Roll `episodes` for training, and a tenth more (at least one) for validation, into two files; returns the first.

    episodes and length (transitions in one): 0 means OGBench's own. workers: processes (default: one a core).
    Files that were made with the same settings are left as they are. Raises ValueError for what cannot be made or is in
    the way, OSError if the disk is too small, ChildProcessError (an OSError too) if a worker dies.
    """
    words, facts = split_name(name), DATASETS[f"{split_name(name).base}-v0"]
    if not can_generate(name):
        raise ValueError(
            f"{words.base} cannot be made on this machine: its body walks by a trained policy, and none is shipped. "
            f"Local data exist for {', '.join(k for k in DATASETS if can_generate(k))}. OGBench's own file: "
            f"python -m ogbench_utils get {words.base}-v0"
        )
    episodes, length = episodes or facts.episodes, length or facts.length
    if episodes < 1 or length < 1 or (workers is not None and workers < 1):
        raise ValueError(f"{episodes} episodes of {length} steps by {workers} workers make no sense: take 1 or more.")
    target = Path(dataset_dir) / local_file(name, episodes)
    target.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "name": local_name(name),
        "made_by": "ogbench_utils.local",
        "seed": seed,
        "episodes": episodes,
        "length": length,
    }
    record |= {"versions": {p: version(p) for p in ("ogbench", "gymnasium", "mujoco", "numpy")}}
    if words.body == "antmaze":
        record["walker"] = sha256_of(WALKER)
    sibling = target.with_name(f"{target.stem}-val.npz")
    with file_lock(target):
        if target.exists() and sibling.exists():
            _check_same(target, record)
            print(f"{target} is there already, made with the same seed")
            return target
        _make(target, sibling, words, record, workers)
    return target


def made_of(path: Path) -> dict:
    """What `make_local` wrote about a file of its own; {} for any other. A damaged file raises what NumPy raises."""
    with np.load(path) as file:
        made = json.loads(str(file["made"])) if "made" in file else {}
    if not isinstance(made, dict) or (made and "name" not in made):
        raise ValueError("what its maker wrote about it cannot be read")
    return made


def _check_same(target: Path, record: dict) -> None:
    theirs = made_of(target)
    for key in ("name", "seed", "episodes", "length", "walker"):
        if theirs.get(key) != record.get(key):
            raise ValueError(
                f"{target} is there already, with {key} {theirs.get(key)} instead of {record.get(key)}. "
                "Remove it, or choose another number of episodes or another --dataset_dir."
            )


def _make(target: Path, sibling: Path, name: Name, record: dict, workers: int | None) -> None:
    from tqdm import tqdm

    episodes, length = record["episodes"], record["length"]
    count = episodes + max(1, episodes // 10)
    (states, actions), (positions, velocities) = DIMS[name.body], POSITIONS[name.body]
    rows = count * (length + 1)
    needed = rows * (states + actions + positions + velocities + 1) * 4
    if needed > shutil.disk_usage(target.parent).free:
        raise OSError(f"{target.parent} has too little room: {needed} bytes are needed. Choose another --dataset_dir.")
    columns = {
        "observations": np.empty((rows, states), np.float32),
        "actions": np.empty((rows, actions), np.float32),
        "terminals": np.tile(np.arange(length + 1) == length, count),
        "qpos": np.empty((rows, positions), np.float32),
        "qvel": np.empty((rows, velocities), np.float32),
    }
    seeds = np.random.SeedSequence(record["seed"]).spawn(count)
    shards = [Shard(name, length, i, seeds[i : i + SHARD]) for i in range(0, count, SHARD)]
    crew, began = min(workers or cores(), len(shards)), time.perf_counter()
    with (
        tqdm(total=rows, desc=record["name"], unit_scale=True, disable=None) as bar,
        closing(run_jobs(roll, shards, crew, bar.update, lambda s: f"the shard of episode {s.first}")) as finished,
    ):
        for shard, found in finished:
            begin = shard.first * (length + 1)
            for key, values in found.items():
                columns[key][begin : begin + len(values)] = values
    cut = episodes * (length + 1)
    _write(sibling, {k: v[cut:] for k, v in columns.items()}, record)
    _write(target, {k: v[:cut] for k, v in columns.items()}, record)
    rate = rows / (time.perf_counter() - began)
    print(f"{target}: {episodes:,} episodes of {length} transitions; {rate:,.0f} steps/s with {crew} workers")


def _write(path: Path, columns: dict[str, np.ndarray], record: dict) -> None:
    """An .npz whose bytes depend on its content alone: NumPy's own has the time of day in it."""
    with atomic_write(path) as part, zipfile.ZipFile(part, "w") as archive:
        for key, values in (columns | {"made": np.array(json.dumps(record))}).items():
            entry = zipfile.ZipInfo(f"{key}.npy")
            entry.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(entry, "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asanyarray(values))


# -- one shard --------------------------------------------------------------------------------------------------------


def roll(shard: Shard, progress: Callable[[int], object] = lambda n: None) -> dict[str, np.ndarray]:
    """The rows of its episodes, T + 1 each: state, action, and MuJoCo's positions and velocities before the action."""
    env = make_maze(shard.name.environment, terminate_at_goal=False, max_episode_steps=shard.length + 1)
    move = walk() if shard.name.body == "antmaze" else lambda state, direction: direction
    rows = []
    for child in shard.seeds:
        seed = int(child.generate_state(1)[0])
        with seeded(env, seed):
            rows += _episode(env, move, shard.name, shard.length, seed)
        progress(shard.length + 1)
    env.close()
    keys = ("observations", "actions", "qpos", "qvel")
    return {key: np.array(column, np.float32) for key, column in zip(keys, zip(*rows))}


def walk() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """The shipped policy's mean, as (state (29,), direction (2,)) -> action (8,)."""
    from d4rl_utils.generate.behavior_policy import Policy

    with np.load(WALKER) as file:
        policy = Policy({k: v for k, v in file.items() if k != "made"})
    still = np.zeros((1, DIMS["antmaze"][1]), np.float32)
    return lambda state, direction: policy(np.concatenate([state[2:], direction])[None].astype(np.float32), still)[0]


def _episode(env, move: Callable, name: Name, length: int, seed: int) -> list[tuple]:
    """One episode of the controller; draws from NumPy's global generator, as the environment does."""
    maze, explores = env.unwrapped, name.kind == "explore"
    free, vertices = cells(maze.maze_map)

    def pick(among: list) -> tuple:
        return among[np.random.randint(len(among))]

    start = pick(free)
    goal = pick(vertices)
    if name.kind == "stitch":
        _, steps_to = maze.get_oracle_subgoal(maze.ij_to_xy(start), maze.ij_to_xy(start))
        goal = pick([c for c in free if steps_to[c] == NEAR] or [start])
    state, _ = env.reset(seed=seed, options={"task_info": {"init_ij": start, "goal_ij": goal}})
    noise, rows, ways = EXPLORING if explores else NOISE[name.body], [], {}
    for t in range(length + 1):
        if not explores:
            place = maze.get_xy()
            leg = maze.xy_to_ij(place), maze.xy_to_ij(maze.cur_goal_xy)
            if leg not in ways:
                ways[leg], _ = maze.get_oracle_subgoal(place, maze.cur_goal_xy)
            heading = ways[leg] - place
        elif t % HOLD == 0:
            heading = np.random.randn(2)
        direction = heading / (np.linalg.norm(heading) + 1e-6)
        action = move(state, direction)
        action = np.clip(action + np.random.normal(0, noise, action.shape), -1, 1).astype(np.float32)
        after, _, _, _, info = env.step(action)
        rows.append((state, action, info["prev_qpos"], info["prev_qvel"]))
        if name.kind == "navigate" and info["success"]:
            maze.set_goal(goal_ij=pick(vertices))
        state = after
    return rows


def cells(maze_map: np.ndarray) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The free cells of a maze, and those among them where a way turns, forks or ends: no straight pieces."""
    free = [tuple(c) for c in np.argwhere(maze_map == 0).tolist()]
    vertices = []
    for i, j in free:
        up, down, left, right = (maze_map[i - 1, j], maze_map[i + 1, j], maze_map[i, j - 1], maze_map[i, j + 1])
        straight = (up, down, left, right) in ((0, 0, 1, 1), (1, 1, 0, 0))
        if not straight:
            vertices.append((i, j))
    return free, vertices
