"""A submission's jobs as processes on this machine, some at a time, each with a GPU of its own where there
are some."""

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from queue import SimpleQueue

from sakd.signals import interruptible
from sakd.sweeps.plan import Job
from sakd.sweeps.submissions import Submission

log = logging.getLogger("sakd")

NO_GPU = ("-1", "NoDevFiles")  # what CUDA_VISIBLE_DEVICES hides all of them with
SECONDS_TO_END = 60.0  # that a process gets to end in when all are told to


def run_here(submission: Submission, jobs: Sequence[Job], processes: int | None) -> None:
    """Until all are done; what waits for a job that failed is left out. ``jobs``: each behind what it needs.

    An interruption ends them all, each with its run marked KILLED.
    """
    with interruptible():
        _run(_Processes(submission, processes), jobs)


def _run(pool: "_Processes", jobs: Sequence[Job]) -> None:
    open_jobs = {job.name: job for job in jobs}
    under_way: dict[Future[int], Job] = {}
    failed: set[str] = set()
    done = 0

    def unfinished() -> set[str]:
        return {*open_jobs, *(job.name for job in under_way.values())}

    with ThreadPoolExecutor(pool.size) as threads:
        try:
            while open_jobs or under_way:
                for job in list(open_jobs.values()):
                    if failed.intersection(job.needs):
                        failed.add(job.name)
                        log.warning("%s is left out: what it needs failed", open_jobs.pop(job.name).name)
                    elif len(under_way) < pool.size and not unfinished().intersection(job.needs):
                        under_way[threads.submit(pool.run, open_jobs.pop(job.name))] = job
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    job, done = under_way.pop(future), done + 1
                    if future.result() != 0:
                        failed.add(job.name)
                    outcome = "finished" if future.result() == 0 else f"failed; see {pool.log(job)}"
                    log.info("%d of %d  %s %s", done, len(jobs), job.name, outcome)
        except BaseException:
            pool.end()
            raise


class _Processes:
    """So many at a time: as many as there are GPUs, or without any as there are cores, unless it is said."""

    def __init__(self, submission: Submission, size: int | None):
        self.submission = submission
        gpus = _gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.size = size or len(gpus) or cores
        self.threads = max(1, cores // self.size)
        self.gpus: SimpleQueue[str | None] = SimpleQueue()
        for place in range(self.size):
            self.gpus.put(gpus[place % len(gpus)] if gpus else None)
        self.starting = threading.Lock()
        self.ending = False
        self.living: set[subprocess.Popen] = set()

    def log(self, job: Job) -> Path:
        array, _ = self.submission.places[job.name]
        return self.submission.logs(array) / f"{job.name}.log"

    def run(self, job: Job) -> int:
        """The exit code of one job."""
        gpu = self.gpus.get()
        try:
            environment = os.environ | self.submission.environment()
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
            if gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            command = [
                sys.executable,
                "-m",
                "sakd.sweeps.work",
                str(self.submission.folder.absolute()),
                job.name,
            ]
            # A session of its own: Ctrl-C reaches the launching process alone, which then ends the others.
            keys = {
                "env": environment,
                "stdin": subprocess.DEVNULL,
                "stderr": subprocess.STDOUT,
                "start_new_session": True,
            }
            with self.log(job).open("ab") as output, self.starting:
                if self.ending:
                    return 1
                process = subprocess.Popen(command, stdout=output, **keys)
                self.living.add(process)
            code = process.wait()
            self.living.discard(process)
            return code
        finally:
            self.gpus.put(gpu)

    def end(self) -> None:
        """All of them, and none starts any more."""
        with self.starting:
            self.ending = True
            living = list(self.living)
        for process in living:
            process.terminate()
        deadline = time.monotonic() + SECONDS_TO_END
        for process in living:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, without asking torch, which would take memory of each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name and name not in NO_GPU]
    try:
        listed = subprocess.run(
            ["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
