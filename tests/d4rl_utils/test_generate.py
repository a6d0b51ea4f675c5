"""Local data: what is rolled, that it does not depend on who rolled it, and that nothing half-made looks whole."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import h5py
import numpy as np
import pytest
from conftest import ROOT

from common import parallel
from d4rl_utils import ENVS, read_hdf5
from d4rl_utils.environment import make_env
from d4rl_utils.generate import behavior_policy as behaviour
from d4rl_utils.generate import rollout as local
from d4rl_utils.generate.behavior_policy import Policy
from d4rl_utils.generate.rollout import LocalDataError, Shard, local_levels, local_names, make_local, roll
from d4rl_utils.names import DIMS, usual_transitions

pytest.importorskip("mujoco")


def weights(env, seed=0):
    """A small untrained actor."""
    rng, (states, actions) = np.random.default_rng(seed), DIMS[env]
    shapes = {"fc0": (8, states), "fc1": (8, 8), "last_fc": (actions, 8), "last_fc_log_std": (actions, 8)}
    return {
        f"{k}.{part}": rng.normal(size=s if part == "weight" else s[:1]).astype(np.float16)
        for k, s in shapes.items()
        for part in ("weight", "bias")
    }


RUNGS = 4


def ship_policies(folder, monkeypatch, levels=("medium", "expert"), env="hopper"):
    """Have the project ship these levels of one body, and nothing else, in `folder`."""
    folder.mkdir()
    for seed, level in enumerate(levels):
        arrays = weights(env, seed)
        if level == "ladder":
            rungs = [weights(env, 10 + snapshot) for snapshot in range(RUNGS)]
            arrays = {k: np.stack([snapshot[k] for snapshot in rungs]) for k in arrays}
        np.savez(folder / f"{env}-{level}.npz", **arrays)
    (folder / "manifest.json").write_text(json.dumps({f"{env}-{level}": {} for level in levels}))
    monkeypatch.setattr(behaviour, "MANIFEST", folder / "manifest.json")
    return folder


@pytest.fixture
def policies(tmp_path, monkeypatch):
    return ship_policies(tmp_path / "policies", monkeypatch)


def shard(env="hopper", policy=None, transitions=900, seed=0):
    return Shard(env, policy, 0, transitions, np.random.SeedSequence(seed))


@pytest.mark.parametrize("env", ENVS)
def test_a_shard_is_what_the_environment_does(env):
    """Every row of the recording, replayed in Gymnasium from its own reset, gives the same successor and reward."""
    columns = roll(shard(env, transitions=700))
    assert all(len(v) == 700 for v in columns.values())
    states, follows = columns["observations"], columns["next_observations"]
    ends = columns["terminals"] | columns["timeouts"]
    assert ends[-1] and not (columns["terminals"] & columns["timeouts"]).any()
    np.testing.assert_array_equal(follows[:-1][~ends[:-1]], states[1:][~ends[:-1]])
    assert columns["rewards"].dtype == states.dtype == columns["actions"].dtype == np.float32
    world = make_env(env).unwrapped
    seed = np.random.default_rng(np.random.SeedSequence(0)).integers(2**31, size=local.LANES)[0]
    np.testing.assert_array_equal(world.reset(seed=int(seed))[0].astype(np.float32), states[0])
    for row in range(np.flatnonzero(ends)[0] + 1):  # the first lane's first episode
        state, reward, terminal, _, _ = world.step(columns["actions"][row].astype(np.float64))
        np.testing.assert_array_equal(state.astype(np.float32), follows[row])
        assert (np.float32(reward), terminal) == (columns["rewards"][row], columns["terminals"][row])


def test_random_is_tanh_of_normal_noise():
    noise = np.arctanh(roll(shard("halfcheetah", transitions=3000))["actions"].astype(np.float64))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03


def test_the_policy_acts_on_the_recorded_states(policies):
    medium, expert = (Policy(np.load(policies / f"hopper-{level}.npz")) for level in ("medium", "expert"))
    columns = roll(shard(policy=medium, transitions=200))
    low, high = (medium(columns["observations"], np.full((200, 3), z, np.float32)) for z in (-6, 6))
    assert (low <= columns["actions"]).all() and (columns["actions"] <= high).all()
    assert not np.array_equal(columns["actions"], roll(shard(policy=expert))["actions"][:200])


@pytest.mark.parametrize("transitions", [1, 5, 16, 17, 333])
def test_a_shard_has_its_exact_size(transitions):
    columns = roll(shard(transitions=transitions))
    assert len(columns["rewards"]) == transitions and (columns["terminals"] | columns["timeouts"])[-1]


def test_episodes_end_by_time_after_1000_steps():
    columns = roll(shard("halfcheetah", transitions=2500))
    assert np.flatnonzero(columns["timeouts"]).tolist() == [999, 1999, 2499] and not columns["terminals"].any()


@pytest.mark.slow
def test_short_episodes_are_not_over_represented(monkeypatch):
    """With nearly as many lanes as episodes, the first to end would be 6 steps shorter than the mean of 21."""
    lengths = np.diff(np.flatnonzero(roll(shard(transitions=6000))["terminals"]), prepend=-1)
    monkeypatch.setattr(local, "LANES", 300)
    kept = np.diff(np.flatnonzero(roll(shard(transitions=3000, seed=1))["terminals"]), prepend=-1)
    assert abs(kept.mean() - lengths.mean()) < 3


def test_progress_adds_up_to_the_whole():
    seen = []
    roll(shard(transitions=700), seen.append)
    assert sum(seen) == 700 and len(seen) > 1 and all(type(n) is int for n in seen)


def digest(path):
    with h5py.File(path) as f:
        return hashlib.sha256(b"".join(f[key][:].tobytes() for key in sorted(f))).hexdigest()


def test_the_file_depends_on_the_seed_and_not_on_the_workers(tmp_path, policies, monkeypatch, capsys):
    monkeypatch.setattr(local, "SHARD", 300)
    made = {
        (workers, seed): make_local("hopper", "medium", 1000, seed, workers, tmp_path / f"{workers}-{seed}")
        for workers, seed in [(1, 0), (3, 0), (1, 1)]
    }
    one, three, other = (digest(m.path) for m in made.values())
    assert one == three != other
    assert all(m.transitions_per_second > 0 for m in made.values())
    assert "transitions/s" in capsys.readouterr().out
    path = made[1, 0].path
    assert path.name == "hopper-medium-local-1000.hdf5" and not path.with_name(path.name + ".part").exists()
    with h5py.File(path) as f:
        facts = dict(f.attrs)
        assert (f["timeouts"][:] | f["terminals"][:])[[249, 499, 749, 999]].all()  # shards end at their exact size
        assert len(np.unique(f["observations"][:][[0, 250, 500, 750]], axis=0)) == 4  # and are not one another's copies
    assert (facts["name"], facts["env_id"], facts["seed"]) == ("hopper-medium-local", "Hopper-v4", 0)
    sha = hashlib.sha256((policies / "hopper-medium.npz").read_bytes()).hexdigest()
    assert json.loads(facts["policies"]) == {"medium": sha} and "mujoco" in json.loads(facts["versions"])
    t, identity = read_hdf5(path)
    assert (identity.name, identity.source, identity.transitions) == ("hopper-medium-local", "local", 1000)
    assert t.ends.sum() == identity.episodes


def test_what_is_there_is_kept_and_never_mistaken(tmp_path, policies):
    path = make_local("hopper", "random", 200, 0, 1, tmp_path).path
    before = path.stat().st_mtime_ns
    assert make_local("hopper", "random", 200, 0, 1, tmp_path) == (path, 0.0) and path.stat().st_mtime_ns == before
    with pytest.raises(LocalDataError, match="there already, with seed 0 instead of 5"):
        make_local("hopper", "random", 200, 5, 1, tmp_path)


def test_a_mixed_type_is_rolled_from_its_levels_in_equal_parts(policies, monkeypatch):
    monkeypatch.setattr(local, "SHARD", 40)
    shards = local._shards("hopper", ["medium", "expert"], 150, 0)
    assert [(s.policy, s.row, s.transitions) for s in shards] == [
        ("medium", 0, 37),
        ("medium", 37, 38),
        ("expert", 75, 37),
        ("expert", 112, 38),
    ]
    assert local_levels("hopper", "medium-expert") == ("medium", "expert")


def test_medium_replay_is_rolled_along_the_ladder(tmp_path, monkeypatch):
    ship_policies(tmp_path / "policies", monkeypatch, ("ladder",))
    assert local_levels("hopper", "medium-replay") == ("ladder",) and "hopper-medium-replay" in local_names()
    path = make_local("hopper", "medium-replay", 402, workers=1, dataset_dir=tmp_path).path
    with h5py.File(path) as f:
        assert f.attrs["name"] == "hopper-medium-replay-local" and list(json.loads(f.attrs["policies"])) == ["ladder"]
        states, actions, ends = f["observations"][:], f["actions"][:], f["timeouts"][:]
    bounds = [402 * i // RUNGS for i in range(RUNGS + 1)]
    assert ends[[b - 1 for b in bounds[1:]]].all()  # every rung's part ends an episode
    for policy, begin, end in zip(behaviour.policy_snapshots("hopper"), bounds, bounds[1:]):  # each on its own rows
        low, high = (policy(states[begin:end], np.full((end - begin, 3), z, np.float32)) for z in (-6, 6))
        near = 1e-5  # a saturated tanh is rounded as the batch's size has it
        assert (low - near <= actions[begin:end]).all() and (actions[begin:end] <= high + near).all()


def test_sizes_are_d4rls_unless_told(tmp_path, monkeypatch):
    ship_policies(tmp_path / "policies", monkeypatch, ("ladder",))
    asked = []
    monkeypatch.setattr(local, "_make", lambda target, attributes, shards, workers: asked.append((target.name, shards)))
    for kind in ("medium-replay", "random"):
        make_local("hopper", kind, dataset_dir=tmp_path)
    assert [name for name, _ in asked] == ["hopper-medium-replay-local-402000.hdf5", "hopper-random-local-1000000.hdf5"]
    assert [sum(s.transitions for s in shards) for _, shards in asked] == [402_000, 1_000_000]
    assert usual_transitions("walker2d", "medium-replay") == usual_transitions("ant", "medium-replay") == 302_000
    assert usual_transitions("halfcheetah", "medium-replay") == 202_000


def test_what_cannot_be_made_is_answered_with_what_can(tmp_path, policies):
    assert local_names()[:4] == ["hopper-random", "hopper-medium", "hopper-medium-expert", "hopper-expert"]
    assert {"walker2d-random", "halfcheetah-random", "ant-random"} < set(local_names())
    for env, kind in [("walker2d", "medium"), ("hopper", "medium-replay"), ("ant", "medium-expert")]:
        with pytest.raises(LocalDataError, match=f"{env}-{kind}.*hopper-medium, .*d4rl_utils get {env}-{kind}"):
            make_local(env, kind, 100, dataset_dir=tmp_path)
    with pytest.raises(LocalDataError, match="hopper-medium of -1 transitions.*at least 1"):
        make_local("hopper", "medium", -1, dataset_dir=tmp_path)
    with pytest.raises(LocalDataError, match="hopper-medium-expert of 1 transitions.*at least 2"):
        make_local("hopper", "medium-expert", 1, dataset_dir=tmp_path)
    with pytest.raises(LocalDataError, match="by 0 workers: take at least 1"):
        make_local("hopper", "medium", 10, workers=0, dataset_dir=tmp_path)
    assert not list(tmp_path.glob("*.hdf5*"))


def test_shipped_policies_fit_their_bodies():
    for env in ENVS:
        for level in {level for kind in local.RECIPES for level in local_levels(env, kind)} - {"random"}:
            for policy in local._policies(env, level, behaviour.MANIFEST.with_name(f"{env}-{level}.npz")):
                assert policy.hidden[0][0].shape[0] == DIMS[env][0] and policy.mean[1].shape == DIMS[env][1:]


def test_a_disk_too_small_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(local.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="1000 bytes free; 500 transitions need .*--dataset_dir"):
        make_local("hopper", "random", 500, dataset_dir=tmp_path)


@pytest.mark.parametrize("foreign", [b"", b"no HDF5 file at all"])
def test_a_foreign_file_under_the_name_is_left_alone(tmp_path, foreign):
    path = tmp_path / "hopper-random-local-200.hdf5"
    path.write_bytes(foreign)
    with pytest.raises(LocalDataError, match="is there already and is no HDF5 file .*Remove it"):
        make_local("hopper", "random", 200, 0, 1, tmp_path)
    assert path.read_bytes() == foreign


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
@pytest.mark.parametrize("size", [10_000, 400_000])
def test_a_disk_that_fills_up_while_writing(tmp_path, size):
    """A limit on the size of files stands for the full disk: at the file's head, and in mid-data.

    The script has no guard round its last lines: workers do not import who started them.
    """
    code = f"""
import resource
from d4rl_utils.__main__ import main
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
raise SystemExit(main(["make", "hopper-random", "--transitions", "8000", "--dataset_dir", {str(tmp_path)!r}]))
"""
    (tmp_path / "small.py").write_text(code)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, tmp_path / "small.py"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "could not be written" in done.stderr and "Is the disk full?" in done.stderr
    assert not list(tmp_path.glob("*.hdf5*"))


def test_a_worker_that_dies_is_an_error_and_leaves_nothing(tmp_path, policies, capfd):
    np.savez(policies / "hopper-medium.npz", **weights("ant"))
    with pytest.raises(ChildProcessError, match="a worker died at the shard of row 0.*try fewer workers"):
        make_local("hopper", "medium", 500, workers=1, dataset_dir=tmp_path)
    assert not list(tmp_path.glob("*.hdf5*")) and "Traceback" in capfd.readouterr().err


def test_workers_start_with_one_blas_thread_and_deaf_to_ctrl_c(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    code = "import os, signal; print(os.environ['OMP_NUM_THREADS'], os.environ['OPENBLAS_NUM_THREADS'], end=' '); "
    code += "signal.raise_signal(signal.SIGINT); print('still here')"
    with pytest.raises(ZeroDivisionError), parallel.starting_workers():
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        raise ZeroDivisionError
    assert child.stdout.strip() == "1 1 still here"
    assert os.environ["OMP_NUM_THREADS"] == "7" and "OPENBLAS_NUM_THREADS" not in os.environ
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


def children_of(pid):
    """Processes whose parent is `pid`."""
    found = set()
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as f:
                if int(f.read().rpartition(")")[2].split()[1]) == pid:
                    found.add(int(entry))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return result


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize(
    "victim, signum",
    [
        ("parent", signal.SIGINT),
        ("parent", signal.SIGTERM),
        ("parent", signal.SIGKILL),
        ("worker", signal.SIGKILL),  # as a system short of memory does
    ],
)
def test_stopped_half_way_nothing_looks_whole_and_no_worker_stays(tmp_path, victim, signum):
    command = ["make", "hopper-random", "--transitions", "3000000", "--workers", "2", "--dataset_dir", str(tmp_path)]
    parent = subprocess.Popen(
        [sys.executable, "-m", "d4rl_utils", *command],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        workers = until(lambda: len(c := children_of(parent.pid)) >= 3 and c)  # one is multiprocessing's own tracker
        until(lambda: list(tmp_path.glob("*.part")))
        if victim == "worker":
            os.kill(max(workers), signum)  # the last one to be started; the first child is the tracker
        elif signum == signal.SIGINT:  # as a terminal does: to the whole group
            os.killpg(parent.pid, signum)
        else:
            parent.send_signal(signum)
        _, words = parent.communicate(timeout=20)
        until(lambda: not any(map(alive, workers)))
    finally:
        parent.kill()
    assert not list(tmp_path.glob("*.hdf5")) and parent.returncode != 0
    if signum == signal.SIGKILL and victim == "parent":  # what is left is not taken for a beginning
        (part,) = tmp_path.glob("*.part")
        small = local.local_file("hopper", "random", 200)
        part.rename(tmp_path / f"{small}.part")
        assert make_local("hopper", "random", 200, 0, 1, tmp_path).transitions_per_second > 0
        assert read_hdf5(tmp_path / small).identity.transitions == 200 and not list(tmp_path.glob("*.part"))
    if victim == "worker":
        assert "a worker died at the shard of row" in words and "Traceback" not in words and parent.returncode == 1
        assert not list(tmp_path.glob("*.part"))
    if signum == signal.SIGINT:
        assert "Traceback" not in words and "stopped" in words and not list(tmp_path.glob("*.part"))
