"""What a launch returns of a run, by which a sweeper finds better values."""

import subprocess
import sys

import pytest
import yaml

from sakd.errors import ConfigError, RunError
from sakd.runs.job import check_before_work
from sakd.runs.optimized import optimized
from tests.conftest import ROOT

RESULT = {"run": "a-run", "student": {"accuracy": 70.0, "val_accuracy": 80.0}}
LINES = [{"epoch": 1, "test/loss": 2.0}, {"epoch": 2, "test/loss": 1.0}]
SEARCH = (
    *("hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "hydra.sweeper.n_jobs=1"),
    *("dataset=digits", "distiller=none", "student=resnet8", "dataset.train_samples=192", "epochs=2"),
    *("tracking=none", "optimizer.lr=choice(0.0001,0.05)"),
)


def test_it_is_the_last_epoch_s_accuracy_by_validation_if_there_is_any_or_what_is_asked_for():
    assert optimized({}, RESULT, LINES) == 80.0
    unvalidated = {**RESULT, "student": {"accuracy": 70.0, "val_accuracy": None}}
    assert optimized({"optimized_metric": None}, unvalidated, LINES) == 70.0
    assert optimized({"optimized_metric": "test/loss"}, RESULT, LINES) == 1.0
    with pytest.raises(RunError, match="found 'val/top5', expected a measurement of a-run: epoch, test/loss"):
        optimized({"optimized_metric": "val/top5"}, RESULT, LINES)


@pytest.mark.parametrize(
    ("overrides", "right"),
    [
        (("optimized_metric=val/accuracy",), "optimized_metric=test/loss"),
        (("optimized_metric=test/top5",), "top5=true"),
        (("optimized_metric=loss/at",), "distiller=at"),
    ],
)
def test_what_a_run_does_not_measure_is_refused_before_it_is_trained(overrides, right, tiny):
    with pytest.raises(ConfigError, match=r"optimized_metric: found '\S+', expected one of test/accuracy"):
        check_before_work(tiny("distiller=kd", *overrides))
    check_before_work(tiny("distiller=kd", *overrides, right))


def searched(tmp_path, *overrides: str) -> subprocess.CompletedProcess:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *SEARCH, *overrides]
    return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_optuna_finds_the_better_of_two_learning_rates(tmp_path):
    done = searched(tmp_path, "hydra.sweeper.direction=maximize")
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = tmp_path.glob("multirun/*/optimization_results.yaml")
    best = yaml.safe_load(found.read_text())
    assert best["best_params"]["optimizer.lr"] == 0.05
    assert best["best_value"] > 15
    assert len(list(tmp_path.glob("runs/*/result.json"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ((), "hydra.sweeper.direction: found minimize, expected maximize for accuracy"),
        (("hydra.sweeper.direction=up",), "ValueError: Please set either 'minimize' or 'maximize'"),
        (
            ("hydra/launcher=local",),
            "hydra/launcher: found one for sweeps of hydra/sweeper=sakd, expected basic",
        ),
    ],
)
def test_a_search_for_the_worst_or_by_a_launcher_that_returns_nothing_is_refused(
    overrides, message, tmp_path
):
    done = searched(tmp_path, *overrides)
    assert done.returncode == 1
    assert f"error: {message}" in done.stderr
    assert not (tmp_path / "runs").exists()
