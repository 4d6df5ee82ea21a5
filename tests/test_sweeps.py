"""What `sakd status` says of a sweep's cells, from what real processes leave."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from filelock import FileLock
from mlflow.tracking import MlflowClient

from sakd.cli import main as cli
from sakd.configuration.compose import sweep
from sakd.errors import SakdError
from sakd.runs import code, read_metrics
from sakd.runs.job import execute
from sakd.sweeps import Plan, launch, plan, submissions, survey
from sakd.sweeps.launchers.local import ALIVE, LocalLauncher, log_of
from sakd.sweeps.submissions import Array, Submission
from sakd.sweeps.work import Work
from tests.conftest import ROOT, TINY
from tests.test_compare import finish

SMALL = (
    "teacher=resnet8",
    "student=resnet8",
    "dataset.train_samples=192",
    "dataset.test_samples=32",
    "threads=1",
)
FOREVER = 5000  # epochs


def until(condition: Callable, patience: float = 300.0):
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.1)
    raise TimeoutError(f"nothing within {patience} seconds")


def planned(*overrides: str) -> Plan:
    return plan(sweep(overrides))


def status(*arguments: str) -> str:
    done = CliRunner().invoke(cli, ["status", *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def cells(*overrides: str) -> dict[str, dict]:
    """What a program is told of each cell."""
    said = status(*overrides, "--format", "json")
    return {cell["name"]: cell for cell in json.loads(said[said.index("{") :])["cells"]}  # behind warnings


def states(*overrides: str) -> list[str]:
    return [cell["state"] for cell in cells(*overrides).values()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder of the test's own, as a user's working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def as_a_job(here, monkeypatch):
    """This process passes for one that runs a copy of the code, as a job must: a process for each would take
    long."""
    monkeypatch.setattr("sakd.runs.code.of_this_process", lambda: (code.Code("c" * 40, False, "copied"), ""))
    return here


@pytest.fixture
def at_work(here):
    """A real process that trains one run for as long as it is let, and is in its third epoch at least."""
    command = [sys.executable, str(ROOT / "launch.py"), *SMALL, "distiller=none", f"epochs={FOREVER}"]
    with (here / "said").open("wb") as said:  # a pipe that nobody reads would be full within half a minute
        process = subprocess.Popen(command, cwd=here, stdout=said, stderr=subprocess.STDOUT)
    try:
        until(lambda: any(len(read_metrics(path.parent)) > 2 for path in here.glob("runs/*/metrics.jsonl")))
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_finished_running_lost_and_missing_cells_are_told_apart_and_mlflow_learns_what_is_lost(at_work, here):
    overrides = (*SMALL, "distiller=none", f"epochs=2,{FOREVER},3")
    sweep = planned(*overrides)
    finished, running, missing = names = [job.name for job in sweep.cells]
    execute(sweep.cells[0].run.config | {"tracking": {"name": "none"}})

    told = cells(*overrides)
    assert list(told) == names
    assert [told[name]["state"] for name in names] == ["finished", "running", "missing"]
    assert [standing.state for standing in survey(sweep.everything, sweep.runs).values()] == [
        "finished",
        "running",
        "missing",
    ]
    assert 2 < told[running]["epoch"] <= len(read_metrics(here / "runs" / running))
    assert told[running]["epochs"] == FOREVER
    measured = [line["test/accuracy"] for line in read_metrics(here / "runs" / running)]
    assert told[running]["accuracy"] == measured[told[running]["epoch"] - 1]
    line = read_metrics(here / "runs" / running)[-1]
    assert line["seconds"] * FOREVER / 10 < told[running]["left"] < line["seconds"] * FOREVER * 10
    assert {told[name]["epoch"] for name in (finished, missing)} == {None}
    text = status(*overrides)
    assert "3 cells: 1 finished, 1 running, 1 missing" in text
    assert re.search(rf"{running} +\d+/{FOREVER} +\d+\.\d\d % +\d+:\d\d", text)

    until((here / "mlflow.db").exists)
    client = MlflowClient(f"sqlite:///{here}/mlflow.db")
    (known,) = until(
        lambda: (found := client.get_experiment_by_name("sakd")) and client.search_runs([found.experiment_id])
    )
    assert known.info.status == "RUNNING"
    at_work.send_signal(signal.SIGKILL)
    at_work.wait()
    assert states(*overrides) == ["finished", "lost", "missing"]
    assert client.get_run(known.info.run_id).info.status == "KILLED"
    text = status(*overrides)
    assert "3 cells: 1 finished, 1 lost, 1 missing" in text
    assert "lost (1)" in text
    epochs = [line["epoch"] for line in read_metrics(here / "runs" / running)]
    assert [point.step for point in client.get_metric_history(known.info.run_id, "loss/task")] == epochs
    assert CliRunner().invoke(cli, ["sync"]).output == "1 runs, 0 epochs sent, 0 runs failed\n"
    assert [point.step for point in client.get_metric_history(known.info.run_id, "loss/task")] == epochs


def hand_over(sweep: Plan, *cohort: str) -> Submission:
    """As a launcher here records it that dies before any of its jobs has run: each run a job, but for
    those that are one ``cohort``."""
    jobs = [[run.name] for run in sweep.everything if run.name not in cohort] + (
        [list(cohort)] if cohort else []
    )
    folder = submissions.new_folder(sweep.runs)
    arrays = [Array(f"sakd-{folder.name}", jobs)]
    needs = {run.name: list(run.needs) for run in sweep.everything if run.needs}
    launcher, overrides = dict(sweep.sweep.launcher), list(sweep.sweep.overrides)
    submission = Submission(folder, launcher, arrays, needs, overrides, str(ROOT))
    submission.write({run.name: run.run.config for run in sweep.everything})
    return submission


def work(submission: Submission, name: str) -> None:
    """A job's turn, which ends with an error."""
    with pytest.raises(SakdError, match=f"1 of 1 failed: {name}"):
        Work(submission.folder, [name])()
    log_of(submission, submission.places[name]).write_text(f"what {name} said")


LOCAL = (*TINY, "tracking=none", "hydra/launcher=local")
FAILING = (*LOCAL, "distiller=none")
# What a launch would refuse, and a job that gets it all the same.
MOMENTUM, EXPECTED = "optimizer.momentum", "expected a number from 0 to below 1"


def test_cells_that_fail_alike_are_told_together_with_their_logs(as_a_job):
    overrides = (*FAILING, "optimizer.momentum=-1,-2", "seed=range(7)")
    sweep = planned(*overrides)
    submission = hand_over(sweep)
    alike = [job.name for job in sweep.cells[:7]]
    for name in (*alike, sweep.cells[7].name):
        work(submission, name)
    told = cells(*overrides)
    assert [told[job.name]["state"] for job in sweep.cells] == ["failed"] * 8 + ["lost"] * 6
    for name in alike:
        assert told[name]["error"] == f"{MOMENTUM}: found -1, {EXPECTED}"
        assert (as_a_job / told[name]["log"]).read_text() == f"what {name} said"
    text = status(*overrides)
    assert text.count("found -1, ") == 1
    assert text.count("found -2, ") == 1
    assert f"failed (1): {MOMENTUM}: found -2, {EXPECTED}" in text
    told_together = text[text.index(f"failed (7): {MOMENTUM}: found -1, {EXPECTED}\n") :].splitlines()
    assert [line.split()[0] for line in told_together[1:6]] == alike[:5]
    assert [line.split()[1] for line in told_together[1:6]] == [told[name]["log"] for name in alike[:5]]
    assert told_together[6] == "  and 2 more"
    assert "14 cells: 8 failed, 6 lost" in text
    each = status(*overrides, "--cells")
    assert all(re.search(rf"^{job.name} +failed", each, re.MULTILINE) for job in sweep.cells[:8])


def test_a_failure_is_forgotten_when_the_cell_finishes(as_a_job):
    overrides = (*FAILING, "seed=0,1")
    sweep = planned(*overrides)
    submission = hand_over(sweep)
    name = sweep.cells[0].name
    submissions.note_failure(submission.folder, name, "of another time", interrupted=True)
    assert states(*overrides) == ["failed", "lost"]
    Work(submission.folder, [name])()
    assert not (submission.folder / "failures" / f"{name}.json").exists()
    assert states(*overrides) == ["finished", "lost"]


def test_what_needs_a_failed_teacher_failed_too_and_says_why_and_what_waits_for_a_living_launcher_is_queued(
    as_a_job,
):
    overrides = (*LOCAL, "distiller=kd", "spot_mode=fixed,anti", "teacher.training.optimizer.momentum=-1")
    sweep = planned(*overrides)
    (teacher,) = sweep.first
    submission = hand_over(sweep)
    assert states(*overrides) == ["lost", "lost"]
    with FileLock(submission.folder / ALIVE):
        assert states(*overrides) == ["queued", "queued"]
    work(submission, teacher.name)
    for cell in cells(*overrides).values():
        assert cell["state"] == "failed"
        assert cell["error"] == f"{teacher.name}, which it needs, failed: {MOMENTUM}: found -1, {EXPECTED}"
        assert (as_a_job / cell["log"]).read_text() == f"what {teacher.name} said"
    text = status(*overrides)
    assert re.search(rf"^{teacher.name} +failed", text, re.MULTILINE)
    assert "2 cells: 2 failed" in text


def test_a_later_submission_is_what_counts(as_a_job):
    overrides = (*FAILING, "optimizer.momentum=-1", "seed=0,1")
    sweep = planned(*overrides)
    first = hand_over(sweep)
    work(first, sweep.cells[0].name)
    second = hand_over(planned(*overrides[:-1], "seed=0"))
    assert states(*overrides) == ["lost", "lost"]
    second.withdraw()
    assert states(*overrides) == ["failed", "lost"]


def test_a_damaged_record_is_told_by_its_name(here):
    sweep = planned(*FAILING)
    record = hand_over(sweep).folder / "submission.json"
    record.write_text('{"arrays": 3}')
    done = CliRunner().invoke(cli, ["status", *FAILING])
    assert done.exit_code == 1
    assert f"{record}: is not a submission's record" in done.output


def test_a_record_of_other_types_is_told_by_its_name(here):
    record = hand_over(planned(*FAILING)).folder / "submission.json"
    content = json.loads(record.read_text())
    del content["sha256"]
    wrong = {"arrays": [{"name": "a", "jobs": 3}], "launcher": {}, "needs": [], "time": "now", "snapshot": 3}
    for key, value in wrong.items():
        record.write_text(json.dumps(content | {key: value}))
        with pytest.raises(SakdError, match=f"^{record}: is not a submission's record"):
            submissions.read(Path("runs"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files to another user")
def test_another_users_submission_is_no_launcher_of_ours_and_its_jobs_are_not_run(here):
    submission = hand_over(planned(*FAILING))
    (cell,) = cells(*FAILING).values()
    assert cell["state"] == "lost"
    os.chown(submission.folder / "submission.json", 12345, -1)
    (cell,) = cells(*FAILING).values()
    assert cell["state"] == "missing"
    done = CliRunner().invoke(cli, ["retry", *TINY, "tracking=none", "distiller=none"])
    assert (done.exit_code, "these cells were never submitted" in done.output) == (1, True)
    with pytest.raises(SakdError, match=r"submission.json: is another user's"):
        Work(submission.folder, [cell["name"]])()


def test_a_job_takes_no_configuration_that_is_not_its_runs(as_a_job):
    sweep = planned(*FAILING, "seed=0,1")
    submission = hand_over(sweep)
    first, second = (submission.folder / "cells" / f"{cell.name}.json" for cell in sweep.cells)
    first.write_bytes(second.read_bytes())
    second.write_text('{"seed": 1}')
    for cell, told in zip(sweep.cells, ("found the configuration of", "is not a run's conf"), strict=True):
        work(submission, cell.name)
        assert (
            submission.read(submission.folder)
            .failure(cell.name)["error"]
            .startswith(f"{submission.folder}/cells/{cell.name}.json: {told}")
        )


def test_nothing_is_submitted_that_needs_a_finished_run_whose_weights_are_not_there_any_more(here):
    sweep = planned(*LOCAL, "distiller=kd")
    (teacher,) = sweep.first
    finish(sweep.runs, 97.0, config=teacher.run.config, teacher=None)
    teacher.run.weights.unlink()
    with pytest.raises(SakdError, match=f"^{teacher.run.weights}: found no such file"):
        launch(sweep)
    assert submissions.read(sweep.runs) == []


def test_a_launch_starts_no_job_from_a_copy_that_was_changed(here):
    sweep = planned(*FAILING)
    (cell,) = sweep.cells
    copy = code.snapshot(sweep.runs)
    submission = replace(hand_over(sweep), snapshot=str(copy))
    with (copy / "sakd/__init__.py").open("a") as file:
        file.write(f"open({str(here / 'executed')!r}, 'w')\n")
    launcher = LocalLauncher(processes=1)
    launcher.submit(submission, {})
    with pytest.raises(SakdError, match=f"{copy}/sakd/__init__.py: is not as it was copied"):
        launcher.carry_out(submission)
    done = subprocess.run(submission.check(), capture_output=True, text=True, check=False)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert not (here / "executed").exists()
    assert not log_of(submission, submission.places[cell.name]).exists()


COHORT = (*LOCAL, "distiller=kd,at,sp", "spot_mode=fixed", "threads=1")


def told_to_fail(monkeypatch, distiller: str) -> None:
    """Let a distiller raise at its first step."""

    def broken(*arguments, **keys):
        raise ValueError("broken on purpose")

    monkeypatch.setattr(f"sakd.distillers.{distiller}.spot_loss", broken)


def test_a_job_notes_a_members_failure_at_once_and_does_not_try_it_again_in_its_next_turn(
    as_a_job, monkeypatch
):
    sweep = planned(*COHORT)
    (teacher,), names = sweep.first, [cell.name for cell in sweep.cells]
    submission = hand_over(sweep, *names)
    Work(submission.folder, [teacher.name])()
    told_to_fail(monkeypatch, "AT")
    kd, at, sp = names
    steps = []

    def interrupted(self, name):
        steps.append(states(*COHORT))
        if "failed" in steps[-1]:
            raise KeyboardInterrupt("SIGTERM")
        return False

    with monkeypatch.context() as patch:
        patch.setattr(Work, "_withdrawn", interrupted)
        patch.setattr("sakd.runs.job.SECONDS_BETWEEN_QUESTIONS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            Work(submission.folder, names)()
    assert steps[-1] == ["running", "failed", "running"]
    assert states(*COHORT) == ["failed"] * 3
    told = cells(*COHORT)
    assert told[at]["error"] == "ValueError: broken on purpose"
    assert {told[name]["error"] for name in (kd, sp)} == {"ended by SIGTERM"}

    monkeypatch.undo()
    monkeypatch.chdir(as_a_job)
    monkeypatch.setattr("sakd.runs.code.of_this_process", lambda: (code.Code("c" * 40, False, "copied"), ""))
    with pytest.raises(SakdError, match=f"1 of 3 failed: {at}"):
        Work(submission.folder, names)()
    assert states(*COHORT) == ["finished", "failed", "finished"]
    assert read_metrics(as_a_job / "runs" / at) == [], "though it would go well now"


def test_a_job_does_not_train_what_was_cancelled_before_and_ends_well(as_a_job):
    sweep = planned(*COHORT)
    names = [cell.name for cell in sweep.cells]
    submission = hand_over(sweep, *names)
    submissions.note_cancelled(submission.folder, names[1])
    assert states(*COHORT) == ["lost", "failed", "lost"]
    Work(submission.folder, names)()
    told = cells(*COHORT)
    assert [told[name]["state"] for name in names] == ["finished", "failed", "finished"]
    assert told[names[1]]["error"] == "cancelled"
    assert not (as_a_job / "runs" / names[1]).exists()


def test_members_of_a_job_whose_need_failed_are_left_out_and_the_others_train(as_a_job):
    sweep = planned(
        *LOCAL, "distiller=ft", "spot_mode=fixed,anti", "distiller.pretraining.optimizer.momentum=-1"
    )
    teacher, pretraining = sweep.first
    (kd,) = planned(*LOCAL, "distiller=kd", "spot_mode=fixed").cells
    names = [kd.name, *(cell.name for cell in sweep.cells)]
    mixed = Plan([kd, *sweep.cells], sweep.first, sweep.sweep, sweep.runs)
    submission = hand_over(mixed, *names)
    Work(submission.folder, [teacher.name])()
    work(submission, pretraining.name)
    with pytest.raises(SakdError, match="2 of 3 failed"):
        Work(submission.folder, names)()
    standings = survey(mixed.everything, mixed.runs)
    assert [standings[name].state for name in names] == ["finished", "failed", "failed"]
    why = f"{pretraining.name}, which it needs, failed: {MOMENTUM}: found -1, {EXPECTED}"
    assert {standings[name].error for name in names[1:]} == {why}


def test_the_time_left_is_told_from_the_times_of_the_last_epochs_and_not_from_a_members_share(here, at_work):
    (cell,) = planned(*SMALL, "distiller=none", f"epochs={FOREVER}").cells
    now, away = time.time(), 1e6  # seconds: killed after its sixth epoch, it went on much later
    lines = [
        {"epoch": epoch, "seconds": 0.5, "time": now - 10 * (10 - epoch) - (away if epoch <= 6 else 0)}
        for epoch in range(1, 11)
    ]
    at_work.send_signal(signal.SIGSTOP)
    (cell.run.folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    left = cells(*SMALL, "distiller=none", f"epochs={FOREVER}")[cell.name]["left"]
    assert left == pytest.approx(10 * (FOREVER - 10), rel=0.01)
    (cell.run.folder / "metrics.jsonl").write_text(json.dumps(lines[0]) + "\n")
    assert cells(*SMALL, "distiller=none", f"epochs={FOREVER}")[cell.name]["left"] is None
