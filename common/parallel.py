"""Many processes for one heap of jobs, and none of them left over, however it ends."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from types import ModuleType


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_jobs(
    do: Callable, jobs: list, workers: int, progress: Callable[[int], object], words: Callable[[object], str]
) -> Iterator[tuple]:
    """(job, do(job, report)) as they are finished, in any order. However this ends, the workers end with it.

    do: a module's function, called in the workers; each report(n), n an int, becomes progress(n) here.
    words(job): what was being done, for the error (ChildProcessError) if a worker dies over it.
    """
    context = multiprocessing.get_context("spawn")
    waiting, under_way, processes = list(reversed(jobs)), {}, []
    try:
        with starting_workers():
            for _ in range(workers):
                pipe, theirs = context.Pipe()
                process = context.Process(target=_work, args=(do, theirs), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()
                under_way[pipe] = waiting.pop()
                with _a_death_told(words, under_way[pipe]):
                    pipe.send(under_way[pipe])
        while under_way:
            for pipe in wait(list(under_way)):
                with _a_death_told(words, under_way[pipe]):
                    message = pipe.recv()
                if isinstance(message, int):
                    progress(message)
                    continue
                done = under_way.pop(pipe)
                if waiting:
                    under_way[pipe] = waiting.pop()
                    with _a_death_told(words, under_way[pipe]):
                        pipe.send(under_way[pipe])
                yield done, message
    finally:
        for process in processes:
            process.terminate()
            process.join()


@contextmanager
def _a_death_told(words: Callable[[object], str], job) -> Iterator[None]:
    """A pipe whose other end is gone, while reading or writing, means that its worker died."""
    try:
        yield
    except (EOFError, ConnectionError):
        raise ChildProcessError(
            f"a worker died at {words(job)}, so no file was made. Its own words are above; "
            "without any, it was killed, perhaps for want of memory: try fewer workers."
        ) from None


def _work(do: Callable, pipe) -> None:
    """A worker's life: jobs in, progress and results out, until the other end of the pipe is gone."""
    try:
        while True:
            pipe.send(do(pipe.recv(), pipe.send))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


@contextmanager
def starting_workers() -> Iterator[None]:
    """Processes started here have one BLAS thread, as they share the cores already, and leave Ctrl-C to the parent.

    They do not import the program that started them either: a trainer's PyTorch would cost each a second.
    """
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
    before, main = {name: os.environ.get(name) for name in names}, sys.modules["__main__"]
    os.environ.update(dict.fromkeys(names, "1"))
    # A Ctrl-C is kept for later: it would leave a worker half begun. The mask alone is not enough, as it is this
    # thread's, and the signal may come to one of BLAS's.
    heard, listening = [], threading.current_thread() is threading.main_thread()
    if listening:
        handler = signal.signal(signal.SIGINT, lambda *_: heard.append(True))
    if hasattr(signal, "pthread_sigmask"):  # children inherit the mask
        resource_tracker.ensure_running()  # else the first child would start it, and it unmasks SIGINT
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    sys.modules["__main__"] = ModuleType("__main__")  # where multiprocessing looks for what to import
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if listening:
            signal.signal(signal.SIGINT, handler or signal.SIG_DFL)
            if heard:
                signal.raise_signal(signal.SIGINT)
