"""A thousand cells, and many processes at once."""

import os
import re
import resource
import subprocess
import sys
import time

import pytest
from mlflow.tracking import MlflowClient

from sakd.configuration.compose import sweep
from sakd.runs import code
from sakd.sweeps import plan
from tests.conftest import ROOT, TINY, last_of_each, tracked_cells
from tests.test_compare import finish

pytestmark = pytest.mark.slow

THOUSAND = ("sweeps=digits", f"seed={','.join(map(str, range(34)))}", "epochs=2", "tracking=none")
PATIENCE = 20.0  # seconds


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """Ten distillers in three modes with 34 seeds, all finished, with their teacher and paraphraser."""
    folder = tmp_path_factory.mktemp("thousand")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda file: None)  # runs are otherwise finished one by one
        patch.setattr("sakd.runs.code.of_this_process", lambda: (code.Code("c" * 40, False), ""))
        for i, job in enumerate(plan(sweep(THOUSAND)).everything):
            config = job.run.config
            finish(folder / "runs", 90 + i % 89 / 10, config=config, seed=config["seed"])
    return folder


def timed(folder, *command: str, patience: float = PATIENCE) -> str:
    """The output of a whole process that is done in time; on a busy machine, in so much of the processors'
    time."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=200, check=False
    )
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert min(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) < patience
    return done.stdout


def test_the_state_of_a_thousand_cells_is_told_in_time(thousand):
    assert "1020 cells: 1020 finished" in timed(thousand, "-m", "sakd.cli", "status", *THOUSAND)


def test_ten_thousand_cells_are_planned_and_their_state_is_told_in_time(tmp_path):
    """With the networks that tell which pretrainings students share."""
    sweep = ("sweeps=cifar100_same_family", f"seed={','.join(map(str, range(67)))}")
    # 16 to 18 s of CPU time where nobody else works; two that share a core's units take half as long again.
    output = timed(tmp_path, "-m", "sakd.cli", "status", *sweep, patience=1.5 * PATIENCE)
    assert "10050 cells: 10050 missing" in output
    assert output.count("67 missing") == 5 * 15 * 2


def test_a_thousand_finished_cells_end_with_their_table_in_time(thousand):
    output = timed(thousand, str(ROOT / "launch.py"), "-m", *THOUSAND)
    assert len(re.findall(r" finished +2/2 ", output)) == 1020
    assert "epoch" not in output.replace("epochs", "")
    assert f"compare: sakd compare sweeps=digits {THOUSAND[1]} epochs=2 tracking=none" in output


def test_a_thousand_finished_cells_are_not_launched_again_and_that_is_told_in_time(thousand):
    output = timed(thousand, str(ROOT / "launch.py"), "-m", *THOUSAND, "hydra/launcher=local")
    assert "nothing to submit" in output
    assert "1020 cells: 1020 finished" in output
    assert not list((thousand / "runs/.sweeps").glob("*/submission.json"))


@pytest.mark.parametrize("which", [(), THOUSAND], ids=["of a folder", "of a sweep"])
def test_a_thousand_cells_are_compared_in_time(which, thousand):
    output = timed(thousand, "-m", "sakd.cli", "compare", *which)
    assert output.count("(34)") == 30


def test_sixteen_processes_at_once_share_a_store_that_was_not_there(tmp_path):
    overrides = (*TINY, "threads=1", "distiller=none")
    command = [sys.executable, str(ROOT / "launch.py"), *last_of_each(*overrides)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    keys = {
        "cwd": tmp_path,
        "env": environment,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
    }
    processes = [subprocess.Popen([*command, f"seed={seed}"], **keys) for seed in range(16)]
    outputs = [process.communicate(timeout=550)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 16
    for output in outputs:
        assert not re.search(
            r"error|cannot be reached|not got everything|Traceback", output, re.IGNORECASE
        ), output
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = tracked_cells(f"sqlite:///{tmp_path}/mlflow.db")
    assert sorted(int(run.data.params["seed"]) for run in runs) == list(range(16))
    assert {run.info.status for run in runs} == {"FINISHED"}
    for run in runs:
        for metric in ("seconds", "loss/task", "test/accuracy"):
            assert [point.step for point in client.get_metric_history(run.info.run_id, metric)] == [1, 2], (
                metric
            )
