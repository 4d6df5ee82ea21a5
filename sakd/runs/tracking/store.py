"""MLflow as a mirror of a run's folder.

Training appends to metrics.jsonl and goes on; a thread sends what the store lacks. Where the store is away,
nothing is lost: `sakd sync` sends the rest later, each epoch exactly once. Only this module knows MLflow."""

import contextlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from sakd.configuration import parameters, short_names
from sakd.errors import RunError
from sakd.files import read_json, write_whole
from sakd.runs.run import Run, is_locked, read_metrics

log = logging.getLogger("sakd")

SECONDS_BETWEEN = 2.0  # between two transfers of one run
PATIENCE = 20.0  # seconds that the end of a run waits for a server
PATIENCE_WITH_A_FILE = 600.0  # and for an SQLite store, which is never away, but may have many others waiting
GOING_ON = ("RUNNING", "SCHEDULED")
TRACEBACK = 4000  # characters of it that a run's page shows
_state_lock = threading.Lock()  # a run's mirror and the run itself both note what they know
PARAMETERS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # MLflow's limits of one batch


class Mirror:
    """Sends a run's folder to MLflow from a thread of its own; neither slow nor absent stores hold up the
    training."""

    def __init__(self, folder: Path, uri: str, experiment: str):
        self.folder = folder
        self.uri = uri
        self.error: str | None = None
        self._status = "RUNNING"
        _note_store(folder, uri, experiment, self._status)
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """There is something new in the folder."""
        self._wake.set()

    def close(self, status: str) -> bool:
        """Record how the run ended (FINISHED, FAILED, KILLED, or SCHEDULED to go on later), and send the
        rest.

        False if not all could be sent.
        """
        with contextlib.suppress(
            RunError
        ):  # the disk is full: that has been said, and the store can still be told
            _update_state(self.folder, status=status)
        self._status = status
        self._wake.set()
        patience = PATIENCE if _sqlite_path(self.uri) is None else PATIENCE_WITH_A_FILE
        self._thread.join(patience)
        if self._thread.is_alive():
            self.error = self.error or f"no answer within {patience:.0f} seconds"
        return self.error is None

    @property
    def _closing(self) -> bool:
        return self._status != "RUNNING"

    def _work(self) -> None:
        while not self._closing:
            self._attempt()
            if not self._closing:
                self._wake.wait()
                self._wake.clear()
                started = time.monotonic()
                while not self._closing and time.monotonic() - started < SECONDS_BETWEEN:
                    time.sleep(0.05)
        self._attempt()

    def _attempt(self) -> None:
        try:
            synchronise(self.folder, self._status)
            if self.error is not None:
                log.info("MLflow at %s is back", self.uri)
            self.error = None
        except Exception as error:
            first = self.error is None
            self.error = (str(error).splitlines() or [type(error).__name__])[0][:160]
            if first:
                log.warning(
                    "MLflow at %s cannot be reached (%s). Training goes on unharmed; what is missing "
                    "there is in %s",
                    self.uri,
                    self.error,
                    self.folder / "metrics.jsonl",
                )


def start_mirror(folder: Path, config: dict[str, Any]) -> Mirror | None:
    """The mirror that the configuration asks for, if any."""
    tracking = config["tracking"]
    return Mirror(folder, tracking["uri"], tracking["experiment"]) if tracking["name"] == "mlflow" else None


def mirrored(folder: Path, config: dict[str, Any]) -> bool:
    """Whether a finished run has been given to the store that the configuration asks for, if it asks for one.

    It has not if it was tracked elsewhere or not at all, or was killed between its result and the store.
    """
    tracking, state = config["tracking"], _read_state(folder)
    if tracking["name"] == "none":
        return True
    noted = state.get("uri"), state.get("experiment"), state.get("status")
    return noted == (absolute(tracking["uri"]), tracking["experiment"], "FINISHED")


def synchronise(folder: Path, status: str | None = None) -> int:
    """Send what the store lacks of one run's folder, and its ``status`` (None: the noted one); the number of
    epochs sent.

    Raises whatever MLflow raises where the store is away or refuses.
    """
    with FileLock(folder / ".mirror.lock"):  # a run's own thread and `sakd sync` must not send the same
        return _synchronise(folder, status)


def _synchronise(folder: Path, status: str | None) -> int:
    state = _read_state(folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    metrics = read_metrics(folder)
    client = _client(state["uri"])
    with _alone(state["uri"]):
        experiment = _experiment(client, state)
        known = _known(client, state.get("run_id"))
        if known is None:
            known = client.get_run(_find_or_create(client, experiment, state, folder, config))
            with contextlib.suppress(RunError):  # it will be found again by its uid
                _update_state(folder, run_id=known.info.run_id)
        run_id = known.info.run_id
        _send_parameters(client, run_id, config, known.data.params)
        sent = _send_metrics(client, run_id, metrics, int(known.data.metrics.get("epoch", 0)))
        status = status or state["status"]
        if status in GOING_ON:
            if known.info.status != status:
                client.update_run(run_id, status=status)
        elif known.info.status != status:
            for name in (
                "config.yaml",
                "result.json",
                "code.diff",
                *(["run.log"] if status == "FAILED" else []),
            ):
                if (folder / name).exists():
                    client.log_artifact(run_id, str(folder / name))
            _send_result(client, run_id, folder)
            _send_traceback(client, run_id, folder, status)
            client.set_terminated(run_id, status=status)
    return sent


def synchronise_all(runs: Path) -> dict[str, int | Exception]:
    """Send what is missing of every run in ``runs``: epochs sent, or what went wrong, by the run's name.

    A run that was killed without warning before its result is marked KILLED; one that another process works
    on is left to it."""
    outcomes = {path.parent.name: settle(path.parent) for path in sorted(runs.glob("*/mlflow.json"))}
    return {name: outcome for name, outcome in outcomes.items() if outcome is not None}


def settle(folder: Path, lost: bool = False) -> int | Exception | None:
    """As ``synchronise_all`` for one run's folder; None where another process works on it.

    ``lost``: it is known not to come to a next turn either.
    """
    if is_locked(folder / ".lock"):
        return None
    try:
        if _read_state(folder)["status"] in (GOING_ON if lost else ("RUNNING",)):
            _update_state(folder, status="FINISHED" if (folder / "result.json").exists() else "KILLED")
        return synchronise(folder)
    except Exception as error:
        return error


def goes_on(folder: Path) -> bool:
    """Whether the store has this run as one that is not over."""
    return _read_state(folder).get("status") in GOING_ON


def catch_up(run: Run) -> None:
    """Give a finished run to the store that its configuration asks for, if that has not got it."""
    if not mirrored(run.folder, run.config):
        with run.locked():
            start_mirror(run.folder, run.config).close("FINISHED")


def prepare(uri: str, experiments: Sequence[str]) -> str | None:
    """Set the store up, and its experiments, before jobs would do so all at once; what is wrong, where it is
    away."""
    try:
        client = _client(uri)
        with _alone(uri):
            for name in experiments:
                _experiment(client, {"uri": absolute(uri), "experiment": name})
    except Exception as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:160]
    return None


def is_a_file(uri: str) -> bool:
    """Whether the store is one file on one machine."""
    return _sqlite_path(uri) is not None


def finished_runs(uri: str) -> Iterator[tuple[str, dict[str, str], dict[str, float], dict[str, str]]]:
    """Of every finished run in the store that distils: its folder's name, parameters, last metrics and tags.

    Raises RunError where the store is away.
    """
    from mlflow.exceptions import MlflowException

    path = _sqlite_path(uri)
    if path is not None and not path.exists():
        raise RunError(f"{uri}: found no file {path}, expected an MLflow store")
    try:
        client = _client(uri)
        experiments = [
            experiment.experiment_id for page in _pages(client.search_experiments) for experiment in page
        ]
        query = "attributes.status = 'FINISHED' and tags.`sakd.uid` LIKE '%' and params.spot_mode != 'none'"
        for page in _pages(client.search_runs, experiments, query):
            for run in page:
                yield (
                    Path(run.data.tags["sakd.folder"]).name,
                    run.data.params,
                    run.data.metrics,
                    run.data.tags,
                )
    except MlflowException as error:
        raise RunError(
            f"{uri}: cannot be read ({str(error).splitlines()[0]}); expected an MLflow store"
        ) from error


def _pages(search: Any, *arguments: Any) -> Iterator[Any]:
    """Each page of what a client's search finds."""
    token = None
    while token != "":
        found = search(*arguments, max_results=1000, page_token=token)
        yield found
        token = found.token or ""


def open_command(uri: str) -> str:
    """What a user types, or opens, to see the runs."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def absolute(uri: str) -> str:
    """A relative SQLite path made absolute, so that the folder can be sent from anywhere."""
    path = _sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def _sqlite_path(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """One process at a time writes to an SQLite store; a fresh one must be set up by one alone."""
    path = _sqlite_path(uri)
    if path is None:
        yield
    else:
        with FileLock(f"{path}.lock"):
            yield


def _client(uri: str) -> Any:
    # MLflow's own defaults would try for minutes; here another try follows anyway.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    from mlflow.tracking import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(
        logging.ERROR
    )  # a store that is away is reported once, by the mirror
    with _alone(uri):
        path = _sqlite_path(uri)
        if path is not None and not path.exists():
            _set_up(path, MlflowClient)
        return MlflowClient(uri)


def _set_up(path: Path, client: Any) -> None:
    """A new SQLite store, made beside and renamed: one that a kill leaves half made fails for everyone, for
    good."""
    partial = path.with_name(path.name + ".partial")
    for leftover in path.parent.glob(partial.name + "*"):
        leftover.unlink()
    client(f"sqlite:///{partial}").search_experiments(max_results=1)
    os.replace(partial, path)


def _experiment(client: Any, state: dict[str, Any]) -> str:
    from mlflow.exceptions import MlflowException

    name = state["experiment"]
    found = client.get_experiment_by_name(name)
    if found is not None:
        return found.experiment_id
    path = _sqlite_path(state["uri"])
    location = None if path is None else (path.parent / "mlartifacts" / name).as_uri()
    try:
        return client.create_experiment(name, artifact_location=location)
    except MlflowException:
        found = client.get_experiment_by_name(name)  # another process was first
        if found is None:
            raise
        return found.experiment_id


def _known(client: Any, run_id: str | None) -> Any:
    """The run, or None if the store has it not (any more): a store may have been replaced, or the run
    deleted."""
    from mlflow.exceptions import MlflowException

    if run_id is None:
        return None
    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return run if run.info.lifecycle_stage == "active" else None


def _find_or_create(
    client: Any, experiment: str, state: dict[str, Any], folder: Path, config: dict[str, Any]
) -> str:
    """A kill between creating the run and noting its id must not lead to two."""
    found = client.search_runs([experiment], f"tags.`sakd.uid` = '{state['uid']}'")
    if found:
        return found[0].info.run_id
    tags = {
        "sakd.uid": state["uid"],
        "sakd.folder": str(folder.absolute()),
        "mlflow.source.name": "launch.py",
    }
    names = short_names(config)
    # What differs between a sweep's runs comes first: MLflow's page shows only the beginning of a name.
    parts = (
        names["distiller"],
        names["spot_mode"],
        f"seed{names['seed']}",
        names["teacher"],
        names["student"],
        names["dataset"],
    )
    created = client.create_run(
        experiment, start_time=state["start_time"], tags=tags, run_name="-".join(parts)
    )
    return created.info.run_id


def _send_parameters(client: Any, run_id: str, config: dict[str, Any], known: dict[str, str]) -> None:
    from mlflow.entities import Param

    missing = [Param(key, value[:6000]) for key, value in parameters(config).items() if key not in known]
    for start in range(0, len(missing), PARAMETERS_AT_ONCE):
        client.log_batch(run_id, params=missing[start : start + PARAMETERS_AT_ONCE])


def _send_metrics(client: Any, run_id: str, lines: list[dict[str, float]], last_known: int) -> int:
    """Whole epochs, each in one transaction together with its number, which then tells what has arrived."""
    from mlflow.entities import Metric

    new = [line for line in lines if line["epoch"] > last_known]
    batch: list[Metric] = []
    for line in new:
        when, epoch = int(line["time"] * 1000), int(line["epoch"])
        metrics = [Metric(key, float(value), when, epoch) for key, value in line.items() if key != "time"]
        if len(batch) + len(metrics) > METRICS_AT_ONCE:
            client.log_batch(run_id, metrics=batch)
            batch = []
        batch += metrics
    if batch:
        client.log_batch(run_id, metrics=batch)
    return len(new)


def _send_result(client: Any, run_id: str, folder: Path) -> None:
    from mlflow.entities import RunTag

    result = read_json(folder / "result.json")
    if result is None:
        return
    tags = {"sakd.student_sha256": result["student_sha256"], "sakd.dataset_sha256": result["data_sha256"]}
    tags["mlflow.source.git.commit"] = result["code"]["commit"]
    if result["teacher"] is not None:
        tags["sakd.teacher_sha256"] = result["teacher"]["sha256"]
    client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items() if value])


def _send_traceback(client: Any, run_id: str, folder: Path, status: str) -> None:
    """What a failed run's page shows; once it is mended, no more."""
    log = folder / "run.log"
    failed = status == "FAILED" and log.exists()
    last = (
        log.read_text(errors="replace").rpartition("Traceback (most recent call last)")
        if failed
        else ("", "", "")
    )
    told = f"```\n{last[1]}{last[2]}"[:TRACEBACK] + "\n```" if last[1] else ""
    if told or status == "FINISHED":
        client.set_tag(run_id, "mlflow.note.content", told)


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return read_json(folder / "mlflow.json") or {}
    except RunError as error:
        log.warning("%s; what MLflow has of this run is not known, so it gets a new one there", error)
        (folder / "mlflow.json").unlink()
        return {}


def _note_store(folder: Path, uri: str, experiment: str, status: str) -> None:
    """What `sakd sync` needs to know; a run's id in another store is no id in this one."""
    state = {"uid": uuid.uuid4().hex, "start_time": _now()} | _read_state(folder)
    if (state.get("uri"), state.get("experiment")) != (absolute(uri), experiment):
        state["run_id"] = None
    _update_state(folder, **state | {"uri": absolute(uri), "experiment": experiment, "status": status})


def _update_state(folder: Path, **changes: object) -> None:
    with _state_lock:
        content = _read_state(folder) | changes
        write_whole(folder / "mlflow.json", (json.dumps(content, indent=2) + "\n").encode())


def _now() -> int:
    return int(time.time() * 1000)
