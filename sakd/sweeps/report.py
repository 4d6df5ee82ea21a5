"""How a sweep stands, for people and for programs."""

import io
import json
import shlex
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from sakd.configuration import Config, flatten, needs_teacher, short_names
from sakd.configuration.compose import Overrides
from sakd.credentials import hidden
from sakd.errors import RunError
from sakd.names import HEADLINE
from sakd.runs import read_metrics, read_result
from sakd.sweeps.launching import summary
from sakd.sweeps.plan import Plan, PlannedRun
from sakd.sweeps.state import STATES, Standing
from sakd.terminal import clock

WIDTH = 160  # of a page that is no terminal
NAMED = 5  # of the cells that fail alike; all are in --cells
ROW = ("dataset", "teacher", "student", "distiller")
MEASURED = ("state", "epochs", "last", "best", "seconds")  # of a cell, beside what tells it apart

Standings = Mapping[str, Standing]
NOWHERE: Mapping[str, str] = {}


def terminal(planned: Plan, standings: Standings, each: bool) -> str:
    """Cells by distiller and mode, what runs, and what went wrong, alike errors together; with ``each`` also
    every cell."""
    console = _page()
    cells = [standings[cell.name] for cell in planned.cells]
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
    counts = Counter(standings[cell.name].state for cell in planned.cells)

    def told(run: PlannedRun) -> dict[str, object]:
        overrides = {"overrides": list(run.overrides)} if run.overrides else {}
        return asdict(standings[run.name]) | short_names(run.run.config) | overrides

    content = {
        "counts": {state: counts[state] for state in STATES},
        "cells": [told(cell) for cell in planned.cells],
        "first": [told(run) for run in planned.first],
    }
    return json.dumps(content, indent=2) + "\n"


FORMATS: dict[str, Callable[[Plan, Standings, bool], str]] = {"terminal": terminal, "json": as_json}


def conclude(
    cells: Sequence[PlannedRun],
    overrides: Overrides,
    states: Mapping[str, str],
    errors: Mapping[str, str],
    shown: Mapping[str, str] = NOWHERE,
) -> None:
    """Print what a sweep ends with: the table of its cells, and how to see more.

    Raises SystemExit with an error line for each cell that is not finished.

    ``states``, ``errors``: by name, the latter of those cells whose error is known. ``shown``: what shows
    the sweep in MLflow, under what it is called, if anything does.
    """
    console = _page()
    console.print(_results(cells, states))
    commands = {"compare": compare_command(cells, overrides), **shown}
    told = [f"{what}: {command}" for what, command in commands.items() if command]
    if told:
        console.print("", *told, sep="\n", markup=False, soft_wrap=True)
    print(console.file.getvalue(), end="")
    unfinished = [cell for cell in cells if states[cell.name] != "finished"]
    if unfinished:
        sys.stdout.flush()
        lines = (f"{_label(cell)}: {errors.get(cell.name) or states[cell.name]}" for cell in unfinished)
        raise SystemExit(hidden("\n".join(f"error: {line}" for line in lines)))


def conclude_launch(planned: Plan, standings: Standings, shown: Mapping[str, str] = NOWHERE) -> None:
    """Print what a launch that has waited for its cells ends with, by ``conclude``."""
    errors = {cell.name: standings[cell.name].error for cell in planned.cells if standings[cell.name].error}
    conclude(planned.cells, planned.sweep.overrides, states_of(planned, standings), errors, shown)


def states_of(planned: Plan, standings: Standings) -> dict[str, str]:
    """The state of each cell by its name."""
    return {cell.name: standings[cell.name].state for cell in planned.cells}


def rows(cells: Sequence[PlannedRun], states: Mapping[str, str]) -> list[dict[str, str]]:
    """A row for each cell: what tells it apart, its state, epochs, accuracies in percent of the last epoch
    and of the best, and seconds.

    Raises RunError for a finished cell whose files are damaged.
    """
    found = []
    for cell, names in zip(cells, _telling_apart(cells), strict=True):
        state = states[cell.name]
        try:
            measured = _measured(cell)
        except RunError:
            if state == "finished":
                raise
            measured = "", "", "", ""  # why it failed is told beside
        found.append({**names, **dict(zip(MEASURED, (state, *measured), strict=True))})
    return found


def _label(cell: PlannedRun) -> str:
    """A cell as its user knows it."""
    return " ".join(cell.overrides) or cell.name


def _results(cells: Sequence[PlannedRun], states: Mapping[str, str]) -> Table:
    """``rows`` as a table."""
    found = rows(cells, states)
    table = _table(*(heading for heading in found[0] if heading not in MEASURED))
    for heading in MEASURED:
        table.add_column(heading, justify="left" if heading == "state" else "right", no_wrap=True)
    for row in found:
        table.add_row(*row.values())
    return table


def _measured(cell: PlannedRun) -> tuple[str, str, str, str]:
    """Epochs done and to be done, last and best accuracy, seconds."""
    epochs = cell.run.config["epochs"]
    result = read_result(cell.run.folder)
    if result is not None:
        student = result["student"]
        done, last, best = result["epochs"], student["accuracy"], student["best_accuracy"]
        seconds = result["seconds"]
    else:
        lines = read_metrics(cell.run.folder)
        accuracies = [line[HEADLINE] for line in lines if HEADLINE in line]
        done, last, best = len(lines), accuracies[-1] if accuracies else None, max(accuracies, default=None)
        seconds = sum(line["seconds"] for line in lines)
    told = ("" if accuracy is None else f"{accuracy:.2f}" for accuracy in (last, best))
    return (f"{done}/{epochs}", *told, f"{seconds:.1f}" if done else "")


def _telling_apart(cells: Sequence[PlannedRun]) -> list[dict[str, str]]:
    """Choose for each cell those of its short names that are not all cells', and where these do not tell
    apart also the overrides that do."""
    names = [short_names(cell.run.config) for cell in cells]
    varying = [key for key in names[0] if len({each[key] for each in names}) > 1]
    columns = [{key: each[key] for key in varying or ("distiller", "spot_mode")} for each in names]
    if len({tuple(each.values()) for each in columns}) < len(cells):
        given = [_values(cell.overrides) for cell in cells]
        keys = [key for key in dict.fromkeys(key for each in given for key in each) if key not in names[0]]
        further = [key for key in keys if len({each.get(key) for each in given}) > 1]
        for each, own in zip(columns, given, strict=True):
            each.update({key: own.get(key, "") for key in further})
    return columns


def _values(overrides: Overrides) -> dict[str, str]:
    """List what is given for each key, as on a command line."""
    return dict(text.lstrip("+").split("=", 1) for text in overrides if "=" in text)


def compare_command(cells: Sequence[PlannedRun], overrides: Overrides) -> str | None:
    """The `sakd compare` that shows these cells, from the overrides that launched them; None where none has a
    teacher, and there is nothing to compare."""
    configs = [cell.run.config for cell in cells if needs_teacher(cell.run.config)]
    if not configs:
        return None
    words = ["sakd", "compare"]
    if any(text.startswith("sweeps=") for text in overrides):
        words += [text for text in overrides if not text.startswith("hydra")]
    else:
        words += [f"{key}={','.join(values)}" for key, values in _filters(configs, overrides).items()]
    if configs[0]["runs"] != "runs":
        words += ["--from", configs[0]["runs"]]
    return shlex.join(words)


def _filters(configs: Sequence[Config], overrides: Overrides) -> dict[str, list[str]]:
    """Find by key the values that single these runs out: of what varies, and of what was asked for."""
    names = [short_names(config) for config in configs]
    typed = {text.lstrip("+").partition("=")[0] for text in overrides}
    pair = {"dataset", "teacher", "student"} if "experiment" in typed else set()
    found = {}
    for key in names[0]:
        values = list(dict.fromkeys(each[key] for each in names))
        if len(values) > 1 or key in typed | pair:
            found[key] = values
    leaves = [dict(flatten(config)) for config in configs]
    groups = {key for key in typed if key.rpartition(".")[2] in ("optimizer", "schedule")}
    chosen = {f"{key}._target_" for key in groups}  # files of a group are told apart by what they build
    for key in sorted((typed - groups | chosen) - {*names[0]} - {"runs"}):
        values = list(dict.fromkeys(str(each[key]) for each in leaves if key in each))
        if values and not any("," in value for value in values):
            found[key] = values
    return found


def _page() -> Console:
    """A console that collects text for the terminal, or for a page as wide as WIDTH."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    return Console(file=io.StringIO(), width=width, color_system=None, highlight=False, soft_wrap=False)


def _table(*columns: str) -> Table:
    return Table(*columns, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _grid(planned: Plan, standings: Standings) -> Table:
    """A table of how many cells of each row and mode are in which state."""
    counts: dict[tuple[str, ...], dict[str, Counter]] = defaultdict(lambda: defaultdict(Counter))
    modes: dict[str, None] = {}
    for cell in planned.cells:
        names = short_names(cell.run.config)
        modes[names["spot_mode"]] = None
        counts[tuple(names[key] for key in ROW)][names["spot_mode"]][standings[cell.name].state] += 1
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
    for run in planned.first:
        table.add_row(run.name, standings[run.name].state)
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
    """Reasons why jobs wait, some of which are for the user to mend."""
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
