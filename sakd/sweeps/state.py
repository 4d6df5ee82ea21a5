"""What has become of each run of a plan: read from folders, submissions' records and SLURM's queue, never
noted."""

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sakd.runs import is_locked, last_words, read_metrics
from sakd.sweeps import slurm, submissions
from sakd.sweeps.plan import Job
from sakd.sweeps.submissions import Submission

STATES = ("finished", "running", "queued", "failed", "lost", "missing")
ON_THEIR_WAY = ("finished", "running", "queued")
UNCONFIRMED = 10.0  # seconds in which jobs of a launcher that died may still come to SLURM
LAST_EPOCHS = 5  # tell how long the next will take

Submissions = Mapping[str, Submission]  # by run, the last that has it
Queue = Mapping[tuple[str, int], slurm.Queued]


@dataclass(frozen=True)
class Standing:
    """``state``: one of STATES. ``job``: SLURM's id where it has one; ``reason``: why it waits; ``error``,
    ``log``: of a failure; ``epoch``, ``epochs``, ``accuracy`` (percent), ``left`` (seconds, None where not
    known): of one that runs."""

    name: str
    state: str
    folder: str
    job: str | None = None
    reason: str | None = None
    error: str | None = None
    log: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    accuracy: float | None = None
    left: float | None = None


def survey(jobs: Iterable[Job], runs: Path) -> dict[str, Standing]:
    """Each job's standing by its name, in order. Raises SlurmError where jobs were handed to SLURM and it
    does not answer.

    finished: it has its result. running: its job runs, or any process has its folder. queued: waiting in
    SLURM or for a process here. failed: its last job, or one that it needed, or its last start by hand, ended
    with an error. lost: it was handed over, or began, and is nowhere to be found. missing: it was never
    begun."""
    jobs = list(jobs)
    finished = {job.name for job in jobs if (job.run.folder / "result.json").exists()}
    last = submissions.latest(submissions.read(runs))
    concerned = {
        last[job.name].folder: last[job.name] for job in jobs if job.name not in finished and job.name in last
    }
    queue = _queue(list(concerned.values()))
    alive = {
        folder for folder, submission in concerned.items() if submission.is_local and submission.is_alive()
    }
    return {job.name: _standing(job, job.name in finished, last, queue, alive) for job in jobs}


def _standing(job: Job, finished: bool, last: Submissions, queue: Queue, alive: Collection[Path]) -> Standing:
    folder, submission = job.run.folder, last.get(job.name)
    if finished or (folder / "result.json").exists():  # it may just have ended
        return Standing(job.name, "finished", str(folder))
    queued = queue.get(submission.places[job.name]) if submission else None
    log = _text(submission.log(job.name)) if submission else None
    failure = submission.failure(job.name) if submission else None
    if queued is not None and not (queued.is_ending and failure):
        if queued.waits:
            return Standing(job.name, "queued", str(folder), queued.id, queued.reason)
        return _running(job, queued.id, log)
    if is_locked(folder / ".lock"):
        return _running(job, None, log)
    if failure:
        return Standing(job.name, "failed", str(folder), error=failure.get("error"), log=log)
    if submission and submission.folder in alive:
        return Standing(job.name, "queued", str(folder), reason="waiting for a process")
    if cause := _failed_before(job, last):
        return Standing(job.name, "failed", str(folder), error=cause[0], log=cause[1])
    own_log = _text(folder / "run.log") if (folder / "run.log").exists() else None
    if (log or not submission) and (error := last_words(folder)):
        return Standing(job.name, "failed", str(folder), error=error, log=log or own_log)
    begun = submission or (folder / "config.yaml").exists()
    return Standing(job.name, "lost" if begun else "missing", str(folder), log=log or own_log)


def needed_elsewhere(names: Collection[str], besides: Collection[str], runs: Path) -> set[str]:
    """Those of ``names`` that a job needs which waits in SLURM for other runs than ``besides``, in whatever
    sweep."""
    found = submissions.latest(submissions.read(runs))
    waiting = {
        run: submission for run, submission in found.items() if run not in besides and not submission.is_local
    }
    needs = {run: set(submission.needs.get(run, ())) & set(names) for run, submission in waiting.items()}
    concerned = {waiting[run].folder: waiting[run] for run, needed in needs.items() if needed}
    queue = _queue(list(concerned.values()))
    return set().union(*(needed for run, needed in needs.items() if waiting[run].places[run] in queue))


def _queue(concerned: Sequence[Submission]) -> Queue:
    at_slurm = [submission for submission in concerned if not submission.is_local]
    if not at_slurm:
        return {}
    unconfirmed = [submission.time for submission in at_slurm if not submission.is_confirmed]
    if unconfirmed:  # its launcher may have died, its jobs be on their way yet
        time.sleep(min(max(0.0, max(unconfirmed) + UNCONFIRMED - time.time()), UNCONFIRMED))
    return slurm.queue([array.name for submission in at_slurm for array in submission.arrays])


def _running(job: Job, queued: str | None, log: str | None) -> Standing:
    lines = read_metrics(job.run.folder)
    epochs = int(job.run.config["epochs"])
    left = accuracy = None
    if lines:
        last = lines[-LAST_EPOCHS:]
        each = sum(line["seconds"] for line in last) / len(last)
        left = max(0.0, each * (epochs - len(lines)) - min(each, time.time() - lines[-1]["time"]))
        accuracy = lines[-1].get("test/accuracy")
    progress = {"epoch": len(lines), "epochs": epochs, "accuracy": accuracy, "left": left}
    return Standing(job.name, "running", str(job.run.folder), queued, log=log, **progress)


def _failed_before(job: Job, last: Submissions) -> tuple[str, str | None] | None:
    """Why a job never came to its turn: what it needed has failed. The error, and that one's log."""
    for needed in job.needs:
        submission = last.get(needed)
        if submission is not None and (failure := submission.failure(needed)) is not None:
            return f"{needed}, which it needs, failed: {failure.get('error')}", _text(submission.log(needed))
    return None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
