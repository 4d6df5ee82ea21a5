"""What has become of each run of a plan: read from folders, submissions' records and SLURM's queue, never noted."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sakd.runs import read_metrics
from sakd.sweeps import slurm, submissions
from sakd.sweeps.plan import Job
from sakd.sweeps.submissions import Submission, is_locked

STATES = ("finished", "running", "queued", "failed", "lost", "missing")
ON_THEIR_WAY = ("finished", "running", "queued")
UNCONFIRMED = 10.0  # seconds in which a submission may be known and SLURM not yet asked for its jobs
LAST_EPOCHS = 5  # tell how long the next will take


@dataclass(frozen=True)
class Standing:
    """``state``: one of STATES. ``job``: SLURM's id where it has one; ``reason``: why it waits; ``error``, ``log``: of a
    failure; ``epoch``, ``epochs``, ``accuracy`` (percent), ``left`` (seconds, None where not known): of one that runs."""

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
    left: float | None = field(default=None)


def survey(jobs: Iterable[Job], runs: Path) -> dict[str, Standing]:
    """Each job's standing by its name, in order. Raises SlurmError where jobs were handed to SLURM and it does not answer.

    finished: it has its result. running: its job runs, or any process has its folder. queued: waiting in SLURM or for a
    process here. failed: its last job, or one that it needed, ended with an error. lost: it was handed over, or began, and
    is nowhere to be found. missing: it was never begun.
    """
    jobs = list(jobs)
    finished = {job.name for job in jobs if (job.run.folder / "result.json").exists()}
    last_submission = submissions.latest(submissions.read(runs))
    open_ones = [job for job in jobs if job.name not in finished]
    concerned = {id(last_submission[job.name]): last_submission[job.name] for job in open_ones if job.name in last_submission}
    queue = _queue(list(concerned.values()))
    alive = {key for key, submission in concerned.items() if submission.is_local and submission.is_alive()}
    found: dict[str, Standing] = {}
    for job in jobs:
        folder = str(job.run.folder)
        if job.name in finished or (job.run.folder / "result.json").exists():  # it may just have ended
            found[job.name] = Standing(job.name, "finished", folder)
            continue
        submission = last_submission.get(job.name)
        queued = submission and queue.get(submission.places[job.name])
        if (queued and queued.state != "PENDING") or is_locked(job.run.folder / ".lock"):
            found[job.name] = _running(job, queued.id if queued else None, submission)
        elif queued:
            found[job.name] = Standing(job.name, "queued", folder, queued.id, queued.reason)
        elif submission and job.name in submission.failures:
            failure = submission.failure(job.name) or {}
            found[job.name] = Standing(
                job.name, "failed", folder, error=failure.get("error"), log=_text(submission.log(job.name))
            )
        elif submission and id(submission) in alive:
            found[job.name] = Standing(job.name, "queued", folder, reason="waiting for a process")
        elif submission and (cause := _failed_before(job, last_submission)):
            found[job.name] = Standing(job.name, "failed", folder, error=cause[0], log=cause[1])
        elif submission or (job.run.folder / "config.yaml").exists():
            found[job.name] = Standing(job.name, "lost", folder, log=_text(submission.log(job.name)) if submission else None)
        else:
            found[job.name] = Standing(job.name, "missing", folder)
    return found


def _queue(concerned: Sequence[Submission]) -> Mapping[tuple[str, int], slurm.Queued]:
    at_slurm = [submission for submission in concerned if not submission.is_local]
    if not at_slurm:
        return {}
    youngest = time.time() - max(submission.time for submission in at_slurm)
    if 0 <= youngest < UNCONFIRMED:  # its launcher may have died between the record and the jobs' arrival
        time.sleep(min(1.0, UNCONFIRMED - youngest))
    return slurm.queue([array.name for submission in at_slurm for array in submission.arrays])


def _running(job: Job, queued: str | None, submission: Submission | None) -> Standing:
    lines = read_metrics(job.run.folder)
    epochs = int(job.run.config["epochs"])
    left = accuracy = None
    if lines:
        last = lines[-LAST_EPOCHS:]
        each = sum(line["seconds"] for line in last) / len(last)
        left = max(0.0, each * (epochs - len(lines)) - min(each, time.time() - lines[-1]["time"]))
        accuracy = lines[-1].get("test/accuracy")
    log = submission.log(job.name) if submission else None
    return Standing(
        *(job.name, "running", str(job.run.folder), queued, None, None, _text(log)),
        *(len(lines), epochs, accuracy, left),
    )


def _failed_before(job: Job, last_submission: Mapping[str, Submission]) -> tuple[str, str | None] | None:
    """Why a job never came to its turn: what it needed has failed. The error, and that one's log."""
    for needed in job.needs:
        submission = last_submission.get(needed)
        if submission is not None and (failure := submission.failure(needed)) is not None:
            return f"{needed}, which it needs, failed: {failure.get('error')}", _text(submission.log(needed))
    return None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
