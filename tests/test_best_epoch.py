"""What is kept and measured of a run's epochs on demand: the best weights, top-5, and an early end."""

import json

import pytest
import torch
from click.testing import CliRunner

import sakd
from sakd.cli import main
from sakd.configuration import build
from sakd.errors import ConfigError, RunError
from sakd.runs import Run
from sakd.runs.best import BestEpoch
from sakd.runs.job import execute, execute_together
from sakd.training.measuring import Score
from tests.test_resume import KILLED, assert_same_runs, in_a_process

SMALL = ("distiller=none", "threads=1", "epochs=4")
VALIDATED = (*SMALL, "dataset.val_fraction=0.25")


def test_the_best_epoch_is_the_first_with_the_highest_accuracy_by_validation_if_there_is_any():
    lines = [
        {"epoch": 1, "val/accuracy": 50.0, "test/accuracy": 70.0},
        {"epoch": 2, "val/accuracy": 60.0, "test/accuracy": 60.0},
        {"epoch": 3, "val/accuracy": 60.0, "test/accuracy": 80.0},
    ]
    assert BestEpoch.of(True, lines) == BestEpoch("val/accuracy", 2, 60.0, 60.0)
    assert BestEpoch.of(False, lines) == BestEpoch("test/accuracy", 3, 80.0, 80.0)


# Its rate grows so high that the best epoch is not the last.
RISING_AND_FALLING = (*VALIDATED, "keep_best=true", "schedule.milestones=[3]", "schedule.gamma=40")


@pytest.mark.slow
def test_a_run_that_is_killed_keeps_the_same_best_weights(tiny, tmp_path):
    whole, killed = tiny(*RISING_AND_FALLING, f"runs={tmp_path}/whole"), tiny(*RISING_AND_FALLING)
    result = execute(whole)
    for moment in (("sakd.runs:Run.save_checkpoint", 3, "before"), ("sakd.runs:Run.finish", 1, "before")):
        assert in_a_process(killed, *moment) == KILLED
    assert execute(killed)["best"] == result["best"]
    assert_same_runs(Run(killed), Run(whole))
    assert Run(killed).best_weights.read_bytes() == Run(whole).best_weights.read_bytes()


def test_the_best_weights_are_kept_beside_the_last(tiny):
    whole = tiny(*RISING_AND_FALLING, "dataset.train_samples=96")
    best, lines = execute(whole)["best"], Run(whole).metrics()
    assert best["epoch"] == max(lines, key=lambda line: line["val/accuracy"])["epoch"] < 4
    assert best["by"] == "val/accuracy"
    dataset = build.dataset(whole)
    student = sakd.load(Run(whole).folder, best=True)
    with torch.no_grad():
        right = [student(pixels).argmax(1) for pixels in dataset.test.plain(512)]
    accuracy = 100 * (torch.cat(right) == dataset.test.labels).float().mean().item()
    assert accuracy == pytest.approx(best["accuracy"])
    assert best["accuracy"] == lines[best["epoch"] - 1]["test/accuracy"]
    told = CliRunner().invoke(main, ["evaluate", str(Run(whole).folder), "--best", "--format", "json"])
    assert json.loads(told.output)["top1"] == pytest.approx(best["accuracy"])


def test_best_weights_that_were_not_kept_are_named(tiny):
    config = tiny(*SMALL, "epochs=1", "dataset.train_samples=48")
    execute(config)
    folder = Run(config).folder
    assert not (folder / "best.safetensors").exists()
    with pytest.raises(RunError, match=r"found the last weights alone, expected .* keep_best=true"):
        sakd.load(folder, best=True)
    with pytest.raises(RunError, match=r"student\.safetensors: found a file, expected a run"):
        sakd.load(folder / "student.safetensors", best=True)


def test_top5_counts_images_whose_class_is_among_the_five_likeliest():
    logits = torch.arange(8.0).expand(8, 8)
    score = Score(top5=True)
    score.add(logits, torch.arange(8))
    assert score.compute()["top5"] == 100 * 5 / 8


def test_a_run_measures_top5_where_that_is_asked_for(tiny):
    config = tiny(*SMALL, "epochs=1", "dataset.train_samples=48", "top5=true")
    result = execute(config)
    (line,) = Run(config).metrics()
    assert line["test/accuracy"] <= line["test/top5"] == result["student"]["top5"] <= 100


def test_training_stops_where_validation_accuracy_rises_no_more_and_its_cohort_goes_on(tiny):
    taught = ("distiller=kd", "spot_mode=fixed", "teacher.training.epochs=1")
    stopping = (*VALIDATED[1:], *taught, "early_stop=2", "epochs=6", "dataset.train_samples=48")
    config, other = (tiny(*stopping, f"optimizer.lr={rate}") for rate in (0, 0.05))
    other["early_stop"], other["epochs"] = None, 4
    results = list(execute_together([config, other]).values())
    assert [result["epochs"] for result in results] == [3, 4]
    assert [len(Run(each).metrics()) for each in (config, other)] == [3, 4]
    assert execute(config) == results[0]
    told = CliRunner().invoke(main, ["list", "--from", config["runs"]])
    assert "3/6" in told.output
    told = CliRunner().invoke(main, ["compare", "--from", config["runs"], "epochs=6"])
    assert told.exit_code == 0, told.output


@pytest.mark.slow
def test_a_run_that_stops_early_ends_with_the_same_bits_where_it_is_killed(tiny, tmp_path):
    stopping = (*VALIDATED, "early_stop=2", "epochs=6", "dataset.train_samples=48", "optimizer.lr=0")
    whole, killed = tiny(*stopping, f"runs={tmp_path}/whole"), tiny(*stopping)
    assert execute(whole)["epochs"] == 3
    for moment in (("sakd.runs:Run.save_checkpoint", 2, "after"), ("sakd.runs:Run.finish", 1, "before")):
        assert in_a_process(killed, *moment) == KILLED
    assert execute(killed)["epochs"] == 3
    assert Run(killed).weights.read_bytes() == Run(whole).weights.read_bytes()
    assert [line["epoch"] for line in Run(killed).metrics()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("early_stop=3",), "early_stop: found 3, but dataset.val_fraction is 0; expected images held out"),
        (("early_stop=0", "dataset.val_fraction=0.1"), "early_stop: found 0, expected a whole number"),
        (("top5=1",), "top5: found 1, expected true or false"),
        (("keep_best=yes",), "keep_best: found 'yes', expected true or false"),
        (
            ("dataset=small_images", "dataset.classes=4", "top5=true"),
            "top5: found true, but dataset.classes is 4; expected more classes than five",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(overrides, message, tiny):
    with pytest.raises(ConfigError, match=message):
        tiny(*overrides)
