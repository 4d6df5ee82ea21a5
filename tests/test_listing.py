"""What `sakd list`, `show`, and `status` without a sweep tell of a folder of runs."""

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from filelock import FileLock

from sakd.cli import main
from sakd.runs import Run
from sakd.runs.job import execute
from sakd.sweeps.submissions import Array, Submission, note_failure
from tests.conftest import TINY, compose_config


def sakd(*arguments: object) -> Result:
    return CliRunner().invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    runs = tmp_path_factory.mktemp("listed") / "runs"
    config = compose_config(*TINY[:-1], "distiller=none", "epochs=1", f"runs={runs}", "tracking=none")
    execute(config)
    return Run(config)


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    """A folder with a run that is finished, one that failed, one that is lost, and one under way."""
    copy = tmp_path / "runs"
    shutil.copytree(finished.folder.parent, copy)
    for name, log in (("failed", "ended early: no such thing"), ("lost", "all is well"), ("running", None)):
        folder = copy / name
        shutil.copytree(copy / finished.name, folder)
        (folder / "result.json").unlink()
        (folder / "run.log").unlink(missing_ok=True)
        if log is not None:
            (folder / "run.log").write_text(f"2026-01-01 00:00:00 ERROR {log}\n")
    return copy


def test_each_run_is_listed_with_its_state_epochs_and_accuracy(runs, finished):
    with FileLock(runs / "running" / ".lock"):
        done = sakd("list", "--from", runs, "--format", "json")
    assert done.exit_code == 0, done.output
    found = {run["name"]: run for run in json.loads(done.output)}
    assert {name: run["state"] for name, run in found.items()} == {
        finished.name: "finished", "failed": "failed", "lost": "lost", "running": "running"
    }  # fmt: skip
    assert found["failed"]["error"] == "no such thing"
    own = found[finished.name]
    student = finished.result()["student"]
    assert (own["accuracy"], own["best_accuracy"]) == (student["accuracy"], student["best_accuracy"])
    assert (own["done"], own["epochs"], own["student"]) == (1, 1, "resnet8")
    assert 0 < own["age"] < 3600


def test_runs_are_sorted_and_chosen_as_asked(runs, finished):
    lines = sakd("list", "--from", runs, "--sort", "name").output.splitlines()
    assert [line.split()[0] for line in lines[2:6]] == sorted([finished.name, "failed", "lost", "running"])
    assert lines[-1] == "4 runs"
    assert sakd("list", "--from", runs, "student=resnet8", "epochs=1").output.endswith("4 runs\n")
    wrong = sakd("list", "--from", runs, "student=resnet9")
    assert (wrong.exit_code, "Traceback" in wrong.output) == (1, False)
    assert "resnet9" in wrong.output
    assert "found 'none', expected a folder of runs" in sakd("list", "--from", "none").output


def test_a_damaged_run_is_named_and_the_others_are_listed(runs, finished):
    (runs / "lost" / "config.yaml").write_text("a: [")
    done = sakd("list", "--from", runs)
    assert done.exit_code == 1
    assert finished.name in done.output
    assert f"{runs / 'lost' / 'config.yaml'}: found no valid YAML" in done.output


def test_a_run_is_shown_in_full(runs, finished):
    done = sakd("show", finished.name[:-2], "--from", runs)
    assert done.exit_code == 0, done.output
    result = finished.result()
    for told in (
        finished.name, "finished, 1 of 1 epochs", f"{result['student']['accuracy']:.2f} % last",
        f"{result['cost']['student']['parameters']:,} parameters",
        result["student_sha256"], "optimizer.lr", f"torch {result['versions']['torch']}",
    ):  # fmt: skip
        assert told in done.output
    known = json.loads(sakd("show", runs / finished.name, "--format", "json").output)
    assert known["result"] == result
    assert known["configuration"]["student"]["name"] == "resnet8"
    assert "no such thing" in sakd("show", "failed", "--from", runs).output
    assert "found no such run" in sakd("show", "nothing", "--from", runs).output


def test_values_are_shown_as_they_are_typed(runs, finished):
    lines = sakd("show", "--from", runs, finished.name).output.splitlines()
    shown = dict(line.split(maxsplit=1) for line in lines if " " in line)
    assert (shown["student.checkpoint"], shown["profile"], shown["dataset.mean"]) == (
        "null",
        "false",
        "[0.3051]",
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["sync", "nowhere"], "nowhere: found no such folder"),
        (["gc", "nowhere"], "nowhere: found no such folder"),
        (["compare", "--output", "nowhere/table.tex"], "--output: found no folder 'nowhere'"),
        (["compare", "--plot", "nowhere/plot.svg"], "--plot: found no folder 'nowhere'"),
        (
            ["export", "any", "--to", "onnx", "--output", "nowhere/x.onnx"],
            "--output: found no folder 'nowhere'",
        ),
    ],
)
def test_folders_that_are_not_there_are_told_in_one_line_before_any_work(words, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = sakd(*words)
    assert (done.exit_code, done.output.count("\n")) == (1, 1)
    assert done.output.startswith(f"Error: {told}, expected")
    assert not list(tmp_path.iterdir())


def test_what_a_terminal_shows_has_one_name_in_every_command():
    formats = [
        option for command in main.commands.values() for option in command.params if option.name == "form"
    ]
    assert len(formats) == 7
    assert all("terminal" in option.type.choices for option in formats)


def test_all_sweeps_of_a_folder_are_told_once_each(runs, finished):
    def submit(number: int, overrides: list[str], job: list[str], needs: dict[str, list[str]]) -> Submission:
        launcher = {"_target_": "sakd.sweeps.LocalLauncher", "processes": 1}
        folder = runs / ".sweeps" / str(number)
        arrays = [Array(f"a{number}", [job])]
        submission = Submission(folder, launcher, arrays, needs, overrides, "/copy", time=float(number))
        submission.write({})
        return submission

    submit(1, ["seed=0,1", "epochs=1"], [finished.name, "failed"], {})
    again = submit(2, ["seed=0,1", "epochs=1"], ["failed"], {})
    note_failure(again.folder, "failed", "RuntimeError: no")
    submit(3, ["student=a,b"], ["teacher", "missing"], {"missing": ["teacher"]})
    done = sakd("status", "--from", runs, "--format", "json")
    assert done.exit_code == 0, done.output
    other, first = json.loads(done.output)
    assert first["overrides"] == ["seed=0,1", "epochs=1"]
    assert first["states"] == {"finished": 1, "failed": 1}
    assert (other["cells"], other["states"]) == (["missing"], {"lost": 1})
    text = sakd("status", "--from", runs).output
    assert "1 finished, 1 failed   sakd status seed=0,1 epochs=1" in text
    assert "--cells: found no sweep" in sakd("status", "--cells").output
    assert "expected a folder of runs" in sakd("status", "--from", runs / "none").output
