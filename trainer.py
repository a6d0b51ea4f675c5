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
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

import utils
from common import distributed, estimate
from common.cuda_graph import CaptureError
from common.env_spec import EnvFault
from common.files import check_file_path, check_folder_path
from common.interface import OnlineAgent
from common.optim import count_due
from common.run import RESUMABLE_FLAGS, Follower, OnlineRun, Run, SeedsRun
from config import PRESETS, argv_value, idle_flags, parse

ESTIMATE_FROM = 4000  # updates: a shorter run is over before an estimate would help
STOP_CHECK = 20  # updates between the questions whether another process was told to stop


@contextmanager
def catch_signals():
    """Collects SIGINT and SIGTERM instead of dying of them; a second one kills as usual."""
    signals = []

    def hear(number, frame):
        signals.append(number)
        signal.signal(number, before[number])

    before = {s: signal.signal(s, hear) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_offline(run: Run | SeedsRun) -> int:
    """Update until the epochs are done. Returns the exit status: 0, or 128 + the signal that stopped it."""
    cfg, agent, size = run.cfg, run.agent, run.cfg.updates_per_epoch
    total = cfg.num_epochs * size
    postfix = {run.headline: f"{run.scores[-1][1]:.1f}"} if run.scores else {}
    with (
        catch_signals() as signals,
        tqdm(
            total=total,
            initial=agent.updates,
            unit="update",
            smoothing=0.05,
            mininterval=0.5,
            disable=distributed.rank() > 0,
        ) as bar,
    ):
        agent.train()
        while agent.updates < total:
            run.update()
            bar.update()
            if agent.updates % size == 0:
                means = run.log_means({"updates_per_s": round(bar.format_dict["rate"] or 0.0, 1)})
                epoch, last = agent.updates // size, agent.updates == total
                postfix |= {k.removeprefix("loss/"): f"{v:.3g}" for k, v in means.items() if k.startswith("loss/")}
                evaluating = cfg.eval_freq and (epoch % cfg.eval_freq == 0 or last)
                if evaluating:
                    postfix[run.headline] = f"{run.evaluate():.1f}"
                if evaluating or last or (cfg.save_freq and epoch % cfg.save_freq == 0):
                    run.save()
                bar.set_postfix(postfix, refresh=False)
            if should_stop(signals, run):
                bar.close()
                return stop(run, signals[0] if signals else signal.SIGTERM)
    if not distributed.rank():
        print(run.report())
    return 0


def should_stop(signals: list, run: Run | SeedsRun) -> bool:
    """Whether a signal has come; of several processes to any of them, so that all stop after the same update."""
    if distributed.size() == 1:
        return bool(signals)
    return run.agent.updates % STOP_CHECK == 0 and distributed.any_process(bool(signals), run.device)


def train_online(run: OnlineRun) -> int:
    """Act and update until the environment steps are done. Returns the exit status, as `train_offline` does."""
    cfg, agent, total = run.cfg, run.agent, run.cfg.env_steps
    postfix, mark = {}, (agent.updates, time.perf_counter())
    with (
        catch_signals() as signals,
        tqdm(total=total, initial=run.global_step, unit="step", smoothing=0.05, mininterval=0.5) as bar,
    ):
        agent.train()
        if agent.is_finetuning and cfg.eval_every and not run.scores:
            postfix[run.headline] = f"{run.evaluate():.1f}"  # what it must not fall below
        while run.global_step < total:
            before = run.global_step
            run.update()
            bar.update(run.global_step - before)
            last = run.global_step >= total
            if last or count_due(before, run.global_step, cfg.log_every):
                seconds, updates = time.perf_counter() - mark[1], agent.updates - mark[0]
                rates = {"steps_per_s": round(bar.format_dict["rate"] or 0.0, 1), "updates_per_s": updates / seconds}
                means, mark = run.log_means(rates), (agent.updates, time.perf_counter())
                postfix |= {k.removeprefix("loss/"): f"{v:.3g}" for k, v in means.items() if k.startswith("loss/")}
            if last and cfg.num_final_episodes:
                postfix[run.headline] = f"{run.evaluate(cfg.num_final_episodes):.1f}"
            elif last:
                run.draw()
            elif count_due(before, run.global_step, cfg.eval_every):
                postfix[run.headline] = f"{run.evaluate():.1f}"
            if last or count_due(before, run.global_step, cfg.save_every):
                run.save()
            bar.set_postfix(postfix, refresh=False)
            if signals:
                bar.close()
                return stop(run, signals[0])
    print(run.report())
    return 0


def stop(run: Run | SeedsRun, number: int) -> int:
    """Save, say how to go on; the exit status of a program that signal `number` ended."""
    run.meter.check()
    run.save()
    if distributed.rank():
        return 128 + number
    name, unit = signal.Signals(number).name, run.unit.replace("_", " ")
    print(f"\n{name}: stopped after {unit} {run.global_step:,}, saved.")
    print(f"Go on with: python trainer.py --resume {run.folder}")
    return 128 + number


def with_preset(argv: list[str], name: str) -> list[str]:
    """The command line with another preset."""
    found, skip = [], False
    for word in argv:
        if not skip and not word.startswith("--preset"):
            found.append(word)
        skip = word == "--preset"
    return found if name == "none" else [*found, "--preset", name]


def presets_of(argv: list[str]) -> dict[str, Callable]:
    """The presets that this command line could have: name -> a function that gives its settings."""
    agent = argv_value("--agent", argv) or "bamba"
    return {name: partial(parse, with_preset(argv, name)) for name in ("none", *PRESETS.get(agent, {}))}


def estimate_of(run: Run | SeedsRun, argv: list[str]) -> str:
    """How long it will take, and what would be shorter."""
    presets = {} if run.cfg.resume else presets_of(argv)
    presets.pop(run.cfg.preset, None)
    return estimate.sentence(run.cfg, presets, run.agent.updates)


def load_config(argv: list[str]) -> tuple:
    """The config, and what is to be continued: a checkpoint, a folder of several seeds', or None."""
    if argv_value("--preset", argv) == "auto":
        cfg = parse(with_preset(argv, "none"))
        if not issubclass(utils.agent_of(cfg.agent), OnlineAgent) and can_estimate(cfg):
            name = estimate.largest_that_fits(presets_of(argv), cfg.hours)
            print(f"preset      {name}, the longest that ends within --hours {cfg.hours:g} here")
            argv = with_preset(argv, name)
    path = argv_value("--resume", argv)
    seeds = sorted(Path(path).glob("*/last_checkpoint.pt")) if path else []
    ckpt = utils.read_checkpoint(seeds[0] if seeds else path) if path else None
    if ckpt and ckpt["optimizer"] is None:  # before its data are looked for
        raise ValueError(
            f"{path} was kept to act: there is nothing in it to go on from (ppo can fine-tune it, by --init)"
        )
    cfg = parse(["--agent", ckpt["system"], *argv] if ckpt else argv)  # flags are those of the agent that goes on
    if not cfg.resume:
        return cfg, None
    path = Path(cfg.resume)
    path = (path / "last_checkpoint.pt" if path.is_dir() and not seeds else path).resolve()
    saved = replace(utils.config_of(ckpt, path), num_seeds=max(1, len(seeds)))
    known = {f.name for f in fields(saved)}
    for f in fields(cfg):
        if argv_value(f"--{f.name}", argv) and f.name != "resume":
            new = getattr(cfg, f.name)
            if f.name in RESUMABLE_FLAGS and f.name in known:
                saved = replace(saved, **{f.name: new})
            elif new != (old := getattr(saved, f.name) if f.name in known else None):
                raise ValueError(
                    f"--{f.name} {new} would change what the run learns (it has {old}): "
                    f"a resumed run takes only {', '.join('--' + k for k in RESUMABLE_FLAGS if k in known)}. "
                    "Start a new one without --resume"
                )
    return saved, path


def can_estimate(cfg) -> bool:
    """Offline agents that learn from D4RL's kind of data, on a CPU."""
    return cfg.agent in ("bamba", "dt", "dmamba", "dm") and estimate.can_be_measured(cfg)


def check_paths(cfg) -> None:
    """ValueError for a folder where a flag means a file, and the reverse."""
    names = {f.name for f in fields(cfg)}
    for flag in {"output_dir", "dataset_dir"} & names:
        check_folder_path(flag, getattr(cfg, flag))
    if "dataset" in names:
        check_file_path("dataset", cfg.dataset)


def check_parallel(cfg, agent_class: type) -> None:
    """ValueError if the agent cannot learn on several devices, or several seeds at once, as it is told to."""
    if distributed.is_launched() or cfg.num_seeds > 1:
        agent_class.check_parallel(cfg)
    if cfg.num_seeds > 1 and (distributed.is_launched() or cfg.wandb):
        raise ValueError("--num_seeds makes several runs in one process: leave torchrun and --wandb away")


def what_is_left(run: Run | SeedsRun) -> str:
    """After an error: where to go on from."""
    path = run.last_good()
    return f"The last good checkpoint is {path}" if path.exists() else "No checkpoint had been written yet"


def begin(argv: list[str]) -> Run | SeedsRun:
    """The run that a command line asks for, ready for its first update. Raises ValueError, OSError, ImportError."""
    cfg, checkpoint = load_config(argv)
    check_paths(cfg)
    agent_class = utils.agent_of(cfg.agent)
    check_parallel(cfg, agent_class)
    distributed.join(cfg.device)
    if cfg.num_seeds > 1:
        return SeedsRun(cfg, checkpoint)
    kind = OnlineRun if issubclass(agent_class, OnlineAgent) else Follower if distributed.rank() else Run
    return kind(cfg, checkpoint)


def train(run: Run | SeedsRun) -> int:
    """To the end, or to a signal; the exit status."""
    return train_online(run) if isinstance(run, OnlineRun) else train_offline(run)


def main(argv: list[str] | None = None) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = sys.argv[1:] if argv is None else argv
    with utils.errors_as_sentences():
        run = begin(argv)
    if not distributed.rank():
        for sentence in idle_flags(run.cfg, argv):
            print(f"notice      {sentence}")
        print(run.describe())
        if can_estimate(run.cfg) and estimate.updates_of(run.cfg) >= ESTIMATE_FROM and distributed.size() == 1:
            print(estimate_of(run, argv), flush=True)
    try:
        try:
            return train(run)
        finally:
            run.close()
    except (FloatingPointError, CaptureError, EnvFault) as error:
        print(f"error: {error}. {what_is_left(run)}", file=sys.stderr)
        return 1
    except OSError as error:  # of a disk that is full, most often
        then = f"; when that is mended: python trainer.py --resume {run.folder}" if run.last_good().exists() else ""
        print(f"error: {error}. {what_is_left(run)}{then}", file=sys.stderr)
        return 1
    finally:
        distributed.leave()


if __name__ == "__main__":
    raise SystemExit(main())
