"""Records of what was handed over, to SLURM or to processes here: a folder for each hand-over, under
``runs/.sweeps``.

``submission.json`` is written before any job exists, so that no job can be unknown; jobs are found again by
their names, so that nothing needs to be noted after. ``cells/NAME.json`` is a run's configuration,
``failures/NAME.json`` how it failed, ``cancelled/NAME`` says that it is not to be trained, ``logs/`` is what
jobs said.
"""

import getpass
import inspect
import json
import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from sakd.configuration import Config
from sakd.credentials import hidden
from sakd.errors import RunError
from sakd.files import read_json, with_checksum, write_whole
from sakd.runs import Run, copies

log = logging.getLogger("sakd")

FOLDER = ".sweeps"

Place = tuple[str, int]  # of a job: the name of its array, and its index in that


def us() -> str:
    """The user, and the machine."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


@dataclass(frozen=True)
class Array:
    """Jobs that are submitted together, since they wait for the same."""

    name: str  # SLURM's for all of them
    jobs: list[list[str]]  # by index: the names of the runs that the job trains


@dataclass(frozen=True)
class Submission:
    """What was handed over at once."""

    folder: Path  # its own, under runs/.sweeps
    launcher: dict[str, Any]  # its class by ``_target_``, and its keys
    arrays: list[Array]  # each behind those that it waits for
    needs: dict[str, list[str]]  # by run: the runs that it waits for
    overrides: list[str]  # the sweep's, as typed
    snapshot: str  # the copy of the code that its jobs run
    by: str = field(default_factory=us)  # who handed over, and on which machine
    pid: int = field(default_factory=os.getpid)  # the process that did
    time: float = field(default_factory=time.time)  # seconds since 1970

    @classmethod
    def read(cls, folder: Path) -> "Submission":
        """Read one. Raises RunError for a damaged record, and for another user's."""
        path = folder / "submission.json"
        if not is_ours(folder):
            raise RunError(f"{path}: is another user's, expected a submission of one's own")
        content = read_json(path)
        try:
            arrays = [Array(**array) for array in content.pop("arrays")]
            found = cls(folder=folder, arrays=arrays, **content)
            if not found._has_its_types():
                raise TypeError("a value is of another type")
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: is not a submission's record ({error!r}); move it away") from error
        return found

    def _has_its_types(self) -> bool:
        texts = [
            self.launcher.get("_target_"),
            self.snapshot,
            self.by,
            *(array.name for array in self.arrays),
        ]
        lists = [self.overrides, *self.needs.values(), *(job for array in self.arrays for job in array.jobs)]
        return (
            all(isinstance(text, str) for text in texts)
            and all(isinstance(names, list) and all(isinstance(n, str) for n in names) for names in lists)
            and isinstance(self.pid, int)
            and isinstance(self.time, (int, float))
        )

    @property
    def runs(self) -> Path:
        """The folder that holds the runs' folders."""
        return self.folder.parent.parent

    def environment(self) -> dict[str, str]:
        """What makes Python run the copied code, and not what lies in the working directory.

        It writes no bytecode: a copy has nothing but what was copied.
        """
        others = os.environ.get("PYTHONPATH")
        return {
            "PYTHONPATH": os.pathsep.join([self.snapshot, *([others] if others else [])]),
            "PYTHONSAFEPATH": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def check(self) -> list[str]:
        """The command that ends with an error, told in one line, where the copy is not what was copied.

        It runs nothing of the copy itself.
        """
        return [sys.executable, "-I", "-c", inspect.getsource(copies), self.snapshot]

    @cached_property
    def jobs(self) -> dict[Place, list[str]]:
        """Names of the runs that each job trains, by its place."""
        return {(array.name, index): job for array in self.arrays for index, job in enumerate(array.jobs)}

    @cached_property
    def places(self) -> dict[str, Place]:
        """Place of each run's job."""
        return {run: place for place, job in self.jobs.items() for run in job}

    @cached_property
    def failures(self) -> frozenset[str]:
        """Names of runs that failed, as of the first time that this is asked."""
        return frozenset(name.removesuffix(".json") for name in _listed(self.folder / "failures"))

    @cached_property
    def cancelled(self) -> frozenset[str]:
        """Names of runs that are not to be trained, as of the first time that this is asked."""
        return frozenset(cancelled(self.folder))

    def failure(self, run: str) -> dict[str, Any] | None:
        """The note of a failure: ``error``, ``traceback``, ``time``, and whether it was an interruption."""
        if run not in self.failures:
            return None
        path = self.folder / "failures" / f"{run}.json"
        noted = read_json(path)
        if noted is None or not {"error", "traceback", "time", "interrupted"} <= noted.keys():
            raise RunError(f"{path}: is not the note of a failure; move it away")
        return noted

    def is_finished(self, run: str) -> bool:
        return (self.runs / run / "result.json").exists()

    def is_over(self, run: str) -> bool:
        """Tell whether no job of this submission is to train the run any more."""
        failure = self.failure(run)
        return (
            self.is_finished(run)
            or run in self.cancelled
            or (failure is not None and not failure["interrupted"])
        )

    def logs(self, array: str) -> Path:
        return self.folder / "logs" / array

    def confirm(self) -> None:
        """Note that all its jobs are the launcher's now."""
        (self.folder / ".confirmed").touch()

    @property
    def is_confirmed(self) -> bool:
        return (self.folder / ".confirmed").exists()

    def write(self, configs: Mapping[str, Config]) -> None:
        """Write it down, with the ``configs`` of all its runs by name."""
        for folder in (
            *(self.folder / name for name in ("cells", "failures", "cancelled")),
            *(self.logs(array.name) for array in self.arrays),
        ):
            folder.mkdir(parents=True, exist_ok=True)
        for name, config in configs.items():
            (self.folder / "cells" / f"{name}.json").write_text(json.dumps(config, indent=1))
        content = asdict(self)
        del content["folder"]
        _write(self.folder / "submission.json", content)

    def withdraw(self) -> None:
        """Take it back, as nothing came of it: its runs are as they were before."""
        os.replace(self.folder / "submission.json", self.folder / "withdrawn.json")


def needs_of(job: Sequence[str], needs: Mapping[str, Sequence[str]]) -> tuple[list[str], list[str]]:
    """Find what all of a job's runs need first, and what some do: without the one it cannot begin, without
    the other it trains the rest."""
    every = {name: None for run in job for name in needs.get(run, ())}
    of_all = [name for name in every if all(name in needs.get(run, ()) for run in job)]
    return of_all, [name for name in every if name not in of_all]


def note_failure(folder: Path, run: str, error: str, traceback: str = "", interrupted: bool = False) -> None:
    """Note that a run failed, in its submission's folder. ``interrupted``: it goes on in its job's next
    turn."""
    told = {"error": hidden(error), "traceback": hidden(traceback)}
    told |= {"time": time.time(), "interrupted": interrupted}
    _write(folder / "failures" / f"{run}.json", told)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_whole(path, (json.dumps(with_checksum(content), indent=1) + "\n").encode())


def config_of(folder: Path, run: str) -> Config:
    """The configuration that was laid down for a run in its submission's folder.

    Raises RunError if it is damaged, or gives another run now.
    """
    path = folder / "cells" / f"{run}.json"
    try:
        config = read_json(path) or {}
        found = Run(config).name
    except (LookupError, TypeError, AttributeError) as error:
        raise RunError(f"{path}: is not a run's configuration ({error!r}); launch the run again") from error
    if found != run:
        raise RunError(
            f"{path}: found the configuration of {found}, expected {run}'s; it was changed, or the file of "
            "its teacher; launch the run again"
        )
    return config


def forget_failure(folder: Path, run: str) -> None:
    """Take the note of a failure back: the run has come to its next turn."""
    (folder / "failures" / f"{run}.json").unlink(missing_ok=True)


def note_cancelled(folder: Path, run: str) -> None:
    """Note in a submission's folder that the run's job is to leave it."""
    (folder / "cancelled" / run).touch()


def cancelled(folder: Path) -> list[str]:
    """Names of the runs that a submission's jobs are to leave, as it is now."""
    return _listed(folder / "cancelled")


def _listed(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.exists() else []


def is_ours(folder: Path) -> bool:
    """True for a submission of the user's own, or root's; none that a link leads to."""
    record = folder / "submission.json"
    owners = {path.lstat().st_uid for path in (folder, record) if path.exists()}  # it may be withdrawn now
    return not folder.is_symlink() and owners <= {os.getuid(), 0}


def new_folder(runs: Path) -> Path:
    return runs / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def read(runs: Path) -> list[Submission]:
    """Read all of one's own, the last one first. Raises RunError for a damaged record.

    Others' may name any launcher, with any commands.
    """
    folders = [path.parent for path in (runs / FOLDER).glob("*/submission.json")]
    if others := [folder for folder in folders if not is_ours(folder)]:
        news = f"submissions in {runs}", str(len(others))
        log.warning(
            "%s: %d submissions of other users are left out, such as %s",
            runs / FOLDER,
            len(others),
            others[0].name,
            extra={"news": news},
        )
    found = [Submission.read(folder) for folder in folders if folder not in others]
    return sorted(found, key=lambda submission: submission.time, reverse=True)


def now(runs: Path) -> float:
    """Seconds since 1970, later than every submission's, also where the clocks of two machines differ."""
    return max([time.time(), *(submission.time + 0.001 for submission in read(runs)[:1])])


def latest(submissions: Sequence[Submission]) -> dict[str, Submission]:
    """Find for each run the last submission that has it."""
    found: dict[str, Submission] = {}
    for submission in submissions:
        for run in submission.places:
            found.setdefault(run, submission)
    return found


def failed_before(needs: Sequence[str], last: Mapping[str, Submission]) -> tuple[str, Submission] | None:
    """The first of ``needs`` that failed in the last submission that had it, and that submission."""
    for needed in needs:
        submission = last.get(needed)
        if submission is not None and submission.failure(needed) and not submission.is_finished(needed):
            return needed, submission
    return None


@contextmanager
def deciding(runs: Path) -> Iterator[None]:
    """Let one process at a time decide what is to be submitted, and submit it: nothing is handed over
    twice."""
    try:
        (runs / FOLDER).mkdir(parents=True, exist_ok=True)
        lock = FileLock(runs / FOLDER / ".lock")
        lock.acquire()
    except OSError as error:
        raise RunError(f"runs={runs}: cannot write {runs / FOLDER} ({error.strerror or error})") from error
    try:
        yield
    finally:
        lock.release()
