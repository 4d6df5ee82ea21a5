"""A sweep in MLflow: a parent run, of which its cells are the children.

A folder under ``runs/.sweeps/parents`` has what is known of a sweep: ``sweep.json``, its overrides and cells,
written before any is trained; ``mlflow.json``, as in a run's folder; and the files of its page. Whoever sends
the first cell makes the parent, with that folder locked, so that there is one.

A cell belongs to the first sweep that asked for it. A later one lists it in its tables.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from sakd.configuration import Config, parameters, short_names
from sakd.credentials import hidden
from sakd.errors import RunError
from sakd.files import explained, read_json, with_checksum, write_whole
from sakd.runs.run import is_locked
from sakd.runs.tracking import page as pages
from sakd.runs.tracking.notes import (
    note_delivered,
    note_status,
    note_store,
    noted,
    sending,
    update_state,
)
from sakd.runs.tracking.store import ENDS, GOING_ON, Store
from sakd.runs.tracking.waiting import StoreAwayError

log = logging.getLogger("sakd")

FOLDER = Path(".sweeps/parents")  # in a folder of runs
TAG = "mlflow.parentRunId"
UID = "sakd.sweep"  # the tag that a parent is found again by; runs have another
PAGE = "sakd.page"  # the tag that tells which files have arrived
LEAST = 2  # cells; one is a run like any other
NAME = 100  # characters of a sweep's name
LOCK = ".lock"  # held by a process that trains the cells
# What each key of sweep.json must be, in words.
NOTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "overrides": ("words", lambda value: _are_texts(value)),
    "cells": (
        "names of runs",
        lambda value: _are_texts(value) and all(Path(name).name == name for name in value),
    ),
    "parameters": ("texts by name", lambda value: isinstance(value, dict) and _are_texts([*value.values()])),
    "time": ("seconds since 1970", lambda value: type(value) in (int, float)),
}
FILES = ("comparison.png", "comparison.md", "comparison.csv", "cells.csv", "report.html")


def sweep_folder(cells: Mapping[str, Config]) -> Path | None:
    """The folder of the sweep of these cells; None where it is not tracked, or is no more than a run.

    ``cells``: configurations by the runs' names. The same cells are the same sweep, however asked for.
    """
    if len(cells) < LEAST:
        return None
    config = next(iter(cells.values()))
    if config["tracking"]["name"] != "mlflow":
        return None
    digest = hashlib.sha256("\n".join(sorted(cells)).encode()).hexdigest()
    return Path(config["runs"]) / FOLDER / digest[:16]


def note_sweep(cells: Mapping[str, Config], overrides: Sequence[str]) -> Path | None:
    """Write down a sweep before its cells are trained; its folder, None where it has none.

    Raises RunError where it cannot be written.
    """
    folder = sweep_folder(cells)
    if folder is None:
        return None
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        _note(folder, cells, overrides)
    except StoreAwayError as error:  # its page is being sent to a slow store
        log.warning("the sweep's page in MLflow is left as it was: %s", error)
    return folder


@contextmanager
def under_way(folder: Path | None) -> Iterator[None]:
    """Train the cells of the sweep with this folder inside, in this process: it is known to go on."""
    with ExitStack() as held:
        if folder is not None:
            with suppress(Timeout):  # another process trains them, too
                held.enter_context(FileLock(folder / LOCK).acquire(timeout=0))
        yield


def sweeps_going_on(runs: Path) -> dict[Path, list[str]]:
    """Folders of sweeps that no end is noted of and that no process is known to train, and their cells."""
    found = {}
    for folder in folders(runs):
        with suppress(RunError):  # a damaged note is told when the sweep is to be sent
            if noted(folder).get("status") in GOING_ON and not is_locked(folder / LOCK):
                found[folder] = _sweep(folder)["cells"]
    return found


def _note(folder: Path, cells: Mapping[str, Config], overrides: Sequence[str]) -> None:
    with sending(folder):
        known = _sweep_or_none(folder)  # what is damaged is written anew
        sweep = {
            "overrides": [hidden(text) for text in overrides],
            "cells": list(cells),
            "parameters": _parameters(list(cells.values())),
            "time": time.time() if known is None else known["time"],
        }
        if known != sweep:
            write_whole(folder / "sweep.json", (json.dumps(with_checksum(sweep), indent=1) + "\n").encode())
        tracking = next(iter(cells.values()))["tracking"]
        note_store(folder, tracking["uri"], tracking["experiment"], "RUNNING")


def _parameters(configs: Sequence[Config]) -> dict[str, str]:
    """Every value that all cells share, and of what varies, all values."""
    each = [parameters(config) for config in configs]
    shared = {key: value for key, value in each[0].items() if all(one.get(key) == value for one in each)}
    names = [short_names(config) for config in configs]
    return {key: pages.listed([one[key] for one in names]) for key in names[0]} | shared


def folders(runs: Path) -> list[Path]:
    """Folders of the sweeps that are noted in a folder of runs."""
    return [path.parent for path in sorted((runs / FOLDER).glob("*/sweep.json"))]


def _owners(runs: Path, state: Mapping[str, Any]) -> dict[str, Path]:
    """Folders of the first sweeps that asked for runs, by run, in the store and experiment of ``state``."""
    found = []
    for folder in folders(runs):
        with suppress(RunError):  # a damaged note is told when the sweep is to be sent
            sweep, own = _sweep(folder), noted(folder)
            if sweep is not None and _place(own) == _place(state):
                found.append((sweep["time"], folder, sweep["cells"]))
    owners: dict[str, Path] = {}
    for _, folder, cells in sorted(found):
        for cell in cells:
            owners.setdefault(cell, folder)
    return owners


def _place(state: Mapping[str, Any]) -> tuple[str | None, str | None]:
    return state.get("uri"), state.get("experiment")


def run_of(run: Path, state: Mapping[str, Any]) -> str | None:
    """The id of MLflow's parent for this run, which is made where there is none; None where it has none."""
    folder = _owners(run.parent, state).get(run.name)
    if folder is None:
        return None
    known = noted(folder).get("run_id")
    if known is not None:
        return known
    with sending(folder):
        own, store = noted(folder), Store(state["uri"])
        with store.alone():
            return _run(store, own, folder).info.run_id


def synchronise_sweep(folder: Path) -> int:
    """Send what the store lacks of a sweep's page, and take its cells in; 0, since it has no epochs.

    Raises as ``sync.synchronise`` does.
    """
    with sending(folder):
        state, sweep = noted(folder), _sweep(folder)
        if not state or sweep is None:
            raise RunError(f"{folder}: found no sweep.json and mlflow.json, expected a sweep's; move it away")
        files = [folder / name for name in FILES if (folder / name).is_file()]
        content = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
        store, status = Store(state["uri"]), state["status"]
        with store.alone():
            run = _run(store, state, folder)
            store.send_parameters(run, sweep["parameters"])
            _adopt(store, run, folder, sweep, state)
            told = _read_text(folder / "description.md")
            if told and told != run.data.tags.get("mlflow.note.content"):
                store.send_tags(run, {"mlflow.note.content": told})
            if run.info.status != status:
                store.set_status(run, status)
            if run.data.tags.get(PAGE) != content:
                for path in files:
                    store.send_file(run, path)
                store.send_tags(run, {PAGE: content})
        if status in ENDS:
            note_delivered(folder, state, status)
    return 0


def earlier_sweeps(folder: Path) -> dict[str, str]:
    """Names of the earlier sweeps that cells of this one belong to, by cell."""
    sweep, state = _sweep(folder), noted(folder)
    owners = _owners(_runs(folder), state)
    owned = {cell: owners[cell] for cell in sweep["cells"] if owners.get(cell, folder) != folder}
    names = {owner: sweep_name(owner) for owner in {*owned.values()}}
    return {cell: names[owner] for cell, owner in owned.items()}


def sweep_name(folder: Path) -> str:
    """The name for people of the sweep that is noted in this folder."""
    told = [text for text in sweep_overrides(folder) if not text.startswith(("hydra", "tracking", "runs="))]
    varying = [text for text in told if "," in text or text.startswith("sweeps=")]  # first: names are cut
    words = [
        text.removeprefix("sweeps=") for text in (*varying, *(text for text in told if text not in varying))
    ]
    return f"sweep {' '.join(words) or folder.name}"[:NAME]


def sweep_overrides(folder: Path) -> list[str]:
    """What the sweep that is noted in this folder was asked for with; nothing if the note is damaged."""
    return (_sweep_or_none(folder) or {"overrides": []})["overrides"]


def noted_sweeps(runs: Path) -> list[tuple[tuple[str, ...], list[str], float]]:
    """Of each sweep that is noted in a folder of runs, its overrides, its cells' names, and when it was first
    asked for, in seconds since 1970. Raises RunError for a damaged note."""
    found = []
    for folder in folders(runs):
        sweep = _sweep(folder)
        if sweep is not None:
            found.append((tuple(sweep["overrides"]), sweep["cells"], sweep["time"]))
    return found


def note_end(folder: Path, status: str) -> None:
    """Note how a sweep stands, in MLflow's words."""
    if noted(folder).get("status") != status:
        note_status(folder, status)


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _read_text(path: Path) -> str:
    return path.read_text() if path.is_file() and not path.is_symlink() else ""


def _sweep(folder: Path) -> dict[str, Any] | None:
    """What is noted of a sweep; None where nothing is. Raises RunError if it is damaged or foreign."""
    path = folder / "sweep.json"
    sweep = read_json(path)
    for key, (expected, fits) in () if sweep is None else NOTED.items():
        if key not in sweep or not fits(sweep[key]):
            found = f"{sweep[key]!r:.60}" if key in sweep else "nothing"
            raise RunError(f"{path}: found {found} for {key}, expected {expected}; move the file away")
    return sweep


def _sweep_or_none(folder: Path) -> dict[str, Any] | None:
    try:
        return _sweep(folder)
    except RunError:
        return None


def _run(store: Store, state: Mapping[str, Any], folder: Path) -> Any:
    """Find or create the store's run of this sweep, and note its id."""
    experiment = store.experiment(state["experiment"])
    known = store.run(state.get("run_id"))
    if known is not None:
        return known
    tags = {"sakd.folder": str(folder.absolute()), "mlflow.source.name": "launch.py -m"}
    tags |= {"mlflow.user": pages.owner(folder)}
    name = sweep_name(folder)
    run = store.find_or_create(experiment, UID, state["uid"], name, state["start_time"], tags)
    with suppress(RunError):  # it will be found again by its uid
        update_state(folder, run_id=run.info.run_id, experiment_id=experiment)
    return run


def _adopt(store: Store, run: Any, folder: Path, sweep: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Make children of those cells that the store has and that belong to no other sweep there."""
    children = {child.info.run_id for child in store.children(run.info.experiment_id, run.info.run_id)}
    owners = _owners(_runs(folder), state)
    for cell, own in _cells(folder, sweep, state):
        if own["run_id"] not in children and owners.get(cell) == folder:
            child = store.run(own["run_id"])
            if child is not None and store.run(child.data.tags.get(TAG)) is None:
                store.send_tags(child, {TAG: run.info.run_id})


def _cells(
    folder: Path, sweep: Mapping[str, Any], state: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Cells that the sweep's store may have, each with what is noted of it."""
    for name in sweep["cells"]:
        with suppress(RunError):  # it is told when the cell is to be sent
            own = noted(_runs(folder) / name)
            if _place(own) == _place(state) and own.get("run_id"):
                yield name, own


def _runs(folder: Path) -> Path:
    """The folder of runs in which a sweep's is."""
    return folder.parent.parent.parent
