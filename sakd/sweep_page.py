"""A sweep's page in MLflow: a table of its cells, their comparison and a report, kept up to date."""

import csv
import io
import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sakd.errors import ConfigError, SakdError, in_one_line
from sakd.files import write_whole
from sakd.names import HEADLINE
from sakd.runs import last_metrics, last_words, read_result
from sakd.runs.tracking import (
    Delivery,
    earlier_sweeps,
    note_end,
    noted,
    seen_at,
    sweep_folder,
    sweep_name,
    sweep_overrides,
    sweeps_going_on,
    view_of,
)
from sakd.sweeps import STATES, PlannedRun, any_goes_on, deciding, number_of, report

if TYPE_CHECKING:
    from sakd.compare import Finished

log = logging.getLogger("sakd")


def update(cells: Sequence[PlannedRun], states: Mapping[str, str]) -> dict[str, str]:
    """Bring the page of a sweep up to date, where there is one and something has become of its cells.

    Returns what shows it, and what shows all runs, best first, under what these are called; nothing where it
    is not tracked. What goes wrong is said, and is no error: the folder has all. ``states``: of the cells, by
    name.
    """
    configs = {cell.name: cell.run.config for cell in cells}
    folder = sweep_folder(configs)
    if folder is None or not (folder / "sweep.json").exists():  # it was launched by an earlier version
        return {}
    uri = cells[0].run.config["tracking"]["uri"]
    damaged = _damaged(cells, states)
    states = {**states, **dict.fromkeys(damaged, "failed")}
    status = _status(states.values())
    try:
        if _write(folder, cells, states, damaged) or noted(folder).get("delivered") != status:
            Delivery().conclude_sweep(folder, status)
    except SakdError as error:
        log.warning("the sweep's page in MLflow is not up to date: %s", error)
    view = view_of(folder, uri)
    return {"see it": seen_at(folder, uri)} | ({} if view is None else {"best first": view})


def settle(runs: Path) -> None:
    """Note how those sweeps ended that a kill left as going on; `sakd sync` sends it."""
    for folder, cells in sweeps_going_on(runs).items():
        try:
            with deciding(runs):  # none is being handed over
                if not any_goes_on(cells, runs):
                    note_end(folder, _status([_state(runs / cell) for cell in cells]))
        except SakdError as error:
            log.warning("%s: whether it goes on is not known: %s", sweep_name(folder), error)


def _state(folder: Path) -> str:
    """What has become of a cell that does not go on, by its folder alone."""
    if (folder / "result.json").exists():
        return "finished"
    return "lost" if last_words(folder) is None else "failed"


def _damaged(cells: Sequence[PlannedRun], states: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with the results and measurements of finished cells, by name."""
    found = {}
    for cell in cells:
        if states[cell.name] == "finished":
            try:
                read_result(cell.run.folder), last_metrics(cell.run.folder)
            except SakdError as error:
                found[cell.name] = in_one_line(error)
    return found


def _status(states: Sequence[str]) -> str:
    """How the sweep stands, in MLflow's words."""
    found = {*states}
    for state, status in (("running", "RUNNING"), ("queued", "RUNNING"), ("failed", "FAILED")):
        if state in found:
            return status
    return "FINISHED" if found == {"finished"} else "KILLED"


def _write(
    folder: Path,
    cells: Sequence[PlannedRun],
    states: Mapping[str, str],
    damaged: Mapping[str, str],
) -> bool:
    """Write the page's files; False, and nothing, if nothing has changed. ``damaged``: cells, and why."""
    earlier = earlier_sweeps(folder)
    rows = [
        {"name": cell.name, **row, "sweep": earlier.get(cell.name, "")}
        for cell, row in zip(cells, report.rows(cells, states), strict=True)
    ]
    table = _csv(rows)
    path = folder / "cells.csv"
    before = path.read_text() if path.is_file() else ""
    if table == before and (folder / "description.md").is_file():
        return False
    runs, others = _read(cells, states)
    compared = _compare(folder, cells, runs)
    if "finished" in states.values():
        from sakd.report import of_cells, write_report  # with pandas and more, which take seconds

        asked = " ".join(sweep_overrides(folder)) or sweep_name(folder)
        write_report(of_cells(asked, cells, states), folder / "report.html")
    counts = Counter(states.values())
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    parts = [
        f"**{sweep_name(folder)}**: {number_of(len(cells), 'cell')}, {told}.",
        "\n".join(f"- Left out, since it is damaged: {what}" for what in {**damaged, **others}.values()),
        compared,
        f"`cells.csv` lists all cells; `{_command(folder, cells)}` shows this on a terminal.",
        _told_of_earlier(earlier),
        f"Folder: [`{folder.absolute()}`]({folder.absolute().as_uri()})",
    ]
    write_whole(folder / "description.md", "\n\n".join(part for part in parts if part).encode())
    write_whole(path, table.encode())
    return True


def _told_of_earlier(earlier: Mapping[str, str]) -> str:
    if not earlier:
        return ""
    names = ", ".join(dict.fromkeys(earlier.values()))
    return f"{number_of(len(earlier), 'cell')} of these stand below an earlier sweep that had them: {names}."


def _command(folder: Path, cells: Sequence[PlannedRun]) -> str:
    overrides = sweep_overrides(folder)
    compared = report.compare_command(cells, overrides)
    return compared or shlex.join(["sakd", "status", *overrides])


def _csv(rows: Sequence[Mapping[str, str]]) -> str:
    content = io.StringIO()
    writer = csv.DictWriter(content, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return content.getvalue()


def _compare(folder: Path, cells: Sequence[PlannedRun], runs: "Sequence[Finished]") -> str:
    """Write the comparison of what is finished, and its plot; the comparison as Markdown, or why there is
    none, in which case no earlier one is left."""
    from sakd import compare  # with pandas, which takes a second
    from sakd.compare import formats, plots
    from sakd.compare.published import FIGURES, read_published
    from sakd.configuration import short_names

    names = [short_names(cell.run.config) for cell in cells]
    written = {}
    try:
        comparison = compare.compare(runs, HEADLINE, read_published(FIGURES), names)
    except ConfigError as error:
        text = f"No comparison: {in_one_line(error)}"
    else:
        text = formats.markdown(comparison)
        written["csv"] = formats.csv(comparison).encode()
        if (comparison.groups["pairs"] > 0).any():
            written["png"] = plots.plot(comparison, ".png")
    written["md"] = text.encode()
    for suffix in ("md", "csv", "png"):
        path = folder / f"comparison.{suffix}"
        if suffix in written:
            write_whole(path, written[suffix])
        else:
            path.unlink(missing_ok=True)
    return text


def _read(cells: Sequence[PlannedRun], states: Mapping[str, str]) -> "tuple[list[Finished], dict[str, str]]":
    """Cells that are finished and may be compared, and what is wrong with others, by name."""
    from sakd.compare import read_folder

    found, damaged = [], {}
    for cell in cells:
        if states[cell.name] == "finished":
            try:
                found.append(read_folder(cell.run.folder, Counter()))
            except SakdError as error:
                damaged[cell.name] = in_one_line(error)
    return [run for run in found if run is not None], damaged
