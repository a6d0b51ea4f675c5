"""Where runs are trained: this machine, a Ray cluster, SLURM's queue. Each returns when all is over or stopped.

On a cluster every node sees the same files: this checkout, the data sets and the study's folder lie in a shared folder
under the same path, and so a run goes on from its last checkpoint on whatever node it comes to next.
"""

import json
import os
import queue
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from common.packages import optional
from sweeping.study import Planned
from sweeping.work import LOOK, Worker


@dataclass(frozen=True)
class Resources:
    """What a run wants of a cluster."""

    cpus: int = 1
    gpus: float = 0.0
    address: str = "auto"  # of a Ray cluster
    partition: str = ""
    minutes: int = 0  # of a SLURM job; 0: the partition's default


PACKAGES = {"ray": '"ray>=2.9"', "slurm": '"submitit>=1.5"'}


def package_for(place: str):
    """Ray, or submitit. ValueError with what to install, if it is missing."""
    return optional({"slurm": "submitit"}.get(place, place), PACKAGES[place], f"--on {place}")


# -- this machine ----------------------------------------------------------------------------------


def visible_gpus() -> list[str]:
    """The cards that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(i) for i in range(count)]


def train_here(runs: list[Planned], worker: Worker, jobs: int, look: Callable[[], bool]) -> None:
    """jobs runs side by side, spread over the cards, if there are any. look: called now and then; True: stop."""
    gpus, places = visible_gpus(), queue.SimpleQueue()
    for i in range(jobs):
        places.put(gpus[i % len(gpus)] if gpus else None)

    def train(run: Planned) -> None:
        gpu = places.get()
        try:
            worker.finish(run, gpu)
        finally:
            places.put(gpu)

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, run) for run in runs]
        while not all(future.done() for future in futures):
            if look() and not worker.stopping.is_set():
                worker.stop()
            time.sleep(LOOK / 4)
        for future in futures:
            future.result()


# -- Ray -------------------------------------------------------------------------------------------


def train_on_ray(runs: list[Planned], worker: Worker, jobs: int, look: Callable[[], bool], want: Resources) -> None:
    """A Ray task for each run; one whose node is lost begins again elsewhere, from the last checkpoint."""
    ray = package_for("ray")
    host, _, port = want.address.rpartition(":")
    if port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except OSError as error:
            raise ValueError(f"no Ray cluster answers at {want.address} ({error}): is `ray start` running?") from error
    try:
        ray.init(address=want.address, log_to_driver=False, include_dashboard=False, configure_logging=False)
    except ConnectionError as error:
        raise ValueError(
            f"no Ray cluster is found ({want.address}): begin one by `ray start --head`, or name it by --address"
        ) from error
    try:
        task = ray.remote(num_cpus=want.cpus, num_gpus=want.gpus, max_retries=-1)(work)
        left, pending = list(runs), {}
        while left or pending:
            if look():
                for ref in pending:  # a KeyboardInterrupt over there, which tells the trainer to save
                    ray.cancel(ref, force=False)
                ray.wait(list(pending), num_returns=len(pending), timeout=120)
                return
            while left and (not jobs or len(pending) < jobs):
                run = left.pop(0)
                args = str(worker.folder), run, worker.retries, worker.threads
                pending[task.options(name=run.name).remote(*args)] = run
            done, _ = ray.wait(list(pending), timeout=LOOK)
            for ref in done:
                run = pending.pop(ref)
                try:
                    ray.get(ref)
                except ray.exceptions.RayError as error:
                    worker.tell(run, "lost", sentence=str(error).splitlines()[0])
    finally:
        ray.shutdown()


def work(folder: str, run: Planned, retries: int, threads: int) -> None:
    """One run, in a process on some node."""
    Worker(Path(folder), retries, threads).finish(run)


# -- SLURM -----------------------------------------------------------------------------------------


class Job:
    """One run as submitit calls it. It is put back into the queue when its time is nearly over."""

    def __init__(self, folder: str, retries: int, threads: int):
        self.arguments = folder, retries, threads
        self.worker = None

    def __getstate__(self) -> dict:
        return {"arguments": self.arguments, "worker": None}

    def __call__(self, run: Planned) -> None:
        folder, retries, threads = self.arguments
        self.worker = Worker(Path(folder), retries, threads)
        self.worker.finish(run)

    def checkpoint(self, run: Planned):
        """submitit asks this when SLURM is about to end the job: save, and come again."""
        submitit = package_for("slurm")
        if self.worker:
            processes = list(self.worker.processes.values())
            self.worker.stop()
            for process in processes:
                process.wait()
        return submitit.helpers.DelayedSubmission(self, run)


def train_on_slurm(
    runs: list[Planned], worker: Worker, jobs: int, look: Callable[[], bool], want: Resources, cluster: str = "slurm"
) -> None:
    """A job array, and a look at it until it is over. cluster: submitit's word; `local` runs it here, for tests"""
    submitit = package_for("slurm")
    if cluster == "slurm" and not shutil.which("sbatch"):
        raise ValueError("there is no sbatch here: --on slurm is for a login node of a SLURM cluster")
    record = worker.folder / "slurm.json"
    if record.exists() and cluster == "slurm":  # what an earlier sweep left waiting would be trained twice
        ids = json.loads(record.read_text())["jobs"]
        subprocess.run(["scancel", "--state=PENDING", *ids], check=False)
    executor = submitit.AutoExecutor(folder=worker.folder / "slurm", cluster=cluster)
    more = {"slurm_partition": want.partition} if want.partition else {}
    more |= {"timeout_min": want.minutes} if want.minutes else {}
    more |= {"gpus_per_node": max(1, round(want.gpus))} if want.gpus else {}
    executor.update_parameters(
        name=f"sweep-{worker.folder.name}",
        cpus_per_task=want.cpus,
        slurm_array_parallelism=jobs or len(runs),
        **more,
    )
    submitted = executor.map_array(Job(str(worker.folder.resolve()), worker.retries, worker.threads), runs)
    record.write_text(json.dumps({"jobs": [job.job_id for job in submitted]}))
    print(f"submitted {len(submitted)} jobs: {submitted[0].job_id.partition('_')[0]}", flush=True)
    told = False
    while not all(job.done() for job in submitted):
        if look() and not told:
            told = True
            for job in submitted:
                job.cancel()
        time.sleep(LOOK)
    for job, run in zip(submitted, runs):
        error = None if told else job.exception()  # submitit waits long for the result of a cancelled one
        if error:
            worker.tell(run, "lost", sentence=str(error).strip().splitlines()[-1])
