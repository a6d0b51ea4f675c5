"""A search over ranges by Optuna: every trial is a study of its own, of all data sets and seeds.

Trials are kept in `optuna.log` in the study's folder. Called again, a search goes on to the number of trials that is
wanted; those that were cut short are tried again with the same values, and their runs go on from their checkpoints.
"""

import argparse
import hashlib
import json
import statistics
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from common.packages import optional
from common.parallel import cores
from sweeping import work
from sweeping.executors import visible_gpus
from sweeping.state import state_of
from sweeping.study import Planned, check, expand, located, prepare, settle
from sweeping.work import Worker
from trainer import catch_signals

METRICS = {
    "last_score": lambda scores: scores[-1],
    "mean_of_last_5": lambda scores: statistics.mean(scores[-5:]),
    "best_score": max,
}


def ranges_of(study: dict) -> dict[str, tuple]:
    """The file's ranges: name -> ("float" or "int", low, high, whether logarithmic) or ("choice", values).

    ValueError for what is none.
    """
    found = {}
    for name, what in (study.get("search") or {}).items():
        bounds = what[:2] if isinstance(what, list) else []
        numbers = len(bounds) == 2 and all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in bounds)
        if isinstance(what, dict) and set(what) == {"choice"} and isinstance(what["choice"], list) and what["choice"]:
            found[name] = ("choice", what["choice"])
        elif numbers and bounds[0] < bounds[1] and (what[2:] == [] or (what[2:] == ["log"] and bounds[0] > 0)):
            kind = "int" if all(isinstance(x, int) for x in bounds) else "float"
            found[name] = (kind, *bounds, what[2:] == ["log"])
        else:
            raise ValueError(
                f"search: {name}: {what} is no range: write [LOW, HIGH], [LOW, HIGH, log] (LOW above 0) or "
                "{choice: [...]}; YAML reads 1.0e-4 as a number, and 1e-4 as text"
            )
    if not found:
        raise ValueError(
            "--trials wants ranges in the study's file, such as search: {learning_rate: [0.0001, 0.01, log]}"
        )
    return found


def suggest(trial, ranges: dict[str, tuple]) -> dict:
    """The values of a trial."""
    values = {}
    for name, (kind, *rest) in ranges.items():
        if kind == "choice":
            values[name] = trial.suggest_categorical(name, rest[0])
        else:
            low, high, log = rest
            values[name] = (trial.suggest_int if kind == "int" else trial.suggest_float)(name, low, high, log=log)
    return values


def runs_of(study: dict, values: dict) -> list[Planned]:
    """A trial's runs: the study with these values in all of them."""
    point = {**study, "flags": {**(study.get("flags") or {}), **values}}
    tag = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
    label = " ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items())
    return [
        Planned(f"trial-{tag}-{run.name}", run.flags, run.total, f"{run.label} {label}".strip())
        for run in expand(point)
    ]


def search(study: dict, folder: Path, args: argparse.Namespace) -> int:
    """Up to `args.trials` trials, `args.jobs` side by side. Returns the exit status."""
    optuna = optional("optuna", '"optuna>=4"', "--trials")
    ranges, name = ranges_of(study), study.get("metric", "last_score")
    if name not in METRICS:
        raise ValueError(located(study, f"metric: {name} is none of {', '.join(METRICS)}", [str(name)]))
    metric = METRICS[name]
    if twice := set(ranges) & (set(study.get("flags") or {}) | set(study.get("grid") or {})):
        raise ValueError(f"{', '.join(sorted(twice))} stands in search and is set, too: which is it?")
    first = {name: what[0][0] if kind == "choice" else what[0] for name, (kind, *what) in ranges.items()}
    check(runs_of(study, first), study)
    prepare(runs_of(study, first))  # what a flag or a data set lacks is said before anything runs
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    states = optuna.trial.TrialState
    book = optuna.create_study(
        study_name=study["name"],
        storage=optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log"))),
        direction="maximize",
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )
    for trial in book.get_trials(states=(states.RUNNING,)):  # of a search that was stopped or killed
        book.tell(trial.number, state=states.FAIL)
        book.enqueue_trial(trial.params)
    jobs, gpus = args.jobs or torch.cuda.device_count() or cores(), visible_gpus()
    worker = Worker(folder, args.retries, 0 if gpus else max(1, cores() // jobs), echo=True)

    def evaluate(trial, runs: list[Planned]) -> float | None:
        """The trial's score; None if it was cut short, by the pruner or by a signal."""
        found = []
        for i, run in enumerate(runs):
            place = folder / run.name

            def worth_it(i=i, run=run, place=place, told=set()) -> bool:  # noqa: B006 - one set a run
                """Its evaluations so far are reported; whether the pruner lets it go on."""
                state = state_of(place)
                if state.scores and state.step not in told:
                    told.add(state.step)
                    trial.report(statistics.mean([*found, state.scores[-1]]), i * run.total + state.step)
                return not trial.should_prune()

            worker.finish(run, gpus[trial.number % len(gpus)] if gpus else None, worth_it)
            state = state_of(place)
            if state.word == "failed":
                raise ValueError(f"{run.name}: {state.sentence}")
            if state.word != "done":
                return None
            found.append(metric(state.scores))
        return statistics.mean(found)

    wanted = args.trials - len(book.get_trials(states=(states.COMPLETE, states.PRUNED)))
    with catch_signals() as signals, ThreadPoolExecutor(jobs) as pool:
        pending, begun = {}, 0
        while pending or (begun < wanted and not signals):
            while len(pending) < jobs and begun < wanted and not signals:
                trial = book.ask()
                runs = runs_of(study, suggest(trial, ranges))
                settle(runs, folder)
                pending[pool.submit(evaluate, trial, runs)] = trial
                begun += 1
            if signals and not worker.stopping.is_set():
                worker.stop()
            for future in wait(pending, timeout=work.LOOK, return_when=FIRST_COMPLETED).done:
                trial = pending.pop(future)
                if future.exception():
                    book.tell(trial, state=states.FAIL)
                    if not isinstance(future.exception(), ValueError):
                        raise future.exception()
                    print(f"trial {trial.number} failed: {future.exception()}", flush=True)
                elif future.result() is not None:
                    book.tell(trial, future.result())
                elif not worker.stopping.is_set():  # else it stays open, and is tried again
                    book.tell(trial, state=states.PRUNED)
    finished = book.get_trials(states=(states.COMPLETE,))
    for trial in sorted(finished, key=lambda trial: -trial.value)[:10]:
        values = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in trial.params.items())
        print(f"{trial.value:8.1f}  {', '.join(values)}")
    pruned = len(book.get_trials(states=(states.PRUNED,)))
    print(f"{len(finished)} trials, {pruned} more cut short; highest {name.replace('_', ' ')} first")
    if signals:
        print("stopped; the same command goes on")
        return 128 + signals[0]
    return 0 if finished else 1
