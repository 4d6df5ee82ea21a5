"""`sakd doctor`: each fault that is made here is found, by the check that it is for, in one line."""

import json
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from PIL import Image

from sakd.cli import main
from sakd.configuration.compose import sweep
from sakd.doctor import CHECKS, Asked, Finding, examine
from tests.conftest import ROOT

composed = cache(sweep)
SLURM = ("hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.mem_gb=1")


@pytest.fixture
def found(tmp_path, monkeypatch):
    """What one check finds of a command line, and of other values, in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)

    def examined(check: str, *overrides: str, canary: bool = False, **values: str) -> Finding:
        swept = composed(overrides)
        config = swept.cells[0][1] | values
        (finding,) = examine(Asked(config, swept.launcher, overrides, canary), [check])
        assert finding.name == check
        assert "\n" not in finding.told
        return finding

    return examined


def is_fault(finding: Finding, *words: str, state: str = "fail") -> bool:
    return finding.state == state and all(word in finding.told for word in words)


@pytest.mark.slow
def test_without_a_fault_all_is_well_and_nothing_is_left(found, tmp_path):
    for check in set(CHECKS) - {"store", "packages"}:
        assert found(check).state == "ok", check
    assert list(tmp_path.iterdir()) == []


def test_a_package_of_another_version_is_found(found, tmp_path, monkeypatch):
    other = tmp_path / "path/sakd-9.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: sakd\nVersion: 9\nRequires-Dist: torch>=2.6\nRequires-Dist: numpy<1\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "path")
    assert is_fault(found("packages"), "numpy: found", "expected <1 for sakd")


def test_packages_that_do_not_go_together_are_found(found, tmp_path, monkeypatch):
    for name, needs in {"sakd": ["torch", "torchvision"], "torchvision": ["torch==1.0"]}.items():
        other = tmp_path / f"path/{name}-9.dist-info"
        other.mkdir(parents=True)
        lines = "".join(f"Requires-Dist: {need}\n" for need in needs)
        (other / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9\n{lines}")
    monkeypatch.syspath_prepend(tmp_path / "path")
    assert is_fault(found("packages"), "torch: found", "expected ==1.0 for torchvision")


def test_a_device_that_is_not_there_is_found(found):
    assert is_fault(found("cuda", device="cuda:97"), "device: found cuda:97")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_is_computed_on_each_gpu(found):
    told = found("cuda", device="cuda")
    assert told.state == "ok"
    assert told.told.count("a step computed") == torch.cuda.device_count()


@pytest.mark.slow
def test_a_missing_file_of_the_data_is_found(found, tmp_path):
    told = found("data", "dataset=cifar10", "dataset.root=images", "dataset.download=true")
    assert is_fault(told, "no file images/cifar-10-batches-py/data_batch_1")  # and nothing was fetched
    assert not (tmp_path / "images").exists()


@pytest.mark.slow
def test_a_damaged_file_of_the_data_is_found(found, tmp_path):
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py/data_batch_1").write_bytes(b"damaged")
    told = found("data", "dataset=cifar10", "dataset.root=.")
    assert is_fault(told, "data_batch_1: found another MD5 checksum")


@pytest.mark.slow
def test_a_damaged_image_is_found(found, tmp_path):
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (8, 8)).save(tmp_path / "photos" / part / name / f"{number}.png")
    damaged = tmp_path / "photos/train/dog/1.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    options = ("dataset=image_folder", "dataset.root=photos", "dataset.classes=2", "dataset.workers=0")
    assert is_fault(found("data", *options), "photos/train/dog/1.png")


def test_a_folder_of_runs_in_the_place_of_a_file_is_found(found, tmp_path):
    (tmp_path / "file").touch()
    assert is_fault(found("runs", runs="file/runs"), "runs=file/runs: cannot be written")


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this machine lets nothing be mounted")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_found(found, tmp_path):
    with small_disk(tmp_path / "disk"):
        assert is_fault(found("runs", runs="disk/runs"), "cannot be written (No space left on device)")


def test_a_launch_that_others_wait_for_is_told(found, tmp_path):
    (tmp_path / "runs/.sweeps").mkdir(parents=True)
    with FileLock(tmp_path / "runs/.sweeps/.lock"):
        assert is_fault(found("runs"), ".sweeps/.lock is held by a launch", state="warn")


def test_without_slurm_a_sweep_for_it_is_told(found, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert is_fault(found("slurm", *SLURM), "found no command sinfo")


def test_a_store_that_is_no_database_is_found(found, tmp_path):
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    assert is_fault(found("store"), "mlflow.db: found no SQLite file that can be read")


def test_a_damaged_store_is_found(found, tmp_path):
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        store.execute("create table numbers (number integer, text text)")
        store.executemany("insert into numbers values (?, ?)", [(n, "x" * 100) for n in range(1000)])
        store.commit()
    with (tmp_path / "mlflow.db").open("r+b") as file:
        file.seek(3 * 4096)
        file.write(os.urandom(4096))
    assert is_fault(found("store"), "mlflow.db: found damage")


@pytest.mark.slow
def test_a_store_of_another_schema_is_found(found, tmp_path):
    assert found("store") == Finding(
        "store", "ok", f"{tmp_path}/mlflow.db: not there yet, the first run makes it"
    )
    script = "from sakd.runs.tracking.store import Store; Store('sqlite:///mlflow.db').answers()"
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        capture_output=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert found("store").told.endswith("answers, its pages are whole and its schema is current")
    shutil.copy("mlflow.db", "other.db")  # a process looks at a file's schema once
    with closing(sqlite3.connect("other.db")) as store:
        store.execute("update alembic_version set version_num = '2d6e25af4d3e'")
        store.commit()
    told = found("store", "tracking.uri=sqlite:///other.db")
    assert is_fault(told, "other.db: found no store for this MLflow", "schema")


@pytest.mark.slow
def test_a_server_that_is_away_is_found(found):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = found("store", f"tracking.uri=http://user:secret@127.0.0.1:{port}")
    assert is_fault(told, f"127.0.0.1:{port}: found no MLflow store that answers", "refused")
    assert "secret" not in told.told


def test_the_exit_code_is_that_of_a_failure_and_findings_are_told_as_json(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["doctor", "device=cuda:97", "--only", "python", "--only", "cuda"]
    done = CliRunner().invoke(main, [*command, "--format", "json"])
    assert done.exit_code == 1
    assert [finding["state"] for finding in json.loads(done.output)] == ["ok", "fail"]
    shown = CliRunner().invoke(main, command)
    assert (shown.exit_code, len(shown.output.splitlines())) == (1, 2)
    assert CliRunner().invoke(main, command[:1] + command[2:4]).exit_code == 0
    unknown = CliRunner().invoke(main, ["doctor", "--only", "pyhton"])
    assert (unknown.exit_code, unknown.output.count("\n")) == (1, 1)
    assert "--only: found 'pyhton'" in unknown.output
    assert "Did you mean 'python'?" in unknown.output


# On a real SLURM


@pytest.mark.slow
@pytest.mark.slurm
def test_slurms_faults_are_found_and_a_canary_comes_back(found, tmp_path):
    if (
        shutil.which("sinfo") is None
        or subprocess.run(["sinfo"], capture_output=True, check=False).returncode
    ):
        pytest.skip("SLURM does not answer; tests/slurm-up starts one")
    assert found("slurm", *SLURM).state == "ok"
    assert is_fault(found("slurm", *SLURM, "hydra.launcher.partition=gone"), "found gone, expected one of")
    assert is_fault(found("slurm", *SLURM, "hydra.launcher.cpus_per_task=1024"), "sbatch: ")
    assert is_fault(found("slurm", *SLURM, "hydra.launcher.constraint=nobodys"), "sbatch: ")
    urgent, limited = (
        (*SLURM, "hydra.launcher.partition=urgent"),
        ["scontrol", "update", "PartitionName=urgent"],
    )
    try:
        subprocess.run([*limited, "MaxTime=1:00:00"], check=True)
        assert is_fault(found("slurm", *urgent), "timeout_min: found 240, expected at most 60, the limit of")
        subprocess.run([*limited, "State=DOWN"], check=True)
        assert is_fault(found("slurm", *urgent), "partition: found urgent, which is down")
    finally:
        subprocess.run([*limited, "MaxTime=INFINITE", "State=UP"], check=True)
    told = found("slurm", *SLURM, "tracking=none", canary=True)
    assert told.state == "ok"
    assert "ran on a node" in told.told
    assert list((tmp_path / "runs").iterdir()) == []
    broken = found("slurm", *SLURM, "hydra.launcher.setup=[exit 3]", canary=True)
    assert is_fault(broken, "found no findings of it")
