"""Runs and sweeps that a folder of runs has, however they came there."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from sakd.configuration import read_config
from sakd.errors import RunError
from sakd.runs.tracking import noted_sweeps
from sakd.sweeps import submissions
from sakd.sweeps.state import STATES, Standing, survey


@dataclass(frozen=True)
class FoundRun:
    """A run that lies, or is to lie, in a folder."""

    folder: Path
    needs: tuple[str, ...] = ()  # names of the runs that must be finished before

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def epochs(self) -> int:
        """How many there are to be."""
        return int(read_config(self.folder)["epochs"])


@dataclass(frozen=True)
class FoundSweep:
    """A sweep by the overrides that asked for it, as typed, and the names of its cells."""

    overrides: tuple[str, ...]
    cells: tuple[str, ...]
    time: float  # seconds since 1970, when it was last asked for
    states: dict[str, int] = field(default_factory=dict)  # how many cells are in each of STATES


def standings_of(names: Iterable[str], runs: Path) -> dict[str, Standing]:
    """What has become of runs, by their names in the folder ``runs``.

    Raises a SakdError where runs were handed over and their launcher does not answer.
    """
    last = submissions.latest(submissions.read(runs))
    found = [
        FoundRun(runs / name, tuple(last[name].needs.get(name, ())) if name in last else ()) for name in names
    ]
    return survey(found, runs)


def sweeps_of(runs: Path) -> list[FoundSweep]:
    """All sweeps that are noted in a folder of runs, the last first, with the states of their cells.

    A sweep that was launched again, for what was missing of it, is one. Raises RunError if there is no such
    folder, else as ``standings_of``.
    """
    if not runs.is_dir():
        raise RunError(f"--from: found {str(runs)!r}, expected a folder of runs")
    by_overrides: dict[tuple[str, ...], FoundSweep] = {}
    for overrides, cells, time in (*noted_sweeps(runs), *_submitted(runs)):
        known = by_overrides.get(overrides, FoundSweep(overrides, (), time))
        every = tuple(dict.fromkeys((*known.cells, *cells)))
        by_overrides[overrides] = FoundSweep(overrides, every, max(known.time, time))
    standings = standings_of({cell for sweep in by_overrides.values() for cell in sweep.cells}, runs)
    found = []
    for sweep in by_overrides.values():
        counts = Counter(standings[cell].state for cell in sweep.cells)
        states = {state: counts[state] for state in STATES if counts[state]}
        found.append(FoundSweep(sweep.overrides, sweep.cells, sweep.time, states))
    return sorted(found, key=lambda sweep: sweep.time, reverse=True)


def _submitted(runs: Path) -> list[tuple[tuple[str, ...], list[str], float]]:
    """Overrides, cells and time of what was handed over; what cells need first is none of them."""
    found = []
    for submission in submissions.read(runs):
        first = {needed for needs in submission.needs.values() for needed in needs}
        cells = [run for run in submission.places if run not in first]
        found.append((tuple(submission.overrides), cells, submission.time))
    return found
