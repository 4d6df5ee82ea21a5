"""MLflow mirrors a run's folder: with real stores, real servers, and servers that are not there."""

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from rich.console import Console

from sakd import terminal
from sakd.cli import main as cli
from sakd.configuration import prerequisites
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.runs.logs import OwnLog
from sakd.runs.tracking import Mirror, synchronise, thread
from tests.conftest import ROOT, TINY, compose_config, last_of_each
from tests.servers import MlflowServer, free_port
from tests.test_terminal import logging_started


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One SQLite store for the module: setting one up takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


def tracked(tmp_path, uri: str, *overrides: str) -> dict:
    return compose_config(
        *TINY,
        f"runs={tmp_path}/runs",
        f"tracking.uri={uri}",
        f"tracking.experiment={tmp_path.name}",
        *overrides,
    )


def runs_of(uri: str, experiment: str) -> list:
    client = MlflowClient(uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


@pytest.fixture
def free_address() -> str:
    """Where no server listens."""
    return f"http://127.0.0.1:{free_port()}"


def a_folder(folder: Path) -> Path:
    """What a run's folder has when its mirror begins."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(compose_config(*TINY, "distiller=none")))
    return folder


# What a finished run has sent; where the code is not its commit's, code.diff, too.
PAGE = {"config.yaml", "result.json", "run.log"}


def artifacts_of(uri: str, run) -> set[str]:
    client = MlflowClient(uri)
    top = client.list_artifacts(run.info.run_id)
    below = [each for one in top if one.is_dir for each in client.list_artifacts(run.info.run_id, one.path)]
    return {each.path for each in (*top, *below) if not each.is_dir} - {"code.diff"}


def steps(uri: str, run_id: str, metric: str) -> list[int]:
    return [point.step for point in MlflowClient(uri).get_metric_history(run_id, metric)]


def test_a_finished_run_is_in_mlflow_with_names_metrics_and_artifacts(store, tmp_path):
    config = tracked(tmp_path, store, "distiller=at")
    result = execute(config)
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "at adaptive seed 0, resnet8 to resnet8, digits"
    assert run.data.tags["sakd.folder"] == str(Run(config).folder)
    expected = {"dataset": "digits", "teacher": "resnet8", "student": "resnet8", "distiller": "at"}
    expected |= {
        "spot_mode": "adaptive",
        "seed": "0",
        "optimizer.lr": "0.05",
        "distiller.losses.at.weight": "1000.0",
    }
    assert expected.items() <= run.data.params.items()
    lines = Run(config).metrics()
    assert set(run.data.metrics) == set(lines[0]) - {"time", "epoch"}
    for metric in run.data.metrics:
        points = MlflowClient(store).get_metric_history(run.info.run_id, metric)
        assert [(point.step, point.value) for point in points] == [
            (line["epoch"], line[metric]) for line in lines
        ], metric
    assert artifacts_of(store, run) == PAGE
    assert run.data.tags["sakd.teacher_sha256"] == result["teacher"]["sha256"]
    (teacher,) = runs_of(store, f"{tmp_path.name}-teachers")
    assert (teacher.info.status, teacher.data.params["student"]) == ("FINISHED", "resnet8")
    assert teacher.info.run_name == "resnet8 alone seed 0, digits"


def test_sending_again_sends_nothing_twice(store, tmp_path):
    config = tracked(tmp_path, store, "distiller=none", "epochs=3")
    execute(config)
    folder = Run(config).folder
    assert synchronise(folder) == 0
    (run,) = runs_of(store, tmp_path.name)
    assert steps(store, run.info.run_id, "test/accuracy") == [1, 2, 3]


def test_a_kill_between_creating_the_run_and_noting_its_id_leads_to_one_run(store, tmp_path):
    config = tracked(tmp_path, store, "distiller=none")
    execute(config)
    state = Run(config).folder / "mlflow.json"
    noted = json.loads(state.read_text())
    del noted["run_id"]
    state.write_text(json.dumps(noted))
    synchronise(Run(config).folder)
    assert len(runs_of(store, tmp_path.name)) == 1


def test_a_failed_run_is_failed_with_its_traceback_in_its_own_log(store, tmp_path, monkeypatch):
    from sakd.training import Trainer

    config = tracked(tmp_path, store, "distiller=none", "epochs=3")
    begin_epoch = Trainer.begin_epoch

    def breaks(self, *arguments):
        if self.epoch == 1:
            raise ZeroDivisionError("of all things")
        return begin_epoch(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "begin_epoch", breaks)
        with pytest.raises(ZeroDivisionError):
            execute(config)
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "FAILED"
    own = (Run(config).folder / "run.log").read_text()
    assert "Traceback" in own
    assert "ZeroDivisionError: of all things" in own
    execute(config)  # mended: the same run goes on
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert steps(store, run.info.run_id, "loss/task") == [1, 2, 3]


def test_an_interrupted_run_is_killed_in_mlflow(store, tmp_path, monkeypatch):
    from sakd.training import Trainer

    config = tracked(tmp_path, store, "distiller=none", "epochs=3")
    begin_epoch = Trainer.begin_epoch

    def interrupted(self, *arguments):
        if self.epoch == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        return begin_epoch(self, *arguments)

    monkeypatch.setattr(Trainer, "begin_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(config)
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "KILLED"


def test_a_server_that_is_down_does_no_harm_and_says_so_and_a_sync_brings_the_rest(
    store, tmp_path, caplog, monkeypatch
):
    config = tracked(tmp_path, f"http://127.0.0.1:{free_port()}", "distiller=none")
    monkeypatch.setattr(logging.getLogger("sakd"), "propagate", True)
    start = time.monotonic()
    result = execute(config)
    assert time.monotonic() - start < 60
    assert result["student"]["accuracy"] > 0
    assert "cannot be reached" in caplog.text
    assert "sakd sync" in caplog.text
    state = Run(config).folder / "mlflow.json"
    state.write_text(
        state.read_text().replace(config["tracking"]["uri"], store)
    )  # a store that is there again
    told = CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")])
    assert told.output == "1 runs, 2 epochs sent, 0 runs failed\n"
    assert told.exit_code == 0
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert steps(store, run.info.run_id, "test/accuracy") == [1, 2]
    assert (
        CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")]).output
        == "1 runs, 0 epochs sent, 0 runs failed\n"
    )


def test_sync_marks_a_run_killed_without_warning(store, tmp_path):
    config = tracked(tmp_path, store, "distiller=none")
    execute(config)
    folder = Run(config).folder
    state = json.loads((folder / "mlflow.json").read_text())
    (folder / "mlflow.json").write_text(json.dumps(state | {"status": "RUNNING"}))  # as a SIGKILL leaves it
    (folder / "result.json").unlink()
    CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")])
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "KILLED"


@pytest.mark.slow
def test_what_finished_untracked_comes_to_mlflow_when_it_is_asked_for(store, tmp_path, launch):
    launch(*TINY, "distiller=none", "tracking=none")
    launch(*TINY, "distiller=none", f"tracking.uri={store}", f"tracking.experiment={tmp_path.name}")
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert steps(store, run.info.run_id, "test/accuracy") == [1, 2]


@pytest.mark.slow
def test_a_sync_brings_what_finished_untracked_only_when_told_to(tmp_path, monkeypatch):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    config = compose_config(*TINY, f"runs={tmp_path}/runs", "tracking=none", "distiller=none")
    execute(config)
    nothing = CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")])
    assert nothing.output == "0 runs, 0 epochs sent, 0 runs failed\n"
    told = CliRunner().invoke(cli, ["sync", str(tmp_path / "runs"), "--untracked"])
    assert told.output.endswith("1 runs, 2 epochs sent, 0 runs failed\n"), told.output
    (run,) = runs_of(store, "sakd")
    assert (run.info.status, steps(store, run.info.run_id, "test/accuracy")) == ("FINISHED", [1, 2])


@pytest.mark.slow
def test_a_kill_between_the_result_and_the_store_is_mended_by_the_same_command(store, tmp_path, launch):
    overrides = (*TINY, "distiller=none", f"tracking.uri={store}", f"tracking.experiment={tmp_path.name}")
    script = (str(ROOT / "tests/kill_at.py"),)
    launch("sakd.runs.tracking:Mirror.end", "1", "before", *overrides, script=script, expect=-signal.SIGKILL)
    assert "finished before" in launch(*overrides).stdout
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "FINISHED"
    assert steps(store, run.info.run_id, "test/accuracy") == [1, 2]
    assert artifacts_of(store, run) == PAGE


def test_a_run_deleted_in_mlflow_comes_back_with_a_sync(store, tmp_path):
    config = tracked(tmp_path, store, "distiller=none")
    execute(config)
    (run,) = runs_of(store, tmp_path.name)
    MlflowClient(store).delete_run(run.info.run_id)
    assert synchronise(Run(config).folder) == 2
    (again,) = runs_of(store, tmp_path.name)
    assert (again.info.status, again.info.run_id != run.info.run_id) == ("FINISHED", True)


def test_a_damaged_note_of_the_mirror_does_not_stop_the_training(store, tmp_path):
    config = tracked(tmp_path, store, "distiller=none")
    Run(config).folder.mkdir(parents=True)
    (Run(config).folder / "mlflow.json").write_text('{"uid": ')
    execute(config)
    (run,) = runs_of(store, tmp_path.name)
    assert run.info.status == "FINISHED"


def test_an_end_is_said_at_once_and_waited_for_apart(tmp_path, free_address):
    mirror = Mirror(a_folder(tmp_path / "run"), free_address, "sakd")
    start = time.monotonic()
    mirror.end("FAILED")
    assert not mirror.wait(0.0)
    assert time.monotonic() - start < 5
    assert json.loads((tmp_path / "run/mlflow.json").read_text())["status"] == "FAILED"
    assert not mirror.wait()  # the store stays away
    assert not mirror._thread.is_alive()


@pytest.mark.parametrize("hurried", [False, True])
def test_mlflow_is_imported_once_there_is_time_or_nothing_is_trained_any_more(hurried, tmp_path, monkeypatch):
    attempts = []
    monkeypatch.setattr(thread, "is_imported", lambda: False)
    monkeypatch.setattr(thread, "SECONDS_BEFORE_THE_FIRST", 60.0 if hurried else 0.3)
    monkeypatch.setattr(Mirror, "_attempt", lambda self: attempts.append(self._status))
    mirror = Mirror(a_folder(tmp_path / "run"), "http://nowhere", "sakd")
    time.sleep(0.05)
    assert attempts == []
    if not hurried:
        time.sleep(1.0)
        assert attempts == ["RUNNING"]
    mirror.end("KILLED")
    assert mirror.wait(10.0)
    assert attempts[-1] == "KILLED"


@pytest.mark.slow
def test_all_that_runs_of_one_process_send_arrives(store, tmp_path):
    """Their threads begin at the same moment, in a process that has not imported MLflow yet."""
    script = """
import sys
from pathlib import Path
from sakd.runs.tracking import Mirror
mirrors = [Mirror(Path(folder), sys.argv[1], sys.argv[2]) for folder in sys.argv[3:]]
for mirror in mirrors:
    mirror.end("FINISHED")
print("mlflow" in sys.modules)
for mirror in mirrors:
    mirror.hurry()
print(all([mirror.wait(60) for mirror in mirrors]))
"""
    folders = [a_folder(tmp_path / f"run{number}") for number in range(8)]
    command = [sys.executable, "-c", script, store, tmp_path.name, *map(str, folders)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert (done.stdout, done.stderr) == ("False\nTrue\n", "")
    assert [run.info.status for run in runs_of(store, tmp_path.name)] == ["FINISHED"] * 8


def test_a_store_that_is_away_is_told_once_on_the_terminal_and_in_each_runs_own_log(
    tmp_path, free_address, monkeypatch
):
    said = io.StringIO()
    monkeypatch.setattr(terminal, "console", Console(file=said, soft_wrap=True))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", free_address)
    logs = []
    with logging_started(), ExitStack() as stack:
        for cohort in range(2):
            mirrors = []
            for number in range(2):
                folder = a_folder(tmp_path / f"run{cohort}{number}")
                logs.append(stack.enter_context(OwnLog(folder / "run.log")))
                with logs[-1].speaking():
                    mirrors.append(Mirror(folder, free_address, "sakd"))
            for mirror in mirrors:
                mirror.end("FINISHED")
            for own, mirror in zip(logs[-2:], mirrors, strict=True):
                with own.speaking():
                    assert not mirror.wait()
    away, incomplete = said.getvalue().splitlines()
    assert away.startswith(f"MLflow at {free_address} cannot be reached (")
    assert incomplete.startswith(f"MLflow at {free_address} has not got everything (")
    for own in logs:
        text = own.path.read_text()
        assert (text.count("cannot be reached"), text.count("has not got everything")) == (1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [50_000, 300_000])
def test_a_kill_while_the_store_is_set_up_leaves_none_that_is_half_made(size, tmp_path, launch):
    command = [sys.executable, str(ROOT / "launch.py"), *TINY[:-1], "distiller=none", "epochs=50"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = tmp_path / "mlflow.db.partial"
    deadline = time.monotonic() + 60
    while not (partial.exists() and partial.stat().st_size >= size) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "mlflow.db").exists()
    assert "cannot be reached" not in launch(*TINY, "distiller=none").stdout
    (run,) = runs_of(f"sqlite:///{tmp_path}/mlflow.db", "sakd")
    assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_a_real_server_that_goes_away_and_comes_back_has_each_epoch_once(tmp_path):
    store = MlflowServer(tmp_path / "server")
    uri = store.uri
    overrides = [*TINY, "distiller=none", "epochs=60", f"tracking.uri={uri}", "dataset.train_samples=1400"]
    server = store.start()
    with (tmp_path / "said").open("wb") as said:
        command = [sys.executable, str(ROOT / "launch.py"), *last_of_each(*overrides)]
        job = subprocess.Popen(command, cwd=tmp_path, stdout=said, stderr=said)
    metrics = None
    while metrics is None or len(metrics.read_text().splitlines()) < 8:
        metrics = next((tmp_path / "runs").glob("*/metrics.jsonl"), None)
        time.sleep(0.2)
    store.stop(server)
    while len(metrics.read_text().splitlines()) < 25:
        time.sleep(0.2)
    server = store.start()
    try:
        assert job.wait(200) == 0
        subprocess.run(
            [sys.executable, "-m", "sakd.cli", "sync", "runs", "--uri", uri], cwd=tmp_path, check=True
        )
        (run,) = runs_of(uri, "sakd")
        assert run.info.status == "FINISHED"
        assert steps(uri, run.info.run_id, "test/accuracy") == list(range(1, 61))
        assert "View run" not in (tmp_path / "said").read_text()  # MLflow's own words, amid ours
    finally:
        store.stop(server)


def test_the_teacher_is_tracked_apart(tmp_path):
    config = compose_config(*TINY, "distiller=kd")
    assert prerequisites(config).teacher["tracking"]["experiment"] == "sakd-teachers"
