"""The runs of a folder in a table, one run in full, and the sweeps that the folder knows."""

import io
import json
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from sakd.compare import Described, checksums_of, facts_of, select
from sakd.configuration import flatten, parameters, read_config, short_names
from sakd.credentials import hidden
from sakd.errors import RunError, in_one_line
from sakd.names import BEST, HEADLINE
from sakd.runs import Metrics, last_metrics, read_result
from sakd.runs.tracking import seen_at
from sakd.sweeps import Standing
from sakd.sweeps.found import FoundSweep, standings_of

WIDE = 1000  # columns: a name is to be copied, and never folded
ABSENT = "-"


@dataclass(frozen=True)
class Listed(Described):
    """A run of a folder. Accuracies in percent, ``age``: seconds since it last wrote an epoch, or began."""

    names: dict[str, str]
    standing: Standing
    epochs: int  # to be done
    done: int
    accuracy: float | None  # on the test images, of the last epoch so far
    best_accuracy: float | None
    age: float

    def as_dict(self) -> dict[str, Any]:
        own = {key: getattr(self, key) for key in ("epochs", "done", "accuracy", "best_accuracy", "age")}
        of_standing = {key: getattr(self.standing, key) for key in ("state", "folder", "error", "log")}
        return {"name": self.name} | self.names | of_standing | own


# What runs are sorted by: the smallest, or what says it first, comes first.
SORTED_BY: dict[str, Callable[[Listed], Any]] = {
    "age": lambda run: run.age,
    "name": lambda run: run.name,
    "state": lambda run: (run.standing.state, run.name),
    "epochs": lambda run: (-run.done, run.name),
    "accuracy": lambda run: (-(run.accuracy or 0.0), run.name),
}


def listed(runs: Path, filters: Sequence[str], order: str) -> tuple[list[Listed], list[str]]:
    """The runs of a folder that fit filters as those of `sakd compare`, sorted by a name of ``SORTED_BY``.

    Also a line for each folder that cannot be read. Raises RunError if there is no such folder, ConfigError
    for a filter that none can fit, another SakdError where a launcher does not answer.
    """
    if not runs.is_dir():
        raise RunError(f"--from: found {str(runs)!r}, expected a folder of runs")
    standings = standings_of(sorted(path.parent.name for path in runs.glob("*/config.yaml")), runs)
    found, unreadable = [], []
    for name, standing in standings.items():
        try:
            found.append(_listed(runs / name, standing))
        except RunError as error:
            unreadable.append(in_one_line(error))
    return sorted(select(found, filters), key=SORTED_BY[order]), unreadable


def _listed(folder: Path, standing: Standing) -> Listed:
    config, result, last = read_config(folder), read_result(folder), last_metrics(folder) or {}
    learned_from = {} if result is None else checksums_of(result)
    since = last.get("time") or (folder / "config.yaml").stat().st_mtime
    return Listed(
        standing.name,
        facts_of(parameters(config) | learned_from),
        short_names(config),
        standing,
        int(config["epochs"]),
        int(last.get("epoch", 0)),
        last.get(HEADLINE),
        last.get(BEST),
        max(0.0, time.time() - since),
    )


def as_text(runs: Sequence[Listed]) -> str:
    """A line for each run, and how many there are."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("run", "state", "epochs", "test", "best", "age"):
        table.add_column(column, justify="left" if column in ("run", "state") else "right", no_wrap=True)
    for run in runs:
        accuracies = (_percent(run.accuracy), _percent(run.best_accuracy))
        table.add_row(run.name, run.standing.state, f"{run.done}/{run.epochs}", *accuracies, _ago(run.age))
    count = f"{len(runs)} run{'s' * (len(runs) != 1)}\n"
    return f"{_printed(table)}\n{count}" if runs else count


def as_json(runs: Sequence[Listed]) -> str:
    return json.dumps([run.as_dict() for run in runs], indent=2, allow_nan=False) + "\n"


FORMATS = {"terminal": as_text, "json": as_json}


# ---- one run


def shown(folder: Path) -> dict[str, Any]:
    """All that is known of a run: where it stands, its configuration and result, its last epoch, its files.

    Raises RunError for what of it is damaged, another SakdError where a launcher does not answer.
    """
    name = folder.resolve().name
    standing = standings_of([name], folder.resolve().parent)[name]
    config = read_config(folder)
    uri = config["tracking"].get("uri")
    return {
        **_listed(folder, standing).as_dict(),
        "folder": str(folder),
        "mlflow": None if uri is None else hidden(seen_at(folder, uri)),
        "files": {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()},
        "last_epoch": last_metrics(folder),
        "result": read_result(folder),
        "configuration": config,
    }


def shown_as_text(known: dict[str, Any]) -> str:
    """What is known of a run in lines, as `launch.py` ends with them."""
    configuration = [(key, _typed(value)) for key, value in flatten(known["configuration"])]
    return hidden(f"{_aligned(list(_lines(known)))}\n{_aligned(configuration)}")


def _typed(value: object) -> str:
    """A value as it is typed on a command line: null and true, not None and True."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def shown_as_json(known: dict[str, Any]) -> str:
    return hidden(json.dumps(known, indent=2, default=str)) + "\n"


SHOWN_FORMATS = {"terminal": shown_as_text, "json": shown_as_json}


def _lines(known: dict[str, Any]) -> Iterator[tuple[str, str]]:
    result, last = known["result"], known["last_epoch"]
    yield "run", known["name"]
    yield "state", f"{known['state']}, {known['done']} of {known['epochs']} epochs, {_ago(known['age'])} ago"
    for label in ("error", "log"):
        if known[label]:
            yield label, known[label]
    for label in ("dataset", "teacher", "student", "distiller", "spot_mode", "seed"):
        yield label, known[label]
    if (decay := known["configuration"].get("ema")) is not None:
        yield "weights", f"a running average of the student's, measured and stored (ema={decay:g})"
    if known["accuracy"] is not None:
        yield "accuracy", f"{_percent(known['accuracy'])} % last, {_percent(known['best_accuracy'])} % best"
    if result is not None:
        yield from _of_result(result)
    elif last is not None:
        yield "measured", ", ".join(f"{key} {value:.4g}" for key, value in _measured(last))
    yield "files", ", ".join(f"{name} ({_size(size)})" for name, size in known["files"].items())
    yield "folder", known["folder"]
    if known["mlflow"] is not None:
        yield "see it", known["mlflow"]


def _aligned(rows: Sequence[tuple[str, str]]) -> str:
    width = max(len(label) for label, _ in rows)
    return "".join(f"{label.ljust(width)}  {text}\n" for label, text in rows)


def _of_result(result: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if result["teacher"] is not None:
        teacher = result["teacher"]
        yield "taught by", f"{teacher['name']}  {teacher['accuracy']:.2f} %  {teacher['source']}"
    for name, cost in result.get("cost", {}).items():
        yield f"{name} costs", told_cost(cost)
    if best := result.get("best"):
        yield "best weights", f"best.safetensors, of epoch {best['epoch']} by {best['by']}"
    if result["kept"]:
        yield "kept", ", ".join(f"{spot} {100 * share:.1f} %" for spot, share in result["kept"].items())
    together = f", {result['cohort']} runs together" if result.get("cohort", 1) > 1 else ""
    device = f" on {result['device']}" if "device" in result else ""
    yield "seconds", f"{result['seconds']:.1f}{device}{together}"
    if result.get("pretraining"):
        yield "pretraining", result["pretraining"]["run"]
    for key in ("student", "data"):
        yield f"{key} sha256", result[f"{key}_sha256"]
    code = result["code"]
    changed = " with changes, in code.diff" if code.get("changed") else ""
    yield "code", f"{code['commit'] or 'no git checkout'}{changed}"
    yield "versions", ", ".join(f"{name} {version}" for name, version in result.get("versions", {}).items())


def told_cost(cost: dict[str, int | None]) -> str:
    """What a network costs, in words."""
    adds = cost["multiply_adds"]
    return f"{cost['parameters']:,} parameters" + ("" if adds is None else f", {adds:,} multiply-adds")


def _measured(last: Metrics) -> list[tuple[str, float]]:
    return [(key, value) for key, value in last.items() if key not in ("epoch", "time", "seconds")]


# ---- sweeps


def sweeps_as_text(sweeps: Sequence[FoundSweep]) -> str:
    """A line for each sweep: how its cells stand, and what shows more of it."""
    if not sweeps:
        return "no sweep\n"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("asked for", "cells", "", "more"):
        table.add_column(column, no_wrap=True)
    for sweep in sweeps:
        states = ", ".join(f"{number} {state}" for state, number in sweep.states.items())
        command = shlex.join(["sakd", "status", *sweep.overrides])
        table.add_row(f"{_ago(time.time() - sweep.time)} ago", str(len(sweep.cells)), states, command)
    return hidden(_printed(table))


def sweeps_as_json(sweeps: Sequence[FoundSweep]) -> str:
    return hidden(json.dumps([asdict(sweep) for sweep in sweeps], indent=2)) + "\n"


SWEEPS_FORMATS = {"terminal": sweeps_as_text, "json": sweeps_as_json}


def _printed(table: Table) -> str:
    console = Console(file=io.StringIO(), width=WIDE, color_system=None, highlight=False, markup=False)
    console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def _percent(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def _ago(seconds: float) -> str:
    """A time in its largest unit: 3 d, 4 h, 5 min, 6 s."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"
