"""Train any agent: `python trainer.py --env hopper --dataset_type medium`. `--help` lists every setting.

A run leaves a folder in `outputs/`: `config.json`, `log.jsonl`, `training_curves.png`, `last_checkpoint.pt` (the
headline is its score) and `best_checkpoint.pt` (of the best evaluation). Ctrl-C and SIGTERM finish the current update
and save; `--resume FOLDER` continues exactly where the checkpoint stands. There are two loops: updates from recorded
data, and steps in environments with the updates that they call for.
"""

import logging
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path

from tqdm import tqdm

import utils
from config import parse, word_after
from learn import CaptureError, due
from runs import MAY_CHANGE, OnlineRun, Run


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
                bar.close()
                return stop(run, told[0])
    print(run.report())
    return 0


def train_online(run: OnlineRun) -> int:
    """Act and update until the environment steps are done. Returns the exit status, as `train_offline` does."""
    cfg, agent, total = run.cfg, run.agent, run.cfg.env_steps
    note, mark = {}, (agent.updates, time.perf_counter())
    with (
        until_told() as told,
        tqdm(total=total, initial=run.now, unit="step", smoothing=0.05, mininterval=0.5) as bar,
    ):
        agent.train()
        if getattr(agent, "continues", False) and cfg.eval_every and not run.scores:
            note[run.headline] = f"{run.evaluate():.1f}"  # what it must not fall below
        while run.now < total:
            before = run.now
            run.step()
            bar.update(run.now - before)
            last = run.now >= total
            if last or due(before, run.now, cfg.log_every):
                seconds, updates = time.perf_counter() - mark[1], agent.updates - mark[0]
                rates = {"steps_per_s": round(bar.format_dict["rate"] or 0.0, 1), "updates_per_s": updates / seconds}
                means, mark = run.meter.means(), (agent.updates, time.perf_counter())
                run.log(run.now, {**means, **agent.status(), "updates": agent.updates, **rates})
                note |= {k.removeprefix("loss/"): f"{v:.3g}" for k, v in means.items() if k.startswith("loss/")}
            if last and cfg.num_final_episodes:
                note[run.headline] = f"{run.evaluate(cfg.num_final_episodes):.1f}"
            elif last:
                run.draw()
            elif due(before, run.now, cfg.eval_every):
                note[run.headline] = f"{run.evaluate():.1f}"
            if last or due(before, run.now, cfg.save_every):
                run.save()
            bar.set_postfix(note, refresh=False)
            if told:
                bar.close()
                return stop(run, told[0])
    print(run.report())
    return 0


def stop(run: Run, number: int) -> int:
    """Save, say how to go on; the exit status of a program that signal `number` ended."""
    run.meter.check()
    run.save()
    name, unit = signal.Signals(number).name, run.unit.replace("_", " ")
    print(f"\n{name}: stopped after {unit} {run.now:,}, saved.")
    print(f"Go on with: python trainer.py --resume {run.folder}")
    return 128 + number


def settings(argv: list[str] | None) -> tuple:
    """The config and the checkpoint to continue, if any: (cfg, path or None)."""
    argv = sys.argv[1:] if argv is None else argv
    path = word_after("--resume", argv)
    part = utils.read_checkpoint(path) if path else None
    cfg = parse(["--agent", part["system"], *argv] if part else argv)  # flags are those of the agent that goes on
    if not cfg.resume:
        return cfg, None
    path = Path(cfg.resume)
    path = (path / "last_checkpoint.pt" if path.is_dir() else path).resolve()
    saved = utils.config_of(part, path)
    for f in fields(cfg):
        if word_after(f"--{f.name}", argv) and f.name != "resume":
            new = getattr(cfg, f.name)
            if f.name in MAY_CHANGE and hasattr(saved, f.name):
                saved = replace(saved, **{f.name: new})
            elif new != getattr(saved, f.name, None):
                raise ValueError(
                    f"--{f.name} {new} would change what the run learns (it has {getattr(saved, f.name, None)}): "
                    f"a resumed run takes only {', '.join('--' + k for k in MAY_CHANGE if hasattr(saved, k))}. "
                    "Start a new one without --resume"
                )
    return saved, path


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with utils.errors_as_sentences():
        cfg, checkpoint = settings(argv)
        online = hasattr(cfg, "env_steps")
        run = (OnlineRun if online else Run)(cfg, checkpoint)
    print(f"{cfg.agent} {run.about}: {run.agent.describe()}")
    print(f"folder      {run.folder}")
    try:
        return train_online(run) if online else train_offline(run)
    except (FloatingPointError, CaptureError) as error:
        print(f"error: {error}. The last good checkpoint is {run.folder / 'last_checkpoint.pt'}", file=sys.stderr)
        return 1
    finally:
        run.log.close()


if __name__ == "__main__":
    raise SystemExit(main())
