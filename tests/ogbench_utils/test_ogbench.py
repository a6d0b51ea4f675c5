"""OGBench: its file layout, segments and goals, its tasks, and local data that do not depend on who made them."""

import http.server
import json
import subprocess
import sys
import threading
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, starting, write_npz

import ogbench_utils
from common.download import DownloadError
from config import OPSOConfig
from ogbench_utils import DATASETS, datasets, make_local, make_task, read_npz, split_name
from ogbench_utils.__main__ import main
from ogbench_utils.generate import rollout as local
from ogbench_utils.goal_dataset import Goals, OfflineGoalDataset, OnlineGoalDataset

MAZE = "pointmaze-medium-navigate-v0"
MIX = Goals(0.2, 0.5, 1.0, 0.0, 0.9, 1.0)


def recorded(path, t=4, k=3, goals=MIX, name=MAZE, **more):
    return OfflineGoalDataset(read_npz(path, name).episodes, t, k, goals, "cpu", 0, **more)


# -- names and files -----------------------------------------------------------------------------


def test_names_are_ogbenchs_and_environments_have_no_word_for_the_data():
    assert split_name("antmaze-large-explore-v0").environment == "antmaze-large-v0"
    assert split_name("pointmaze-medium-navigate-local") == split_name("pointmaze-medium-navigate")
    for wrong in ("humanoidmaze-medium-explore-v0", "antmaze-giant-explore-v0", "antmaze-large-play-v0"):
        with pytest.raises(ValueError, match="OGBench has no maze data called"):
            split_name(wrong)
    with pytest.raises(ValueError, match="Did you mean antmaze-medium-navigate-v0"):
        split_name("antmaze-medium-navigat-v0")
    assert len([n for n in DATASETS if not n.startswith("pointmaze")]) == 10


def test_what_is_read_are_the_facts_of_the_layout(maze_file):
    """Episodes of T + 1 rows, `terminals` in the last: against OGBench's own loader where it is installed."""
    (states, actions, ends), identity = read_npz(maze_file, MAZE)
    raw = np.load(maze_file)
    assert np.array_equal(states, raw["observations"]) and np.array_equal(actions, raw["actions"])
    assert ends.tolist() == np.flatnonzero(raw["terminals"]).tolist()
    assert (identity.episodes, identity.transitions) == (len(ends), len(states) - len(ends))
    assert identity.source == "ogbench-custom" and identity.return_mean is None
    ogbench = pytest.importorskip("ogbench")
    theirs = ogbench.utils.load_dataset(str(maze_file))
    rows = np.setdiff1d(np.arange(len(states)), ends)
    assert np.array_equal(states[rows], theirs["observations"])
    assert np.array_equal(states[rows + 1], theirs["next_observations"])
    assert np.flatnonzero(theirs["terminals"]).tolist() == (ends - 1 - np.arange(len(ends))).tolist()
    compact = ogbench.utils.load_dataset(str(maze_file), compact_dataset=True)
    assert np.flatnonzero(compact["valids"] == 0).tolist() == ends.tolist()


def test_max_trajectories_gives_exactly_so_many_whole_episodes(maze_file):
    whole = read_npz(maze_file, MAZE).episodes
    for count in (1, 3):
        (states, actions, ends), identity = read_npz(maze_file, MAZE, count)
        assert identity.episodes == count == len(ends) and len(states) == whole.ends[count - 1] + 1 == len(actions)
        assert np.array_equal(ends, whole.ends[:count])
    with pytest.raises(ValueError, match="max_trajectories = 0"):
        read_npz(maze_file, MAZE, 0)


def test_a_file_is_mapped_and_its_cache_follows_it(tmp_path):
    path = write_npz(tmp_path / f"{MAZE}.npz", [5, 5])
    first = read_npz(path, MAZE)
    assert isinstance(first.episodes.states.base, np.memmap) or isinstance(first.episodes.states, np.memmap)
    assert first.identity.source == "ogbench" and first.identity.name == MAZE
    write_npz(path, [7, 7, 7])
    again = read_npz(path, MAZE)
    assert again.identity.episodes == 3 and again.identity.sha256 != first.identity.sha256
    assert len(list((tmp_path / ".cache").glob("*.npz-*"))) == 1  # the old one is gone
    (tmp_path / ".cache").joinpath(*next((tmp_path / ".cache").glob("*.npz-*")).parts[-1:], "actions.npy").write_bytes(
        b"\x93NUMPY"
    )
    assert read_npz(path, MAZE).identity == again.identity  # a torn cache is made anew


def test_what_is_no_data_of_the_maze_is_refused_in_words(tmp_path, maze_file):
    (tmp_path / "page.npz").write_text("<html>")
    torn = tmp_path / "torn.npz"
    torn.write_bytes(maze_file.read_bytes()[:3000])
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "ends.npz", observations=np.zeros((4, 2)), actions=np.zeros((4, 2)), terminals=[0, 1, 0, 0])
    rows = {"actions": np.zeros((4, 2)), "terminals": [0, 0, 0, 1]}
    np.savez(tmp_path / "words.npz", observations=np.full((4, 2), "a"), **rows)
    np.savez(tmp_path / "pickled.npz", observations=np.array([[None, 1]] * 4), **rows)
    np.savez(tmp_path / "nan.npz", **{**rows, "observations": np.full((4, 2), np.nan)})
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("observations.npy", b"")
        archive.getinfo("observations.npy").file_size = 10**10  # a claim: nobody unpacks it to see
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as archive:
        archive.writestr("observations.npy", "3.0 4.0")
    for file, words in (
        ("page.npz", "no whole .npz archive"),
        ("torn.npz", "no whole .npz archive"),
        ("other.npz", "not in OGBench's layout: it has no observations. It holds a.npy"),
        ("words.npz", "'observations' holds .*, not numbers"),
        ("pickled.npz", "damaged"),
        ("nan.npz", "'observations' holds NaN or infinity"),
        ("bomb.npz", "'observations' says that it holds .* GB"),
        ("text.npz", "'observations' is no NumPy array"),
        ("ends.npz", "`terminals` must be true in the last row"),
    ):
        with pytest.raises(ValueError, match=words):
            read_npz(tmp_path / file, MAZE)
    with pytest.raises(ValueError, match="antmaze has 29 state and 8 action dims"):
        read_npz(maze_file, "antmaze-medium-navigate-v0")
    with pytest.raises(FileNotFoundError, match="is not a file"):
        read_npz(tmp_path / "none.npz", MAZE)
    assert not list(tmp_path.glob(".cache/*.part"))


# -- segments and goals --------------------------------------------------------------------------


def test_segments_stay_in_their_episode_and_steps_ahead_stop_at_its_end(maze_file):
    data, t, k = recorded(maze_file), 4, 3
    b = starting(data, data.starts)  # every start there is
    ends = data.last[b.rows[:, :1]]
    assert (b.rows <= ends).all() and torch.equal(b.states, data.states[b.rows])
    real = b.mask.bool()
    assert torch.equal(real, b.rows[:, :t] < ends) and real[:, 0].all()
    assert torch.equal(b.rows.gather(1, b.k_step_idx)[real], torch.minimum(b.rows[:, :t] + k, ends)[real])
    moved = (b.states[:, 1 : t + 1] - b.states[:, :t])[real]
    assert torch.equal((moved != 0).any(-1), torch.ones(len(moved), dtype=torch.bool))  # a step is a step
    assert torch.equal(b.actions, data.actions[b.rows[:, :t]])


def test_goals_are_drawn_in_the_shares_that_were_asked_for(maze_file):
    data = recorded(maze_file, goals=MIX._replace(policy_trajectory=0.5))
    ids = {tuple(s): i for i, s in enumerate(data.states.tolist())}
    b = data.sample(4000)
    row = lambda goals: torch.tensor([ids[tuple(g)] for g in goals[:, 0].tolist()])  # noqa: E731
    here, last, goal = b.rows[:, 0], data.last[b.rows[:, 0]], row(b.value_goals)
    sure = 3 * (0.25 / 4000) ** 0.5
    future = b.future[:, 0] == 1
    assert abs(future.float().mean() - 0.7) < sure
    assert ((goal > here) & (goal <= last))[future].all()  # a goal ahead never passes the episode's end
    room = last - here >= 12
    leap = (goal - here)[future & room]
    # P(1) = 0.2 / 0.7 + 0.5 / 0.7 * (1 - gamma): the next state, or a geometric leap of one
    assert abs((leap == 1).float().mean() - (0.2 + 0.5 * 0.1) / 0.7) < 3 * (0.25 / len(leap)) ** 0.5
    policy = row(b.policy_goals)
    inside = (policy > here) & (policy <= last)
    by_luck = ((last - here).float() / len(data.valid_rows)).mean()
    assert abs(inside.float().mean() - (0.5 + 0.5 * by_luck)) < sure


def test_the_policys_goals_are_near_in_the_share_asked_for_and_no_proposal_lies_behind_one(maze_file):
    k = 3
    near, far = (recorded(maze_file, k=k, goals=MIX._replace(near=share)) for share in (1.0, 0.0))
    ids = {tuple(s): i for i, s in enumerate(near.states.tolist())}
    means = []
    for data in (near, far):
        b = data.sample(4000)
        real, here = b.mask.bool(), b.rows[:, :4]
        goal = torch.tensor([ids[tuple(g)] for g in b.policy_goals.flatten(0, 1).tolist()]).view(here.shape)
        subgoal_idx = b.rows.gather(1, b.subgoal_idx)
        wanted = torch.minimum(torch.minimum(here + k, data.last[here]), goal)
        assert torch.equal(subgoal_idx[real], wanted[real]) and (goal > here)[real].all()
        room = real & (data.last[here] - here >= 12)
        means.append(((goal - here)[room] == 1).float().mean().item())
    assert abs(means[0] - 0.1) < 0.02 and means[1] < 1 / 12  # Geometric(1 - 0.9); uniform over 12 and more
    anywhere = recorded(maze_file, goals=MIX._replace(policy_trajectory=0.0)).sample(100)
    assert torch.equal(anywhere.subgoal_idx, anywhere.k_step_idx)


def test_success_is_a_matter_of_place_and_nothing_else(tmp_path):
    path = write_npz(tmp_path / "ant.npz", [30] * 4, 29, 8)
    data = recorded(path, goals=MIX._replace(tolerance=0.5), name="antmaze-medium-navigate-v0")
    b = data.sample(500)
    distance = np.linalg.norm(b.states[:, 1:5, :2].numpy() - b.value_goals[..., :2].numpy(), axis=-1)
    assert np.array_equal(b.success.numpy() == 1, distance <= 0.5) and 0 < b.success.mean() < 1


def test_a_share_of_episodes_shows_its_actions_and_always_the_same_ones(maze_file):
    data = recorded(maze_file, labelled_fraction=0.5, label_seed=3)
    again = recorded(maze_file, labelled_fraction=0.5, label_seed=3)
    by_episode = {int(e): set(data.has_actions[data.last == e].tolist()) for e in data.last.unique()}
    assert torch.equal(data.has_actions, again.has_actions) and all(len(v) == 1 for v in by_episode.values())
    assert sum(v == {1.0} for v in by_episode.values()) == round(0.5 * len(by_episode))
    assert set(recorded(maze_file, labelled_fraction=0.0).has_actions.tolist()) == {0.0}


def test_own_episodes_are_kept_whole_and_the_oldest_go_first():
    from common.rollout import Step

    own, n = OnlineGoalDataset(30, 2, 2, 1, 3, 2, MIX, "cpu", 0), 2
    count = 0.0
    for t in range(40):
        over = torch.tensor([(t + 1) % 5 == 0, (t + 1) % 8 == 0])
        now = torch.tensor([[t, 0.0], [t, 1.0]])
        own.add(Step(now, torch.full((n, 1), count), torch.zeros(n), now + torch.tensor([1.0, 0]), over, ~over & False))
        count += 1
    assert own.episodes == 8 + 5
    b = starting(own, own.starts)
    real = b.mask.bool()
    step = (b.states[:, 1:4] - b.states[:, :3])[real]
    assert torch.equal(step, torch.tensor([[1.0, 0.0]]).expand_as(step))  # of one episode, in order
    assert torch.equal(b.actions[real][:, 0], b.states[:, :3][real][:, 0])  # an action beside its state
    assert own.valid_rows.max() < 30 and b.states[..., 0].min() >= 20  # what is old is gone
    twin = OnlineGoalDataset(30, 2, 2, 1, 3, 2, MIX, "cpu", 1)
    twin.load_state_dict(own.state_dict())
    for mine, theirs in zip(own.sample(16), twin.sample(16)):
        assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="does not fit in buffer_size = 30"):
        own.keep(torch.zeros(31, 2), torch.zeros(30, 1))


# -- local data and downloads --------------------------------------------------------------------


def test_local_data_depend_on_the_seed_and_not_on_the_workers(tmp_path):
    pytest.importorskip("ogbench")
    paths = [
        make_local("pointmaze-medium-navigate", 12, seed, workers, tmp_path / str(i), length=30)
        for i, (seed, workers) in enumerate([(0, 1), (0, 2), (1, 1)])
    ]
    one, two, other = (p.read_bytes() for p in paths)
    assert one == two != other
    val = paths[0].with_name(f"{paths[0].stem}-val.npz")
    raw, identity = np.load(paths[0]), read_npz(paths[0], MAZE).identity
    assert len(np.load(val)["observations"]) == 31 and raw["observations"].shape == (12 * 31, 2)
    assert (identity.name, identity.source) == ("pointmaze-medium-navigate-local", "ogbench-local")
    assert np.abs(raw["actions"]).max() <= 1 and np.array_equal(raw["qpos"], raw["observations"])
    free = ~raw["terminals"][:-1]
    moved = np.diff(raw["observations"], axis=0)[free] - 0.2 * raw["actions"][:-1][free]
    assert (np.abs(moved).max(1) < 0.02).mean() > 0.9  # away from walls s' = s + 0.2 a
    assert make_local("pointmaze-medium-navigate", 12, 0, 1, tmp_path / "0", length=30) == paths[0]  # left as it is
    with pytest.raises(ValueError, match="is there already, with seed 0 instead of 5"):
        make_local("pointmaze-medium-navigate", 12, 5, 1, tmp_path / "0", length=30)


def test_stitch_goals_are_near_and_cells_that_turn_are_known():
    pytest.importorskip("ogbench")
    env = ogbench_utils.make_maze("pointmaze-medium-v0", terminate_at_goal=False, max_episode_steps=5)
    free, vertices = local.cells(env.unwrapped.maze_map)
    assert (len(free), len(vertices)) == (26, 21)
    shard = local.Shard(split_name("pointmaze-medium-stitch"), 8, 0, np.random.SeedSequence(0).spawn(2))
    rows = local.roll(shard)
    assert {k: v.shape for k, v in rows.items()} == dict.fromkeys(("observations", "actions", "qpos", "qvel"), (18, 2))
    env.close()


@pytest.mark.parametrize("kind", ["navigate", "explore"])
def test_ants_data_are_in_ogbenchs_layout_and_repeat_themselves(kind, tmp_path, monkeypatch):
    pytest.importorskip("ogbench")
    name = f"antmaze-medium-{kind}"
    path, again = (make_local(name, 2, 0, workers, tmp_path / str(workers), length=60) for workers in (1, 2))
    raw, (episodes, identity) = np.load(path), read_npz(path, f"{name}-v0")
    assert {k: raw[k].shape for k in ("observations", "actions", "qpos", "qvel", "terminals")} == {
        "observations": (122, 29),
        "actions": (122, 8),
        "qpos": (122, 15),
        "qvel": (122, 14),
        "terminals": (122,),
    }
    assert np.array_equal(raw["observations"], np.concatenate([raw["qpos"], raw["qvel"]], 1))
    assert (identity.name, identity.source, len(episodes.ends)) == (f"{name}-local", "ogbench-local", 2)
    assert path.read_bytes() == again.read_bytes()
    monkeypatch.setattr(local, "sha256_of", lambda path: "another")
    with pytest.raises(ValueError, match="is there already, with walker .* instead of another"):
        make_local(name, 2, 0, 1, tmp_path / "1", length=60)
    clipped = (np.abs(raw["actions"]) == 1).mean()
    assert clipped > 0.3 if kind == "explore" else clipped < 0.3  # its noise is five times as strong


def test_what_cannot_be_made_says_so_in_words(tmp_path, capsys):
    assert main(["make", "humanoidmaze-medium-navigate", "--dataset_dir", str(tmp_path)]) == 1
    said = capsys.readouterr().err
    assert "walks by a trained policy" in said and "antmaze-medium-navigate-v0" in said and "get humanoid" in said
    assert main(["make", "antmaze-mediun-navigate"]) == 1 and "Did you mean" in capsys.readouterr().err
    assert main(["list", "--dataset_dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in DATASETS) and said.count("can be made") == 11


def test_info_says_what_is_in_a_file(maze_file, capsys):
    assert main(["info", str(maze_file), "--env", MAZE]) == 0
    assert "episodes     6, of 11 to 16 transitions" in capsys.readouterr().out
    assert main(["info", "nothing.npz"]) == 1 and "nothing" in capsys.readouterr().err


def test_a_download_is_whole_or_not_there_and_local_data_stand_in(tmp_path, monkeypatch, capsys):
    body = write_npz(tmp_path / "source.npz", [9] * 3).read_bytes()
    sent = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            begin = int((self.headers["Range"] or "bytes=0-")[6:-1])
            sent.append((self.path, begin))
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(body) - begin))
            self.end_headers()
            self.wfile.write(body[begin : begin + 500] if len(sent) == 1 else body[begin:])

        def log_message(self, *args):
            pass

    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datasets, "SERVERS", (f"http://127.0.0.1:{web.server_port}/",))
    path = datasets.download(MAZE, tmp_path / "in", backoff=lambda failures: 0)
    assert path.read_bytes() == body and sent == [(f"/{MAZE}.npz", 0), (f"/{MAZE}.npz", 500)]
    assert read_npz(path, MAZE).identity.source == "ogbench"
    web.shutdown()
    web.server_close()

    cfg = OPSOConfig(dataset=MAZE, dataset_dir=str(tmp_path / "none"), data="ogbench")
    with pytest.raises(DownloadError, match="--data local"):
        datasets.open_data(cfg)
    made = []
    monkeypatch.setattr(datasets, "make_local", lambda name, n, dataset_dir: made.append((name, n)) or path)
    cfg = OPSOConfig(dataset="pointmaze-medium-navigate", dataset_dir=str(tmp_path / "none"), max_trajectories=2)
    assert datasets.open_data(cfg).identity.episodes == 2 and made == [(MAZE, 2)]
    assert "LOCAL DATA" in capsys.readouterr().err


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"dataset": MAZE, "data": "local"}, "contradict each other"),
        ({"dataset": "pointmaze-medium-navigate-local", "data": "ogbench"}, "contradict each other"),
        ({"dataset": "mine.npz"}, "say what it is like with --env"),
        ({"dataset": MAZE, "env": "antmaze-medium-navigate-v0"}, "contradicts --dataset"),
        ({"dataset": "maze"}, "OGBench has no maze data"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        datasets.open_data(OPSOConfig(**settings, dataset_dir=str(tmp_path)))


def test_a_missing_package_is_named_with_the_command_to_run():
    code = """
import sys
sys.modules["ogbench"] = None
from ogbench_utils import make_task
try:
    make_task("pointmaze-medium-v0", "task1")
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "pip install ogbench" in done.stdout, done.stderr


# -- the tasks -----------------------------------------------------------------------------------


def test_a_task_follows_from_its_seed_and_leaves_numpys_generator_alone():
    pytest.importorskip("ogbench")
    env = make_task("pointmaze-medium-v0", "task3")
    np.random.seed(7)
    before = json.dumps(np.random.get_state()[1].tolist())
    first, again, other = (env.reset(seed=seed) for seed in (5, 5, 6))
    assert json.dumps(np.random.get_state()[1].tolist()) == before
    assert np.array_equal(first[0], again[0]) and np.array_equal(first[1]["goal"], again[1]["goal"])
    assert not np.array_equal(first[0], other[0]) and first[1]["goal"].shape == (2,)
    assert np.abs(first[0] - [8, 16]).max() <= 1 and np.abs(first[1]["goal"] - [4, 12]).max() < 1.5
    env.close()


def test_an_oracle_reaches_every_goal_and_chance_none():
    """Steering by OGBench's own map, then to the goal itself once in its cell."""
    pytest.importorskip("ogbench")
    for oracle in (True, False):
        reached = []
        for task in ogbench_utils.TASKS:
            env = make_task("pointmaze-medium-v0", task)
            _, info = env.reset(seed=0)
            maze, goal, over = env.env.unwrapped, info["goal"], False
            env.env.action_space.seed(0)
            for _ in range(1000 if oracle else 200):
                place = maze.get_xy()
                same = maze.xy_to_ij(place) == maze.xy_to_ij(goal)
                way = (goal if same else maze.get_oracle_subgoal(place, goal)[0]) - place
                action = np.clip(way / (np.linalg.norm(way) + 1e-6), -1, 1) if oracle else env.env.action_space.sample()
                _, reward, over, cut, info = env.step(action.astype(np.float32))
                if over or cut:
                    break
            reached.append(bool(over and info["success"] and reward == 1))
            env.close()
        assert reached == [oracle] * 5
