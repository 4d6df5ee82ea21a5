"""A submission's jobs as processes on this machine, some at a time, each with a GPU of its own where there are some."""

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from queue import SimpleQueue

from sakd.sweeps.plan import Job
from sakd.sweeps.submissions import Submission

log = logging.getLogger("sakd")

SECONDS_TO_END = 60.0  # that a process gets to end in when all are told to


def run_here(submission: Submission, jobs: Sequence[Job], processes: int | None) -> None:
    """Until all are done; what waits for a job that failed is left out. ``jobs``: each behind what it needs.

    An interruption ends them all, each with its run marked KILLED.
    """
    pool = _Processes(submission, processes)
    open_jobs = {job.name: job for job in jobs}
    under_way: dict[Future[int], Job] = {}
    failed: set[str] = set()
    done = 0
    with ThreadPoolExecutor(pool.size) as threads:
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            while open_jobs or under_way:
                for job in list(open_jobs.values()):
                    if failed.intersection(job.needs):
                        failed.add(job.name)
                        log.warning("%s is left out: what it needs failed", open_jobs.pop(job.name).name)
                    elif len(under_way) < pool.size and not any(
                        name in open_jobs or _runs(name, under_way) for name in job.needs
                    ):
                        under_way[threads.submit(pool.run, open_jobs.pop(job.name))] = job
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    job, done = under_way.pop(future), done + 1
                    if future.result() != 0:
                        failed.add(job.name)
                    outcome = "finished" if future.result() == 0 else f"failed; see {submission.log(job.name)}"
                    log.info("%d of %d  %s %s", done, len(jobs), job.name, outcome)
        except BaseException:
            pool.end()
            raise
        finally:
            signal.signal(signal.SIGTERM, before)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt(signal.Signals(number).name)


def _runs(name: str, under_way: dict[Future[int], Job]) -> bool:
    return any(job.name == name for job in under_way.values())


class _Processes:
    """So many at a time: as many as there are GPUs, or without any as there are cores, unless it is said."""

    def __init__(self, submission: Submission, size: int | None):
        self.submission = submission
        gpus = _gpus()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.size = size or len(gpus) or cores
        self.threads = max(1, cores // self.size)
        self.places: SimpleQueue[str | None] = SimpleQueue()
        for place in range(self.size):
            self.places.put(gpus[place % len(gpus)] if gpus else None)
        self.living: set[subprocess.Popen] = set()

    def run(self, job: Job) -> int:
        """The exit code of one job."""
        gpu = self.places.get()
        try:
            environment = os.environ | {"PYTHONPATH": _path(self.submission.snapshot)}
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
            if gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            command = [sys.executable, "-m", "sakd.sweeps.work", str(self.submission.folder.absolute()), job.name]
            array, _ = self.submission.places[job.name]
            with (self.submission.logs(array) / f"{job.name}.log").open("ab") as output:
                # A session of its own: Ctrl-C reaches this process alone, which then ends the others.
                process = subprocess.Popen(
                    command,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self.living.add(process)
            try:
                return process.wait()
            finally:
                self.living.discard(process)
        finally:
            self.places.put(gpu)

    def end(self) -> None:
        for process in list(self.living):
            process.terminate()
        for process in list(self.living):
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()


def _path(first: str) -> str:
    others = os.environ.get("PYTHONPATH")
    return first if not others else f"{first}{os.pathsep}{others}"


def _gpus() -> list[str]:
    """As CUDA_VISIBLE_DEVICES names them, without asking torch, which would take memory of each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [str(index) for index, line in enumerate(listed.splitlines()) if line.startswith("GPU ")]
