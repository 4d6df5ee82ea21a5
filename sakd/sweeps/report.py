"""How a sweep stands, for people and for programs."""

import io
import json
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from sakd.configuration import short_names
from sakd.sweeps.launching import summary
from sakd.sweeps.plan import Job, Plan
from sakd.sweeps.state import STATES, Standing
from sakd.terminal import clock

WIDTH = 160  # of a page that is no terminal
NAMED = 5  # of the cells that fail alike; all are in --cells
ROW = ("dataset", "teacher", "student", "distiller")

Standings = Mapping[str, Standing]


def terminal(planned: Plan, standings: Standings, each: bool) -> str:
    """Cells by distiller and mode, what runs, and what went wrong, alike errors together; with ``each`` also
    every cell."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, soft_wrap=False)
    cells = [standings[job.name] for job in planned.cells]
    console.print(_grid(planned, standings))
    for part in (
        _first(planned, standings),
        _running(standings),
        _queued(standings),
        *_failures(cells),
        _lost(cells),
    ):
        if part is not None:
            console.print("", part, sep="\n", markup=False)
    if each:
        console.print("", _each(cells), sep="\n")
    console.print("", summary(cells), sep="\n", markup=False)
    return console.file.getvalue()


def as_json(planned: Plan, standings: Standings, each: bool) -> str:
    """Everything known of each cell, and of what these need first; always each."""
    counts = Counter(standings[job.name].state for job in planned.cells)

    def told(job: Job) -> dict[str, object]:
        overrides = {"overrides": list(job.overrides)} if job.overrides else {}
        return asdict(standings[job.name]) | short_names(job.run.config) | overrides

    content = {
        "counts": {state: counts[state] for state in STATES},
        "cells": [told(job) for job in planned.cells],
        "first": [told(job) for job in planned.first],
    }
    return json.dumps(content, indent=2) + "\n"


FORMATS: dict[str, Callable[[Plan, Standings, bool], str]] = {"terminal": terminal, "json": as_json}


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _grid(planned: Plan, standings: Standings) -> Table:
    """How many cells of each row and mode are in which state."""
    counts: dict[tuple[str, ...], dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    modes: dict[str, None] = {}
    for job in planned.cells:
        names = short_names(job.run.config)
        modes[names["spot_mode"]] = None
        counts[tuple(names[key] for key in ROW)][names["spot_mode"]][standings[job.name].state] += 1
    varying = [i for i, key in enumerate(ROW) if key == "distiller" or len({row[i] for row in counts}) > 1]
    table = _table(*(ROW[i] for i in varying), *modes)
    for row, by_mode in counts.items():
        table.add_row(*(row[i] for i in varying), *(_counted(by_mode[mode]) for mode in modes))
    return table


def _counted(states: Counter) -> str:
    return ", ".join(f"{states[state]} {state}" for state in STATES if states[state])


def _first(planned: Plan, standings: Standings) -> RenderableType | None:
    if not planned.first:
        return None
    table = _table("needed first", "state")
    for job in planned.first:
        table.add_row(job.name, standings[job.name].state)
    return table


def _running(standings: Standings) -> RenderableType | None:
    running = [standing for standing in standings.values() if standing.state == "running"]
    if not running:
        return None
    table = _table("running", "job", "epoch", "test", "left")
    for standing in running:
        accuracy = "" if standing.accuracy is None else f"{standing.accuracy:.2f} %"
        left = "" if standing.left is None else clock(standing.left)
        table.add_row(
            standing.name, standing.job or "", f"{standing.epoch}/{standing.epochs}", accuracy, left
        )
    return table


def _queued(standings: Standings) -> RenderableType | None:
    """Why jobs wait: some reasons are for the user to mend."""
    reasons = Counter(standing.reason for standing in standings.values() if standing.state == "queued")
    return (
        "queued: " + ", ".join(f"{number} {reason}" for reason, number in reasons.items())
        if reasons
        else None
    )


def _failures(cells: list[Standing]) -> Iterator[RenderableType]:
    by_error: dict[str, list[Standing]] = defaultdict(list)
    for standing in cells:
        if standing.state == "failed":
            by_error[standing.error or "unknown"].append(standing)
    for error, alike in by_error.items():
        lines = [f"failed ({len(alike)}): {error}"]
        lines += [f"  {standing.name}  {standing.log or 'no log'}" for standing in alike[:NAMED]]
        lines += [f"  and {len(alike) - NAMED} more"] if len(alike) > NAMED else []
        yield "\n".join(lines)


def _lost(cells: list[Standing]) -> RenderableType | None:
    lost = [standing for standing in cells if standing.state == "lost"]
    if not lost:
        return None
    lines = [
        f"lost ({len(lost)}): ended without a word, as by a kill or a node's failure; the same launch "
        "goes on with them"
    ]
    lines += [f"  {standing.name}  {standing.log or 'no log'}" for standing in lost[:NAMED]]
    return "\n".join(lines + ([f"  and {len(lost) - NAMED} more"] if len(lost) > NAMED else []))


def _each(cells: list[Standing]) -> Table:
    table = _table("cell", "state", "job", "")
    for standing in cells:
        progress = (
            f"epoch {standing.epoch}/{standing.epochs}"
            if standing.state == "running"
            else standing.reason or ""
        )
        table.add_row(standing.name, standing.state, standing.job or "", progress)
    return table
