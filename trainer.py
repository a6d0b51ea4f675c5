"""Train any agent: `python trainer.py --env hopper --dataset_type medium`. `--help` lists every setting.

A run leaves a folder in `outputs/`: `config.json`, `log.jsonl`, `training_curves.png`, `last_checkpoint.pt` (the
headline is its score) and `best_checkpoint.pt` (of the best evaluation). Ctrl-C and SIGTERM finish the current update
and save; `--resume FOLDER` continues exactly where the checkpoint stands.
"""

import importlib.util
import json
import logging
import re
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import datetime
from pathlib import Path

import torch
from torch.utils import _pytree as pytree
from tqdm import tqdm

import machine
import pictures
import records
import utils
from config import parse, word_after
from learn import Meter

# What a resumed run may be told anew: how far it goes, where it computes and lies, never what it learns.
MAY_CHANGE = ("num_epochs", "device", "threads", "output_dir", "dataset_dir", "tensorboard", "wandb")


class Run:
    """One training: its folder, data, world, log and checkpoints. It knows no algorithm."""

    def __init__(self, cfg, checkpoint: Path | None = None):
        """checkpoint: continue it, exactly, in its own folder; else begin in a new one."""
        module, system, _ = utils.system_of(cfg.agent)
        if cfg.wandb and not importlib.util.find_spec("wandb"):
            raise ValueError("--wandb needs the wandb package: pip install wandb")
        self.cfg, self.device = cfg, machine.pick_device(cfg.device)
        machine.hold_memory()
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        torch.set_float32_matmul_precision("high" if cfg.precision == "tf32" else "highest")
        seeds = machine.streams(cfg.seed, "init", "data", "noise")
        self.world = module.world(cfg)
        torch.manual_seed(seeds["init"])
        self.agent = (
            None if checkpoint else system(cfg, self.world.spec, self.device)
        )  # its words about bad sizes come first
        self.sampler, self.identity = module.data(cfg, self.device, seeds["data"])
        # what evaluations are called: a score, by the data's source, or "return" where there is no reference
        self.headline = utils.headline_name(self.world, self.identity.source)
        mean = self.identity.return_mean
        self.behaviour_score = self.world.score(mean) if self.world.score else mean
        self.meter, self.scores = Meter(), []  # scores: (update, score or mean return) of every evaluation
        if checkpoint:
            self.awake(checkpoint)
        else:
            self.begin()
            torch.manual_seed(seeds["noise"])

    def begin(self) -> None:
        """A folder whose log opens with what the run is."""
        cfg = self.cfg
        data = re.sub(r"[^\w.-]", "-", self.identity.name)  # a Minari name has slashes
        name = f"{data}-{cfg.agent}-s{cfg.seed}-{datetime.now():%Y%m%d-%H%M%S}"
        self.agent.prepare(self.sampler)
        self.folder = records.new_folder(Path(cfg.output_dir) / name)
        head = {"config": asdict(cfg), "data": asdict(self.identity), "versions": machine.versions()}
        (self.folder / "config.json").write_text(json.dumps(head, indent=1) + "\n")
        self.log = records.Log(self.folder, cfg.tensorboard, cfg.wandb)
        self.log(0, {**head, "score_name": self.headline, "behaviour_score": self.behaviour_score})

    def awake(self, checkpoint: Path) -> None:
        """The agent, the data order, the noise, the half-filled means and the log, as they were."""
        self.agent, part = utils.load(
            checkpoint, self.device, **{k: getattr(self.cfg, k) for k in MAY_CHANGE if k != "device"}
        )
        run, data = part["run"], asdict(self.identity)
        if run["data"]["sha256"] != data["sha256"]:
            raise ValueError(
                f"this run learned from {run['data']['name']} (SHA-256 {run['data']['sha256'][:12]}), but here "
                f"{data['name']} is {data['sha256'][:12]}: give the --dataset_dir that holds the first"
            )
        self.folder = checkpoint.parent
        self.sampler.load_state_dict(run["sampler"])
        self.meter.load_state_dict(
            pytree.tree_map(lambda x: x.to(self.device) if torch.is_tensor(x) else x, run["meter"])
        )
        self.scores = [tuple(x) for x in run["scores"]]
        self.log = records.Log(self.folder, self.cfg.tensorboard, self.cfg.wandb, after=self.agent.updates)
        torch.set_rng_state(run["rng"])
        if run["cuda_rng"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(run["cuda_rng"], self.device)

    def save(self, name: str = "last_checkpoint.pt") -> None:
        """A checkpoint; `outputs/best_checkpoint.pt` becomes this run's best, or its last if nothing was evaluated."""
        run = {
            "data": asdict(self.identity),
            "sampler": self.sampler.state_dict(),
            "meter": self.meter.state_dict(),
            "scores": self.scores,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        utils.save(self.folder / name, self.agent, run)
        best = self.folder / "best_checkpoint.pt"
        records.publish(best if best.exists() else self.folder / name, self.folder.parent / best.name)

    def evaluate(self) -> float:
        """Judge the agent as it is, draw the curves, keep it if it is the best so far."""
        cfg, update = self.cfg, self.agent.updates
        row = utils.summary(
            utils.evaluate(self.agent, self.world.make, cfg.num_eval_episodes, cfg.eval_seed), self.world.score
        )
        self.log(update, row)
        score = utils.headline(row)
        best = not self.scores or score > max(s for _, s in self.scores)
        self.scores.append((update, score))
        if best:
            self.save("best_checkpoint.pt")
        title = f"{cfg.agent} on {self.identity.name}, seed {cfg.seed}, {update:,} updates"
        with records.replacing(self.folder / "training_curves.png") as picture:
            pictures.draw_curves(records.read_log(self.folder / "log.jsonl"), title, picture)
        return score

    def report(self) -> str:
        """The run's last word."""
        data, folder, name = self.identity, self.folder, self.headline
        lines = [f"data        {data.name}, {data.transitions:,} transitions, mean {name} {self.behaviour_score:.1f}"]
        if self.scores:
            (at, last), (best_at, best) = self.scores[-1], max(self.scores, key=lambda x: x[1])
            lines.append(f"{name:<12}{last:.1f}  last, update {at:,}, {self.cfg.num_eval_episodes} episodes")
            lines.append(
                f"best        {best:.1f}  of {len(self.scores)} evaluations, update {best_at:,}; picked, so flattering"
            )
            lines.append(f"curves      {folder / 'training_curves.png'}")
        lines.append(f"checkpoint  {folder / 'last_checkpoint.pt'}")
        return "\n".join(lines)


@contextmanager
def until_told():
    """Collects SIGINT and SIGTERM instead of dying of them; a second one kills as usual."""
    told = []

    def hear(number, frame):
        told.append(number)
        signal.signal(number, before[number])

    before = {s: signal.signal(s, hear) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_offline(run: Run) -> int:
    """Update until the epochs are done. Returns the exit status: 0, or 128 + the signal that stopped it."""
    cfg, agent, size = run.cfg, run.agent, run.cfg.updates_per_epoch
    total = cfg.num_epochs * size
    note = {run.headline: f"{run.scores[-1][1]:.1f}"} if run.scores else {}
    with (
        until_told() as told,
        tqdm(total=total, initial=agent.updates, unit="update", smoothing=0.05, mininterval=0.5) as bar,
    ):
        agent.train()
        while agent.updates < total:
            metrics = agent.update(run.sampler.sample(cfg.batch_size))
            run.meter.add(metrics, agent.updates)
            bar.update()
            if agent.updates % size == 0:
                means = run.meter.means()
                run.log(agent.updates, {**means, "updates_per_s": round(bar.format_dict["rate"] or 0.0, 1)})
                epoch, last = agent.updates // size, agent.updates == total
                note |= {k.removeprefix("loss/"): f"{v:.3g}" for k, v in means.items() if k.startswith("loss/")}
                evaluating = cfg.eval_freq and (epoch % cfg.eval_freq == 0 or last)
                if evaluating:
                    note[run.headline] = f"{run.evaluate():.1f}"
                if evaluating or last or (cfg.save_freq and epoch % cfg.save_freq == 0):
                    run.save()
                bar.set_postfix(note, refresh=False)
            if told:
                run.meter.check()
                run.save()
                bar.close()
                name = signal.Signals(told[0]).name
                print(f"\n{name}: stopped after update {agent.updates:,}, saved.")
                print(f"Go on with: python trainer.py --resume {run.folder}")
                return 128 + told[0]
    print(run.report())
    return 0


def settings(argv: list[str] | None) -> tuple:
    """The config and the checkpoint to continue, if any: (cfg, path or None)."""
    cfg = parse(argv)
    if not cfg.resume:
        return cfg, None
    argv = sys.argv[1:] if argv is None else argv
    path = Path(cfg.resume)
    path = (path / "last_checkpoint.pt" if path.is_dir() else path).resolve()
    part = utils.read_checkpoint(path)
    saved = utils.config_of(part, path)
    for f in fields(cfg):
        if word_after(f"--{f.name}", argv) and f.name != "resume":
            new = getattr(cfg, f.name)
            if f.name in MAY_CHANGE:
                saved = replace(saved, **{f.name: new})
            elif new != getattr(saved, f.name, None):
                raise ValueError(
                    f"--{f.name} {new} would change what the run learns (it has {getattr(saved, f.name, None)}): "
                    f"a resumed run takes only {', '.join('--' + k for k in MAY_CHANGE)}. "
                    "Start a new one without --resume"
                )
    return saved, path


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with utils.errors_as_sentences():
        cfg, checkpoint = settings(argv)
        run = Run(cfg, checkpoint)
    print(f"{cfg.agent} on {run.identity.name} ({run.identity.transitions:,} transitions): {run.agent.describe()}")
    print(f"folder      {run.folder}")
    try:
        return train_offline(run)
    except FloatingPointError as error:
        print(f"error: {error}. The last good checkpoint is {run.folder / 'last_checkpoint.pt'}", file=sys.stderr)
        return 1
    finally:
        run.log.close()


if __name__ == "__main__":
    raise SystemExit(main())
