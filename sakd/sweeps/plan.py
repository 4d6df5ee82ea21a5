"""A sweep's runs, and the runs that these need first: teachers, and pretrainings that several share."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sakd.configuration import Config, prerequisites
from sakd.configuration.compose import Overrides, Sweep
from sakd.errors import ConfigError, SakdError
from sakd.process import uncollected
from sakd.runs import Run


@dataclass(frozen=True)
class PlannedRun:
    """A run that a sweep asks for or needs."""

    run: Run  # its folder and configuration
    needs: tuple[str, ...] = ()  # names of the runs that must be finished before
    overrides: Overrides = ()  # of a cell, as on a command line

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def folder(self) -> Path:
        return self.run.folder

    @property
    def epochs(self) -> int:
        """How many there are to be."""
        return int(self.run.config["epochs"])


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep."""

    cells: list[PlannedRun]  # what was asked for
    first: list[PlannedRun]  # what these need and is not among them, each before what needs it
    sweep: Sweep  # as it was composed
    runs: Path  # the folder that holds the runs' folders

    @property
    def everything(self) -> Iterator[PlannedRun]:
        yield from self.first
        yield from self.cells


class KnownRuns:
    """Runs of configurations that come up again and again, as a teacher's does: each worked out once."""

    def __init__(self):
        self.known: dict[str, Run] = {}

    def of(self, config: Config | None) -> Run | None:
        if config is None:
            return None
        key = json.dumps(config)
        if key not in self.known:
            self.known[key] = Run(config)
        return self.known[key]


def check_parts(cells: Iterable[PlannedRun]) -> None:
    """Raise ConfigError, naming the cell, for what no cell could be built of, before any is launched.

    Each node of those that are not finished is looked at once, with torch; networks are built once.
    """
    open_cells = [cell for cell in cells if not (cell.run.folder / "result.json").exists()]
    if not open_cells:
        return
    from sakd.configuration import build  # with torch, which takes seconds

    for cell in open_cells:
        try:
            build.check_parts(cell.run.config)
            build.check_networks(cell.run.config)
        except SakdError as error:
            line = f" (cell {' '.join(cell.overrides)})" if cell.overrides else ""
            raise type(error)(f"{error}{line}") from error


@uncollected()
def plan(sweep: Sweep) -> Plan:
    """Plan a sweep. Raises ConfigError for cells in more than one folder of runs."""
    folders = {config["runs"] for _, config in sweep.cells}
    if len(folders) > 1:
        raise ConfigError(
            f"runs: found {', '.join(sorted(folders))}, expected one folder for all cells of a sweep"
        )
    known = KnownRuns()
    needed = [prerequisites(config) for _, config in sweep.cells]
    needed_runs = [(known.of(each.teacher), known.of(each.pretraining)) for each in needed]
    shared = Counter(pretraining.name for _, pretraining in needed_runs if pretraining is not None)
    first: dict[str, PlannedRun] = {}
    pretrainings: dict[str, PlannedRun] = {}
    cells = []
    for (overrides, config), (teacher, pretraining) in zip(sweep.cells, needed_runs, strict=True):
        needs: tuple[str, ...] = ()
        if teacher is not None:
            first[teacher.name] = PlannedRun(teacher)
            needs = (teacher.name,)
        # What one cell alone needs, that cell's job does.
        if pretraining is not None and shared[pretraining.name] > 1:
            pretrainings[pretraining.name] = PlannedRun(pretraining, needs)
            needs = (*needs, pretraining.name)
        cells.append(PlannedRun(Run(config), needs, overrides))
    names = {cell.name for cell in cells}
    before = [run for run in (*first.values(), *pretrainings.values()) if run.name not in names]
    return Plan(cells, before, sweep, Path(folders.pop()))
