"""A sweep's runs, and the runs that these need first: teachers, and pretrainings that several share."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sakd.configuration import Config, needs_teacher, pretraining_config, teacher_config
from sakd.configuration.compose import Overrides, Sweep
from sakd.errors import ConfigError
from sakd.runs import Run

# What a student has of its own; all else of its configuration is its teacher's, too.
STUDENTS_OWN = (
    *("student", "distiller", "spot_mode"),
    *("seed", "epochs", "batch_size", "precision", "optimizer", "schedule"),
)


@dataclass(frozen=True)
class PlannedRun:
    """A run that a sweep asks for or needs."""

    run: Run
    needs: tuple[str, ...] = ()  # names of the runs that must be finished before
    overrides: Overrides = ()  # of a cell, as on a command line

    @property
    def name(self) -> str:
        return self.run.name


@dataclass(frozen=True)
class Plan:
    """All runs of a sweep."""

    cells: list[PlannedRun]  # what was asked for
    first: list[PlannedRun]  # what these need and is not among them, each before what needs it
    sweep: Sweep
    runs: Path  # the folder that holds the runs' folders

    @property
    def everything(self) -> Iterator[PlannedRun]:
        yield from self.first
        yield from self.cells


class Teachers:
    """The runs that train the teachers of many students, each worked out once."""

    def __init__(self):
        self.known: dict[str, Run] = {}

    def of(self, config: Config) -> Run | None:
        """None where there is no teacher, or it comes from a weights file."""
        if not needs_teacher(config) or config["teacher"]["checkpoint"] is not None:
            return None
        key = json.dumps({name: value for name, value in config.items() if name not in STUDENTS_OWN})
        if key not in self.known:
            self.known[key] = Run(teacher_config(config))
        return self.known[key]


def plan(sweep: Sweep) -> Plan:
    """Raises ConfigError for cells in more than one folder of runs."""
    folders = {config["runs"] for _, config in sweep.cells}
    if len(folders) > 1:
        raise ConfigError(
            f"runs: found {', '.join(sorted(folders))}, expected one folder for all cells of a sweep"
        )
    teachers, stages = Teachers(), {}
    prerequisites = [(teachers.of(config), _pretraining(config, stages)) for _, config in sweep.cells]
    shared = Counter(pretraining.name for _, pretraining in prerequisites if pretraining is not None)
    first: dict[str, PlannedRun] = {}
    pretrainings: dict[str, PlannedRun] = {}
    cells = []
    for (overrides, config), (teacher, pretraining) in zip(sweep.cells, prerequisites, strict=True):
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


def _pretraining(config: Config, stages: dict[str, list[str] | None]) -> Run | None:
    """The run of the pretraining, where there is one."""
    if not config["distiller"].get("pretraining"):
        return None
    return Run(pretraining_config(config, _pretraining_stages(config, stages)))


def _pretraining_stages(config: Config, known: dict[str, list[str] | None]) -> list[str] | None:
    """As in sakd.runs.job, which builds the networks with torch to know it: once for all seeds and modes."""
    pretraining = config["distiller"]["pretraining"] | {"seed": None}
    key = json.dumps(
        [config["student"], config["teacher"], config["distiller"] | {"pretraining": pretraining}]
    )
    if key not in known:
        from sakd.runs.job import pretraining_stages

        known[key] = pretraining_stages(config)
    return known[key]
