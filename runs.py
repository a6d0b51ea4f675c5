"""One training: its folder, data, world, log and checkpoints. `Run` learns from data, `OnlineRun` in environments;
neither knows an algorithm."""

import importlib.util
import json
import re
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

import machine
import pictures
import records
import utils
from envs import Ended, Envs
from learn import Meter

# What a resumed run may be told anew: how far it goes, where it computes and lies, never what it learns.
MAY_CHANGE = ("num_epochs", "env_steps", "device", "threads", "output_dir", "dataset_dir", "tensorboard", "wandb")


class Run:
    """A training on recorded data."""

    unit = "update"  # what its log counts in
    curves = "training_curves.png"

    def __init__(self, cfg, checkpoint: Path | None = None):
        """checkpoint: continue it, exactly, in its own folder; else begin in a new one."""
        module, system, _ = utils.system_of(cfg.agent)
        if hasattr(module, "settle") and not checkpoint:
            cfg = module.settle(cfg)
        if cfg.wandb and not importlib.util.find_spec("wandb"):
            raise ValueError("--wandb needs the wandb package: pip install wandb")
        self.cfg, self.device = cfg, machine.pick_device(cfg.device)
        machine.hold_memory()
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        machine.set_precision(cfg.precision, self.device)
        self.seeds = machine.streams(cfg.seed, "init", "data", "noise", "env")
        self.world = module.world(cfg)
        torch.manual_seed(self.seeds["init"])
        self.agent = (
            None if checkpoint else system(cfg, self.world.spec, self.device)
        )  # its words about bad sizes come first
        self.judged: list[tuple[str, str]] = []  # what is to be said of the last evaluation
        self.meter, self.scores = Meter(), []  # scores: (update or step, score or mean return) of every evaluation
        self.open(module)
        if checkpoint:
            self.awake(checkpoint)
        else:
            self.begin()
            torch.manual_seed(self.seeds["noise"])

    @property
    def now(self) -> int:
        """Where the training is, in its unit."""
        return self.agent.updates

    def open(self, module) -> None:
        """What there is to learn from."""
        self.sampler, identity = module.data(self.cfg, self.device, self.seeds["data"])
        self.data = asdict(identity)
        # what evaluations are called: a score, by the data's source, or "return" where there is no reference
        self.headline = utils.headline_name(self.world, identity.source)
        mean = identity.return_mean
        self.about = f"on {identity.name} ({identity.transitions:,} transitions)"
        self.origin = f"data        {identity.name}, {identity.transitions:,} transitions"
        self.behaviour_score = None  # of data without rewards
        if mean is not None:
            self.behaviour_score = self.world.score(mean) if self.world.score else mean
            self.origin += f", mean {self.headline} {self.behaviour_score:.1f}"

    def prepare(self) -> dict:
        """What comes before the first update; returns what the log's head says of it."""
        self.agent.prepare(self.sampler)
        return {} if self.behaviour_score is None else {"behaviour_score": self.behaviour_score}

    def begin(self) -> None:
        """A folder whose log opens with what the run is."""
        cfg, more = self.cfg, self.prepare()
        data = re.sub(r"[^\w.-]", "-", self.data["name"])  # a Minari name has slashes
        name = f"{data}-{cfg.agent}-s{cfg.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        self.folder = records.new_folder(Path(cfg.output_dir) / name)
        head = {"config": asdict(cfg), "data": self.data, "versions": machine.versions()}
        (self.folder / "config.json").write_text(json.dumps(head, indent=1) + "\n")
        self.log = records.Log(self.folder, cfg.tensorboard, cfg.wandb, unit=self.unit)
        self.log(0, {**head, "score_name": self.headline, **more})

    def awake(self, checkpoint: Path) -> None:
        """The agent, the data order, the noise, the half-filled means and the log, as they were."""
        changes = {k: getattr(self.cfg, k) for k in MAY_CHANGE if k != "device" and hasattr(self.cfg, k)}
        self.agent, part = utils.load(checkpoint, self.device, **changes)
        run = part["run"]
        self.folder = checkpoint.parent
        self.restore(run)
        self.meter.load_state_dict(
            pytree.tree_map(lambda x: x.to(self.device) if torch.is_tensor(x) else x, run["meter"])
        )
        self.scores = [tuple(x) for x in run["scores"]]
        self.log = records.Log(self.folder, self.cfg.tensorboard, self.cfg.wandb, after=self.now, unit=self.unit)
        torch.set_rng_state(run["rng"])
        if run["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(run["cuda_rng"], self.device)

    def restore(self, run: dict) -> None:
        """What is learned from, where the checkpoint left it."""
        if run["data"]["sha256"] != self.data["sha256"]:
            raise ValueError(
                f"this run learned from {run['data']['name']} (SHA-256 {run['data']['sha256'][:12]}), but here "
                f"{self.data['name']} is {self.data['sha256'][:12]}: give the --dataset_dir that holds the first"
            )
        self.sampler.load_state_dict(run["sampler"])

    def source(self, name: str) -> dict:
        """What `restore` will need, for the checkpoint `name`."""
        return {"sampler": self.sampler.state_dict()}

    def save(self, name: str = "last_checkpoint.pt") -> None:
        """A checkpoint; `outputs/best_checkpoint.pt` becomes this run's best, or its last if nothing was evaluated."""
        run = {
            "data": self.data,
            **self.source(name),
            "meter": self.meter.state_dict(),
            "scores": self.scores,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        utils.save(self.folder / name, self.agent, run)
        best = self.folder / "best_checkpoint.pt"
        records.publish(best if best.exists() else self.folder / name, self.folder.parent / best.name)

    def evaluate(self, episodes: int = 0) -> float:
        """Judge the agent as it is, draw the curves, keep it if it is the best so far. episodes 0: as configured"""
        cfg, world, episodes = self.cfg, self.world, episodes or self.cfg.num_eval_episodes
        result = utils.evaluate(
            self.agent, world.make, episodes, cfg.eval_seed, outcome=world.outcome, tasks=world.tasks
        )
        row = utils.summary(result, world.score)
        self.log(self.now, row)
        score = utils.headline(row)
        best = not self.scores or score > max(s for _, s in self.scores)
        self.scores.append((self.now, score))
        self.judged = utils.words_of(result, world)
        if best:
            self.save("best_checkpoint.pt")
        self.draw()
        return score

    def draw(self) -> None:
        """The curves, out of the log."""
        unit = self.unit.replace("_", " ")
        title = f"{self.cfg.agent} on {self.data['name']}, seed {self.cfg.seed}, {self.now:,} {unit}s"
        with records.replacing(self.folder / self.curves) as picture:
            pictures.draw_curves(records.read_log(self.folder / "log.jsonl"), title, picture)

    def report(self) -> str:
        """The run's last word."""
        folder, name, unit, lines = self.folder, self.headline, self.unit.replace("_", " "), [self.origin]
        if self.scores:
            (at, last), (best_at, best) = self.scores[-1], max(self.scores, key=lambda x: x[1])
            lines.append(f"{name:<11} {last:.1f}  last, {unit} {at:,}, {self.episodes_at_last()} episodes")
            if len(self.scores) > 1:
                lines.append(
                    f"best        {best:.1f}  of {len(self.scores)} evaluations, {unit} {best_at:,}; "
                    "picked, so flattering"
                )
            lines += [f"{label:<12}{text}" for label, text in self.judged]
            if self.world.scale:
                lines.append(f"scale       {self.world.scale}")
            lines.append(f"curves      {folder / self.curves}")
        lines.append(f"checkpoint  {folder / 'last_checkpoint.pt'}")
        return "\n".join(lines)

    def episodes_at_last(self) -> int:
        return self.cfg.num_eval_episodes


class OnlineRun(Run):
    """A training in environments. What it counts in is environment steps."""

    unit = "env_step"

    @property
    def now(self) -> int:
        return self.agent.steps

    def open(self, module) -> None:
        self.data = {"name": self.world.name, "source": "online"}
        if hasattr(self.cfg, "before"):  # it goes on from a training on data, which lend their name to its scores
            self.data["before"] = self.cfg.before
        self.curves = getattr(module, "CURVES", self.curves)
        self.headline = utils.headline_name(self.world, utils.source_of(self.data))
        self.envs = Envs(self.world.make, self.cfg.num_envs, self.seeds["env"], self.device)
        self.about, self.origin = f"in {self.world.name}", f"learned in  {self.world.name}"

    def prepare(self) -> dict:
        self.agent.gather(self.cfg.num_envs, self.seeds["data"])
        if hasattr(self.agent, "prepare"):
            self.agent.prepare(self.agent.experience)
        self.memory = self.agent.reset(self.cfg.num_envs, self.envs.goal)
        self.trivial = self.world.trivial() if self.world.trivial else {}
        return {"trivial": self.trivial}

    def step(self) -> None:
        """Act once in every environment, take it in, and make the updates that are due."""
        agent, envs = self.agent, self.envs
        action, self.memory = agent.act(envs.state, envs.reward, self.memory, explore=True)
        step, ended = envs.step(action)
        agent.observe(step)
        if ended:
            self.memory = agent.restart(self.memory, step.terminated | step.truncated, envs.goal)
        for episode in ended:
            self.log(self.now, self.row_of(episode))
        for batch in agent.lessons():
            self.meter.add(agent.update(batch), agent.updates)

    def row_of(self, episode: Ended) -> dict:
        row = {"return": episode.total, "length": episode.length, "terminated": float(episode.terminated)}
        if self.world.score:
            row["score"] = self.world.score(episode.total)
        return {f"episode/{k}": v for k, v in row.items()}

    def source(self, name: str) -> dict:
        if name == "best_checkpoint.pt":  # to be judged, not to go on from
            return {"trivial": self.trivial}
        return {
            "trivial": self.trivial,
            "experience": self.agent.experience.state_dict(),
            "envs": self.envs.state_dict(),
            "memory": pytree.tree_leaves(self.memory),
        }

    def restore(self, run: dict) -> None:
        if "experience" not in run:
            raise ValueError(
                "this checkpoint was kept to be judged: resume from last_checkpoint.pt, or the run's folder"
            )
        self.data = run["data"]
        self.headline = utils.headline_name(self.world, utils.source_of(self.data))
        agent, n = self.agent, self.cfg.num_envs
        agent.gather(n, self.seeds["data"])
        agent.experience.load_state_dict(run["experience"])
        memory, shape = pytree.tree_flatten(agent.reset(n, self.envs.goal))
        self.memory = pytree.tree_unflatten([x.to(y.device) for x, y in zip(run["memory"], memory)], shape)
        self.trivial = run["trivial"]
        lost = self.envs.load_state_dict(run["envs"])
        if lost.any():
            agent.forsake(lost)
            self.memory = agent.restart(self.memory, lost, self.envs.goal)

    def report(self) -> str:
        words = utils.words_of_trivial(self.trivial)
        return "\n".join([super().report(), *(f"{label:<12}{text}" for label, text in words)])

    def episodes_at_last(self) -> int:
        return self.cfg.num_final_episodes or self.cfg.num_eval_episodes
