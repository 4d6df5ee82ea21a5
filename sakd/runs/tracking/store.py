"""MLflow's stores.

Only this module, ``model`` and ``machine`` import MLflow, and only once it is used: that takes seconds.
"""

import contextlib
import json
import logging
import os
import re
import sqlite3
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from sakd import credentials, names
from sakd.errors import RunError, SakdError
from sakd.names import HEADLINE
from sakd.runs.tracking.waiting import StoreAwayError, holding, within

PARAMETERS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # MLflow's limits of one batch
PARAMETER = 6000  # characters, MLflow's limit
GOING_ON = ("RUNNING", "SCHEDULED")  # of the states that MLflow has for a run, those that are not its end
ENDS = ("FINISHED", "FAILED", "KILLED")
PAGE_PATIENCE = 60.0  # seconds for a page of a search
TRY_LATER = (408, 429)  # of HTTP's 4xx, which else say that a request is wrong
COUNTER = "seconds"  # a metric that every epoch has: its steps tell which epochs have arrived
EPOCHS = "sakd.epochs"  # the tag of a run that is over: how many there are of it
MODEL = "student"  # the name that a run's network has among its models

# What MLflow's pages of an experiment begin with: tags say that it trains networks, and keep a view that a
# link calls by its name. In that the accuracy leads, in the table and among the charts.
VIEW = "sakd"
_FIRST = ("test", "loss", "kept")  # sections of charts
_VIEW = {
    "selectedColumns": [
        f"metrics.`{HEADLINE}`",
        *(f"params.`{key}`" for key in ("distiller", "spot_mode", "teacher", "student", "dataset", "seed")),
    ],
    "orderByKey": f"metrics.`{HEADLINE}`",
    "orderByAsc": False,
    "compareRunSections": [
        {"uuid": f"sakd-{name}", "name": name, "display": True, "isReordered": True} for name in _FIRST
    ],
    "compareRunCharts": [
        {
            "type": "LINE",
            "uuid": "sakd-headline",
            "metricSectionId": "sakd-test",
            "metricKey": HEADLINE,
            "selectedMetricKeys": [HEADLINE],
            "isGenerated": True,
            "deleted": False,
            "runsCountToCompare": 10,
            "lineSmoothness": 0,
            "scaleType": "linear",
            "xAxisKey": "step",
            "xAxisScaleType": "linear",
            "selectedXAxisMetricKey": "",
            "yAxisKey": "metric",
            "yAxisExpressions": [],
            "range": {},
        }
    ],
    "isAccordionReordered": True,
}
VIEW_TAG = f"mlflow.sharedViewState.{VIEW}"
EXPERIMENT = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.experiment.primaryMetric.name": HEADLINE,
    "mlflow.experiment.primaryMetric.greaterIsBetter": "True",
    VIEW_TAG: json.dumps(_VIEW),
}


class Store:
    """An MLflow store, by its URI; a new SQLite store is set up.

    Each method raises whatever MLflow raises where the store is away or refuses, RunError for a file that can
    be no store, and StoreAwayError where another process keeps it to itself. They may take any time:
    ``within`` bounds that.
    """

    def __init__(self, uri: str):
        self.uri = uri
        self.path = sqlite_path(uri)
        revealed = credentials.revealed(uri)
        if self.path is not None:
            _check_place(self.path)
        client = _client_class()
        if self.path is not None:
            with contextlib.suppress(ImportError):  # where it is; others would wait while the client does so
                import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
        with self.alone():
            try:
                if self.path is not None and not self.path.exists():
                    _set_up(self.path, client)
                self.client = client(revealed)
            except Exception as error:
                if self.path is None or _is_busy(error):
                    raise
                raise RunError(f"{self.path}: found no store for this MLflow ({reason(error)})") from error

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes and threads from writing to an SQLite store, which takes only one at a time.

        A server looks after itself.
        """
        with contextlib.nullcontext() if self.path is None else holding(_lock_of(self.path)):
            yield

    def answers(self) -> None:
        """Ask for next to nothing, to see whether the store can be asked at all."""
        self.client.search_experiments(max_results=1)

    def experiment(self, name: str) -> str:
        """The id of the experiment, which is created where there is none."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is not None:
            for key, value in EXPERIMENT.items():  # others are the user's to change
                if key not in found.tags or (key == VIEW_TAG and found.tags[key] != value):
                    self.client.set_experiment_tag(found.experiment_id, key, value)
            return found.experiment_id
        location = None
        if self.path is not None:
            location = (self.path.parent / "mlartifacts" / names.folder(name)).as_uri()
        try:
            return self.client.create_experiment(name, artifact_location=location, tags=EXPERIMENT)
        except MlflowException:
            found = self.client.get_experiment_by_name(name)  # another process was first
            if found is None:
                raise
            return found.experiment_id

    def run(self, run_id: str | None) -> Any:
        """MLflow's Run, or None if the store has it not (any more).

        A store may have been replaced, or the run deleted.
        """
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        return run if run.info.lifecycle_stage == "active" else None

    def find_or_create(
        self, experiment: str, key: str, uid: str, name: str, start_time: int, tags: Mapping[str, str]
    ) -> Any:
        """MLflow's Run that has this ``uid`` as its tag ``key``, made with ``tags`` where there is none.

        A kill between creating it and noting its id must not lead to two. ``start_time`` in milliseconds.
        """
        found = self.client.search_runs([experiment], f"tags.`{key}` = '{uid}'")
        if found:
            return found[0]
        tags = {key: uid, **tags}
        return self.client.create_run(experiment, start_time=start_time, tags=tags, run_name=name)

    def children(self, experiment: str, parent: str) -> Iterator[Any]:
        """MLflow's Runs that are the children of the one with this id."""
        query = f"tags.`mlflow.parentRunId` = '{parent}'"
        for page in _pages(partial(self.client.search_runs, [experiment], query)):
            yield from page

    def send_parameters(self, run: Any, parameters: Mapping[str, str]) -> None:
        """Add the parameters that the run has not yet."""
        from mlflow.entities import Param

        missing = [
            Param(key, value[:PARAMETER]) for key, value in parameters.items() if key not in run.data.params
        ]
        for start in range(0, len(missing), PARAMETERS_AT_ONCE):
            self.client.log_batch(run.info.run_id, params=missing[start : start + PARAMETERS_AT_ONCE])

    def send_metrics(
        self, run: Any, lines: Sequence[Mapping[str, float]], number: str = "epoch", counter: str = COUNTER
    ) -> int:
        """Add the epochs that the run has not yet, and count them.

        Each goes in one transaction, with its ``number`` as the step, which then tells what has arrived;
        ``counter``: a metric that each has.
        """
        from mlflow.entities import Metric

        if not lines:
            return 0
        known = counter in run.data.metrics
        points = self.client.get_metric_history(run.info.run_id, counter) if known else []
        last_known = max((point.step for point in points), default=0)
        new = [line for line in lines if line[number] > last_known]
        batch: list[Metric] = []
        for line in new:
            when, step = int(line["time"] * 1000), int(line[number])
            metrics = [
                Metric(key, float(value), when, step)
                for key, value in line.items()
                if key not in ("time", number)
            ]
            if len(batch) + len(metrics) > METRICS_AT_ONCE:
                self.client.log_batch(run.info.run_id, metrics=batch)
                batch = []
            batch += metrics
        if batch:
            self.client.log_batch(run.info.run_id, metrics=batch)
        return len(new)

    def send_tags(self, run: Any, tags: Mapping[str, str]) -> None:
        """Set tags; a run has one value of each."""
        from mlflow.entities import RunTag

        self.client.log_batch(run.info.run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def send_dataset(self, run: Any, dataset: Mapping[str, str]) -> None:
        """Say which data set the run learned from; saying it again changes nothing.

        ``dataset``: the arguments of MLflow's Dataset.
        """
        from mlflow.entities import Dataset, DatasetInput, InputTag

        tags = [InputTag("mlflow.data.context", "training")]
        self.client.log_inputs(run.info.run_id, [DatasetInput(Dataset(**dataset), tags)])

    def files(self, run: Any, folder: str | None = None) -> set[str]:
        """Paths of the run's artifacts, or of those in one ``folder`` of them."""
        with self._files_taken():
            return {artifact.path for artifact in self.client.list_artifacts(run.info.run_id, folder)}

    def send_file(self, run: Any, path: Path, folder: str | None = None) -> None:
        """Store a copy of a file among the run's artifacts, in the place of one of that name."""
        with self._files_taken():
            self.client.log_artifact(run.info.run_id, str(path), folder)

    def send_model(self, run: Any, path: Path, checksum: str, step: int) -> None:
        """Store MLflow's model in the folder ``path`` as what the run has made at its ``step``, once.

        ``checksum``: of its weights. One that a kill has left without its files is used again.
        """
        from mlflow.entities import LoggedModelOutput, LoggedModelStatus

        found = self.client.search_logged_models(
            [run.info.experiment_id], f"source_run_id = '{run.info.run_id}'"
        )
        alike = [model for model in found if model.tags.get("sakd.student_sha256") == checksum]
        if any(model.status == LoggedModelStatus.READY for model in alike):
            return
        model = (
            alike[0]
            if alike
            else self.client.create_logged_model(
                run.info.experiment_id, MODEL, run.info.run_id, {"sakd.student_sha256": checksum}
            )
        )
        known = [] if run.outputs is None else run.outputs.model_outputs
        if model.model_id not in {output.model_id for output in known}:
            self.client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step)])
        with self._files_taken():
            self.client.log_model_artifacts(model.model_id, str(path))
        self.client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)

    @contextlib.contextmanager
    def _files_taken(self) -> Iterator[None]:
        """Tell a store that takes no files from one that is away: as RunError, alike for all runs."""
        try:
            yield
        except OSError as error:  # where its files lie on a disk that is not this machine's
            if _http_status(error) is not None or error.strerror is None:
                raise
            why = f"{_folder_of(error)}, where it keeps them, cannot be written here: {error.strerror}"
            raise self._takes_no_files(why) from error
        except Exception as error:
            if "--serve-artifacts" not in str(error):
                raise
            raise self._takes_no_files("it runs without --serve-artifacts") from error

    def _takes_no_files(self, why: str) -> RunError:
        return RunError(
            f"MLflow at {self.uri} takes no files ({why}); expected a server that passes them on, with "
            "--artifacts-destination. Measurements and status have arrived"
        )

    def set_status(self, run: Any, status: str) -> None:
        """Say how the run goes on or has ended, in MLflow's words."""
        if status in GOING_ON:
            self.client.update_run(run.info.run_id, status=status)
        else:
            self.client.set_terminated(run.info.run_id, status=status)


def set_up_store(uri: str, experiments: Sequence[str]) -> None:
    """Make a fresh store and its experiments, before jobs would do so all at once. Raises as Store does."""
    store = Store(absolute(uri))
    with store.alone():
        for name in experiments:
            store.experiment(name)


def finished_runs(uri: str) -> Iterator[tuple[str, dict[str, str], dict[str, float], dict[str, str]]]:
    """Finished runs in the store that distil: folder's name, parameters, last metrics and tags.

    Raises a SakdError where the store is away.
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise RunError(f"{uri}: found no file {path}, expected an MLflow store")

    def asked(search: Any, *arguments: Any, **keys: Any) -> Any:
        return within(PAGE_PATIENCE, uri, lambda: search(*arguments, **keys))

    try:
        client = asked(Store, uri).client
        experiments = [
            experiment.experiment_id
            for page in _pages(partial(asked, client.search_experiments))
            for experiment in page
        ]
        query = "attributes.status = 'FINISHED' and tags.`sakd.uid` LIKE '%' and params.spot_mode != 'none'"
        for page in _pages(partial(asked, client.search_runs), experiments, query):
            for run in page:
                name, metrics = Path(run.data.tags["sakd.folder"]).name, dict(run.data.metrics)
                if EPOCHS in run.data.tags:  # else it was sent when the epoch was a metric, too
                    metrics["epoch"] = float(run.data.tags[EPOCHS])
                yield name, run.data.params, metrics, run.data.tags
    except SakdError:
        raise
    except Exception as error:  # of MLflow, or a database's driver
        raise RunError(f"{uri}: cannot be read ({reason(error)}); expected an MLflow store") from error


def _pages(search: Any, *arguments: Any) -> Iterator[Any]:
    """Pages of what a client's search finds."""
    token = None
    while token != "":
        found = search(*arguments, max_results=1000, page_token=token)
        yield found
        token = found.token or ""


def reason(error: Exception) -> str:
    """The first line of what MLflow says, of that the cause, 160 characters at most: it may go on for
    pages."""
    first = credentials.hidden((str(error).splitlines() or [type(error).__name__])[0])
    _, caused, cause = first.rpartition("(Caused by ")
    return (cause.removesuffix(")") if caused else first)[:160]


def is_refusal(error: Exception) -> bool:
    """True if nothing is gained by trying again: the store takes no such thing, or a file is damaged."""
    if isinstance(error, SakdError):
        return not isinstance(error, StoreAwayError)
    status = _http_status(error)
    return status is not None and 400 <= status < 500 and status not in TRY_LATER


def _http_status(error: Exception) -> int | None:
    """HTTP's number for what MLflow says, where it has one: of its error, or of a response as it is."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code
    told = re.search(r"failed with error code (\d{3})", str(error))
    if told:
        return int(told[1])
    return error.get_http_status_code() if hasattr(error, "get_http_status_code") else None


def open_command(uri: str) -> str:
    """The command that a user types, or the address to open, to see the runs."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


def page(uri: str, experiment: str, run: str | None = None) -> str:
    """The address of a run's page, or, of an experiment, of all its runs with what tells them apart; of a
    file once it is served by ``open_command``."""
    base = credentials.hidden(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    view = f"runs/{run}?" if run else f"runs?viewStateShareKey={VIEW}&"
    return f"{base}/#/experiments/{experiment}/{view}workflowType=machine_learning"


def is_a_file(uri: str) -> bool:
    """True if the store is one file on one machine."""
    return sqlite_path(uri) is not None


def absolute(uri: str) -> str:
    """The URI with a relative SQLite path made absolute, so that it holds from anywhere."""
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The store's file, absolute; None for a server."""
    return Path(uri.removeprefix("sqlite:///")).absolute() if uri.startswith("sqlite:///") else None


def _folder_of(error: OSError) -> str:
    """Where an error of the disk was met, but for what differs from run to run."""
    return str(Path(*Path(error.filename or "?").parts[:3]))


def _lock_of(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def _check_place(path: Path) -> None:
    """Raise RunError where no store can be: MLflow, and its lock, would try for minutes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (_lock_of(path), *([path] if path.exists() else [])):
            os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o644))
    except OSError as error:
        raise RunError(
            f"{path}: cannot be written ({error.strerror}), expected an SQLite file, or a place for one"
        ) from error


def _is_busy(error: BaseException | None) -> bool:
    """True if SQLite itself says why it cannot work now: the file is locked, or its disk full."""
    while error is not None and not isinstance(error, sqlite3.OperationalError):
        error = error.__cause__
    return error is not None


def is_imported() -> bool:
    """True if this process has MLflow already, so that a store costs it no more than the store's own time."""
    return "mlflow" in sys.modules


def _client_class() -> Any:
    """MLflow's client, told to give up soon and to be quiet.

    Whoever sends tries again, and tells once.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER", "false")  # it may ask for an hour
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow.tracking import MlflowClient

    # Errors of a database are raised, too: there they are told in one line.
    levels = {"alembic": "WARNING", "mlflow": "WARNING", "mlflow.store.db": "CRITICAL", "urllib3": "ERROR"}
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    return MlflowClient


def _set_up(path: Path, client: Any) -> None:
    """Make a new SQLite store beside its place, and rename it.

    One that a kill leaves half made fails for everyone, for good.
    """
    partial = path.with_name(path.name + ".partial")
    for leftover in path.parent.glob(partial.name + "*"):
        leftover.unlink()
    client(f"sqlite:///{partial}").search_experiments(max_results=1)
    os.replace(partial, path)
