"""Disk and locks of a folder of runs."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from sakd.errors import RunError
from sakd.runs import is_locked

MEBIBYTE = 2**20
PROBE = 4 * MEBIBYTE  # bytes that are written, as a small checkpoint has
SMALL = (
    2048 * MEBIBYTE
)  # bytes; a checkpoint of a large network has a tenth of it, and is written beside the last


def check_folder(runs: Path) -> tuple[str, str]:
    """Write, flush and rename a file there, or where the folder would be made, and hold a lock twice.

    Raises RunError where that cannot be done. Nothing is left.
    """
    there = next(place for place in (runs.absolute(), *runs.absolute().parents) if place.exists())
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".doctor-") as probe:
            _write(Path(probe))
            _lock(Path(probe), runs)
    except OSError as error:
        raise RunError(f"runs={runs}: cannot be written ({error.strerror or error})") from error
    free = shutil.disk_usage(there).free
    held = sorted(path.parent.name for path in runs.glob("*/.lock") if is_locked(path))
    told = f"{runs.absolute()}: written, locks hold, {free / 2**30:.1f} GiB free, {len(held)} runs under way"
    if is_locked(runs / ".sweeps/.lock"):
        return "warn", f"{told}; {runs}/.sweeps/.lock is held by a launch that goes on: others wait for it"
    if free < SMALL:
        return "warn", f"{told}; expected {SMALL / 2**30:.0f} GiB"
    return "ok", told


def _write(probe: Path) -> None:
    with (probe / "partial").open("wb") as file:
        file.write(b"\1" * PROBE)
        file.flush()
        os.fsync(file.fileno())
    os.replace(probe / "partial", probe / "whole")


def _lock(probe: Path, runs: Path) -> None:
    """Raise RunError where a second one gets a lock that is held: two processes would train one run."""
    with (probe / "lock").open("wb") as first, (probe / "lock").open("rb") as second:
        fcntl.flock(first, fcntl.LOCK_EX)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
    raise RunError(f"runs={runs}: found a file system on which locks do not hold; expected one with flock")
