"""A run's folder against a store: what the store lacks is sent, each epoch exactly once.

The folder is the truth; ``notes`` tells what is known of its place there.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from sakd.configuration import Config, parameters, product_node, read_config, teacher_of, tracked_apart
from sakd.errors import RunError
from sakd.files import explained
from sakd.runs.run import Run
from sakd.runs.stored import Metrics, read_metrics, read_result
from sakd.runs.tracking import machine, model, parents, pictures
from sakd.runs.tracking import page as pages
from sakd.runs.tracking.notes import (
    is_noted,
    note_delivered,
    note_store,
    noted,
    noted_or_new,
    sending,
    update_state,
)
from sakd.runs.tracking.store import (
    ENDS,
    EPOCHS,
    GOING_ON,
    Store,
    absolute,
    is_refusal,
    open_command,
    page,
    reason,
    sqlite_path,
)
from sakd.runs.tracking.waiting import holding

log = logging.getLogger("sakd")

# What is sent of a run's folder, as it is or in parts.
SENT = (
    *("config.yaml", "metrics.jsonl", "result.json", "code.diff", "run.log", "student.safetensors"),
    machine.FILE,
)


def synchronise(folder: Path, status: str | None = None) -> int:
    """Send what the store lacks of one run's folder, and count the epochs sent.

    Its ``status`` is sent, too (None: the noted one), but a run with a result is FINISHED whatever is said.
    Raises RunError where a file of the folder is damaged, and whatever a Store does where that is away or
    refuses.
    """
    with sending(folder):
        return _send(folder, status)


def bring(folder: Path, tracking: Config, first: bool = False) -> int:
    """Give a finished run to the store that ``tracking`` asks for, as ``synchronise`` does.

    ``first``: it was needed by others first, as for ``lacks``.
    """
    with sending(folder):
        if not is_noted(noted_or_new(folder), tracking, first):
            note_store(folder, tracking["uri"], tracking["experiment"], "FINISHED")
        return _send(folder)


def prepare(folder: Path) -> None:
    """Draw and make what belongs to the end of a run's page, where that is not done yet: without any store,
    since it takes seconds. In the process that trained it, which has run its code before.

    Raises RunError where a file of the folder is damaged.
    """
    _check_regular(folder)
    _prepare(folder, read_config(folder), _metrics(folder), own=True)


def _prepare(folder: Path, config: Config, lines: list[Metrics], own: bool = False) -> Path | None:
    """As ``prepare``; the folder of the model, where one is to be sent.

    A run that is not this process's ``own`` gets none if its configuration names code of others.
    """
    with explained(folder / ".prepare.lock"), holding(folder / ".prepare.lock"):
        if config["tracking"].get("pictures", True):
            pictures.draw(folder, lines)
        return _model(folder, config, own)


def _model(folder: Path, config: Config, own: bool) -> Path | None:
    if not config["tracking"].get("model", True) or "pretrains" in config["distiller"]:
        return None
    if not (folder / "result.json").exists():
        return None
    if not (own or model.is_made(folder) or model.is_of_sakd(product_node(config))):
        return None
    try:
        return model.make(folder)
    except RunError as error:  # the run is worth no less for it
        log.warning("MLflow gets no model: %s", error, extra={"news": (f"model of {folder}", str(error))})
        return None


def _send(folder: Path, status: str | None = None) -> int:
    _check_regular(folder)
    state = noted(folder)
    if not state:
        raise RunError(f"{folder / 'mlflow.json'}: found no file, expected what MLflow is to have of the run")
    result = read_result(folder)
    status = "FINISHED" if result is not None else status or state["status"]
    config, lines = read_config(folder), _metrics(folder)
    if result is not None and len(lines) != result["epochs"]:
        raise RunError(
            f"{folder / 'metrics.jsonl'}: found {len(lines)} whole lines, expected {result['epochs']}, one "
            "for each epoch of a finished run; bring it back, or move the folder away"
        )
    made, prepared = None, status in ENDS and state.get("delivered") != status
    if prepared:
        made = _prepare(folder, config, lines)  # before others wait for the store
    parent = parents.run_of(folder, state) if state.get("run_id") is None else None
    store = Store(state["uri"])
    with store.alone():
        run = _run_of(store, state, folder, config, parent)
        store.send_parameters(run, parameters(config))
        sent = store.send_metrics(run, lines)
        store.send_metrics(run, machine.samples(folder), "sample", machine.COUNTER)
        is_delivered = status not in ENDS or _is_delivered(store, run, state, folder, status)
        if not is_delivered:
            store.send_tags(run, _tags(config, folder, status, result, len(lines)))
        if run.info.status != status:
            store.set_status(run, status)
        if not is_delivered:  # last, since there are stores that take no files
            made = made if prepared else _prepare(folder, config, lines)
            _send_files(store, run, folder, made, result)
    if status in ENDS:
        note_delivered(folder, state, status)
        model.forget(folder)
    return sent


def _is_delivered(store: Store, run: Any, state: dict[str, Any], folder: Path, status: str) -> bool:
    """True if the store has all that belongs to this end; it may have been replaced since it said so.

    What an earlier version has delivered stays as it is.
    """
    if not state.get("delivered") == run.info.status == status:
        return False
    paths = _files(folder)
    if EPOCHS not in run.data.tags:
        return store.files(run) >= {name for name in ("config.yaml", "result.json") if name in paths}
    there = store.files(run)
    if pictures.FOLDER in there:
        there |= store.files(run, pictures.FOLDER)
    return there >= paths.keys()


def _run_of(store: Store, state: dict[str, Any], folder: Path, config: Config, parent: str | None) -> Any:
    """Find or create the store's run of this folder, a child of ``parent``, and note its id."""
    experiment = store.experiment(state["experiment"])
    known = store.run(state.get("run_id"))
    if known is not None:
        return known
    tags = {"sakd.folder": str(folder.absolute()), "mlflow.source.name": "launch.py"}
    tags |= {"mlflow.user": pages.owner(folder)} | ({} if parent is None else {parents.TAG: parent})
    name = pages.run_name(config)
    run = store.find_or_create(experiment, "sakd.uid", state["uid"], name, state["start_time"], tags)
    with suppress(RunError):  # it will be found again by its uid
        update_state(folder, run_id=run.info.run_id, experiment_id=experiment)
    return run


def _tags(
    config: Config, folder: Path, status: str, result: dict[str, Any] | None, epochs: int
) -> dict[str, str]:
    """What tags say of a run that is over: its description, how many epochs it has, and checksums."""
    traceback = pages.traceback_of(folder / "run.log") if status == "FAILED" else ""
    told = pages.description(config, folder, status, result, epochs, traceback)
    return {**_checksums(result), EPOCHS: str(epochs), "mlflow.note.content": told}


def _send_files(
    store: Store, run: Any, folder: Path, made: Path | None, result: dict[str, Any] | None
) -> None:
    """Send what a run that is over leaves, its data set and the model of its network, if one was ``made``."""
    if result is not None:
        store.send_dataset(run, pages.dataset(read_config(folder), result["data_sha256"]))
    for name, path in _files(folder).items():
        store.send_file(run, path, str(Path(name).parent) if "/" in name else None)
    if made is not None and result is not None:
        store.send_model(run, made, result["student_sha256"], result["epochs"])


def _files(folder: Path) -> dict[str, Path]:
    """Files of a run that are sent once it is over, of those that it has, by their names in the store."""
    names = ["config.yaml", "result.json", "code.diff", "run.log"]
    found = {name: folder / name for name in names if (folder / name).exists()}
    return found | {f"{pictures.FOLDER}/{path.name}": path for path in pictures.found(folder)}


def _check_regular(folder: Path) -> None:
    """Raise RunError for what is sent of a run and is no regular file: a link may lead to anybody's."""
    drawn = folder / pictures.FOLDER
    if drawn.is_symlink():
        raise RunError(f"{drawn}: found a link, expected a folder; nothing of this run is sent")
    for path in (*(folder / name for name in SENT), *pictures.found(folder)):
        if path.is_symlink() or (path.exists() and not path.is_file()):
            kind = "a link" if path.is_symlink() else "no regular file"
            raise RunError(f"{path}: found {kind}, expected a regular file; nothing of this run is sent")


def page_of(folder: Path, uri: str) -> str | None:
    """The address of the page of a run, or a sweep, whose folder this is; None where it is not known.

    Of a file, once it is served.
    """
    place = _place(folder, uri)
    return None if place is None else page(uri, *place)


def view_of(folder: Path, uri: str) -> str | None:
    """The address of the view of all runs beside a run, or a sweep, best first; as ``page_of``."""
    place = _place(folder, uri)
    return None if place is None else page(uri, place[0])


def _place(folder: Path, uri: str) -> tuple[str, str] | None:
    """Ids of the experiment and of the run that a store has of this folder; None where they are not known."""
    try:
        state = noted(folder)
    except RunError:  # it is told when it is to be sent
        return None
    if state.get("uri") != absolute(uri) or not state.get("run_id") or not state.get("experiment_id"):
        return None
    return state["experiment_id"], state["run_id"]


def seen_at(folder: Path, uri: str) -> str:
    """What shows a run, or a sweep, in one line: its address, or the command that serves a file, and the
    address then."""
    address = page_of(folder, uri)
    if address is None:
        return open_command(uri)
    return address if uri.startswith("http") else f"{open_command(uri)}  # then {address}"


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
    delivered = is_noted(state, tracking, first) and state.get("delivered") == "FINISHED"
    return not delivered or (path is not None and not path.exists())


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
