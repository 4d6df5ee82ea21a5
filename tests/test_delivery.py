"""What a launch sends to MLflow arrives, or it is said what did not; every wait for it has an end."""

import json
import logging
import shutil
import signal
import sqlite3
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from filelock import FileLock

from sakd.cli import main as cli
from sakd.configuration import prerequisites
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.runs.tracking import Delivery, Mirror, delivery, start_mirror, sync, waiting
from tests.conftest import ROOT, TINY, compose_config
from tests.servers import OddServer, drip, free_port, put_off, refuse
from tests.test_tracking import PAGE, artifacts_of, runs_of, steps, store, tracked  # noqa: F401


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("sakd"), "propagate", True)
    caplog.set_level(logging.INFO, logger="sakd")
    return caplog


def finished(run: Run, **result: object) -> Run:
    """A run's folder as its training leaves it, for what tracking asks of it."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(run.config))
    epochs = range(1, run.config["epochs"] + 1)
    lines = [{"epoch": epoch, "time": 1e9 + epoch, "seconds": 1.0, "test/accuracy": 50.0} for epoch in epochs]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content = {
        "run": run.name,
        "student": {"name": "resnet8", "accuracy": 50.0, "best_accuracy": 50.0, "best_epoch": 1},
        "student_sha256": "a" * 64,
        "data_sha256": "b" * 64,
        "teacher": None,
        "kept": {},
        "seconds": 1.0,
        "epochs": run.config["epochs"],
        "code": {"commit": "c"},
    } | result
    (run.folder / "result.json").write_text(json.dumps(content))
    return run


def note(run: Run) -> dict:
    return json.loads((run.folder / "mlflow.json").read_text())


def assert_there_once(uri: str, experiment: str, epochs: int = 2) -> None:
    (found,) = runs_of(uri, experiment)
    assert found.info.status == "FINISHED"
    assert steps(uri, found.info.run_id, "test/accuracy") == list(range(1, epochs + 1))
    assert artifacts_of(uri, found) == PAGE - {"run.log"} | ({"run.log"} & artifacts_of(uri, found))


def test_only_what_the_store_confirmed_counts_as_delivered(store, tmp_path, said):  # noqa: F811
    away = f"http://127.0.0.1:{free_port()}"
    run = finished(Run(tracked(tmp_path, away, "distiller=none")))
    assert not start_mirror(run.folder, run.config).close("FINISHED")
    assert (note(run)["status"], note(run)["delivered"]) == ("FINISHED", None)
    Delivery().catch_up(run)
    assert f"MLflow at {away} has not got all of {run.name} (" in said.text
    there = Run(tracked(tmp_path, store, "distiller=none"))  # the same run, for another store
    Delivery().catch_up(there)
    assert note(run)["delivered"] == "FINISHED"
    assert_there_once(store, tmp_path.name)


def test_a_note_from_before_there_was_a_confirmation_is_sent_again_to_no_harm(store, tmp_path):  # noqa: F811
    run = finished(Run(tracked(tmp_path, store, "distiller=none")))
    Delivery().catch_up(run)
    old = {key: value for key, value in note(run).items() if key != "delivered"}
    (run.folder / "mlflow.json").write_text(json.dumps(old))
    Delivery().catch_up(run)
    assert note(run) == {**old, "delivered": "FINISHED"}
    assert_there_once(store, tmp_path.name)


def test_a_finished_run_brings_what_it_needed_first_and_then_asks_nobody(store, tmp_path, monkeypatch):  # noqa: F811
    config = tracked(tmp_path, store, "distiller=ft")
    first = [finished(Run(each)) for each in prerequisites(config)]
    assert len(first) == 2
    run = finished(Run(config), pretraining={"run": first[1].name, "sha256": "d" * 64})
    Delivery().catch_up(run)
    experiments = (tmp_path.name, f"{tmp_path.name}-teachers", f"{tmp_path.name}-pretraining")
    for experiment, each in zip(experiments, (run, *first), strict=True):
        assert_there_once(store, experiment, each.config["epochs"])
    monkeypatch.setattr(sync, "Store", None)
    for each in (run, *first):
        Delivery().catch_up(each)
    elsewhere = Run(tracked(tmp_path, store, "distiller=ft", "tracking.experiment=other"))
    assert [folder for folder, _, _ in sync.undelivered(elsewhere)] == [run.folder]  # a teacher has one place


def test_an_artifact_that_the_store_lacks_is_sent_by_a_sync(store, tmp_path):  # noqa: F811
    run = finished(Run(tracked(tmp_path, store, "distiller=none")))
    Delivery().catch_up(run)
    (found,) = runs_of(store, tmp_path.name)
    (Path(found.info.artifact_uri.removeprefix("file://")) / "result.json").unlink()
    assert CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")]).exit_code == 0
    assert_there_once(store, tmp_path.name)


def test_a_store_of_a_file_that_is_gone_has_nothing(tmp_path):
    run = finished(Run(tracked(tmp_path, f"sqlite:///{tmp_path}/gone.db", "distiller=none")))
    sync.note_store(
        run.folder, **{key: run.config["tracking"][key] for key in ("uri", "experiment")}, status="FINISHED"
    )
    (run.folder / "mlflow.json").write_text(json.dumps(note(run) | {"delivered": "FINISHED"}))
    assert sync.lacks(run.folder, run.config["tracking"])
    (tmp_path / "gone.db").touch()
    assert not sync.lacks(run.folder, run.config["tracking"])


@pytest.mark.slow
def test_killed_behind_its_result_while_its_store_was_held_it_arrives_by_the_same_command(launch, tmp_path):
    overrides = (*TINY, "epochs=3", "distiller=kd")
    moment = ("sakd.runs:Run.finish", "2", "after")
    with FileLock(tmp_path / "mlflow.db.lock"):
        script = (str(ROOT / "tests/kill_at.py"),)
        launch(*moment, *overrides, script=script, expect=-signal.SIGKILL)
    assert "finished before" in launch(*overrides).stdout
    for experiment in ("sakd", "sakd-teachers"):
        assert_there_once(f"sqlite:///{tmp_path}/mlflow.db", experiment, epochs=3)


@pytest.mark.parametrize("answer", [drip, put_off])
def test_all_runs_of_a_launch_wait_for_a_server_once_and_say_so(answer, tmp_path, said, monkeypatch):
    monkeypatch.setattr(waiting, "UNTOLD", 0.2)
    uri = OddServer(answer).uri
    config = tracked(tmp_path, uri, "distiller=none")
    runs = [finished(Run(config | {"seed": seed})) for seed in range(4)]
    ours, start = Delivery(3.0), time.monotonic()
    for run in runs[:2]:
        mirror = start_mirror(run.folder, run.config)
        mirror.end("FINISHED")
        ours.add(mirror)
    ours.catch_up(*runs)
    assert time.monotonic() - start < 10
    if answer is drip:
        assert f"waiting for MLflow at {uri}, at most 3 s" in said.text
    assert f"MLflow at {uri} has not got everything (" in said.text
    for run in runs[2:]:
        assert f"MLflow at {uri} has not got all of {run.name} (" in said.text


def test_a_teacher_is_not_waited_for_while_its_student_could_be_trained(tmp_path, monkeypatch):
    config = tracked(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", "distiller=kd", "epochs=1")
    trained = []

    def waits(self, seconds):
        trained.append((Run(config).folder / "result.json").exists())
        return True

    monkeypatch.setattr(Mirror, "_attempt", lambda self: None)
    monkeypatch.setattr(Mirror, "wait", waits)
    monkeypatch.setattr(delivery, "undelivered", lambda run: [])
    execute(config)
    assert trained == [True, True]


def test_a_lock_that_another_process_holds_is_waited_for_only_so_long(store, tmp_path, said, monkeypatch):  # noqa: F811
    monkeypatch.setattr(waiting, "UNTOLD", 0.1)
    monkeypatch.setattr(waiting, "LOCK_PATIENCE", 0.5)
    run = finished(Run(tracked(tmp_path, store, "distiller=none")))
    Delivery().catch_up(run)  # MLflow is imported, and the store set up
    Run(run.config).folder.joinpath("mlflow.json").unlink()
    with FileLock(f"{store.removeprefix('sqlite:///')}.lock"):
        start = time.monotonic()
        Delivery(1.0).catch_up(run)
        assert time.monotonic() - start < 3
    assert f"waiting for MLflow at {store}, at most 1 s" in said.text
    assert f"has not got all of {run.name} (" in said.text
    assert note(run)["delivered"] is None
    Delivery().catch_up(run)
    assert note(run)["delivered"] == "FINISHED"


def test_what_can_be_no_store_is_said_at_once(tmp_path):
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "text.db").write_text("no database" * 1000)
    places = {"/proc/x.db": "No such file", f"{tmp_path}/folder.db": "Is a directory"}
    places |= {f"{tmp_path}/text.db": "file is not a database"}
    for path, why in places.items():
        start = time.monotonic()
        error = Delivery().set_up(f"sqlite:///{path}", ["sakd"])
        assert time.monotonic() - start < 20
        assert str(error).startswith(f"{path}: ")
        assert why in str(error)


def test_a_store_with_a_schema_of_another_mlflow_is_named(store, tmp_path):  # noqa: F811
    Delivery().set_up(store, ["sakd"])
    shutil.copy(store.removeprefix("sqlite:///"), tmp_path / "newer.db")
    with sqlite3.connect(tmp_path / "newer.db") as newer:
        newer.execute("update alembic_version set version_num = 'ffff'")
    newer.close()
    error = Delivery().set_up(f"sqlite:///{tmp_path}/newer.db", ["sakd"])
    assert "newer.db: found no store for this MLflow (Detected out-of-date database schema" in str(error)


def test_what_is_refused_is_said_to_be_and_not_tried_again_while_it_trains(tmp_path, said, monkeypatch):
    monkeypatch.setattr("sakd.runs.tracking.thread.SECONDS_BETWEEN", 0.05)
    server = OddServer(refuse)
    run = finished(Run(tracked(tmp_path, server.uri, "distiller=none")))
    mirror = start_mirror(run.folder, run.config)
    for _ in range(6):
        mirror.notify()
        time.sleep(0.2)
    assert server.asked == 1
    assert not mirror.close("FINISHED")
    assert server.asked == 2
    assert (
        f"MLflow at {server.uri} refuses what it is sent (INVALID_PARAMETER_VALUE: no such name)" in said.text
    )
    assert "cannot be reached" not in said.text


DAMAGES = {
    "mlflow.json": {
        "no JSON": b'{"uid": ',
        "a list": b"[]",
        "nothing": b"{}",
        "a number for a name": b'{"uid": 3}',
        "not a number": None,
        "a folder": None,
    },
    "metrics.jsonl": {"words": b'{"epoch": 1, "time": "now"}\n', "too few": b"", "a folder": None},
    "config.yaml": {"no YAML": b"a: [", "no configuration": b"3", "bytes": b"\xff", "a folder": None},
    "result.json": {"another's": b"{}"},
}


def test_a_damaged_file_is_named_and_the_other_runs_are_sent(store, tmp_path):  # noqa: F811
    cases = [(name, kind, content) for name, kinds in DAMAGES.items() for kind, content in kinds.items()]
    config = tracked(tmp_path, store, "distiller=none")
    for seed, (name, kind, content) in enumerate(cases):
        run = finished(Run(config | {"seed": seed}))
        sync.note_store(run.folder, store, tmp_path.name, "FINISHED")
        path = run.folder / name
        if kind == "a folder":
            path.unlink()
            path.mkdir()
        elif kind == "not a number":
            path.write_text(json.dumps(note(run) | {"start_time": float("nan")}))
        else:
            path.write_bytes(content)
        if name == "mlflow.json":
            assert sync.goes_on(run.folder)  # so that whoever tells MLflow of it says what is wrong
    good = finished(Run(config | {"seed": 100}))
    sync.note_store(good.folder, store, tmp_path.name, "RUNNING")
    told = CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")])
    assert told.exit_code == 1
    assert "Traceback" not in told.output
    lines = told.output.splitlines()
    assert f"{len(cases) + 1} runs, 2 epochs sent, {len(cases)} runs failed" in lines
    for seed, (name, kind, _) in enumerate(cases):
        (line,) = (line for line in lines if f"-seed{seed}-" in line)
        assert name in line, (kind, line)
    assert_there_once(store, tmp_path.name)


def test_a_damaged_note_of_a_finished_run_gives_way_to_a_new_one(store, tmp_path, said):  # noqa: F811
    run = finished(Run(tracked(tmp_path, store, "distiller=none")))
    (run.folder / "mlflow.json").write_text('{"uid": "\' or 1"}')
    Delivery().catch_up(run)
    assert 'mlflow.json: found "\' or 1" for uid, expected 32 hexadecimal digits' in said.text
    assert_there_once(store, tmp_path.name)


def test_untracked_runs_have_nothing_to_deliver(tmp_path):
    run = finished(Run(compose_config(*TINY, "distiller=kd", "tracking=none", f"runs={tmp_path}/runs")))
    assert list(sync.undelivered(run)) == []
