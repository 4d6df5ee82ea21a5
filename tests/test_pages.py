"""What MLflow's pages show of a run and of a sweep: in real stores, on a real server, in a real browser."""

import csv
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from PIL import Image

from sakd import sweep_page
from sakd.cli import main as cli
from sakd.configuration import build
from sakd.errors import ConfigError
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.runs.record import Recording
from sakd.runs.tracking import (
    Delivery,
    machine,
    model,
    note_sweep,
    noted,
    page_of,
    pictures,
    seen_at,
    start_mirror,
    under_way,
)
from sakd.runs.tracking import page as pages
from sakd.runs.tracking.store import VIEW_TAG, Store
from sakd.sweeps import PlannedRun, report
from tests.browser import browser  # noqa: F401
from tests.conftest import ROOT, TINY, compose_config
from tests.servers import MlflowServer
from tests.test_delivery import finished, note, said  # noqa: F401
from tests.test_tracking import PAGE, artifacts_of, runs_of, steps, store, tracked  # noqa: F401


@pytest.fixture(autouse=True)
def _drawn(monkeypatch):
    monkeypatch.setenv("SAKD_TRACKING_PICTURES", "true")


def delivered(*runs: Run, patience: float | None = None) -> None:
    Delivery(patience).catch_up(*runs)
    for run in runs:
        assert note(run)["delivered"] == "FINISHED"


def awaited(ask: Callable[[], Any], seconds: float = 90.0) -> Any:
    """What ``ask`` gives once that is anything."""
    deadline = time.monotonic() + seconds
    while not (found := ask()):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    return found


def test_names_say_what_a_person_asks_for():
    named = {
        ("distiller=at", "seed=3"): "at adaptive seed 3, vgg8 to resnet8, digits_quick",
        ("distiller=none",): "resnet8 alone seed 0, digits_quick",
    }
    for overrides, name in named.items():
        assert pages.run_name(compose_config(*overrides)) == name


def test_a_page_says_what_the_run_is_how_it_ended_and_where_it_lies(store, tmp_path):  # noqa: F811
    teacher = {"name": "resnet20", "accuracy": 91.5, "sha256": "e" * 64, "source": "x"}
    config = tracked(tmp_path, store, "distiller=at", "teacher.checkpoint=null")
    run = finished(Run(config), teacher=teacher, kept={"stage2": 0.25})
    Delivery().catch_up(run)
    (found,) = [each for each in runs_of(store, tmp_path.name) if "at adaptive" in each.info.run_name]
    told = found.data.tags["mlflow.note.content"]
    assert "**resnet8** learns **digits** from **resnet8** with **at** at **adaptive** spots, seed 0." in told
    assert "**50.00 %** on the test images after 2 epochs" in told
    assert "the teacher has 91.50 %" in told
    assert "stage2 25.0 %" in told
    assert f"(file://{run.folder})" in told
    assert found.data.tags["mlflow.user"] == run.folder.owner()
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("digits", "b" * 36)
    assert json.loads(dataset.dataset.source)["sha256"] == "b" * 64
    assert "epoch" not in found.data.metrics
    assert "pictures/learning_curves.png" in artifacts_of(store, found)


@pytest.mark.slow
def test_a_run_whose_policy_chooses_has_pictures_of_its_decisions(store, tmp_path):  # noqa: F811
    execute(tracked(tmp_path, store, "spot_mode.same_family_bias=0", "distiller=at"))
    drawn = {"learning_curves"} | {
        f"spots_{name}" for name in ("classes", "samples", "changes", "confidence", "loss", "images")
    }
    (run,) = [run for run in runs_of(store, tmp_path.name) if "adaptive" in run.info.run_name]
    assert artifacts_of(store, run) == PAGE | {f"pictures/{name}.png" for name in drawn}
    execute(tracked(tmp_path, store, "spot_mode=fixed", "distiller=at"))  # it keeps all
    (run,) = [run for run in runs_of(store, tmp_path.name) if "fixed" in run.info.run_name]
    assert artifacts_of(store, run) == PAGE | {"pictures/learning_curves.png"}


def test_pictures_in_a_runs_folder_are_sent_and_links_are_not_followed(store, tmp_path):  # noqa: F811
    run = finished(Run(tracked(tmp_path, store, "distiller=none")))
    (run.folder / "pictures").mkdir()
    (run.folder / "pictures/spots.png").write_bytes(b"PNG")
    delivered(run)
    (found,) = runs_of(store, tmp_path.name)
    assert {"pictures/spots.png", "pictures/learning_curves.png"} <= artifacts_of(store, found)
    other = finished(Run(tracked(tmp_path, store, "distiller=none", "seed=1")))
    (other.folder / "pictures").mkdir()
    (other.folder / "pictures/theirs.png").symlink_to("/etc/passwd")
    start_mirror(other.folder, other.config).close("FINISHED")
    assert note(other)["delivered"] is None


def test_learning_curves_have_a_panel_for_each_kind_and_are_not_blank(tmp_path):
    lines = [
        {"epoch": n, "test/accuracy": 50.0 + n, "loss/task": 1 / n, "loss/kd": 2 / n, "kept/stage1": 0.5}
        for n in range(1, 4)
    ]
    (figure,) = pictures.learning_curves(tmp_path, lines).values()
    assert [axis.get_ylabel() for axis in figure.axes] == ["accuracy, %", "loss", "share distilled"]
    labels = [[line.get_label() for line in axis.lines] for axis in figure.axes]
    assert labels == [["test/accuracy"], ["task", "kd"], ["stage1"]]
    assert list(figure.axes[1].lines[1].get_ydata()) == [2, 1, 2 / 3]
    pictures.draw(tmp_path, lines)
    from matplotlib.image import imread

    assert imread(tmp_path / "pictures/learning_curves.png").std() > 0.05


def test_what_an_earlier_version_has_sent_stays_as_it_is(store, tmp_path):  # noqa: F811
    run = finished(Run(tracked(tmp_path, store, "distiller=none")))
    client = MlflowClient(store)
    start_mirror(run.folder, run.config).close("FINISHED")
    (found,) = runs_of(store, tmp_path.name)
    for key in ("sakd.epochs", "mlflow.note.content"):
        client.delete_tag(found.info.run_id, key)
    client.log_batch(found.info.run_id, [Metric("epoch", epoch, 0, epoch) for epoch in (1, 2)])
    shutil.rmtree(Path(found.info.artifact_uri.removeprefix("file://")) / "pictures")
    assert CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")]).exit_code == 0
    (after,) = runs_of(store, tmp_path.name)
    assert "mlflow.note.content" not in after.data.tags
    assert artifacts_of(store, after) == {"config.yaml", "result.json"}
    assert steps(store, after.info.run_id, "test/accuracy") == [1, 2]


def test_a_store_that_takes_no_files_has_all_else_and_that_is_said_once(store, tmp_path, said):  # noqa: F811
    MlflowClient(store).create_experiment(tmp_path.name, artifact_location="file:///proc/nowhere/x")
    runs = [finished(Run(tracked(tmp_path, store, "distiller=none", f"seed={n}"))) for n in range(2)]
    for run in runs:
        start_mirror(run.folder, run.config).close("FINISHED")
    told = [record.news for record in said.records if " takes no files (/proc/" in record.getMessage()]
    assert len(told) == 4
    assert {topic for topic, _ in told} == {store, f"the rest for {store}"}
    assert len({*told}) == 2  # the terminal leaves out what has been said
    for found in runs_of(store, tmp_path.name):
        assert found.info.status == "FINISHED"
        assert steps(store, found.info.run_id, "test/accuracy") == [1, 2]
        assert "Finished" in found.data.tags["mlflow.note.content"]


def test_an_experiment_keeps_the_view_that_links_open(store, tmp_path):  # noqa: F811
    client = MlflowClient(store)
    before = client.create_experiment(tmp_path.name, tags={VIEW_TAG: "{}", "mlflow.experimentKind": "mine"})
    assert Store(store).experiment(tmp_path.name) == before
    tags = client.get_experiment(before).tags
    assert json.loads(tags[VIEW_TAG])["selectedColumns"][0] == "metrics.`test/accuracy`"
    assert tags["mlflow.experimentKind"] == "mine"  # the user's own


def test_a_link_leads_to_the_run(store, tmp_path):  # noqa: F811
    run = finished(Run(tracked(tmp_path, store, "distiller=none")))
    assert seen_at(run.folder, store) == f"mlflow ui --backend-store-uri {store}"
    delivered(run)
    (found,) = runs_of(store, tmp_path.name)
    page = f"http://127.0.0.1:5000/#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}?"
    assert seen_at(run.folder, store).startswith(f"mlflow ui --backend-store-uri {store}  # then {page}")
    assert page_of(run.folder, store).startswith(page)


def test_system_metrics_are_asked_for_by_psutil(monkeypatch):
    monkeypatch.setattr(sys.modules["sakd.configuration.check"], "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"^tracking.system_metrics: found true, expected .* psutil"):
        compose_config("tracking.system_metrics=true")


def test_system_metrics_arrive_each_once_also_where_a_run_goes_on(store, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("psutil")
    monkeypatch.setattr(machine, "SECONDS_BETWEEN", 0.05)
    run = finished(Run(tracked(tmp_path, store, "distiller=none", "tracking.system_metrics=true")))
    for _ in range(2):
        before = len(machine.samples(run.folder))
        mirror = start_mirror(run.folder, run.config)
        while len(machine.samples(run.folder)) < before + 2:
            time.sleep(0.05)
        assert mirror.close("FINISHED")
        time.sleep(0.2)  # the last sample may be under way
    delivered(run)
    CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")])
    (found,) = runs_of(store, tmp_path.name)
    sent = steps(store, found.info.run_id, machine.COUNTER)
    assert sent == list(range(1, len(machine.samples(run.folder)) + 1))
    assert "system/system_memory_usage_megabytes" in found.data.metrics


def test_a_run_goes_on_where_its_machine_cannot_be_sampled(tmp_path, said):  # noqa: F811
    pytest.importorskip("psutil")
    (tmp_path / machine.FILE).symlink_to("/etc/passwd")
    sampling = machine.Sampling(tmp_path)
    awaited(lambda: "no system metrics: " in said.text)
    assert f"{machine.FILE}: found a link" in said.text
    sampling.end()


# ---- sweeps


def a_sweep(tmp_path: Path, store: str, *seeds: int) -> list[PlannedRun]:  # noqa: F811
    configs = [tracked(tmp_path, store, "distiller=none", f"seed={seed}") for seed in seeds]
    return [PlannedRun(Run(config)) for config in configs]


def asked_for(cells: list[PlannedRun], *overrides: str) -> Path:
    return note_sweep({cell.name: cell.run.config for cell in cells}, overrides)


def parents_of(uri: str, experiment: str) -> dict[str, set[str]]:
    """Seeds of the children of each sweep's run, by its name."""
    found = runs_of(uri, experiment)
    sweeps = {run.info.run_id: run.info.run_name for run in found if "sakd.sweep" in run.data.tags}
    assert len({*sweeps.values()}) == len(sweeps)
    children = {name: set() for name in sweeps.values()}
    for run in found:
        if "mlflow.parentRunId" in run.data.tags:
            children[sweeps[run.data.tags["mlflow.parentRunId"]]].add(run.data.params["seed"])
    return children


def test_a_cell_stays_with_the_first_sweep_that_asked_for_it(store, tmp_path, capsys):  # noqa: F811
    first, second = a_sweep(tmp_path, store, 0, 1), a_sweep(tmp_path, store, 0, 1, 2)
    alone = finished(first[0].run)
    delivered(alone)  # before there was a sweep
    folder = asked_for(first, "seed=0,1")
    assert asked_for(first[::-1], "seed=1,0") == folder
    later = asked_for(second, "seed=0,1,2")
    delivered(finished(first[1].run), finished(second[2].run))
    for cells in (first, second):
        states = {cell.name: "finished" for cell in cells}
        shown = sweep_page.update(cells, states)
        assert shown == sweep_page.update(cells, states)
        assert "/runs/" in shown["see it"]
        assert "/runs?viewStateShareKey=sakd&" in shown["best first"]
        report.conclude(cells, (), states, {}, shown)
        told = capsys.readouterr().out.splitlines()
        assert told[-2:] == [f"{what}: {address}" for what, address in shown.items()]
    assert parents_of(store, tmp_path.name) == {"sweep seed=1,0": {"0", "1"}, "sweep seed=0,1,2": {"2"}}
    assert json.loads((later / "mlflow.json").read_text())["delivered"] == "FINISHED"
    (parent,) = [run for run in runs_of(store, tmp_path.name) if run.info.run_name == "sweep seed=0,1,2"]
    assert parent.info.status == "FINISHED"
    assert parent.data.params["seed"] == "0, 1, 2"
    assert (
        "2 cells of these stand below an earlier sweep that had them"
        in (parent.data.tags["mlflow.note.content"])
    )
    with (later / "cells.csv").open() as rows:
        assert [row["sweep"] for row in csv.DictReader(rows)] == ["sweep seed=1,0", "sweep seed=1,0", ""]
    assert {"cells.csv", "report.html"} <= set(artifacts_of(store, parent))


def test_sync_ends_a_sweep_that_was_killed_and_no_other(store, tmp_path):  # noqa: F811
    cells = a_sweep(tmp_path, store, 0, 1)
    folder = asked_for(cells, "seed=0,1")
    finished(cells[0].run)

    def settled() -> str:
        sweep_page.settle(tmp_path / "runs")
        return noted(folder)["status"]

    with under_way(folder):  # between two cohorts, as on a terminal that is still there
        assert settled() == "RUNNING"
    with cells[1].run.locked():  # in a job
        assert settled() == "RUNNING"
    assert CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")]).exit_code == 0
    assert MlflowClient(store).get_run(noted(folder)["run_id"]).info.status == "KILLED"
    asked_for(cells, "seed=0,1")
    shutil.rmtree(cells[1].run.folder)
    finished(cells[1].run)
    assert settled() == "FINISHED"


@pytest.mark.slow
def test_a_damaged_run_is_left_out_of_a_sweeps_comparison_and_no_earlier_one_is_left(store, tmp_path):  # noqa: F811
    teacher = {"name": "resnet8", "accuracy": 91.5, "sha256": "e" * 64, "source": "x"}
    cells = []
    for mode in ("fixed", "adaptive"):
        for seed in (0, 1):
            config = tracked(tmp_path, store, "distiller=at", f"spot_mode={mode}", f"seed={seed}")
            cells.append(PlannedRun(finished(Run(config), teacher=teacher)))
    folder = asked_for(cells, "spot_mode=fixed,adaptive", "seed=0,1")
    states = {cell.name: "finished" for cell in cells}
    sweep_page.update(cells, states)
    assert (folder / "comparison.png").is_file()
    (cells[3].run.folder / "result.json").write_text("{")
    sweep_page.update(cells, states)
    told = (folder / "description.md").read_text()
    assert "3 finished, 1 failed" in told
    assert f"damaged: {cells[3].run.folder}/result.json: found no valid JSON" in told
    assert "50.00 ± 0.00 (2)" in told
    assert "(1 of 2)" in told
    assert (folder / "comparison.png").is_file()
    for cell in cells[:2]:
        (cell.run.folder / "metrics.jsonl").write_text("{}\n")
    sweep_page.update(cells, states)
    assert not (folder / "comparison.png").exists()
    (parent,) = [run for run in runs_of(store, tmp_path.name) if "sakd.sweep" in run.data.tags]
    assert parent.info.status == "FAILED"
    assert parent.data.tags["mlflow.note.content"].count("damaged: ") == 3


def test_a_sweep_is_no_run_to_compare_and_an_untracked_one_or_one_cell_has_no_page(store, tmp_path):  # noqa: F811
    cells = a_sweep(tmp_path, store, 0)
    assert asked_for(cells) is None
    assert sweep_page.update(cells, {cells[0].name: "finished"}) == {}
    untracked = [compose_config(*TINY, "tracking=none", f"seed={n}", f"runs={tmp_path}/runs") for n in (0, 1)]
    assert note_sweep({Run(config).name: config for config in untracked}, ()) is None
    assert not (tmp_path / "runs").exists()


def test_a_damaged_note_of_a_sweep_is_told_and_its_cells_are_sent(store, tmp_path):  # noqa: F811
    cells = a_sweep(tmp_path, store, 0, 1)
    folder = asked_for(cells, "seed=0,1")
    (folder / "sweep.json").write_text("{")
    delivered(*(finished(cell.run) for cell in cells))
    told = CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")])
    assert told.exit_code == 1
    assert "sweep.json: found no valid JSON" in told.output
    assert "Traceback" not in told.output


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("overrides", "seed=0"),
        ("cells", None),
        ("cells", ["../elsewhere"]),
        ("cells", [1]),
        ("parameters", {"seed": 1}),
        ("time", "now"),
    ],
)
def test_a_note_of_a_sweep_is_held_to_what_it_must_hold(tmp_path, key, value):
    folder = asked_for(a_sweep(tmp_path, f"sqlite:///{tmp_path}/mlflow.db", 0, 1), "seed=0,1")
    sweep = json.loads((folder / "sweep.json").read_text())
    del sweep["sha256"], sweep[key]
    (folder / "sweep.json").write_text(json.dumps(sweep if value is None else sweep | {key: value}))
    told = str(Delivery().bring_sweep(folder))
    found = "nothing" if value is None else repr(value)
    assert told.startswith(f"{folder}/sweep.json: found {found} for {key}, expected "), told
    assert not (tmp_path / "mlflow.db").exists()


PROCESS = """
import sys
from pathlib import Path
from sakd.runs.tracking import Mirror
mirror = Mirror(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
mirror.end("FINISHED")
print(mirror.wait(150))
"""


@pytest.mark.slow
def test_cells_that_several_processes_send_at_once_have_one_parent(tmp_path):
    server = MlflowServer(tmp_path / "server")
    process = server.start()
    try:
        cells = a_sweep(tmp_path, server.uri, *range(4))
        asked_for(cells, "seed=0,1,2,3")
        folders = [finished(cell.run).folder for cell in cells]
        started = [
            subprocess.Popen(
                [sys.executable, "-c", PROCESS, str(folder), server.uri, tmp_path.name],
                cwd=ROOT,
                env={**os.environ, "MLFLOW_TRACKING_URI": server.uri},
                stdout=subprocess.PIPE,
                text=True,
            )
            for folder in folders
        ]
        assert [each.communicate(timeout=200)[0] for each in started] == ["True\n"] * 4
        assert parents_of(server.uri, tmp_path.name) == {"sweep seed=0,1,2,3": set("0123")}
    finally:
        server.stop(process)


# ---- models


def idle_worker(monkeypatch, *command: str) -> tuple[Any, list[subprocess.Popen]]:
    """A worker whose process takes work and, by default, never answers; the processes that it has started."""
    worker, started = model._Worker(), []

    def start() -> subprocess.Popen:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command or ["sleep", "60"], **pipes))
        return started[-1]

    monkeypatch.setattr(worker, "_started", start)
    return worker, started


def test_who_only_looks_builds_no_network_that_names_code_of_others(store, tmp_path, monkeypatch):  # noqa: F811
    own, others = compose_config("student=resnet8")["student"], compose_config("student=torchvision_resnet18")
    assert model.is_of_sakd(own)
    for student in (others["student"], own | {"_target_": "os.system"}, own | {"widths": ["os.system"]}):
        assert not model.is_of_sakd(student)
    known, foreign = (
        finished(Run(tracked(tmp_path, store, "distiller=none", "tracking.model=true", f"seed={seed}")))
        for seed in (0, 1)
    )
    path = foreign.folder / "config.yaml"
    path.write_text(path.read_text().replace("sakd.networks.resnet8", "os.system"))
    built = []
    monkeypatch.setattr(model, "make", built.append)
    delivered(known, foreign)
    assert built == [known.folder]


def test_a_process_that_makes_no_model_is_waited_for_no_longer_than_is_sensible(tmp_path, monkeypatch):
    monkeypatch.setattr(model, "MADE_WITHIN", 0.2)
    worker, started = idle_worker(monkeypatch)
    assert "was not made within 0 seconds" in worker.made(tmp_path)
    assert [process.poll() for process in started] == [-signal.SIGKILL]


def test_a_process_that_has_ended_idle_leaves_no_pipe_open_when_the_next_is_started(tmp_path, monkeypatch):
    worker, started = idle_worker(monkeypatch, "sh", "-c", "read folder; echo null")
    for _ in range(2):
        assert worker.made(tmp_path) is None
        started[-1].wait(20)
    worker.end()
    assert [(each.stdin.closed, each.stdout.closed) for each in started] == [(True, True)] * 2


def test_a_launch_that_ends_ends_the_process_that_makes_models_for_good(tmp_path, monkeypatch):
    worker, started = idle_worker(monkeypatch)
    told = []
    waiting = threading.Thread(target=lambda: told.append(worker.made(tmp_path)))
    waiting.start()
    awaited(lambda: started)
    worker.end()
    waiting.join(20)
    assert told == [worker.made(tmp_path)]
    assert "the launch ended before" in told[0]
    assert [process.poll() for process in started] == [-signal.SIGKILL]


@pytest.mark.slow
def test_a_model_that_cannot_be_made_does_not_keep_a_run_from_being_delivered(store, tmp_path, said):  # noqa: F811
    run = finished(Run(tracked(tmp_path, store, "distiller=none", "tracking.model=true")))
    (run.folder / "student.safetensors").write_bytes(b"others'")
    delivered(run)
    assert "MLflow gets no model: " in said.text
    assert "in result.json" in said.text


def accuracy_of(network: torch.nn.Module, config: dict) -> float:
    dataset = build.dataset(config)
    images = torch.cat(list(dataset.test.plain(1000)))
    return 100 * (network(images).argmax(1) == dataset.test.labels).float().mean().item()


@pytest.mark.slow
def test_a_logged_model_has_the_runs_accuracy_and_is_there_once(store, tmp_path, monkeypatch):  # noqa: F811
    import mlflow.pytorch

    config = tracked(tmp_path, store, "distiller=kd", "tracking.model=true", "epochs=6")
    result = execute(config)
    folder = Run(config).folder
    (run,) = runs_of(store, tmp_path.name)
    (output,) = run.outputs.model_outputs
    logged = MlflowClient(store).get_logged_model(output.model_id)
    assert (logged.name, str(logged.status), logged.source_run_id) == ("student", "READY", run.info.run_id)
    assert not (folder / model.FOLDER).exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    path = f"{logged.artifact_location}".removeprefix("file://")
    network = mlflow.pytorch.load_model(path)
    assert accuracy_of(network, config) == pytest.approx(result["student"]["accuracy"], abs=1e-3)
    described = mlflow.models.get_model_info(path)
    assert described.signature.inputs.inputs[0].shape == (-1, 1, 8, 8)
    assert described.metadata["mean"] == config["dataset"]["mean"]
    state = json.loads((folder / "mlflow.json").read_text())
    (folder / "mlflow.json").write_text(json.dumps(state | {"delivered": None}))  # as a kill leaves it
    assert CliRunner().invoke(cli, ["sync", str(tmp_path / "runs")]).exit_code == 0
    (again,) = runs_of(store, tmp_path.name)
    assert again.outputs.model_outputs == run.outputs.model_outputs
    assert steps(store, run.info.run_id, "test/accuracy") == list(range(1, 7))


@pytest.mark.slow
def test_a_kill_while_a_model_is_sent_leads_to_one(store, tmp_path, launch):  # noqa: F811
    overrides = (*TINY, "distiller=none", "tracking.model=true", f"tracking.uri={store}")
    overrides += (f"tracking.experiment={tmp_path.name}",)
    script = (str(ROOT / "tests/kill_at.py"),)
    moment = ("mlflow.tracking:MlflowClient.log_model_artifacts", "1", "after")
    launch(*moment, *overrides, script=script, expect=-signal.SIGKILL)
    launch(*overrides)
    (run,) = runs_of(store, tmp_path.name)
    found = MlflowClient(store).search_logged_models([run.info.experiment_id])
    assert [str(each.status) for each in found] == ["READY"]
    assert len(run.outputs.model_outputs) == 1
    assert artifacts_of(store, run) == PAGE | {"pictures/learning_curves.png"}


# ---- in a browser


def shown(browser, text: str, seconds: float = 90.0) -> str:  # noqa: F811
    """The page's text once it has ``text``."""
    deadline = time.monotonic() + seconds
    while text not in (page := browser.execute_script("return document.body.innerText")):
        assert time.monotonic() < deadline, page
        time.sleep(0.5)
    return page


TABLE = """
    const found = [...document.querySelectorAll('[role=gridcell][col-id="' + arguments[0] + '"]')]
    const place = cell => Number(cell.closest('[role=row]').getAttribute('row-index'))
    return found.sort((a, b) => place(a) - place(b)).map(cell => cell.innerText)
"""
HEADING = "return document.querySelector('[role=columnheader][col-id=\"' + arguments[0] + '\"]')"
WIDEST = """
    const found = [...document.querySelectorAll('img')].filter(i => i.complete && i.naturalWidth >= 600)
    return found.length ? found[0] : null
"""
ACCURACY = "metrics.`test/accuracy`"


def measured(run: Run, accuracy: float) -> Run:
    """A finished run with this accuracy, and a record of a policy that chooses, on its own images."""
    dataset = build.dataset(run.config)
    finished(run, data_sha256=dataset.checksum)
    for name in ("metrics.jsonl", "result.json"):
        path = run.folder / name
        path.write_text(path.read_text().replace("50.0", str(accuracy)))
    recording = Recording(["stage1"], dataset.train.labels.numpy(), dataset.places_of("train").numpy())
    for epoch in (1, 2):
        recording.add(epoch, np.packbits(np.arange(len(dataset.train)) % (epoch + 1) > 0)[None])
    (run.folder / "spots.npz").write_bytes(recording.content())
    return run


@pytest.mark.slow
def test_a_browser_sees_accuracies_pictures_and_a_sweeps_cells(browser, tmp_path):  # noqa: F811
    server = MlflowServer(tmp_path / "server")
    process = server.start()
    logging.getLogger("sakd").setLevel(logging.INFO)
    try:
        cells = a_sweep(tmp_path, server.uri, 0, 1, 2)
        folder = asked_for(cells, "seed=0,1,2")
        accuracies = (62.5, 75.25, 50.125)
        runs = [measured(cell.run, one) for cell, one in zip(cells, accuracies, strict=True)]
        delivered(*runs, patience=120)
        links = sweep_page.update(cells, {cell.name: "finished" for cell in cells})
        browser.get(links["best first"])
        table = shown(browser, "resnet8 alone seed 1")
        assert table.index("test/accuracy") < table.index("distiller")

        def column(name: str) -> list[str]:
            return browser.execute_script(TABLE, name)

        awaited(lambda: len(column(ACCURACY)) == 4)
        assert column(ACCURACY) == ["75.25", "62.5", "50.125", "-"]  # the last is the sweep
        names = [name.split(",")[0][-6:] for name in column("attributes.`Run Name`")[:3]]
        assert names == ["seed 1", "seed 0", "seed 2"]
        browser.execute_script(HEADING, ACCURACY).click()
        awaited(lambda: column(ACCURACY)[:3] == ["50.125", "62.5", "75.25"])
        browser.get(seen_at(cells[0].run.folder, server.uri))
        run = shown(browser, "learns digits by itself, seed 0")
        assert "62.50 %" in run
        state = note(cells[0].run)
        base = f"{server.uri}/#/experiments/{state['experiment_id']}/runs/{state['run_id']}"
        drawn = pictures.found(cells[0].run.folder)
        assert {path.stem for path in drawn} >= {"learning_curves", "spots_classes", "spots_images"}
        for path in drawn:
            browser.get("about:blank")
            browser.get(f"{base}/artifacts/pictures/{path.name}")
            image = awaited(lambda: browser.execute_script(WIDEST))
            sizes = image.get_property("naturalWidth"), image.get_property("naturalHeight")
            assert sizes == Image.open(io.BytesIO(path.read_bytes())).size
            assert np.asarray(Image.open(io.BytesIO(image.screenshot_as_png)).convert("L")).std() > 10
        browser.get(seen_at(folder, server.uri))
        sweep = shown(browser, "resnet8 alone seed 0")
        assert "3 cells, 3 finished" in sweep
    finally:
        server.stop(process)
