"""A run that is killed and launched again ends as one that never was, bit for bit."""

import json
import multiprocessing
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sakd.configuration import Config, build, prerequisites
from sakd.errors import CheckpointError, DataError, NonFiniteLossError, RunError
from sakd.networks import resnet8
from sakd.networks.checkpoints import read_weights
from sakd.runs import Run
from sakd.runs.job import execute
from tests.conftest import ROOT, TINY, compose_config
from tests.kill_at import kill_at

# Where in three epochs of the teacher and three of the student a SIGKILL strikes, one launch after the other.
MOMENTS = (
    (
        "sakd.training.trainer:Trainer.train_step",
        2,
        "before",
    ),  # in the teacher's first epoch: no checkpoint yet
    (
        "sakd.runs:Run.append_metrics",
        2,
        "after",
    ),  # the teacher's second epoch is in metrics.jsonl, not in last.pt
    ("sakd.runs:Run.save_checkpoint", 1, "after"),  # between two of the teacher's epochs
    ("sakd.runs:Run.finish", 1, "before"),  # the teacher is trained, its weights are not stored
    ("sakd.training.trainer:Trainer.train_step", 2, "after"),  # in the student's first epoch
    ("sakd.files:os.replace", 3, "before"),  # the record is written beside, not renamed
    ("sakd.files:os.replace", 4, "before"),  # and last.pt
    ("sakd.files:os.fsync", 5, "before"),  # in the midst of a write
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


def sources_of(result: dict) -> dict[str, str]:
    teacher = {} if result["teacher"] is None else {"teacher": result["teacher"]["sha256"]}
    return {"data set": result["data_sha256"], **teacher}


def assert_same_runs(found: Run, expected: Run) -> None:
    """Weights, optimizers and all, and metrics but for times."""
    assert found.weights.read_bytes() == expected.weights.read_bytes()
    sources = sources_of(expected.result())
    assert_same(found.load_checkpoint(sources), expected.load_checkpoint(sources))
    record = expected.folder / "spots.npz"
    assert not record.exists() or (found.folder / "spots.npz").read_bytes() == record.read_bytes()
    times = ("seconds", "time", "images_per_second")
    for line, other in zip(found.metrics(), expected.metrics(), strict=True):
        assert {k: v for k, v in line.items() if k not in times} == {
            k: v for k, v in other.items() if k not in times
        }
    assert [line["epoch"] for line in found.metrics()] == list(range(1, found.config["epochs"] + 1))


def _execute(config: Config, *moment: object) -> None:
    torch.set_num_threads(1)
    if moment:
        kill_at(*moment)
    execute(config)


def in_a_process(config: Config, *moment: object) -> int:
    """Execute in a fresh process; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["sakd.runs.job", "sklearn.datasets", "torch._dynamo"]
    )  # a second a process, not six
    process = context.Process(target=_execute, args=(config, *moment))
    process.start()
    process.join(120)
    return process.exitcode


@pytest.mark.parametrize(
    "mode",
    ["adaptive", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("fixed", "anti", "random"))],
)
def test_killed_at_any_moment_it_ends_with_the_same_bits(mode, tiny, tmp_path):
    overrides = ("epochs=3", f"spot_mode={mode}", "distiller=fitnet", "threads=1")
    undisturbed, disturbed = tiny(*overrides, f"runs={tmp_path}/undisturbed"), tiny(*overrides)
    assert in_a_process(undisturbed) == 0
    moments = MOMENTS if mode in ("fixed", "adaptive") else MOMENTS[4:5]
    assert [in_a_process(disturbed, *moment) for moment in moments] == [KILLED] * len(moments)
    assert in_a_process(disturbed) == 0
    assert_same_runs(Run(disturbed), Run(undisturbed))
    assert_same_runs(Run(prerequisites(disturbed).teacher), Run(prerequisites(undisturbed).teacher))


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
    assert_same_runs(Run(prerequisites(disturbed).teacher), Run(prerequisites(undisturbed).teacher))
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


def test_a_teacher_that_was_changed_is_refused(tiny):
    config = tiny("distiller=kd")
    execute(prerequisites(config).teacher)
    weights = Run(prerequisites(config).teacher).weights
    state = read_weights(weights)
    state["logits.bias"] += 1
    weights.write_bytes(safetensors.torch.save(state))
    with pytest.raises(CheckpointError, match="the file was changed"):
        execute(config)
    assert not Run(config).folder.exists()


def test_another_teacher_cannot_go_on_where_one_left_off(tiny):
    config = tiny("distiller=kd", "epochs=3")
    assert in_a_process(config, "sakd.runs:Run.save_checkpoint", 4, "after") == KILLED
    with pytest.raises(
        CheckpointError, match=r"last.pt: found a teacher with checksum \w+ in the epochs so far"
    ):
        Run(config).load_checkpoint({"data set": build.dataset(config).checksum, "teacher": "0" * 64})


def test_other_images_of_the_same_name_cannot_go_on_where_the_first_left_off(tiny):
    config = tiny("distiller=none", "epochs=3")
    assert in_a_process(config, "sakd.runs:Run.save_checkpoint", 2, "after") == KILLED
    dataset = build.dataset(config)
    dataset.train.images[0, 0, 0, 0] += 1
    with pytest.raises(
        CheckpointError, match=r"last.pt: found a data set with checksum \w+ in the epochs so far"
    ):
        execute(config, dataset)


def test_a_teacher_of_other_images_of_the_same_name_does_not_teach(tiny):
    execute(tiny("distiller=kd", "epochs=1"))
    config = tiny("distiller=kd", "epochs=1", "seed=1")
    dataset = build.dataset(config)
    dataset.test.labels[:2] = dataset.test.labels[:2].flip(0)
    with pytest.raises(
        DataError, match=r"none-none-seed0-\w+: learned from images with checksum .* dataset.name"
    ):
        execute(config, dataset)
    assert not Run(config).folder.exists()


def test_a_teachers_file_counts_by_what_it_held_when_the_run_began(tiny, tmp_path):
    torch.save(resnet8(10, 1, 8).state_dict(), tmp_path / "teacher.pt")
    run = Run(tiny(f"teacher.checkpoint={tmp_path}/teacher.pt"))
    (tmp_path / "teacher.pt").unlink()
    with run.locked():
        run.save_checkpoint({"epoch": 1}, {"teacher": "its checksum"})
        assert run.load_checkpoint({"teacher": "its checksum"}) == {"epoch": 1}


@pytest.mark.parametrize("content", [b"{}", b"3", b"\xff\x00", b'{"student": '])
def test_a_damaged_result_is_named(content, tiny):
    run = Run(tiny("distiller=none"))
    run.folder.mkdir(parents=True)
    (run.folder / "result.json").write_bytes(content)
    with pytest.raises(RunError, match=r"result.json: .* move the file away"):
        execute(run.config)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"3\n", "line 1: found int, expected a JSON object"),
        (b"\xff\xfe\n", "line 1: found no valid JSON"),
        (b"", r"found epochs \[\], expected 1 to 2 as in last.pt"),
    ],
)
def test_damaged_metrics_are_named_with_the_way_out(content, told, tiny):
    config = tiny("distiller=none", "epochs=3")
    assert in_a_process(config, "sakd.runs:Run.save_checkpoint", 2, "after") == KILLED
    (Run(config).folder / "metrics.jsonl").write_bytes(content)
    with pytest.raises(
        RunError, match=rf"metrics.jsonl: {told}.*; move last.pt away to train from the start"
    ):
        execute(config)
    (Run(config).folder / "last.pt").unlink()
    assert execute(config)["student"]["best_epoch"] <= 3


def test_a_damaged_checkpoint_is_named(tiny):
    config = tiny("distiller=none", "epochs=3")
    assert in_a_process(config, "sakd.runs:Run.save_checkpoint", 2, "after") == KILLED
    last = Run(config).folder / "last.pt"
    last.write_bytes(last.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match=r"last.pt: found no checksum .* move it away"):
        execute(config)


def test_weights_broken_by_an_epochs_last_step_are_not_saved(tiny):
    """No training loss shows it: the epoch's only step comes after its only loss."""
    config = tiny("distiller=none", "optimizer.lr=1e6", "dataset.train_samples=64")
    with pytest.raises(NonFiniteLossError, match=r"test/loss.* became NaN or infinite in epoch 1"):
        execute(config)
    assert not (Run(config).folder / "last.pt").exists()
    assert not (Run(config).folder / "result.json").exists()


def test_a_finished_run_with_a_weak_teacher_is_refused_too(tiny):
    execute(tiny("distiller=kd"))
    with pytest.raises(CheckpointError, match=r"teacher.min_accuracy: found .* expected at least 100 %"):
        execute(tiny("distiller=kd", "teacher.min_accuracy=100"))


def test_a_torn_last_line_and_epochs_past_the_checkpoint_are_dropped(tiny):
    run = Run(tiny("distiller=none"))
    with run.locked():
        run.start()
        for epoch in (1, 2, 3):
            run.append_metrics({"epoch": epoch, "seconds": 1.0, "time": 1.8e9})
        with (run.folder / "metrics.jsonl").open("a") as file:
            file.write('{"epoch": 4, "loss/ta')
        run.keep_metrics(2)
        assert [
            json.loads(line)["epoch"] for line in (run.folder / "metrics.jsonl").read_text().splitlines()
        ] == [1, 2]


@pytest.mark.slow
def test_one_process_at_a_time_works_in_a_folder(tmp_path):
    """Two launches of one command at once: both end well, one trained."""
    command = [sys.executable, str(ROOT / "launch.py"), *TINY, "tracking=none", "distiller=kd"]
    both = [
        subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in "ab"
    ]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    lines = [line for output in outputs for line in output.splitlines() if "epoch 2/2" in line]
    assert len(lines) == 2, outputs  # the teacher's and the student's, each once
