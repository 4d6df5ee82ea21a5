"""MLflow's stores.

Only this module imports MLflow, and only once it is used: that takes seconds.
"""

import contextlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from sakd import credentials, names
from sakd.errors import RunError, SakdError

PARAMETERS_AT_ONCE, METRICS_AT_ONCE = 100, 1000  # MLflow's limits of one batch
PARAMETER = 6000  # characters, MLflow's limit
GOING_ON = ("RUNNING", "SCHEDULED")  # of the states that MLflow has for a run, those that are not its end


class Store:
    """An MLflow store, by its URI; a new SQLite store is set up.

    Each method raises whatever MLflow raises where the store is away or refuses.
    """

    def __init__(self, uri: str):
        self.uri = uri
        self.path = sqlite_path(uri)
        revealed = credentials.revealed(uri)
        client = _client_class()
        with self.alone():
            if self.path is not None and not self.path.exists():
                _set_up(self.path, client)
            self.client = client(revealed)

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes and threads from writing to an SQLite store, which takes only one at a time.

        A server looks after itself.
        """
        if self.path is None:
            yield
        else:
            with FileLock(f"{self.path}.lock"):
                yield

    def experiment(self, name: str) -> str:
        """The id of the experiment, which is created where there is none."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is not None:
            return found.experiment_id
        location = None
        if self.path is not None:
            location = (self.path.parent / "mlartifacts" / names.folder(name)).as_uri()
        try:
            return self.client.create_experiment(name, artifact_location=location)
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

    def find_or_create(self, experiment: str, uid: str, folder: Path, name: str, start_time: int) -> Any:
        """MLflow's Run of the folder that has this ``uid``, made where there is none.

        A kill between creating it and noting its id must not lead to two. ``start_time`` in milliseconds.
        """
        found = self.client.search_runs([experiment], f"tags.`sakd.uid` = '{uid}'")
        if found:
            return found[0]
        tags = {"sakd.uid": uid, "sakd.folder": str(folder.absolute()), "mlflow.source.name": "launch.py"}
        return self.client.create_run(experiment, start_time=start_time, tags=tags, run_name=name)

    def send_parameters(self, run: Any, parameters: Mapping[str, str]) -> None:
        """Add the parameters that the run has not yet."""
        from mlflow.entities import Param

        missing = [
            Param(key, value[:PARAMETER]) for key, value in parameters.items() if key not in run.data.params
        ]
        for start in range(0, len(missing), PARAMETERS_AT_ONCE):
            self.client.log_batch(run.info.run_id, params=missing[start : start + PARAMETERS_AT_ONCE])

    def send_metrics(self, run: Any, lines: Sequence[Mapping[str, float]]) -> int:
        """Add the epochs that the run has not yet, and count them.

        Each goes in one transaction together with its number, which then tells what has arrived.
        """
        from mlflow.entities import Metric

        last_known = run.data.metrics.get("epoch", 0)
        new = [line for line in lines if line["epoch"] > last_known]
        batch: list[Metric] = []
        for line in new:
            when, epoch = int(line["time"] * 1000), int(line["epoch"])
            metrics = [Metric(key, float(value), when, epoch) for key, value in line.items() if key != "time"]
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

    def send_file(self, run: Any, path: Path) -> None:
        """Store a copy of a file among the run's artifacts, in the place of one of that name."""
        self.client.log_artifact(run.info.run_id, str(path))

    def set_status(self, run: Any, status: str) -> None:
        """Say how the run goes on or has ended, in MLflow's words."""
        if status in GOING_ON:
            self.client.update_run(run.info.run_id, status=status)
        else:
            self.client.set_terminated(run.info.run_id, status=status)


def set_up_store(uri: str, experiments: Sequence[str]) -> str | None:
    """Make a fresh store and its experiments, before jobs would do so all at once.

    Returns what is wrong, in one line, where the store is away.
    """
    try:
        store = Store(absolute(uri))
        with store.alone():
            for name in experiments:
                store.experiment(name)
    except Exception as error:
        return reason(error)
    return None


def finished_runs(uri: str) -> Iterator[tuple[str, dict[str, str], dict[str, float], dict[str, str]]]:
    """Finished runs in the store that distil: folder's name, parameters, last metrics and tags.

    Raises RunError where the store is away.
    """
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise RunError(f"{uri}: found no file {path}, expected an MLflow store")
    try:
        client = Store(uri).client
        experiments = [
            experiment.experiment_id for page in _pages(client.search_experiments) for experiment in page
        ]
        query = "attributes.status = 'FINISHED' and tags.`sakd.uid` LIKE '%' and params.spot_mode != 'none'"
        for page in _pages(client.search_runs, experiments, query):
            for run in page:
                name = Path(run.data.tags["sakd.folder"]).name
                yield name, run.data.params, run.data.metrics, run.data.tags
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
    """The first line of what MLflow says, 160 characters at most: it may go on for pages."""
    return credentials.hidden((str(error).splitlines() or [type(error).__name__])[0])[:160]


def open_command(uri: str) -> str:
    """The command that a user types, or the address to open, to see the runs."""
    return uri if uri.startswith("http") else f"mlflow ui --backend-store-uri {uri}"


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


def _client_class() -> Any:
    """MLflow's client, told to give up soon and to be quiet.

    Whoever sends tries again, and tells once.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    from mlflow.tracking import MlflowClient

    for name, level in (("alembic", "WARNING"), ("mlflow", "WARNING"), ("urllib3", "ERROR")):
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
