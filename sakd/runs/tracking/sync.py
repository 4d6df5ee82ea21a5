"""A run's folder against a store: what the store lacks is sent, each epoch exactly once.

The folder is the truth. ``mlflow.json`` in it notes which store is to have it, as which run, how it stands,
and, as ``delivered``, with which end the store has confirmed to have it whole.
"""

import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sakd.configuration import Config, parameters, short_names, teacher_of, tracked_apart
from sakd.errors import RunError
from sakd.files import explained, read_json, write_whole
from sakd.runs.run import Run
from sakd.runs.stored import Metrics, read_config, read_metrics, read_result
from sakd.runs.tracking.store import ENDS, GOING_ON, Store, absolute, is_refusal, reason, sqlite_path
from sakd.runs.tracking.waiting import holding

log = logging.getLogger("sakd")

TRACEBACK = 4000  # characters of it that a run's page shows

# What is sent of a run's folder, as it is or in parts.
SENT = ("config.yaml", "metrics.jsonl", "result.json", "code.diff", "run.log")

_state_lock = threading.Lock()  # a run's mirror and the run itself both note what they know


def synchronise(folder: Path, status: str | None = None) -> int:
    """Send what the store lacks of one run's folder, and count the epochs sent.

    Its ``status`` is sent, too (None: the noted one), but a run with a result is FINISHED whatever is said.
    Raises RunError where a file of the folder is damaged, and whatever a Store does where that is away or
    refuses.
    """
    with _sending(folder):
        return _send(folder, status)


def bring(folder: Path, tracking: Config, first: bool = False) -> int:
    """Give a finished run to the store that ``tracking`` asks for, as ``synchronise`` does.

    ``first``: it was needed by others first, as for ``lacks``.
    """
    with _sending(folder):
        if not _is_noted(_noted_or_new(folder), tracking, first):
            note_store(folder, tracking["uri"], tracking["experiment"], "FINISHED")
        return _send(folder)


@contextmanager
def _sending(folder: Path) -> Iterator[None]:
    """Send alone: a run's own thread and `sakd sync` must not send the same."""
    with explained(folder / ".mirror.lock"), holding(folder / ".mirror.lock"):
        yield


def _send(folder: Path, status: str | None = None) -> int:
    _check_regular(folder)
    state = noted(folder)
    if not state:
        raise RunError(f"{folder / 'mlflow.json'}: found no file, expected what MLflow is to have of the run")
    finished = (folder / "result.json").exists()
    status = "FINISHED" if finished else status or state["status"]
    config, lines, tags = read_config(folder), _metrics(folder), _checksums(read_result(folder))
    if finished and len(lines) != config["epochs"]:
        raise RunError(
            f"{folder / 'metrics.jsonl'}: found {len(lines)} whole lines, expected {config['epochs']}, one "
            "for each epoch of a finished run; bring it back, or move the folder away"
        )
    store = Store(state["uri"])
    with store.alone():
        run = _run_of(store, state, folder, config)
        store.send_parameters(run, parameters(config))
        sent = store.send_metrics(run, lines)
        if status in ENDS and not _is_delivered(store, run, state, folder, status):
            _send_end(store, run, folder, status, tags)
        if run.info.status != status:
            store.set_status(run, status)
    if status in ENDS:
        _note_delivered(folder, state, status)
    return sent


def _is_delivered(store: Store, run: Any, state: dict[str, Any], folder: Path, status: str) -> bool:
    """True if the store has all that belongs to this end; it may have been replaced since it said so."""
    confirmed = state.get("delivered") == run.info.status == status
    return confirmed and store.files(run) >= {path.name for path in _files(folder, status)}


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


def _send_end(store: Store, run: Any, folder: Path, status: str, tags: dict[str, str]) -> None:
    """Send what is known once a run is over: files, ``tags``, and, until it is mended, why it failed."""
    for path in _files(folder, status):
        store.send_file(run, path)
    told = _traceback(folder / "run.log") if status == "FAILED" else ""
    if told or status == "FINISHED":
        tags = {**tags, "mlflow.note.content": told}  # what the run's page shows
    store.send_tags(run, tags)


def _files(folder: Path, status: str) -> list[Path]:
    """Files of a run that are sent once it is over, of those that it has."""
    names = ["config.yaml", "result.json", "code.diff", *(["run.log"] if status == "FAILED" else [])]
    return [path for path in (folder / name for name in names) if path.exists()]


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


def _metrics(folder: Path) -> list[Metrics]:
    """The run's epochs, in order. Raises RunError if they are damaged or foreign."""
    path = folder / "metrics.jsonl"
    lines = read_metrics(folder)
    for number, line in enumerate(lines, 1):
        if line["epoch"] != number or not math.isfinite(line["time"]):
            raise RunError(
                f"{path}: found {str(line)[:100]} in line {number}, expected measurements of epoch {number}; "
                "bring the file back, or move the folder away"
            )
    return lines


def undelivered(run: Run) -> Iterator[tuple[Path, Config, bool]]:
    """Find what its store lacks of a finished run and of what was needed first, its teacher and its
    pretraining: folders, each with its tracking, and whether it came first.

    From what is written, without torch: a finished run answers at once.
    """
    if run.config["tracking"]["name"] == "none":
        return
    for folder, tracking, first in _family(run):
        if (folder / "result.json").exists() and lacks(folder, tracking, first):
            yield folder, tracking, first


def _family(run: Run) -> Iterator[tuple[Path, Config, bool]]:
    tracking = run.config["tracking"]
    yield run.folder, tracking, False
    if "pretrains" in run.config["distiller"]:  # its students know where their teacher goes
        return
    teacher = teacher_of(run.config)
    if teacher is not None:
        yield Run(teacher).folder, teacher["tracking"], True
    if run.config["distiller"].get("pretraining") is not None:
        result = read_result(run.folder) or {}
        if result.get("pretraining"):
            name = result["pretraining"]["run"]
            yield run.folder.parent / name, tracked_apart(tracking, "pretraining"), True


def lacks(folder: Path, tracking: Config, first: bool = False) -> bool:
    """True unless the store that ``tracking`` asks for has confirmed to have a finished run.

    ``first``: it was needed by others first. These may be in several experiments, and it is in one of them.
    """
    try:
        state = noted(folder)
    except RunError:  # it will be told when it is to be sent
        return True
    path = sqlite_path(absolute(tracking["uri"]))
    delivered = _is_noted(state, tracking, first) and state.get("delivered") == "FINISHED"
    return not delivered or (path is not None and not path.exists())


def _is_noted(state: dict[str, Any], tracking: Config, first: bool) -> bool:
    """True if a run is noted as one of the store, and experiment, that ``tracking`` asks for."""
    same_store = state.get("uri") == absolute(tracking["uri"])
    return same_store and (first or state.get("experiment") == tracking["experiment"])


def goes_on(folder: Path) -> bool:
    """True if the store has this run as one that is not over, as far as is known."""
    try:
        return (folder / "mlflow.json").exists() and noted(folder)["status"] in GOING_ON
    except RunError:  # it will be told when it is to be sent
        return True


def tell_trouble(uri: str, error: Exception) -> None:
    """Say that a store does not take what it is sent: to the run at work, and on the terminal once, however
    many runs say so."""
    why = reason(error)
    if isinstance(error, RunError):
        log.warning("%s. Training goes on unharmed", error, extra={"news": (uri, why)})
    elif is_refusal(error):
        log.warning(
            "MLflow at %s refuses what it is sent (%s). Training goes on unharmed; once that is mended, "
            "`sakd sync` sends what is missing",
            uri,
            why,
            extra={"news": (uri, why)},
        )
    else:
        log.warning(
            "MLflow at %s cannot be reached (%s). Training goes on unharmed; `sakd sync` sends what is "
            "missing",
            uri,
            why,
            extra={"news": (uri, "away")},
        )


# ---- mlflow.json

# What each key must be, by name, in words.
NOTED = {
    "uid": (
        "32 hexadecimal digits",
        lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value),
    ),
    "start_time": ("milliseconds since 1970", lambda value: type(value) is int and value >= 0),
    "uri": ("a store's URI", lambda value: isinstance(value, str) and value),
    "experiment": ("an experiment's name", lambda value: isinstance(value, str) and value),
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
    state = {"uid": uuid.uuid4().hex, "start_time": int(time.time() * 1000)} | _noted_or_new(folder)
    if (state.get("uri"), state.get("experiment")) != (absolute(uri), experiment):
        state["run_id"] = None
    changes = {"uri": absolute(uri), "experiment": experiment, "status": status, "delivered": None}
    _update_state(folder, **state | changes)


def note_status(folder: Path, status: str) -> None:
    """Write down how a run goes on or has ended. Raises RunError where the disk is full."""
    _update_state(folder, status=status)


def _note_delivered(folder: Path, sent: dict[str, Any], status: str) -> None:
    """Write down that the store has confirmed this end, unless the run has begun anew since it was read."""
    now = _noted_or_new(folder)
    places = [(state.get("uri"), state.get("experiment")) for state in (sent, now)]
    if places[0] == places[1] and now.get("status") in (sent["status"], status):
        _update_state(folder, status=status, delivered=status)


def _noted_or_new(folder: Path) -> dict[str, Any]:
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


def _update_state(folder: Path, **changes: object) -> None:
    with _state_lock:
        content = _noted_or_new(folder) | changes
        write_whole(folder / "mlflow.json", (json.dumps(content, indent=2) + "\n").encode())
