"""A run's folder against a store: what the store lacks is sent, each epoch exactly once.

The folder is the truth. ``mlflow.json`` in it notes which store has it, as which run, and how it stands.
"""

import json
import logging
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from sakd.configuration import Config, parameters, short_names
from sakd.errors import RunError
from sakd.files import read_json, write_whole
from sakd.runs.run import Run, is_locked
from sakd.runs.stored import read_metrics, read_result
from sakd.runs.tracking.store import GOING_ON, Store, absolute, reason

log = logging.getLogger("sakd")

TRACEBACK = 4000  # characters of it that a run's page shows

# What is sent of a run's folder, as it is or in parts.
SENT = ("config.yaml", "metrics.jsonl", "result.json", "code.diff", "run.log")

_state_lock = threading.Lock()  # a run's mirror and the run itself both note what they know


def synchronise(folder: Path, status: str | None = None) -> int:
    """Send what the store lacks of one run's folder, and count the epochs sent.

    Its ``status`` is sent, too (None: the noted one). Raises whatever MLflow raises where the store is away
    or refuses.
    """
    with FileLock(folder / ".mirror.lock"):  # a run's own thread and `sakd sync` must not send the same
        _check_regular(folder)
        state = _read_state(folder)
        status = status or state["status"]
        config = yaml.safe_load((folder / "config.yaml").read_text())
        metrics = read_metrics(folder)
        store = Store(state["uri"])
        with store.alone():
            run = _run_of(store, state, folder, config)
            store.send_parameters(run, parameters(config))
            sent = store.send_metrics(run, metrics)
            if run.info.status != status:
                if status not in GOING_ON:
                    _send_end(store, run, folder, status)
                store.set_status(run, status)
    return sent


def _run_of(store: Store, state: dict[str, Any], folder: Path, config: Config) -> Any:
    """Find or create the store's run of this folder, and note its id."""
    experiment = store.experiment(state["experiment"])
    known = store.run(state.get("run_id"))
    if known is not None:
        return known
    names = short_names(config)
    # What differs between a sweep's runs comes first: MLflow's page shows only the beginning of a name.
    first = names["distiller"], names["spot_mode"], f"seed{names['seed']}"
    name = "-".join((*first, names["teacher"], names["student"], names["dataset"]))
    run = store.find_or_create(experiment, state["uid"], folder, name, state["start_time"])
    with suppress(RunError):  # it will be found again by its uid
        _update_state(folder, run_id=run.info.run_id)
    return run


def _send_end(store: Store, run: Any, folder: Path, status: str) -> None:
    """Send what is known once a run is over: files, checksums, and, until it is mended, why it failed."""
    names = ["config.yaml", "result.json", "code.diff", *(["run.log"] if status == "FAILED" else [])]
    for path in (folder / name for name in names):
        if path.exists():
            store.send_file(run, path)
    tags = _checksums(read_result(folder))
    told = _traceback(folder / "run.log") if status == "FAILED" else ""
    if told or status == "FINISHED":
        tags["mlflow.note.content"] = told  # what the run's page shows
    store.send_tags(run, tags)


def _check_regular(folder: Path) -> None:
    """Raise RunError for what is sent of a run and is no regular file: a link may lead to anybody's."""
    for path in (folder / name for name in SENT):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "a link" if path.is_symlink() else "no regular file"
            raise RunError(f"{path}: found {kind}, expected a regular file; nothing of this run is sent")


def _checksums(result: dict[str, Any] | None) -> dict[str, str]:
    """Checksums of what a finished run made and learned from, as tags."""
    if result is None:
        return {}
    tags = {
        "sakd.student_sha256": result["student_sha256"],
        "sakd.dataset_sha256": result["data_sha256"],
        "sakd.teacher_sha256": (result["teacher"] or {}).get("sha256"),
        "mlflow.source.git.commit": result["code"]["commit"],
    }
    return {key: value for key, value in tags.items() if value}


def _traceback(path: Path) -> str:
    """The last traceback in a run's log, as Markdown; empty if there is none."""
    if not path.exists():
        return ""
    _, head, rest = path.read_text(errors="replace").rpartition("Traceback (most recent call last)")
    return f"```\n{head}{rest}"[:TRACEBACK] + "\n```" if head else ""


def synchronise_all(runs: Path) -> dict[str, int | Exception]:
    """Send what is missing of every run in ``runs``.

    Returns the number of epochs sent, or what went wrong, by the run's name. A run that was killed without
    warning before its result is marked KILLED; one that another process works on is left to it.
    """
    outcomes = {path.parent.name: mark_ended(path.parent) for path in sorted(runs.glob("*/mlflow.json"))}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def mark_ended(folder: Path, lost: bool = False) -> int | Exception | None:
    """Say of a run that was killed without warning that it is over, and send what is missing.

    Returns the number of epochs sent, or what went wrong; None where another process works on it. ``lost``:
    it is known not to come to a next turn either.
    """
    if is_locked(folder / ".lock"):
        return None
    try:
        if (folder / "result.json").exists():  # whatever was noted: it may have been killed right after
            note_status(folder, "FINISHED")
        elif _read_state(folder)["status"] in (GOING_ON if lost else ("RUNNING",)):
            note_status(folder, "KILLED")
        return synchronise(folder)
    except Exception as error:
        return error


def catch_up(run: Run) -> None:
    """Give a finished run to the store that its configuration asks for, if that has not got it."""
    if mirrored(run.folder, run.config):
        return
    tracking = run.config["tracking"]
    with run.locked():
        note_store(run.folder, tracking["uri"], tracking["experiment"], "FINISHED")
        try:
            synchronise(run.folder)
        except Exception as error:
            tell_away(tracking["uri"], reason(error))


def mirrored(folder: Path, config: Config) -> bool:
    """True if the store that the configuration asks for, if any, has been given a finished run.

    It is False for one that was tracked elsewhere or not at all, or was killed between its result and the
    store.
    """
    tracking, state = config["tracking"], _read_state(folder)
    if tracking["name"] == "none":
        return True
    noted = state.get("uri"), state.get("experiment"), state.get("status")
    return noted == (absolute(tracking["uri"]), tracking["experiment"], "FINISHED")


def goes_on(folder: Path) -> bool:
    """True if the store has this run as one that is not over."""
    return _read_state(folder).get("status") in GOING_ON


def tell_away(uri: str, why: str) -> None:
    """Say that a store is away: to the run at work, and on the terminal once, however many runs say so."""
    log.warning(
        "MLflow at %s cannot be reached (%s). Training goes on unharmed; `sakd sync` sends what is missing",
        uri,
        why,
        extra={"news": (uri, "away")},
    )


def note_store(folder: Path, uri: str, experiment: str, status: str) -> None:
    """Write down what `sakd sync` needs to know; a run's id in another store is no id in this one."""
    state = {"uid": uuid.uuid4().hex, "start_time": int(time.time() * 1000)} | _read_state(folder)
    if (state.get("uri"), state.get("experiment")) != (absolute(uri), experiment):
        state["run_id"] = None
    _update_state(folder, **state | {"uri": absolute(uri), "experiment": experiment, "status": status})


def note_status(folder: Path, status: str) -> None:
    """Write down how a run goes on or has ended. Raises RunError where the disk is full."""
    _update_state(folder, status=status)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "mlflow.json") or {}
    except RunError as error:
        log.warning("%s; what MLflow has of this run is not known, so it gets a new one there", error)
        (folder / "mlflow.json").unlink()
        return {}


def _update_state(folder: Path, **changes: object) -> None:
    with _state_lock:
        content = _read_state(folder) | changes
        write_whole(folder / "mlflow.json", (json.dumps(content, indent=2) + "\n").encode())
