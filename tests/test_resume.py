"""A run that is killed and launched again ends as one that never was, bit for bit."""

import json
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sakd.config import Config, teacher_config
from sakd.job import execute
from sakd.runs import Run
from tests.conftest import ROOT, TINY, compose_config
from tests.kill_at import kill_at

# Where in three epochs of the teacher and three of the student a SIGKILL strikes, one launch after the other.
MOMENTS = (
    ("sakd.trainer:Trainer.train_step", 2, "before"),  # in the teacher's first epoch: no checkpoint yet
    ("sakd.runs:Run.append_metrics", 2, "after"),  # the teacher's second epoch is in metrics.jsonl, not in last.pt
    ("sakd.runs:Run.save_checkpoint", 1, "after"),  # between two of the teacher's epochs
    ("sakd.runs:Run.finish", 1, "before"),  # the teacher is trained, its weights are not stored
    ("sakd.trainer:Trainer.train_step", 2, "after"),  # in the student's first epoch
    ("sakd.runs:os.replace", 3, "before"),  # last.pt is written beside, not renamed
    ("sakd.runs:os.fsync", 5, "before"),  # in the midst of a write
    ("sakd.runs:Run.save_checkpoint", 1, "after"),
    ("sakd.runs:Run.finish", 1, "before"),
)
KILLED = -signal.SIGKILL


def assert_same(found: object, expected: object, where: str = "") -> None:
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    else:
        assert found == expected, where


def assert_same_runs(found: Run, expected: Run) -> None:
    """Weights, optimizers and all, and metrics but for times."""
    assert found.weights.read_bytes() == expected.weights.read_bytes()
    assert_same(found.load_checkpoint(), expected.load_checkpoint())
    times = ("seconds", "time", "images_per_second")
    for line, other in zip(found.metrics(), expected.metrics(), strict=True):
        assert {k: v for k, v in line.items() if k not in times} == {k: v for k, v in other.items() if k not in times}
    assert [line["epoch"] for line in found.metrics()] == list(range(1, found.config["epochs"] + 1))


def _execute(config: Config, *moment: object) -> None:
    torch.set_num_threads(1)
    if moment:
        kill_at(*moment)
    execute(config)


def in_a_process(config: Config, *moment: object) -> int:
    """Execute in a fresh process; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sakd.job", "sklearn.datasets", "torch._dynamo"])  # a second a process, not six
    process = context.Process(target=_execute, args=(config, *moment))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize("mode", ["fixed", "adaptive", "anti", "random"])
def test_killed_at_any_moment_it_ends_with_the_same_bits(mode, tiny, tmp_path):
    overrides = ("epochs=3", f"spot_mode={mode}", "distiller=fitnet", "threads=1")
    undisturbed, disturbed = tiny(*overrides, f"runs={tmp_path}/undisturbed"), tiny(*overrides)
    assert in_a_process(undisturbed) == 0
    moments = MOMENTS if mode in ("fixed", "adaptive") else MOMENTS[4:5]
    assert [in_a_process(disturbed, *moment) for moment in moments] == [KILLED] * len(moments)
    assert in_a_process(disturbed) == 0
    assert_same_runs(Run(disturbed), Run(undisturbed))
    assert_same_runs(Run(teacher_config(disturbed)), Run(teacher_config(undisturbed)))


@pytest.mark.slow
def test_killed_commands_end_with_the_same_bits_and_each_epoch_once_in_mlflow(launch, tmp_path):
    from mlflow.tracking import MlflowClient

    overrides = (*TINY, "epochs=3", "spot_mode=adaptive", "distiller=at", "threads=1")
    launch(*overrides, f"runs={tmp_path}/undisturbed", "tracking=none")
    script = (str(Path(__file__).parent / "kill_at.py"),)
    for place, number, when in MOMENTS:
        launch(place, str(number), when, *overrides, script=script, expect=KILLED)
    launch(*overrides)
    undisturbed = compose_config(*overrides, f"runs={tmp_path}/undisturbed")
    disturbed = compose_config(*overrides, f"runs={tmp_path}/runs")
    assert_same_runs(Run(disturbed), Run(undisturbed))
    assert_same_runs(Run(teacher_config(disturbed)), Run(teacher_config(undisturbed)))
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    for experiment in ("sakd", "sakd-teachers"):
        (found,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
        assert found.info.status == "FINISHED"
        for metric in found.data.metrics:
            assert [point.step for point in client.get_metric_history(found.info.run_id, metric)] == [1, 2, 3]


def test_a_finished_run_is_not_trained_again(tiny):
    config = tiny()
    first = execute(config)
    stamp = Run(config).weights.stat().st_mtime_ns
    assert execute(config) == first
    assert Run(config).weights.stat().st_mtime_ns == stamp


def test_a_torn_last_line_and_epochs_past_the_checkpoint_are_dropped(tiny):
    run = Run(tiny("distiller=none"))
    with run.locked():
        run.start()
        for epoch in (1, 2, 3):
            run.append_metrics({"epoch": epoch})
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 4, "loss/ta')
        run.keep_metrics(2)
        assert [json.loads(line)["epoch"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    """Two launches of one command at once: both end well, one trained."""
    command = [sys.executable, str(ROOT / "launch.py"), *TINY, "tracking=none", "distiller=kd"]
    both = [subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    lines = [line for output in outputs for line in output.splitlines() if "epoch 2/2" in line]
    assert len(lines) == 2, outputs  # the teacher's and the student's, each once
