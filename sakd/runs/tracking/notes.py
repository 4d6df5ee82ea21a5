"""What is noted of a run's, or a sweep's, place in MLflow: ``mlflow.json`` in its folder.

Which store is to have it, as which run, how it stands, and, as ``delivered``, with which end the store has
confirmed to have it whole.
"""

import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sakd.configuration import Config
from sakd.errors import RunError
from sakd.files import explained, read_json, write_whole
from sakd.runs.tracking.store import ENDS, GOING_ON, absolute
from sakd.runs.tracking.waiting import holding

log = logging.getLogger("sakd")

_state_lock = threading.Lock()  # a run's mirror and the run itself both note what they know

# What each key must be, by name, in words.
NOTED = {
    "uid": (
        "32 hexadecimal digits",
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value),
    ),
    "start_time": ("milliseconds since 1970", lambda value: type(value) is int and value >= 0),
    "uri": ("a store's URI", lambda value: isinstance(value, str) and value),
    "experiment": ("an experiment's name", lambda value: isinstance(value, str) and value),
    "experiment_id": ("an experiment's id, or null", lambda value: value is None or isinstance(value, str)),
    "run_id": ("a run's id, or null", lambda value: value is None or (isinstance(value, str) and value)),
    "status": (f"one of {', '.join((*GOING_ON, *ENDS))}", lambda value: value in (*GOING_ON, *ENDS)),
    "delivered": (f"one of {', '.join(ENDS)}, or null", lambda value: value in (None, *ENDS)),
}


def noted(folder: Path) -> dict[str, Any]:
    """Read what is noted of a run's place in MLflow; nothing where it has none.

    Raises RunError if the file is damaged or foreign.
    """
    path = folder / "mlflow.json"
    state = read_json(path)
    if state is None:
        return {}
    for key, (expected, fits) in NOTED.items():
        if not fits(state.get(key)):
            found = f"{state[key]!r:.60}" if key in state else "nothing"
            raise RunError(f"{path}: found {found} for {key}, expected {expected}; move the file away")
    return state


def note_store(folder: Path, uri: str, experiment: str, status: str) -> None:
    """Write down what `sakd sync` needs to know, before anything is sent: nothing of it is delivered.

    A run's id in another store is no id in this one.
    """
    state = {"uid": uuid.uuid4().hex, "start_time": int(time.time() * 1000)} | noted_or_new(folder)
    if (state.get("uri"), state.get("experiment")) != (absolute(uri), experiment):
        state["run_id"] = state["experiment_id"] = None
    changes = {"uri": absolute(uri), "experiment": experiment, "status": status, "delivered": None}
    update_state(folder, **state | changes)


def note_status(folder: Path, status: str) -> None:
    """Write down how a run goes on or has ended. Raises RunError where the disk is full."""
    update_state(folder, status=status)


def note_delivered(folder: Path, sent: dict[str, Any], status: str) -> None:
    """Write down that the store has confirmed this end, unless the run has begun anew since it was read."""
    now = noted_or_new(folder)
    places = [(state.get("uri"), state.get("experiment")) for state in (sent, now)]
    if places[0] == places[1] and now.get("status") in (sent["status"], status):
        update_state(folder, status=status, delivered=status)


def noted_or_new(folder: Path) -> dict[str, Any]:
    """As ``noted``, but a damaged file gives way to a new one."""
    path = folder / "mlflow.json"
    try:
        return noted(folder)
    except RunError as error:
        if not path.is_file():
            raise
        what = str(error).removesuffix("; move the file away")
        log.warning("%s; what MLflow has of this run is not known, so it gets a new one there", what)
        path.unlink()
        return {}


def update_state(folder: Path, **changes: object) -> None:
    """Note what has become known. Raises RunError where it cannot be written."""
    with _state_lock:
        content = noted_or_new(folder) | changes
        write_whole(folder / "mlflow.json", (json.dumps(content, indent=2) + "\n").encode())


def is_noted(state: dict[str, Any], tracking: Config, first: bool = False) -> bool:
    """True if a run is noted as one of the store, and experiment, that ``tracking`` asks for.

    ``first``: it was needed by others first, which may be in several experiments, and is in one of them.
    """
    same_store = state.get("uri") == absolute(tracking["uri"])
    return same_store and (first or state.get("experiment") == tracking["experiment"])


@contextmanager
def sending(folder: Path) -> Iterator[None]:
    """Send alone: a run's own thread and `sakd sync` must not send the same."""
    with explained(folder / ".mirror.lock"), holding(folder / ".mirror.lock"):
        yield
