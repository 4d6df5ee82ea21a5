"""Processes on this machine, some at a time, each with a GPU of its own where there are some."""

import fcntl
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated

from annotated_types import Ge, Le
from filelock import FileLock

from sakd.runs import is_locked
from sakd.runs.code import check_copy
from sakd.signals import interruptible, uninterrupted
from sakd.sweeps.launchers.base import Launcher, Queue, Queued
from sakd.sweeps.plan import Plan
from sakd.sweeps.submissions import Place, Submission, cancelled, needs_of

log = logging.getLogger("sakd")

NO_GPU = ("-1", "NoDevFiles")  # what CUDA_VISIBLE_DEVICES hides all of them with
SECONDS_TO_END = 60.0  # that a process gets to end in when all are told to
ALIVE = ".alive"  # in a submission's folder: locked by the launch that starts its jobs, while it lives


@dataclass(frozen=True)
class LocalSettings:
    """The keys of hydra/launcher=local."""

    # At a time; None: as many as there are GPUs, or without any as there are cores.
    processes: Annotated[int, Ge(1), Le(1024)] | None


class LocalLauncher(Launcher):
    """Launcher of `hydra/launcher=local`: waits until all is done."""

    Settings = LocalSettings
    waits = True

    def check(self, planned: Plan) -> None:
        """Accept everything: what runs here runs anywhere."""

    def largest_array(self) -> None:
        return None

    def submit(self, submission: Submission, under_way: Mapping[str, str]) -> None:
        """Let its jobs wait for this process, by a lock that the kernel lets go of when that dies."""
        self.alive = FileLock(submission.folder / ALIVE)
        self.alive.acquire()

    def carry_out(self, submission: Submission) -> None:
        """Run all jobs to their end; one that needs what failed is left out.

        An interruption ends them all, each with its runs marked KILLED.
        """
        try:
            with interruptible():
                _run(_Processes(submission, self.settings.processes))
        finally:
            self.alive.release()

    def queue(self, submissions: Sequence[Submission]) -> Queue:
        found: dict[Place, Queued] = {}
        for submission in submissions:
            alive = is_locked(submission.folder / ALIVE)
            for place in submission.jobs:
                path = log_of(submission, place)
                if is_locked(path):  # its process lives, also where the launch has died
                    found[place] = Queued("running")
                elif alive and not (path.exists() and path.stat().st_size):
                    found[place] = Queued("waiting", reason="waiting for a process")
        return found

    def cancel(self, ids: Iterable[str]) -> None:
        """Do nothing: jobs look at what is cancelled before they start, and once a second."""

    def logs(self, submission: Submission) -> dict[Place, Path]:
        paths = {place: log_of(submission, place) for place in submission.jobs}
        return {place: path for place, path in paths.items() if path.exists()}


def log_of(submission: Submission, place: Place) -> Path:
    """A job's log, which is also locked by its process."""
    array, index = place
    return submission.logs(array) / f"{index}.log"


def _run(pool: "_Processes") -> None:
    submission = pool.submission
    jobs, waiting = submission.jobs, dict(submission.jobs)
    under_way: dict[Future[int], Place] = {}
    unmet: set[str] = set()  # runs whose jobs are over, or left out, and that have no result
    done = 0

    def begin() -> None:
        """Start the jobs that may, as far as there is room, and leave those out that must not."""
        stopped = set(cancelled(submission.folder))
        unfinished = {run for place in (*waiting, *under_way.values()) for run in jobs[place]}
        for place, job in list(waiting.items()):
            of_all, of_some = needs_of(job, submission.needs)
            if stopped.issuperset(job) or unmet.intersection(of_all):
                why = "it is cancelled" if stopped.issuperset(job) else "what it needs failed"
                for run in job:
                    log.warning("%s is left out: %s", run, why)
                unmet.update(job)
                unfinished.difference_update(job)
                del waiting[place]
            elif len(under_way) < pool.size and not unfinished.intersection((*of_all, *of_some)):
                under_way[threads.submit(pool.run, place)] = place
                del waiting[place]

    with ThreadPoolExecutor(pool.size) as threads:
        try:
            while waiting or under_way:
                begin()
                for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                    place, done = under_way.pop(future), done + 1
                    unmet.update(run for run in jobs[place] if not submission.is_finished(run))
                    log_file = log_of(submission, place)
                    outcome = "finished" if future.result() == 0 else f"failed; see {log_file}"
                    log.info("%d of %d  %s %s", done, len(jobs), _title(jobs[place]), outcome)
        except BaseException:
            pool.end()
            raise


def _title(job: Sequence[str]) -> str:
    return job[0] if len(job) == 1 else f"{job[0]} and {len(job) - 1} more"


class _Processes:
    """Processes, so many at a time: as there are GPUs, or without any as there are cores, unless it is
    said."""

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

    def run(self, place: Place) -> int:
        """Run one job; its exit code. Raises RunError where the code is not any more what was copied."""
        check_copy(Path(self.submission.snapshot))
        gpu = self.gpus.get()
        try:
            environment = os.environ | self.submission.environment()
            environment.setdefault("OMP_NUM_THREADS", str(self.threads))
            if gpu is not None:
                environment["CUDA_VISIBLE_DEVICES"] = gpu
            folder = str(self.submission.folder.absolute())
            command = [sys.executable, "-m", "sakd.sweeps.work", folder, *self.submission.jobs[place]]
            # A session of its own: Ctrl-C reaches the launching process alone, which then ends the others.
            keys = {
                "env": environment,
                "stdin": subprocess.DEVNULL,
                "stderr": subprocess.STDOUT,
                "start_new_session": True,
            }
            with log_of(self.submission, place).open("ab") as output, self.starting:
                if self.ending:
                    return 1
                # The process inherits the lock with the file, and keeps it for as long as it lives.
                fcntl.flock(output, fcntl.LOCK_EX)
                process = subprocess.Popen(command, stdout=output, **keys)
                self.living.add(process)
            code = process.wait()
            self.living.discard(process)
            return code
        finally:
            self.gpus.put(gpu)

    def end(self) -> None:
        """End all of them, and let none start any more."""
        with uninterrupted():  # whatever else comes, all are told
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
    """List GPUs as CUDA_VISIBLE_DEVICES names them, without asking torch, which would take memory of each."""
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
