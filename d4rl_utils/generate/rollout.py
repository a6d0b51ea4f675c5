"""Local data: files in D4RL's layout, rolled out on this machine, for where D4RL's cannot be downloaded.

`random` acts with tanh of standard normal noise, which is what an untrained tanh-Gaussian actor does. The other levels
come from behaviour policies that the project ships in `policies/`; a type is available when the policies of its levels
are. D4RL's `medium-replay` is all that a training saw up to its medium policy; here it is rolled from the ladder, the
policies of one training at equal distances up to medium, in that order.

A file is made of shards of at most 31,250 transitions, each rolled from its own child of the seed, so its content does
not depend on how many processes worked on it. A shard keeps its episodes in the order in which they were *started*, as
if one environment had run them one after another (in the order of ending, short ones would be over-represented), and is
cut at its exact size: its last row gets a timeout.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np

from common.files import file_lock, sha256_of
from common.parallel import cores, run_jobs
from d4rl_utils.environment import IDS, MAX_EPISODE_STEPS
from d4rl_utils.generate import behavior_policy as behaviour
from d4rl_utils.generate.behavior_policy import Policy
from d4rl_utils.generate.vector_env import BatchedMujoco
from d4rl_utils.names import DIMS, ENVS, MADE_BY, check_name, usual_transitions

# a dataset type -> the levels it consists of, in equal parts. A level is `random`, a policy `<env>-<level>.npz`, or
# `ladder`, whose policies make equal parts one after another.
RECIPES = {
    "random": ("random",),
    "medium": ("medium",),
    "medium-replay": ("ladder",),
    "medium-expert": ("medium", "expert"),
    "expert": ("expert",),
}

SHARD = 31_250  # transitions
LANES = 16  # environments that one process steps side by side, for one call of the policy a tick


class LocalDataError(ValueError):
    """Local data that cannot be made; the message lists what can."""


class Generated(NamedTuple):
    """A file of local data, and how fast it was made (0 if it was there)."""

    path: Path
    transitions_per_second: float


class Shard(NamedTuple):
    """One piece of work: `row` is its place in the file; policy None is `random`."""

    env: str
    policy: Policy | None
    row: int
    transitions: int
    seed: np.random.SeedSequence


def local_file(env: str, dataset_type: str, transitions: int) -> str:
    """The base name of a local file."""
    return f"{env}-{dataset_type}-local-{transitions}.hdf5"


def local_levels(env: str, dataset_type: str) -> tuple[str, ...]:
    """The levels that make up this type, or () if it cannot be made here."""
    shipped = json.loads(behaviour.MANIFEST.read_text()) if behaviour.MANIFEST.exists() else {}
    levels = RECIPES.get(dataset_type, ())
    return levels if all(level == "random" or f"{env}-{level}" in shipped for level in levels) else ()


def local_names() -> list[str]:
    """All that can be made here, e.g. `hopper-medium`."""
    return [f"{env}-{kind}" for env in ENVS for kind in RECIPES if local_levels(env, kind)]


def make_local(
    env: str,
    dataset_type: str,
    transitions: int = 0,
    seed: int = 0,
    workers: int | None = None,
    dataset_dir: str | Path = "./datasets",
) -> Generated:
    """Roll out `transitions` of a body and a type into `dataset_dir`, with `workers` processes (default: one a core).

    transitions: 0 means `usual_transitions`, 1M or, for medium-replay, as many as D4RL's.
    A file that was made with the same seed and policies is left as it is. Raises LocalDataError for what cannot be made
    or is in the way, OSError if the disk is too small, ChildProcessError (an OSError too) if a worker dies.
    """
    name = check_name(env, dataset_type)
    transitions = transitions or usual_transitions(env, dataset_type)
    levels = local_levels(env, dataset_type)
    if not levels:
        raise LocalDataError(
            f"no behaviour policy for {name} is shipped, so it cannot be made on this machine. "
            f"Local data exist for: {', '.join(local_names())}. The real {name}-v2: python -m d4rl_utils get {name}"
        )
    if workers is not None and workers < 1:
        raise LocalDataError(f"nothing can be rolled by {workers} workers: take at least 1.")
    files = {level: behaviour.MANIFEST.with_name(f"{env}-{level}.npz") for level in levels}
    policies = [policy for level in levels for policy in _policies(env, level, files[level])]
    if transitions < len(policies):
        raise LocalDataError(f"{name} of {transitions} transitions is out of range: take at least {len(policies)}.")
    attributes = {
        "name": f"{name}-local",
        "made_by": MADE_BY,
        "env_id": f"{IDS[env]}-v4",
        "seed": seed,
        "transitions": transitions,
        "policies": json.dumps(
            {level: "tanh(normal)" if level == "random" else sha256_of(file) for level, file in files.items()}
        ),
        "versions": json.dumps({p: version(p) for p in ("gymnasium", "mujoco", "numpy")}),
    }
    target = Path(dataset_dir) / local_file(env, dataset_type, transitions)
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_lock(target):
        if target.exists():
            _check_same(target, attributes)
            print(f"{target} is there already, made with the same seed and policies")
            return Generated(target, 0.0)
        return _make(target, attributes, _shards(env, policies, transitions, seed), workers)


def _check_same(target: Path, attributes: dict) -> None:
    import h5py

    advice = "Remove it, or choose another number of transitions or another --dataset_dir."
    try:
        with h5py.File(target, "r") as file:
            theirs = dict(file.attrs)
    except OSError as error:
        raise LocalDataError(f"{target} is there already and is no HDF5 file ({error}). {advice}") from error
    for key in ("name", "seed", "policies"):
        if theirs.get(key) != attributes[key]:
            raise LocalDataError(
                f"{target} is there already, with {key} {theirs.get(key)} instead of {attributes[key]}. {advice}"
            )


def _policies(env: str, level: str, file: Path) -> list[Policy | None]:
    """What acts at a level: one policy, the ladder's one after another, or None for `random`."""
    if level == "ladder":
        return behaviour.policy_snapshots(env)
    return [None if level == "random" else Policy(np.load(file))]


def _shards(env: str, policies: list[Policy | None], transitions: int, seed: int) -> list[Shard]:
    """Equal parts for the policies, each in equal pieces of at most SHARD."""
    pieces = []
    for policy, (begin, size) in zip(policies, _parts(transitions, len(policies))):
        pieces += [(policy, begin + row, n) for row, n in _parts(size, -(-size // SHARD))]
    children = np.random.SeedSequence(seed).spawn(len(pieces))
    return [Shard(env, *piece, child) for piece, child in zip(pieces, children)]


def _parts(n: int, k: int) -> list[tuple[int, int]]:
    """(first, size) of k parts of n things, equal but for one."""
    bounds = [n * i // k for i in range(k + 1)]
    return [(a, b - a) for a, b in zip(bounds, bounds[1:])]


def _make(target: Path, attributes: dict, shards: list[Shard], workers: int | None) -> Generated:
    """Roll the shards and put each in its place of a file that gets its name when it is whole."""
    import h5py
    from tqdm import tqdm

    n, (state_dim, action_dim) = attributes["transitions"], DIMS[shards[0].env]
    needed, free = n * (2 * state_dim + action_dim + 2) * 4, shutil.disk_usage(target.parent).free
    if needed > free:
        raise OSError(
            f"{target.parent} has {free} bytes free; {n} transitions need {needed}. Choose another --dataset_dir."
        )
    workers = min(workers or cores(), len(shards))
    part, began, rewards = target.with_name(target.name + ".part"), time.perf_counter(), 0.0
    try:
        with _said_plainly(part), h5py.File(part, "w") as file:
            for key, shape, dtype in _columns(state_dim, action_dim):
                file.create_dataset(key, (n, *shape), dtype)
            with (
                tqdm(total=n, desc=attributes["name"], unit_scale=True, disable=None) as bar,
                closing(run_jobs(roll, shards, workers, bar.update, _words)) as finished,
            ):
                for shard, columns in finished:
                    for key, values in columns.items():
                        file[key][shard.row : shard.row + shard.transitions] = values
                    rewards += float(columns["rewards"].sum(dtype=np.float64))
            file.attrs.update(attributes)
        with open(part, "rb+") as f:
            os.fsync(f.fileno())  # a power cut must not leave the name on an empty file
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
    rate = n / (time.perf_counter() - began)
    print(
        f"{target}: {n:,} transitions, mean reward {rewards / n:.3f}; {rate:,.0f} transitions/s with {workers} workers"
    )
    return Generated(target, rate)


@contextmanager
def _said_plainly(part: Path) -> Iterator[None]:
    """HDF5 wraps the system's reason for a failed write in its own words; say what to do about it."""
    try:
        yield
    except ChildProcessError:
        raise
    except (OSError, RuntimeError) as error:  # h5py raises RuntimeError when it fails to close a file
        raise OSError(
            f"{part} could not be written ({error}). Is the disk full? Make room, or choose another --dataset_dir; "
            "nothing half-made is left."
        ) from error


def _words(shard: Shard) -> str:
    return f"the shard of row {shard.row}"


def _columns(state_dim: int, action_dim: int) -> list[tuple[str, tuple[int, ...], type]]:
    return [
        ("observations", (state_dim,), np.float32),
        ("actions", (action_dim,), np.float32),
        ("rewards", (), np.float32),
        ("next_observations", (state_dim,), np.float32),
        ("terminals", (), np.bool_),
        ("timeouts", (), np.bool_),
    ]


# -- one shard --------------------------------------------------------------------------------------------------------


def roll(shard: Shard, progress: Callable[[int], object] = lambda n: None) -> dict[str, np.ndarray]:
    """The columns of D4RL's layout, `shard.transitions` rows each. progress(n): n more rows are sure."""
    steps, lanes = shard.transitions, min(LANES, shard.transitions)
    state_dim, action_dim = DIMS[shard.env]
    policy = shard.policy or (lambda states, noise: np.tanh(noise))
    rng = np.random.default_rng(shard.seed)
    envs = BatchedMujoco(shard.env, rng.integers(2**31, size=lanes))

    # what happened, by tick and lane; all lanes are busy until `steps` have been made, then at most one episode follows
    ticks = steps // lanes + 1 + MAX_EPISODE_STEPS
    record = {key: np.zeros((ticks, lanes, *shape), dtype) for key, shape, dtype in _columns(state_dim, action_dim)}
    # episodes in the order of their start
    began, length, lane_of = [0] * lanes, np.zeros(steps + lanes, np.int64), list(range(lanes))
    live, episode = np.arange(lanes), np.arange(lanes)  # busy lanes, and the episode that each lane is in

    t = taken = reported = 0
    while len(live):
        state = envs.states[live]
        action = policy(state, rng.standard_normal((len(live), action_dim), np.float32))
        reward, terminal = envs.step(live, action)
        length[episode[live]] += 1
        taken += len(live)
        over = terminal | (length[episode[live]] == MAX_EPISODE_STEPS)
        for key, now in zip(record, (state, action, reward, envs.states[live], terminal, over & ~terminal)):
            record[key][t, live] = now
        t += 1
        if over.any():
            if taken < steps:
                for lane in live[over].tolist():
                    envs.reset(lane)
                    episode[lane] = len(began)
                    began.append(t)
                    lane_of.append(lane)
            else:
                live = live[~over]
        if taken >= steps:  # go on with episodes that lie before the cut only; as lengths grow, the others never will
            live = live[np.cumsum(length)[episode[live]] < steps]
        if t % 64 == 0 or not len(live):
            progress(min(taken, steps) - reported)
            reported = min(taken, steps)
    envs.close()

    length = length[: len(began)]
    within = np.arange(length.sum()) - np.repeat(np.cumsum(length) - length, length)
    rows = (np.repeat(began, length) + within) * lanes + np.repeat(lane_of, length)  # into (tick, lane), flattened
    columns = {key: values.reshape(-1, *values.shape[2:])[rows[:steps]] for key, values in record.items()}
    columns["timeouts"][-1] = not columns["terminals"][-1]
    return columns
