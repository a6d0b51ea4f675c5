"""One training: its folder, data, environment, log and checkpoints. None of the classes knows an algorithm.

Run         learns from recorded data
SeedsRun    several seeds of it in one process, a Run each
Follower    a further process of it under torchrun
OnlineRun   learns in environments
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from common import checkpoint as checkpoints
from common import device as devices
from common import distributed, evaluation, logger, plotting
from common.cuda_graph import draw_by_graph
from common.env_spec import EnvFault
from common.interface import Agent, EvalEnv, OnlineAgent
from common.meter import Meter, SeedMeter
from common.stacked import StackedAgents
from common.vector_env import Envs, EpisodeStats

# What a resumed run may be told anew: how far it goes, where it computes and lies, never what it learns.
RESUMABLE_FLAGS = ("num_epochs", "env_steps", "device", "threads", "output_dir", "dataset_dir", "tensorboard", "wandb")


class Run:
    """A training on recorded data.

    env, agent: what it is about. sampler, dataset: what it learns from; data: what is recorded of that, as a
    dictionary. scores: (update or step, score) of every evaluation. meter, log, folder: where its numbers go.
    """

    unit = "update"  # what its log counts in
    curves = "training_curves.png"

    def __init__(self, cfg, checkpoint: Path | None = None, first: "Run | None" = None):
        """checkpoint: continue it, exactly, in its own folder; else start in a new one. first: a run whose data it
        learns from, too."""
        agent_class = checkpoints.agent_of(cfg.agent)
        self.cfg = cfg = cfg if checkpoint else agent_class.resolve_config(cfg)
        if cfg.wandb and not importlib.util.find_spec("wandb"):
            raise ValueError("--wandb needs the wandb package: pip install wandb")
        self.device = devices.pick_device(distributed.join(cfg.device))
        devices.keep_freed_memory()
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        devices.set_precision(cfg.precision, self.device)
        self.seeds = seeds_of(cfg.seed)
        self.env: EvalEnv = agent_class.make_eval_env(cfg)
        torch.manual_seed(self.seeds["init"])
        # what a new agent says about bad sizes comes before the data are opened
        self.agent = None if checkpoint else agent_class(cfg, self.env.spec, self.device)
        self.meter = Meter()
        self.scores: list[tuple[int, float]] = []
        self.eval_lines: list[tuple[str, str]] = []  # labels and words on the last evaluation
        self.data = self.open_data(agent_class, first)
        if checkpoint:
            self.folder, self.log = self.resume(checkpoint)
        else:
            self.folder, self.log = self.start_new()
            torch.manual_seed(self.seeds["noise"])

    @property
    def global_step(self) -> int:
        """Where the training is, in its unit."""
        return self.agent.updates

    @property
    def headline(self) -> str:
        """What the number of an evaluation is called."""
        return evaluation.headline_name(self.env, evaluation.source_of(self.data))

    @property
    def about(self) -> str:
        return f"on {self.dataset.name} ({self.dataset.transitions:,} transitions)"

    @property
    def origin(self) -> str:
        """What it learned from, for its last word."""
        text = f"data        {self.dataset.name}, {self.dataset.transitions:,} transitions"
        return text if self.behavior_score is None else f"{text}, mean {self.headline} {self.behavior_score:.1f}"

    def open_data(self, agent_class: type[Agent], first: "Run | None") -> dict:
        """What there is to learn from, in `sampler` and `dataset`; returns what is recorded of it."""
        if first:
            self.sampler, self.dataset = first.sampler, first.dataset
        else:
            self.sampler, self.dataset = agent_class.open_data(self.cfg, self.device, self.seeds["data"])
            if self.cfg.cuda_graphs:
                draw_by_graph(self.sampler)
        return asdict(self.dataset)

    @property
    def behavior_score(self) -> float | None:
        """Mean score of the recorded episodes; None of data without rewards."""
        mean = self.dataset.return_mean
        return self.env.score(mean) if mean is not None and self.env.score else mean

    def prepare(self) -> dict:
        """What comes before the first update; returns what the log's head says of it."""
        self.agent.fit_normalizer(self.sampler)
        levels = {"levels": self.agent.data_levels(self.sampler)}
        return levels if self.behavior_score is None else {**levels, "behavior_score": self.behavior_score}

    def start_new(self) -> tuple[Path, logger.Logger]:
        """A folder, and its log, which opens with what the run is."""
        cfg, more = self.cfg, self.prepare()
        folder = logger.new_folder(Path(cfg.output_dir) / folder_name(self.data["name"], cfg, f"s{cfg.seed}"))
        head = {"config": asdict(cfg), "data": self.data, "versions": devices.versions()}
        head |= {"machine": devices.machine(), "commit": devices.commit()}
        (folder / "config.json").write_text(json.dumps(head, indent=1) + "\n")
        log = self.open_log(folder)
        log(0, {**head, "score_name": self.headline, **more})
        return folder, log

    def open_log(self, folder: Path, after: int | None = None) -> logger.Logger:
        return logger.Logger(folder, self.cfg.tensorboard, self.cfg.wandb, after, self.unit)

    def resume(self, checkpoint: Path) -> tuple[Path, logger.Logger]:
        """The agent, the data order, the noise and the half-filled means, as they were; folder and log go on."""
        names = {f.name for f in fields(self.cfg)}
        changes = {k: getattr(self.cfg, k) for k in RESUMABLE_FLAGS if k != "device" and k in names}
        self.agent, ckpt = checkpoints.load(checkpoint, self.device, **changes)
        run = ckpt["run"]
        own = self.own_part(run)
        self.load_extra_state(run, own)
        self.meter.load_state_dict(own["meter"])
        self.scores = [tuple(x) for x in run["scores"]]
        log = self.open_log(checkpoint.parent, after=self.global_step)
        torch.set_rng_state(own["rng"])
        if own["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(own["cuda_rng"], self.device)
        return checkpoint.parent, log

    def load_extra_state(self, run: dict, own: dict) -> None:
        """What is learned from, where the checkpoint left it."""
        if run["data"]["sha256"] != self.data["sha256"]:
            raise ValueError(
                f"this run learned from {run['data']['name']} (SHA-256 {run['data']['sha256'][:12]}), but here "
                f"{self.data['name']} is {self.data['sha256'][:12]}: give the --dataset_dir that holds the first"
            )
        self.sampler.load_state_dict(own["sampler"])

    def own_part(self, run: dict) -> dict:
        """What is this process's in a checkpoint: data order, noise, half-filled means."""
        processes = run.get("processes", [run])
        if len(processes) != distributed.size():
            raise ValueError(
                f"this run has {len(processes)} processes, each with its own data order: resume last_checkpoint.pt by "
                + (f"torchrun --nproc_per_node {len(processes)}" if len(processes) > 1 else "python, without torchrun")
            )
        return processes[distributed.rank()]

    def extra_state(self, name: str) -> dict:
        """What `load_extra_state` will need, for the checkpoint `name`."""
        return {"sampler": self.sampler.state_dict()}

    def random_state(self) -> dict:
        """What the noise goes on from."""
        cuda = self.device.type == "cuda"
        return {"rng": torch.get_rng_state(), "cuda_rng": torch.cuda.get_rng_state(self.device) if cuda else None}

    def save(self, name: str = "last_checkpoint.pt") -> None:
        """A checkpoint; `outputs/best_checkpoint.pt` becomes this run's best, or its last if nothing was evaluated."""
        own = {**self.extra_state(name), "meter": self.meter.state_dict(), **self.random_state()}
        run = {"data": self.data, "scores": self.scores, **own}
        if distributed.size() > 1 and name == "last_checkpoint.pt":  # the best one is the first process's alone
            run["processes"] = distributed.gather(own)
        if distributed.rank():
            return
        if name == "last_checkpoint.pt":
            logger.keep_previous(self.folder / name)
        checkpoints.save(self.folder / name, self.agent, run)
        best = self.folder / "best_checkpoint.pt"
        logger.link_latest(best if best.exists() else self.folder / name, self.folder.parent / best.name)

    def update(self) -> None:
        """Draw a batch and learn from it."""
        self.meter.add(self.agent.update(self.sampler.sample(self.cfg.batch_size)), self.agent.updates)

    def log_means(self, rates: dict[str, float]) -> dict[str, float]:
        """A row of the log: the means of what was measured since the last one, and `rates`. Returns the means."""
        means = distributed.mean_metrics(self.meter.means(), self.device)
        self.log(self.agent.updates, {**means, **rates})
        return means

    def evaluate(self, episodes: int = 0) -> float:
        """Evaluate the agent as it is, draw the curves, keep it if it is the best so far. episodes 0: as configured"""
        cfg, env, episodes = self.cfg, self.env, episodes or self.cfg.num_eval_episodes
        with self.kept_from_faults():
            result = evaluation.evaluate(
                self.agent, env.make, episodes, cfg.eval_seed, outcome=env.outcome, tasks=env.tasks
            )
        return self.take_evaluation(result)

    @contextmanager
    def kept_from_faults(self) -> Iterator[None]:
        """What has been learned is saved if the environment of an evaluation breaks."""
        try:
            yield
        except EnvFault:
            self.save()
            raise

    def take_evaluation(self, result: evaluation.Episodes) -> float:
        """Log it, draw the curves, keep the agent if it is the best so far; its score."""
        row = evaluation.summary(result, self.env.score)
        self.log(self.global_step, row)
        score = evaluation.headline(row)
        best = not self.scores or score > max(s for _, s in self.scores)
        self.scores.append((self.global_step, score))
        self.eval_lines = evaluation.report_lines(result, self.env)
        if best:
            self.save("best_checkpoint.pt")
        self.draw()
        return score

    def draw(self) -> None:
        """The curves, out of the log."""
        unit = self.unit.replace("_", " ")
        title = f"{self.cfg.agent} on {self.data['name']}, seed {self.cfg.seed}, {self.global_step:,} {unit}s"
        with logger.atomic_write(self.folder / self.curves) as picture:
            plotting.draw_curves(logger.read_log(self.folder / "log.jsonl"), title, self.agent.panels, picture)

    def report(self) -> str:
        """The run's last word."""
        folder, name, unit, lines = self.folder, self.headline, self.unit.replace("_", " "), [self.origin]
        if self.scores:
            (at, last), (best_at, best) = self.scores[-1], max(self.scores, key=lambda x: x[1])
            lines.append(f"{name:<11} {last:.1f}  last, {unit} {at:,}, {self.episodes_at_last()} episodes")
            if len(self.scores) > 1:
                lines.append(
                    f"best        {best:.1f}  best of {len(self.scores)} evaluations (optimistic), {unit} {best_at:,}"
                )
            lines += [f"{label:<12}{text}" for label, text in self.eval_lines]
            if self.env.scale:
                lines.append(f"scale       {self.env.scale}")
            lines.append(f"curves      {folder / self.curves}")
        lines.append(f"checkpoint  {folder / 'last_checkpoint.pt'}")
        return "\n".join(lines)

    def episodes_at_last(self) -> int:
        return self.cfg.num_eval_episodes

    def describe(self) -> str:
        """What is trained, and where its traces go."""
        return f"{self.cfg.agent} {self.about}: {self.agent.describe()}\nfolder      {self.folder}"

    def last_good(self) -> Path:
        """What is left after an error."""
        return self.folder / "last_checkpoint.pt"

    def listen(self, callbacks: Sequence[Callable[[dict], None]]) -> None:
        """Each is called with every row of the log from now on."""
        self.log.callbacks += callbacks

    def close(self) -> None:
        self.log.close()


def seeds_of(seed: int) -> dict[str, int]:
    """The seeds of a run's random streams. All processes begin with the same weights, and then draw their own."""
    seeds = devices.spawn_seeds(seed, "init", "data", "noise", "env")
    return seeds | {name: seeds[name] + distributed.rank() for name in ("data", "noise")}


def folder_name(data: str, cfg, seeds: str) -> str:
    """A Minari name has slashes; a folder has none."""
    return f"{re.sub(r'[^a-zA-Z0-9_.-]', '-', data)}-{cfg.agent}-{seeds}-{datetime.now():%Y%m%d-%H%M%S}"


class Follower(Run):
    """What a further process under torchrun has of the run: all but its folder."""

    def start_new(self) -> tuple[None, logger.NoLog]:
        self.prepare()
        return None, logger.NoLog()

    def open_log(self, folder: Path, after: int | None = None) -> logger.NoLog:
        return logger.NoLog()

    def evaluate(self, episodes: int = 0) -> float:
        """The first process evaluates, the others wait for it in their next update."""
        return float("nan")

    def report(self) -> str:
        """The first process says it."""
        return ""


class SeedRun(Run):
    """One of the seeds that learn together: a run like any other, but that its updates are made by `SeedsRun`.

    data_rng, noise_rng: its streams in there, once they are made. saved_rng: where a checkpoint left them.
    """

    data_rng: torch.Generator
    noise_rng: torch.Generator
    saved_rng: tuple[torch.Tensor, torch.Tensor] | None = None

    def load_extra_state(self, run: dict, own: dict) -> None:
        super().load_extra_state(run, own)
        noise = own["cuda_rng"] if self.device.type == "cuda" else own["rng"]
        self.saved_rng = own["sampler"]["generator"], noise

    def extra_state(self, name: str) -> dict:
        return {"sampler": {"generator": self.data_rng.get_state()}}

    def random_state(self) -> dict:
        """In the single run's places: it draws its noise from the device's own stream."""
        noise = self.noise_rng.get_state()
        if self.device.type == "cuda":
            return {"rng": torch.get_rng_state(), "cuda_rng": noise}
        return {"rng": noise, "cuda_rng": None}


class SeedsRun:
    """Several seeds of a training in one process: a run and a folder each, one update for all of them.

    Each folder is that of a single run, which `--resume` can continue alone. The folder around them continues all.
    """

    def __init__(self, cfg, folder: Path | None = None):
        """folder: of an earlier one, to be continued."""
        checkpoint = sorted(folder.glob("*/last_checkpoint.pt")) if folder else [None] * cfg.num_seeds
        if not folder:
            env, data = cfg.dataset or f"{cfg.env}-{cfg.dataset_type}", f"s{cfg.seed}to{cfg.seed + cfg.num_seeds - 1}"
            folder = logger.new_folder(Path(cfg.output_dir) / folder_name(Path(env).stem, cfg, data))
        self.cfg, self.folder, self.runs = cfg, folder, []
        for i, path in enumerate(checkpoint):
            seed = cfg.seed + i if path is None else checkpoints.read_checkpoint(path)["config"]["seed"]
            own = replace(cfg, seed=seed, num_seeds=1, output_dir=str(folder))
            self.runs.append(SeedRun(own, path, self.runs[0] if self.runs else None))
        first, seeds = self.runs[0], [(run.seeds["data"], run.seeds["noise"]) for run in self.runs]
        if len({run.agent.updates for run in self.runs}) > 1:
            raise ValueError(f"the seeds in {folder} are not after the same update: continue each alone, by its folder")
        self.agent = StackedAgents([r.agent for r in self.runs], first.sampler, seeds, cfg.cuda_graphs, cfg.compile)
        for run, data_rng, noise_rng in zip(self.runs, self.agent.data_rng, self.agent.noise_rng):
            run.data_rng, run.noise_rng = data_rng, noise_rng
            if run.saved_rng:
                data_rng.set_state(run.saved_rng[0])
                noise_rng.set_state(run.saved_rng[1])
        self.meter = SeedMeter([run.meter for run in self.runs])
        self.headline, self.unit = first.headline, first.unit

    @property
    def global_step(self) -> int:
        return self.agent.updates

    @property
    def scores(self) -> list[tuple[int, float]]:
        """Means over the seeds."""
        rows = zip(*(run.scores for run in self.runs))
        return [(row[0][0], sum(score for _, score in row) / len(row)) for row in rows]

    def update(self) -> None:
        """Draw a batch for each seed and learn from them."""
        self.meter.add(self.agent.update(), self.agent.updates)

    def log_means(self, rates: dict[str, float]) -> dict[str, float]:
        """A row in every log; returns the means over the seeds."""
        self.meter.fold()
        rows = [run.meter.means() for run in self.runs]
        for run, row in zip(self.runs, rows):
            run.log(self.agent.updates, {**row, **rates})
        return {k: sum(row[k] for row in rows) / len(rows) for k in rows[0]}

    def evaluate(self, episodes: int = 0) -> float:
        """All seeds in one vectorised environment; the mean of their scores."""
        self.agent.unstack()
        cfg, env, agents = self.cfg, self.runs[0].env, [run.agent for run in self.runs]
        episodes = episodes or cfg.num_eval_episodes
        with ExitStack() as stack:
            for run in self.runs:
                stack.enter_context(run.kept_from_faults())
            results = evaluation.evaluate_seeds(agents, env.make, episodes, cfg.eval_seed, env.outcome, env.tasks)
        scores = [run.take_evaluation(result) for run, result in zip(self.runs, results)]
        return sum(scores) / len(scores)

    def save(self) -> None:
        self.agent.unstack()
        self.meter.fold()
        for run in self.runs:
            run.save()
        best = self.folder / "best_checkpoint.pt"
        logger.link_latest(best, self.folder.parent / best.name)

    def report(self) -> str:
        """Each seed's score and folder, and their mean."""
        lines = [self.runs[0].origin]
        for run in self.runs:
            score = f"{run.scores[-1][1]:.1f}  last, " if run.scores else ""
            lines.append(f"seed {run.cfg.seed:<7}{score}{run.folder}")
        if self.scores:
            last = [run.scores[-1][1] for run in self.runs]
            spread = torch.tensor(last).std().item() if len(last) > 1 else 0.0
            lines.append(f"{self.headline:<11} {sum(last) / len(last):.1f} ± {spread:.1f}  mean of {len(last)} seeds")
        return "\n".join(lines)

    def describe(self) -> str:
        first = self.runs[0]
        what = f"{len(self.runs)} seeds of {self.cfg.agent} {first.about}, each: {first.agent.describe()}"
        return f"{what}\nfolder      {self.folder}"

    def last_good(self) -> Path:
        """What is left after an error."""
        return self.folder

    def listen(self, callbacks: Sequence[Callable[[dict], None]]) -> None:
        """Each is called with every row of every seed's log, which then says whose it is (`seed`)."""
        for run in self.runs:
            run.listen([lambda row, call=call, seed=run.cfg.seed: call({**row, "seed": seed}) for call in callbacks])

    def close(self) -> None:
        for run in self.runs:
            run.close()


class OnlineRun(Run):
    """A training in environments. What it counts in is environment steps.

    envs: those it learns in. memory: the agent's, of them. baseline_returns: of policies that look at nothing.
    """

    unit = "env_step"
    behavior_score = None

    @property
    def global_step(self) -> int:
        return self.agent.steps

    @property
    def curves(self) -> str:
        return self.agent.curves

    @property
    def about(self) -> str:
        return f"in {self.env.name}"

    @property
    def origin(self) -> str:
        return f"learned in  {self.env.name}"

    def open_data(self, agent_class: type[OnlineAgent], first: None) -> dict:
        self.envs = Envs(self.env.make, self.cfg.num_envs, self.seeds["env"], self.device)
        before = agent_class.pretraining_data(self.cfg)  # its name is in the scores
        return {"name": self.env.name, "source": "online", **({"before": before} if before else {})}

    def prepare(self) -> dict:
        self.agent.init_buffer(self.cfg.num_envs, self.seeds["data"])
        self.agent.load_pretrained()
        self.memory = self.agent.reset(self.cfg.num_envs, self.envs.goal)
        self.baseline_returns = self.env.baseline_returns() if self.env.baseline_returns else {}
        return {"baseline_returns": self.baseline_returns}

    def update(self) -> None:
        """Act once in every environment, take it in, and make the updates that are due."""
        agent, envs = self.agent, self.envs
        action, self.memory = agent.act(envs.state, envs.reward, self.memory, explore=True)
        step, ended = envs.step(action)
        agent.observe(step)
        if ended:
            self.memory = agent.reset_where(self.memory, step.terminated | step.truncated, envs.goal)
        for episode in ended:
            self.log(self.global_step, self.row_of(episode))
        for batch in agent.minibatches():
            self.meter.add(agent.update(batch), agent.updates)

    def log_means(self, rates: dict[str, float]) -> dict[str, float]:
        means = self.meter.means()
        schedules = {**self.agent.schedule_metrics(), "updates": self.agent.updates}
        self.log(self.global_step, {**means, **schedules, **rates})
        return means

    def row_of(self, episode: EpisodeStats) -> dict:
        row = {"return": episode.total, "length": episode.length, "terminated": float(episode.terminated)}
        if self.env.score:
            row["score"] = self.env.score(episode.total)
        return {f"episode/{k}": v for k, v in row.items()}

    def extra_state(self, name: str) -> dict:
        if name == "best_checkpoint.pt":  # to be evaluated, not to go on from
            return {"baseline_returns": self.baseline_returns}
        return {
            "baseline_returns": self.baseline_returns,
            "buffer": self.agent.buffer.state_dict(),
            "envs": self.envs.state_dict(),
            "memory": pytree.tree_leaves(self.memory),
        }

    def load_extra_state(self, run: dict, own: dict) -> None:
        if "buffer" not in run:
            raise ValueError(
                "this checkpoint was kept to be evaluated: resume from last_checkpoint.pt, or the run's folder"
            )
        self.data = run["data"]
        agent, n = self.agent, self.cfg.num_envs
        agent.init_buffer(n, self.seeds["data"])
        agent.buffer.load_state_dict(run["buffer"])
        memory, shape = pytree.tree_flatten(agent.reset(n, self.envs.goal))
        self.memory = pytree.tree_unflatten([x.to(y.device) for x, y in zip(run["memory"], memory)], shape)
        self.baseline_returns = run["baseline_returns"]
        unrestored = self.envs.load_state_dict(run["envs"])
        if unrestored.any():
            agent.on_env_reset(unrestored)
            self.memory = agent.reset_where(self.memory, unrestored, self.envs.goal)

    def report(self) -> str:
        words = evaluation.baseline_lines(self.baseline_returns)
        return "\n".join([super().report(), *(f"{label:<12}{text}" for label, text in words)])

    def episodes_at_last(self) -> int:
        return self.cfg.num_final_episodes or self.cfg.num_eval_episodes
