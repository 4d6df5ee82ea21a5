"""A cohort that is killed again and again ends as runs that were trained alone and never disturbed."""

import multiprocessing
import random
import signal

import pytest
import torch
from mlflow.tracking import MlflowClient

from sakd.configuration import Config, prerequisites
from sakd.runs import Run
from sakd.runs.job import execute, execute_together
from sakd.runs.tracking import synchronise_all
from tests.conftest import compose_config
from tests.kill_at import kill_at
from tests.test_resume import assert_same_runs

EPOCHS, KILLS = 12, 11  # of each of three sequences
# Where a kill may strike, and among how many calls.
PLACES = (
    ("sakd.training.trainer:Trainer.train_step", 24),
    ("sakd.training.trainer:Trainer.begin_epoch", 6),
    ("sakd.runs:Run.append_metrics", 5),
    ("sakd.runs:Run.save_checkpoint", 5),
    ("sakd.runs:Run.start", 4),
    ("sakd.files:os.replace", 9),
    ("sakd.files:os.fsync", 12),
)


def _train(configs: list[Config], *moment: object) -> None:
    torch.set_num_threads(1)
    if moment:
        kill_at(*moment)
    outcomes = execute_together(configs)
    assert all(isinstance(outcome, dict) for outcome in outcomes.values()), outcomes


def in_a_process(configs: list[Config], *moment: object) -> int:
    """Train in a fresh process; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sakd.runs.job", "sklearn.datasets", "torch._dynamo", "mlflow.tracking"])
    process = context.Process(target=_train, args=(configs, *moment))
    process.start()
    process.join(200)
    return process.exitcode


def cohort(runs: str, tracking: tuple[str, ...]) -> list[Config]:
    """Two methods in two modes, of different lengths."""
    shared = ("teacher=resnet8", "student=resnet8", "dataset.train_samples=96", "dataset.test_samples=32")
    shared += ("threads=1", "batch_size=32", "teacher.training.epochs=2", f"runs={runs}", *tracking)
    return [
        compose_config(*shared, f"distiller={distiller}", f"spot_mode={mode}", f"epochs={epochs}")
        for distiller, mode, epochs in (
            ("fitnet", "adaptive", EPOCHS),
            ("crd", "adaptive", EPOCHS),
            ("ft", "fixed", EPOCHS - 2),
            ("kd", "anti", EPOCHS),
        )
    ]


@pytest.mark.slow
@pytest.mark.parametrize("draws", [0, 1, 2])
def test_killed_at_random_moments_every_member_ends_with_the_bits_of_a_run_alone(draws, tmp_path):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    disturbed = cohort(f"{tmp_path}/runs", (f"tracking.uri={store}", "tracking.experiment=kills"))
    undisturbed = cohort(f"{tmp_path}/alone", ("tracking=none",))
    for config in undisturbed:
        execute(config)
    chance, kills = random.Random(draws), 0
    while kills < KILLS:
        place, calls = chance.choice(PLACES)
        code = in_a_process(disturbed, place, chance.randint(1, calls), chance.choice(["before", "after"]))
        if code == 0:  # that moment never came
            break
        assert code == -signal.SIGKILL
        kills += 1
    assert kills == KILLS
    assert in_a_process(disturbed) == 0
    assert all(isinstance(outcome, int) for outcome in synchronise_all(tmp_path / "runs").values())
    for found, expected in zip(disturbed, undisturbed, strict=True):
        assert_same_runs(Run(found), Run(expected))
    assert_same_runs(Run(prerequisites(disturbed[0]).teacher), Run(prerequisites(undisturbed[0]).teacher))
    client = MlflowClient(store)
    experiment = client.get_experiment_by_name("kills").experiment_id
    tracked = {run.data.tags["sakd.folder"]: run for run in client.search_runs([experiment])}
    assert set(tracked) == {str(Run(config).folder) for config in disturbed}
    for config in disturbed:
        run = tracked[str(Run(config).folder)]
        assert run.info.status == "FINISHED"
        for metric in run.data.metrics:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            assert steps == list(range(1, config["epochs"] + 1)), metric
