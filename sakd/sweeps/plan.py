"""A sweep's runs, and the runs that these need first: teachers, and pretrainings that several share."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sakd.configuration import Config, prerequisites
from sakd.configuration.compose import Overrides, Sweep
from sakd.errors import ConfigError
from sakd.runs import Run


@dataclass(frozen=True)
class Job:
    """A run of a sweep. ``needs``: names of the runs that must be finished before; ``overrides``: of a cell,
    as on a command line."""

    run: Run
    needs: tuple[str, ...] = ()
    overrides: Overrides = ()

    @property
    def name(self) -> str:
        return self.run.name


@dataclass(frozen=True)
class Plan:
    """``cells``: what was asked for; ``first``: what these need and is not among them, each before what needs
    it."""

    cells: list[Job]
    first: list[Job]
    sweep: Sweep
    runs: Path

    @property
    def jobs(self) -> Iterator[Job]:
        yield from self.first
        yield from self.cells


def plan(sweep: Sweep) -> Plan:
    """Raises ConfigError for cells in more than one folder of runs."""
    folders = {config["runs"] for _, config in sweep.cells}
    if len(folders) > 1:
        raise ConfigError(
            f"runs: found {', '.join(sorted(folders))}, expected one folder for all cells of a sweep"
        )
    needed = [prerequisites(config) for _, config in sweep.cells]
    needed_runs = [(_run(each.teacher), _run(each.pretraining)) for each in needed]
    shared = Counter(pretraining.name for _, pretraining in needed_runs if pretraining is not None)
    first: dict[str, Job] = {}
    pretrainings: dict[str, Job] = {}
    cells = []
    for (overrides, config), (teacher, pretraining) in zip(sweep.cells, needed_runs, strict=True):
        needs: tuple[str, ...] = ()
        if teacher is not None:
            first[teacher.name] = Job(teacher)
            needs = (teacher.name,)
        if (
            pretraining is not None and shared[pretraining.name] > 1
        ):  # what one cell alone needs, that cell does
            pretrainings[pretraining.name] = Job(pretraining, needs)
            needs = (*needs, pretraining.name)
        cells.append(Job(Run(config), needs, overrides))
    names = {job.name for job in cells}
    before = [job for job in (*first.values(), *pretrainings.values()) if job.name not in names]
    return Plan(cells, before, sweep, Path(folders.pop()))


def _run(config: Config | None) -> Run | None:
    return None if config is None else Run(config)
