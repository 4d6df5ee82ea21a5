"""Records of what was handed to SLURM, or to processes here: a folder for each hand-over, under
``runs/.sweeps``.

``submission.json`` is written before any job exists, so that no job can be unknown; jobs are found again by
their names, so that nothing needs to be noted after. ``cells/NAME.json`` is a job's configuration,
``failures/NAME.json`` how it failed, ``logs/`` what it said."""

import getpass
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from sakd.configuration import Config
from sakd.errors import RunError
from sakd.files import read_json, write_whole
from sakd.runs import is_locked
from sakd.sweeps import launchers

FOLDER = ".sweeps"


def us() -> str:
    """Who, and on which machine."""
    return f"{getpass.getuser()}@{socket.gethostname()}"


@dataclass(frozen=True)
class Array:
    """Jobs that are submitted together: SLURM's ``name`` for them, and the runs' names by index."""

    name: str
    runs: list[str]


@dataclass(frozen=True)
class Submission:
    """``launcher``: its keys; ``needs``: by run, the runs that it waits for; ``overrides``: the sweep's, as
    typed; ``pid``: of the process that handed over."""

    folder: Path
    launcher: dict[str, Any]
    arrays: list[Array]
    needs: dict[str, list[str]]
    overrides: list[str]
    snapshot: str
    by: str = field(default_factory=us)
    pid: int = field(default_factory=os.getpid)
    time: float = field(default_factory=time.time)

    @property
    def is_local(self) -> bool:
        return launchers.is_local(self.launcher)

    def environment(self) -> dict[str, str]:
        """What makes Python run the copied code, and not what lies in the working directory."""
        others = os.environ.get("PYTHONPATH")
        return {
            "PYTHONPATH": os.pathsep.join([self.snapshot, *([others] if others else [])]),
            "PYTHONSAFEPATH": "1",
        }

    @cached_property
    def places(self) -> dict[str, tuple[str, int]]:
        """By run: its array's name and index."""
        return {run: (array.name, index) for array in self.arrays for index, run in enumerate(array.runs)}

    @cached_property
    def failures(self) -> frozenset[str]:
        """Names of runs that failed, as of the first time that this is asked."""
        folder = self.folder / "failures"
        return frozenset(
            name.removesuffix(".json") for name in (os.listdir(folder) if folder.exists() else ())
        )

    def failure(self, run: str) -> dict[str, Any] | None:
        return read_json(self.folder / "failures" / f"{run}.json") if run in self.failures else None

    def logs(self, array: str) -> Path:
        return self.folder / "logs" / array

    def log(self, run: str) -> Path | None:
        """Of the run's job, if it had said anything when logs were first asked for."""
        return self._found_logs.get(run)

    @cached_property
    def _found_logs(self) -> dict[str, Path]:
        """By run. Names are ours for processes here, and submitit's: JOB_INDEX_TASK, or JOB_TASK outside of
        an array."""
        found = {}
        for array in self.arrays:
            for path in self.logs(array.name).iterdir():
                if self.is_local and path.suffix == ".log":
                    found[path.stem] = path
                elif match := re.fullmatch(r"\d+(?:_(\d+))?_0_log\.out", path.name):
                    found[array.runs[int(match[1] or 0)]] = path
        return found

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Held by the process whose jobs die with it; the kernel lets go when it does."""
        with FileLock(self.folder / ".alive"):
            yield

    def is_alive(self) -> bool:
        return is_locked(self.folder / ".alive")

    def confirm(self) -> None:
        """All its jobs are SLURM's now."""
        (self.folder / ".confirmed").touch()

    @property
    def is_confirmed(self) -> bool:
        return (self.folder / ".confirmed").exists()

    def write(self, configs: dict[str, Config]) -> None:
        for folder in (
            self.folder / "cells",
            self.folder / "failures",
            *(self.logs(array.name) for array in self.arrays),
        ):
            folder.mkdir(parents=True, exist_ok=True)
        for name, config in configs.items():
            (self.folder / "cells" / f"{name}.json").write_text(json.dumps(config, indent=1))
        content = asdict(self)
        del content["folder"]
        write_whole(self.folder / "submission.json", (json.dumps(content, indent=1) + "\n").encode())

    def withdraw(self) -> None:
        """Nothing came of it: its runs are as they were before."""
        os.replace(self.folder / "submission.json", self.folder / "withdrawn.json")


def note_failure(folder: Path, run: str, error: str, traceback: str = "") -> None:
    """Of a run, in its submission's folder."""
    told = {"error": error, "traceback": traceback, "time": time.time()}
    write_whole(folder / "failures" / f"{run}.json", (json.dumps(told, indent=1) + "\n").encode())


def forget_failure(folder: Path, run: str) -> None:
    """It has come to its next turn."""
    (folder / "failures" / f"{run}.json").unlink(missing_ok=True)


def new_folder(runs: Path) -> Path:
    return runs / FOLDER / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


def read(runs: Path) -> list[Submission]:
    """All of them, the last one first. Raises RunError for a damaged record."""
    found = []
    for path in (runs / FOLDER).glob("*/submission.json"):
        content = read_json(path)
        try:
            arrays = [Array(**array) for array in content.pop("arrays")]
            found.append(Submission(folder=path.parent, arrays=arrays, **content))
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(f"{path}: is not a submission's record ({error!r}); move it away") from error
    return sorted(found, key=lambda submission: submission.time, reverse=True)


def now(runs: Path) -> float:
    """Seconds since 1970, later than every submission's, also where the clocks of two machines differ."""
    return max([time.time(), *(submission.time + 0.001 for submission in read(runs)[:1])])


def latest(submissions: Sequence[Submission]) -> dict[str, Submission]:
    """By run, the last submission that has it."""
    found: dict[str, Submission] = {}
    for submission in submissions:
        for run in submission.places:
            found.setdefault(run, submission)
    return found


@contextmanager
def deciding(runs: Path) -> Iterator[None]:
    """One process at a time decides what is to be submitted, and submits it: nothing is handed over twice."""
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
