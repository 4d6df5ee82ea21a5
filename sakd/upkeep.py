"""What nobody needs any more in a folder of runs: copies of code, submissions, what a kill cut short."""

import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from sakd.errors import RunError
from sakd.files import explained
from sakd.runs import is_locked
from sakd.runs.code import COPIES, ROOT
from sakd.sweeps import submissions
from sakd.sweeps.state import open_jobs
from sakd.sweeps.submissions import Submission

DAY = 86400.0  # seconds
SUBMISSION = re.compile(r"\d{8}-\d{6}-[0-9a-f]{6}")  # a submission's folder
CUT_SHORT = ("*.partial", ".partial-*", ".model.new")  # what is renamed once it is whole


@dataclass(frozen=True)
class Unneeded:
    """A file or folder that may go, why, and its size in bytes."""

    path: Path
    why: str
    size: int


def collect(runs: Path, days: float, dry_run: bool) -> list[Unneeded]:
    """Remove what nobody needs in a folder of runs and is older than ``days``; what it was.

    With ``dry_run`` nothing is removed. Nothing is submitted meanwhile. Raises RunError if there is no such
    folder, a record in it is damaged, or something cannot be removed, SlurmError where SLURM does not say
    which jobs are not over.
    """
    if not runs.is_dir():
        raise RunError(f"{runs}: found no such folder, expected a folder of runs")
    with nullcontext() if dry_run else submissions.deciding(runs):
        found = list(_unneeded(runs, time.time() - days * DAY))
        if not dry_run:
            for each in found:
                _remove(each.path)
    return found


def _unneeded(runs: Path, before: float) -> Iterator[Unneeded]:
    known = submissions.read(runs)
    needed = _needed(known)
    for folder in sorted((runs / submissions.FOLDER).glob("*")):
        is_one = SUBMISSION.fullmatch(folder.name) and submissions.is_ours(folder)
        if is_one and folder not in needed and _is_older(folder, before):
            yield _found(folder, "a submission whose runs are finished, or were submitted again")
    yield from _copies(runs, [each for each in known if each.folder in needed], before)
    for path in _cut_short(runs):
        if _is_older(path, before):
            yield _found(path, "cut short by a kill")


def _needed(known: Sequence[Submission]) -> set[Path]:
    """Folders of those submissions that have a job, a run under way, or the last word about one that is not
    finished."""
    latest = submissions.latest(known)
    queue = open_jobs(known)
    return {
        submission.folder
        for submission in known
        if any(place in queue for place in submission.jobs)
        or any(
            is_locked(submission.runs / run / ".lock")
            or (latest[run] is submission and not submission.is_finished(run))
            for run in submission.places
        )
    }


def _copies(runs: Path, needed: Iterable[Submission], before: float) -> Iterator[Unneeded]:
    """Copies of code that no submission that is needed names.

    None where another user has submissions here, whose jobs may run them.
    """
    records = (runs / submissions.FOLDER).glob("*/submission.json")
    if not all(submissions.is_ours(record.parent) for record in records):
        return
    named = {Path(submission.snapshot).name for submission in needed}
    for copy in sorted((runs / COPIES).glob("[0-9a-f]*")):
        is_this = ROOT.resolve() == copy.resolve()
        if copy.name not in named and not is_this and _is_older(copy, before):
            yield _found(copy, "a copy of the code that no job runs")


def _cut_short(runs: Path) -> Iterator[Path]:
    """Files and folders that a kill left, but for those of runs under way."""
    folders = [path for path in runs.iterdir() if path.is_dir() and not path.is_symlink()]
    for folder in (runs, *folders):
        is_sweeps = folder.name == submissions.FOLDER  # whose lock is this process's
        if is_sweeps or not is_locked(folder / ".lock"):
            for pattern in CUT_SHORT:
                yield from sorted(folder.rglob(pattern) if is_sweeps else folder.glob(pattern))


def _is_older(path: Path, before: float) -> bool:
    return not path.is_symlink() and path.stat().st_mtime < before


def _found(path: Path, why: str) -> Unneeded:
    inside = [Path(folder) / name for folder, _, names in os.walk(path) for name in names]
    return Unneeded(path, why, sum(each.lstat().st_size for each in (path, *inside) if not each.is_dir()))


def _remove(path: Path) -> None:
    with explained(path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # inside of a folder that is gone, or of a run that has begun anew


def as_text(found: Sequence[Unneeded], dry_run: bool) -> str:
    lines = [f"{each.size:>12,} bytes  {each.path}  {each.why}\n" for each in found]
    total = sum(each.size for each in found)
    told = "would be removed" if dry_run else "removed"
    return "".join(lines) + f"{len(found)} {told}, {total:,} bytes\n"
