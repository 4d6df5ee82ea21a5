"""What a launch trains is in MLflow, whole and once, whenever it was killed, once it ends by itself."""

import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
import yaml
from mlflow.tracking import MlflowClient

from tests.conftest import TINY
from tests.kill_at import kill_at
from tests.servers import MlflowServer

EPOCHS = 2
OVERRIDES = (*TINY, f"epochs={EPOCHS}", "spot_mode=fixed", "dataset.train_samples=96", "batch_size=32")
OVERRIDES += ("dataset.test_samples=32", "threads=1", "distiller.alpha=0.5", "tracking.experiment=kills")
# Where a signal may strike, and among how many calls: while the store is made, while all that is trained is
# under way, and once there are results.
PHASES = (
    (
        ("sakd.runs.tracking.store:_set_up", 1),
        ("sakd.runs.tracking.store:Store.__init__", 3),
        ("sakd.runs.tracking.store:Store.experiment", 2),
        ("sakd.runs.tracking.store:Store.find_or_create", 1),
        ("sakd.training.trainer:Trainer.train_step", 6),
    ),
    (
        ("sakd.training.trainer:Trainer.train_step", 12),
        ("sakd.runs:Run.append_metrics", 5),
        ("sakd.runs:Run.save_checkpoint", 5),
        ("sakd.files:os.replace", 12),
        ("sakd.files:os.fsync", 12),
        ("sakd.runs.tracking.store:Store.send_metrics", 4),
    ),
    (
        ("sakd.runs:Run.finish", 2),
        ("sakd.runs.tracking:Mirror.end", 2),
        ("sakd.runs.tracking:Mirror.wait", 2),
        ("sakd.runs.tracking.store:Store.send_file", 4),
        ("sakd.runs.tracking.store:Store.send_tags", 2),
        ("sakd.runs.tracking.store:Store.set_status", 3),
        ("sakd.terminal:show_result", 1),
    ),
)
# A launch may meet several of them: each trial comes back to the end, where a result can be there already.
TRIAL = (0, 1, 2, 2)
ENDS = {-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 130}
WARM = ["launch", "sakd.runs.job", "sklearn.datasets", "torch._dynamo", "mlflow.tracking", "hydra"]


def _launch(folder: Path, overrides: tuple[str, ...], *moment: object) -> None:
    os.chdir(folder)
    with open("said", "ab") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    torch.set_num_threads(1)
    sys.argv = ["launch.py", *overrides]
    if moment:
        kill_at(*moment)
    import launch

    launch.run()


def in_a_process(folder: Path, overrides: tuple[str, ...], *moment: object) -> int:
    """Launch in a process that has everything imported; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM)
    process = context.Process(target=_launch, args=(folder, overrides, *moment))
    process.start()
    process.join(200)
    assert process.exitcode is not None
    return process.exitcode


def lacking(folder: Path, uri: str) -> list[str]:
    """What the store lacks of the runs in ``folder``/runs, or has twice."""
    client, found = MlflowClient(uri), []
    for path in sorted((folder / "runs").glob("*/config.yaml")):
        run_folder, config = path.parent, yaml.safe_load(path.read_text())
        experiment = client.get_experiment_by_name(config["tracking"]["experiment"])
        here = f"tags.`sakd.folder` = '{run_folder}'"
        runs = [] if experiment is None else client.search_runs([experiment.experiment_id], here)
        if len(runs) != 1:
            found.append(f"{run_folder.name}: {len(runs)} runs")
            continue
        (run,) = runs
        if run.info.status != "FINISHED":
            found.append(f"{run_folder.name}: {run.info.status}")
        artifacts = {artifact.path for artifact in client.list_artifacts(run.info.run_id)}
        if missing := {"config.yaml", "result.json"} - artifacts:
            found.append(f"{run_folder.name}: without {sorted(missing)}")
        expected = list(range(1, config["epochs"] + 1))
        for metric in {"seconds", *run.data.metrics}:
            steps = [point.step for point in client.get_metric_history(run.info.run_id, metric)]
            if steps != expected:
                found.append(f"{run_folder.name}: {metric} of {steps}")
    return found


def trial(chance: random.Random, folder: Path, uri: str) -> tuple[int, list[str]]:
    """Kill a launch again and again until it ends by itself; the number of kills, and what is lacking."""
    distiller = chance.choice([("distiller=kd",), ("distiller=ft", "distiller.pretraining.epochs=1")])
    overrides = (*OVERRIDES, *distiller, f"tracking.uri={uri}", f"seed={chance.randint(0, 10**6)}")
    folder.mkdir()
    kills = 0
    for phase in TRIAL:
        place, calls = chance.choice(PHASES[phase])
        by = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        moment = (place, chance.randint(1, calls), chance.choice(["before", "after"]), by)
        code = in_a_process(folder, overrides, *moment)
        if code == 0:
            break
        assert code in ENDS, (folder / "said").read_text()
        kills += 1
    else:
        assert in_a_process(folder, overrides) == 0, (folder / "said").read_text()
    return kills, lacking(folder, uri)


def assert_all_arrives(draws: int, least: int, folder: Path, uri: str) -> None:
    """Hold trials until at least so many kills. ``uri``: of the store, in which "{folder}" is the trial's."""
    chance, kills, lost, trials = random.Random(draws), 0, {}, 0
    while kills < least:
        own = folder / f"trial{trials}"
        more, found = trial(chance, own, uri.format(folder=own))
        if found:
            lost[own.name] = found
        kills, trials = kills + more, trials + 1
    assert not lost, f"{len(lost)} of {trials} trials with {kills} kills"


@pytest.mark.slow
@pytest.mark.parametrize("draws", [0, 1, 2])
def test_what_is_killed_and_ends_is_in_a_file_whole_and_once(draws, tmp_path):
    assert_all_arrives(draws, 20, tmp_path, "sqlite:///{folder}/mlflow.db")


@pytest.mark.slow
def test_what_is_killed_and_ends_is_on_a_server_whole_and_once(tmp_path):
    server = MlflowServer(tmp_path / "server")
    process = server.start()
    try:
        assert_all_arrives(3, 12, tmp_path, server.uri)
    finally:
        server.stop(process)
