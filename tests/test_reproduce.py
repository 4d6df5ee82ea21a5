"""A run is trained again by its own code, and compared."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner

from sakd.cli import main
from sakd.errors import RunError
from sakd.reproduce import FOLDER, first_different, reproduce
from sakd.runs import Run
from sakd.runs.job import execute
from tests.conftest import ROOT, TINY, compose_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Run:
    runs = tmp_path_factory.mktemp("reproduced") / "runs"
    config = compose_config(*TINY[:-1], "distiller=none", "epochs=1", f"runs={runs}", "tracking=none")
    execute(config)
    return Run(config)


@pytest.fixture
def copied(finished, tmp_path):
    """The run in a folder of the test's own; ``changes``: to its result."""

    def made(**changes):
        folder = tmp_path / "runs" / finished.name
        shutil.copytree(finished.folder, folder, dirs_exist_ok=True)
        result = json.loads((folder / "result.json").read_text()) | changes
        del result["sha256"]
        (folder / "result.json").write_text(json.dumps(result))
        return folder

    return made


def test_what_was_measured_is_compared_but_for_times():
    before = [{"epoch": epoch, "test/accuracy": 90.0, "seconds": 1.0, "time": 1.0} for epoch in (1, 2)]
    now = [{**line, "seconds": 2.0, "time": 5.0} for line in before]
    assert first_different(before, now) is None
    assert first_different(before, now[:1]) == 2
    now[0]["test/accuracy"] = 90.1
    assert first_different(before, now) == 1


def test_a_run_whose_code_is_not_at_hand_is_named_and_nothing_is_left(copied):
    for code, told in (
        ({"commit": None, "changed": None}, "was trained by code of no commit"),
        ({"commit": "c" * 40, "changed": False}, "commit cccccccccccc cannot be checked out from"),
    ):
        folder = copied(code=code)
        with pytest.raises(RunError, match=told):
            reproduce(folder)
        assert not (folder.parent / FOLDER / folder.name / "code").exists()
        assert not (folder.parent / FOLDER / folder.name / "code.partial").exists()
    folder = copied(code={"commit": "c" * 40, "changed": True})
    (folder / "code.diff").unlink(missing_ok=True)
    with pytest.raises(RunError, match=r"code\.diff: no such file"):
        reproduce(folder)
    (folder / "result.json").unlink()
    done = CliRunner().invoke(main, ["reproduce", str(folder)])
    assert (done.exit_code, "found no result.json" in done.output) == (1, True)


@pytest.mark.slow
def test_a_student_is_reproduced_bit_for_bit_by_the_code_that_trained_it(tmp_path):
    """In a checkout whose code has changed since: that of the run is used, with what its commit had not."""
    checkout, runs = tmp_path / "checkout", tmp_path / "runs"
    subprocess.run(["git", "clone", "-q", "--no-hardlinks", ROOT, checkout], check=True)
    difference = subprocess.run(
        ["git", "-C", ROOT, "diff", "--binary", "HEAD"], check=True, capture_output=True
    ).stdout
    if difference:
        subprocess.run(["git", "-C", checkout, "apply"], check=True, input=difference)
    log = checkout / "sakd" / "data" / "normalising.py"
    log.write_text(f"{log.read_text()}\n\nOWN = True  # no commit has it\n")

    def sakd(*command: object) -> subprocess.CompletedProcess:
        environment = {"PYTHONPATH": str(checkout), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *map(str, command)], cwd=tmp_path, env=environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip

    overrides = (*TINY, "distiller=kd", f"runs={runs}", "tracking=none")
    launched = sakd(checkout / "launch.py", *overrides)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    (student,) = runs.glob("*-kd-*")
    log.write_text(f"{log.read_text()}\nraise RuntimeError('the code of today')\n")
    trainer = checkout / "sakd" / "training" / "trainer.py"
    trainer.write_text("raise RuntimeError('the code of today')\n")
    done = sakd("-m", "sakd.cli", "reproduce", student)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "reproduced, bit for bit" in done.stdout
    assert "all weights are the same, bit for bit" in done.stdout
    code = runs / FOLDER / student.name / "code"
    assert "OWN = True" in (code / "sakd" / "data" / "normalising.py").read_text()

    path, weights = student / "student.safetensors", (student / "student.safetensors").read_bytes()
    path.write_bytes(weights[:-4] + b"\x00\x00\x00\x3f")
    refused = sakd("-m", "sakd.cli", "reproduce", student)
    assert (refused.returncode, "found other weights" in refused.stderr) == (1, True)
    result = json.loads((student / "result.json").read_text())
    del result["sha256"]
    result["student_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (student / "result.json").write_text(json.dumps(result))
    done = sakd("-m", "sakd.cli", "reproduce", student)  # trained before: only compared
    assert done.returncode == 1, done.stdout + done.stderr
    assert "not reproduced, bit for bit" in done.stdout
    assert "weights differ; no epoch measured something else" in done.stdout
    assert sakd("-m", "sakd.cli", "reproduce", student, "--tolerance", "0").returncode == 0
