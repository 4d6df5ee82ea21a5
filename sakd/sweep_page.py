"""A sweep's page in MLflow: a table of its cells, their comparison and a report, kept up to date."""

import csv
import io
import logging
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from sakd.errors import SakdError
from sakd.files import write_whole
from sakd.runs.tracking import (
    Delivery,
    earlier_sweeps,
    noted,
    seen_at,
    sweep_folder,
    sweep_name,
    sweep_overrides,
    view_of,
)
from sakd.sweeps import STATES, PlannedRun, number_of, report

log = logging.getLogger("sakd")

METRIC = "test/accuracy"


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
    status = _status(states.values())
    try:
        if _write(folder, cells, states) or noted(folder).get("delivered") != status:
            Delivery().conclude_sweep(folder, status)
    except SakdError as error:
        log.warning("the sweep's page in MLflow is not up to date: %s", error)
    view = view_of(folder, uri)
    return {"see it": seen_at(folder, uri)} | ({} if view is None else {"best first": view})


def _status(states: Sequence[str]) -> str:
    """How the sweep stands, in MLflow's words."""
    found = {*states}
    for state, status in (("running", "RUNNING"), ("queued", "RUNNING"), ("failed", "FAILED")):
        if state in found:
            return status
    return "FINISHED" if found == {"finished"} else "KILLED"


def _write(folder: Path, cells: Sequence[PlannedRun], states: Mapping[str, str]) -> bool:
    """Write the page's files; False, and nothing, if nothing has changed."""
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
    compared = _compare(folder, cells)
    if "finished" in states.values():
        from sakd.report import of_cells, write_report  # with pandas and more, which take seconds

        asked = " ".join(sweep_overrides(folder)) or sweep_name(folder)
        write_report(of_cells(asked, cells, states), folder / "report.html")
    counts = Counter(states.values())
    told = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    parts = [
        f"**{sweep_name(folder)}**: {number_of(len(cells), 'cell')}, {told}.",
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


def _compare(folder: Path, cells: Sequence[PlannedRun]) -> str:
    """Write the comparison of what is finished, and its plot; the comparison as Markdown, or why there is
    none."""
    from sakd import compare  # with pandas, which takes a second
    from sakd.compare import formats, plots
    from sakd.compare.published import FIGURES, read_published
    from sakd.configuration import short_names

    names = {cell.name: short_names(cell.run.config) for cell in cells}
    try:
        runs = [run for run in compare.read(str(cells[0].run.folder.parent)) if run.name in names]
        if not runs:
            return "Nothing to compare yet."
        comparison = compare.compare(runs, METRIC, read_published(FIGURES), list(names.values()))
    except SakdError as error:
        return f"No comparison: {str(error).splitlines()[0]}"
    text = formats.markdown(comparison)
    write_whole(folder / "comparison.md", text.encode())
    write_whole(folder / "comparison.csv", formats.csv(comparison).encode())
    if (comparison.groups["pairs"] > 0).any():
        write_whole(folder / "comparison.png", plots.plot(comparison, ".png"))
    return text
