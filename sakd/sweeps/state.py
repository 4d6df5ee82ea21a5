"""What has become of each run of a plan: read from folders, submissions' records and launchers' queues, never
noted."""

import itertools
import statistics
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sakd.names import HEADLINE
from sakd.runs import Metrics, is_locked, last_words, read_metrics
from sakd.sweeps import submissions
from sakd.sweeps.launchers import Queue, Queued, launcher_of
from sakd.sweeps.submissions import Place, Submission, failed_before

STATES = ("finished", "running", "queued", "failed", "lost", "missing")
ON_THEIR_WAY = ("finished", "running", "queued")
LAST_EPOCHS = 5  # tell how long the next will take

Submissions = Mapping[str, Submission]  # by run, the last that has it


class Looked(Protocol):
    """A run that is looked at: one of a plan, or found in a folder."""

    @property
    def name(self) -> str: ...

    @property
    def folder(self) -> Path: ...

    @property
    def needs(self) -> Collection[str]: ...

    @property
    def epochs(self) -> int: ...


@dataclass(frozen=True)
class Standing:
    """What has become of a run."""

    name: str  # its folder's
    state: str  # one of STATES
    folder: str  # its path
    job: str | None = None  # the scheduler's id, where there is one
    reason: str | None = None  # why it waits
    error: str | None = None  # of one that failed
    log: str | None = None  # what its job said, where it has one
    epoch: int | None = None  # of one that runs: how many are done
    epochs: int | None = None  # of one that runs: how many there are to be
    accuracy: float | None = None  # of one that runs, percent
    left: float | None = None  # of one that runs, seconds; None where that is not known


@dataclass(frozen=True)
class Known:
    """What is looked at once for all runs."""

    last: Submissions
    queue: Queue  # jobs that are not over
    logs: Mapping[Place, Path]


def survey(runs: Iterable[Looked], folder: Path) -> dict[str, Standing]:
    """Find each run's standing, by its name, in order. ``folder``: the folder of runs.

    Raises a SakdError where runs were handed over and their launcher does not answer.
    """
    runs = list(runs)
    finished = {run.name for run in runs if (run.folder / "result.json").exists()}
    last = submissions.latest(submissions.read(folder))
    concerned = {
        last[run.name].folder: last[run.name] for run in runs if run.name not in finished and run.name in last
    }
    logs: dict[Place, Path] = {}
    for submission in concerned.values():
        logs |= launcher_of(submission.launcher).logs(submission)
    known = Known(last, open_jobs(concerned.values()), logs)
    return {run.name: _standing(run, run.name in finished, known) for run in runs}


def open_jobs(concerned: Iterable[Submission]) -> Queue:
    """Find those of their jobs that are not over. Raises a SakdError where a launcher does not answer."""
    by_launcher: dict[str, list[Submission]] = defaultdict(list)
    for submission in concerned:
        by_launcher[submission.launcher["_target_"]].append(submission)
    found: dict[Place, Queued] = {}
    for alike in by_launcher.values():
        found |= launcher_of(alike[0].launcher).queue(alike)
    return found


def any_goes_on(names: Collection[str], runs: Path) -> bool:
    """True if a process works on one of these runs, or its job waits for its turn.

    Raises a SakdError where a launcher does not answer.
    """
    if any(is_locked(runs / name / ".lock") for name in names):
        return True
    last = submissions.latest(submissions.read(runs))
    found = {name: last[name] for name in names if name in last and not last[name].is_over(name)}
    queue = open_jobs({submission.folder: submission for submission in found.values()}.values())
    return any(submission.places[name] in queue for name, submission in found.items())


def needed_elsewhere(names: Collection[str], besides: Collection[str], runs: Path) -> set[str]:
    """Find those of ``names`` that a job needs which is not over and has other runs than ``besides``, in any
    sweep."""
    found = submissions.latest(submissions.read(runs))
    needs = {
        run: set(submission.needs.get(run, ())) & set(names)
        for run, submission in found.items()
        if run not in besides and not submission.is_over(run)
    }
    queue = open_jobs({found[run].folder: found[run] for run, needed in needs.items() if needed}.values())
    return set().union(*(needed for run, needed in needs.items() if found[run].places[run] in queue))


# A run's state is the first of these that holds:
#
#  1. finished  its result is in its folder
#  2. running   a process works in its folder
#  3. failed    its job noted its failure, while others of the job may go on
#  4. failed    it was cancelled
#  5. queued    its job waits for its turn
#     running   its job is at work
#  6. failed    its job was interrupted
#  7. failed    a run that it needs failed
#  8. failed    its run.log ends with an error, as of a launch by hand
#  9. lost      it was handed over, or began, and is nowhere to be found
# 10. missing   it was never begun
#
# "Its job" is that of the last submission that has the run.


def _standing(run: Looked, finished: bool, known: Known) -> Standing:
    folder, submission = run.folder, known.last.get(run.name)
    place = submission.places[run.name] if submission else None
    log = _text(known.logs.get(place))
    job = known.queue.get(place)

    def stands(state: str, **more: str | None) -> Standing:
        return Standing(run.name, state, str(folder), **{"log": log, **more})

    if finished or (folder / "result.json").exists():  # 1; it may just have ended
        return stands("finished", log=None)
    if is_locked(folder / ".lock"):  # 2
        return _running(run, job if job and job.state == "running" else None, log)
    failure = submission.failure(run.name) if submission else None
    if failure and not failure["interrupted"]:  # 3
        return stands("failed", error=failure["error"])
    if submission and run.name in submission.cancelled:  # 4
        return stands("failed", error="cancelled")
    if job and not (job.state == "ending" and failure):  # 5
        if job.state == "waiting":
            return stands("queued", job=job.id, reason=job.reason, log=None)
        return _running(run, job, log)
    if failure:  # 6
        return stands("failed", error=failure["error"])
    if found := failed_before(run.needs, known.last):  # 7
        needed, where = found
        error = f"{needed}, which it needs, failed: {where.failure(needed)['error']}"
        logs = launcher_of(where.launcher).logs(where)
        return stands("failed", error=error, log=_text(logs.get(where.places[needed])))
    own_log = _text(folder / "run.log") if (folder / "run.log").exists() else None
    if (log or not submission) and (error := last_words(folder)):  # 8
        return stands("failed", error=error, log=log or own_log)
    begun = submission or (folder / "config.yaml").exists()
    return stands("lost" if begun else "missing", log=log or own_log)  # 9, 10


def _running(run: Looked, job: Queued | None, log: str | None) -> Standing:
    lines = read_metrics(run.folder)
    epochs = run.epochs
    return Standing(
        run.name,
        "running",
        str(run.folder),
        None if job is None else job.id,
        log=log,
        epoch=len(lines),
        epochs=epochs,
        accuracy=lines[-1].get(HEADLINE) if lines else None,
        left=_left(lines, epochs),
    )


def _left(lines: list[Metrics], epochs: int) -> float | None:
    """Seconds until the last epoch is over, from the times at which the last ones were: ``seconds`` is only a
    run's own share where several train together. The median, since a run that was killed has a gap."""
    times = [line["time"] for line in lines[-LAST_EPOCHS - 1 :]]
    if len(times) < 2:
        return None
    each = statistics.median(after - before for before, after in itertools.pairwise(times))
    return max(0.0, each * (epochs - len(lines)) - min(each, max(0.0, time.time() - times[-1])))


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
