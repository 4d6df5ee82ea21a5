"""The command line, as a new user meets it."""

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch

from sakd.configuration import build, check
from sakd.errors import CheckpointError, DataError, RunError, SakdError
from sakd.networks import resnet8, vgg8
from sakd.runs import Run
from sakd.runs.job import execute
from tests.conftest import ROOT, TINY, compose_config, last_of_each

UNTRACKED = (*TINY, "tracking=none")


def files(folder) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_configuration_is_shown_without_torch_in_under_three_seconds(launch, tmp_path):
    start = time.monotonic()
    shown = launch("-X", "importtime", str(ROOT / "launch.py"), "--cfg", "job", script=("-B",))
    assert time.monotonic() - start < 3
    assert "distiller:" in shown.stdout
    modules = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert "omegaconf" in modules
    assert not modules & {"torch", "mlflow", "sklearn", "submitit"}
    assert files(tmp_path) == []


def test_the_resolved_configuration_can_be_shown(launch):
    shown = launch("dataset=digits", "--cfg", "job", "--resolve").stdout
    assert "milestones:\n  - 12\n  - 15\n  - 18\n" in shown


def test_a_run_ends_with_its_table_and_answers_at_once_when_asked_again(launch, tmp_path):
    first = launch(*UNTRACKED, "distiller=fitnet").stdout
    table = first[first.index("teacher  ") :]
    for part in ("teacher", "student", "last", "best", "kept", "stage2", "logits", "seconds", "folder"):
        assert part in table, first
    assert "epoch 2/2" in first
    start = time.monotonic()
    again = launch(*UNTRACKED, "distiller=fitnet").stdout
    assert time.monotonic() - start < 15
    assert "epoch" not in again.splitlines()[0]
    assert again.endswith(table)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_first_run_s_policy_chooses(seed, tmp_path):
    config = compose_config(f"seed={seed}", f"runs={tmp_path}/runs", "tracking=none", "device=cpu")
    result = execute(config)
    first, *_, last = Run(config).metrics()
    assert first["kept/stage2"] > 0.8
    assert last["kept/stage2"] < 0.7
    assert last["kept/logits"] > 0.95
    assert result["student"]["accuracy"] > result["teacher"]["accuracy"] > 90


def test_a_run_leaves_what_is_promised_in_its_folder(launch, tmp_path):
    launch(*UNTRACKED, "distiller=kd", "dataset.val_fraction=0.1")
    (folder,) = (tmp_path / "runs").glob("digits-resnet8-resnet8-kd-adaptive-seed0-*")
    assert {"config.yaml", "metrics.jsonl", "last.pt", "student.safetensors", "result.json"} <= set(
        files(folder)
    )
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert result["student"]["accuracy"] == lines[-1]["test/accuracy"]
    assert result["student"]["best_accuracy"] == max(line["test/accuracy"] for line in lines)
    assert result["teacher"]["accuracy"] == lines[-1]["teacher/accuracy"]
    assert len(result["teacher"]["sha256"]) == 64
    for key in (
        "loss/task",
        "loss/kd",
        "loss/policy",
        "kept/logits",
        "lr/student",
        "lr/policy",
        "images_per_second",
    ):
        assert all(key in line for line in lines), key
    assert all("val/accuracy" in line for line in lines)


MISTAKES = {
    "datset=digits": "Did you mean 'dataset'?",
    "dataset=digit": "Did you mean 'digits'?",
    "teacher=resnet21": "Did you mean 'resnet20'?",
    "student=wrn_16_3": "Did you mean 'wrn_16_2'?",
    "distiller=fitnett": "Did you mean 'fitnet'?",
    "spot_mode=adaptve": "Did you mean 'adaptive'?",
    "tracking=mlfow": "Did you mean 'mlflow'?",
    "experiment=cifar100/resnet56_resnet21": "Did you mean 'cifar100/resnet56_resnet20'?",
    "experiment=[cifar100/resnet56_resnet20,debg]": "Did you mean 'debug'?",
    "epohcs=3": "Did you mean 'epochs'?",
    "optimizer.lrr=1": "Did you mean 'lr'?",
    "device=cud": "device: found 'cud', expected auto, cpu, cuda or cuda:N",
    "epochs=abc": "epochs: found 'abc', expected a whole number",
    "epochs=0": "epochs: found 0, expected a whole number of at least 1",
    "teacher.min_accuracy=high": "teacher.min_accuracy: found 'high', expected percent",
    "student.num_classes=7": "student.num_classes: found 7, expected dataset.classes, which is 10",
    "teacher.checkpoint=missing.pt": "teacher.checkpoint: no file missing.pt",
    "optimizer.lr=0.1,": "optimizer.lr: found '0.1,', which Hydra cannot read; expected optimizer.lr=VALUE",
    "seed": "seed: found no value; expected seed=VALUE",
    "hydra/job_logging=3": "must be a string or a list. Got int; found in hydra/job_logging=3",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named_at_once_with_exit_code_1_and_nothing_written(mistake, launch, tmp_path):
    done = launch(mistake, expect=1)
    assert MISTAKES[mistake] in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert files(tmp_path) == []


TYPES = {
    "tracking.name=foo": "tracking.name: found 'foo', expected one of mlflow, none",
    "tracking.experiment=3": "tracking.experiment: found 3, expected a name",
    "tracking.uri=null": "tracking.uri: found None, expected a store",
    "tracking.uri=nonsense": "tracking.uri: found 'nonsense', expected a store",
    "+sead=1": "sead: no such key; .* Did you mean 'seed'",
    "teacher.checkpoint=3": "teacher.checkpoint: found 3, expected the path of a file",
    "runs=null": "runs: found None, expected the path of a folder",
    "~dataset.recipe": "dataset.recipe",
    "distiller.losses=null": "distiller.losses: found None",
    "distiller.losses.kd=null": "distiller.losses.kd: found None",
    "optimizer.lr=abc": "optimizer.lr: found 'abc', expected a number of at least 0",
    "optimizer.lr=null": "optimizer.lr: found None, expected a number of at least 0",
    "threads=0": "threads: found 0",
    "distiller.beta=-1": "distiller.beta: found -1, expected a number of at least 0",
    "dataset.image_size=abc": "dataset.image_size: found 'abc', expected a whole number",
}


@pytest.mark.parametrize("mistake", TYPES)
def test_a_value_of_the_wrong_type_is_named(mistake):
    with pytest.raises(SakdError, match=TYPES[mistake]):
        compose_config(mistake)


def test_a_distiller_without_losses_is_not_taken_for_none():
    config = compose_config()
    config["distiller"]["losses"] = {}
    with pytest.raises(SakdError, match=r"distiller.losses: found none, expected some for distiller=fitnet"):
        check(config)


LATER_MISTAKES = {
    "+dataset.crop_pading=3": "Did you mean 'crop_padding'?",
    "schedule._target_=torch.optim.lr_scheduler.ReduceLROnPlateau": "schedule.milestones: no such key",
    "optimizer._target_=torch.optim.LBFGS": "(~optimizer.momentum removes it)",
    "+optimizer.momentun=1": "Did you mean 'momentum'?",
    "optimizer._target_=torch.optim.SDG": "Did you mean 'SGD'?",
    "distiller.losses.fitnet.where=stage5": "has no stage 'stage5'; it has stem, stage1, stage2, stage3",
    "distiller.losses.fitnet.weight=-1": "distiller.losses.fitnet.weight: found -1, expected a number of at "
    "least 0",
    "spot_mode.gamma=0": "spot_mode.gamma: found 0, expected a number above 0",
    "+schedule.gama=1": "Did you mean 'gamma'?",
    "teacher.training.optimizer.lr=-1": "teacher.training.optimizer.lr: found -1, expected a number of "
    "at least 0",
}


@pytest.mark.parametrize("mistake", LATER_MISTAKES)
def test_what_only_a_constructor_can_tell_is_found_before_any_data_is_read(
    mistake, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr(build, "dataset", lambda config: pytest.fail("data was read"))
    with pytest.raises(SakdError) as raised:
        execute(tiny("distiller=fitnet", mistake))
    assert LATER_MISTAKES[mistake] in str(raised.value)
    assert files(tmp_path) == []


def test_a_missing_data_folder_is_named(tmp_path):
    where = (f"dataset.root={tmp_path}/nowhere", f"runs={tmp_path}/runs", "tracking=none")
    with pytest.raises(DataError, match=r"no file .*nowhere/cifar-10-batches-py/data_batch_1"):
        execute(compose_config("dataset=cifar10", *where))
    with pytest.raises(DataError, match=r"dataset.root=.*nowhere: no train-images"):
        execute(compose_config("dataset=fashion_mnist", *where))
    assert files(tmp_path) == []


def test_runs_where_no_folder_can_be_is_named(launch, tmp_path):
    (tmp_path / "occupied").write_text("a file")
    (line,) = launch(*UNTRACKED, "runs=occupied", expect=1).stderr.splitlines()
    assert line == "error: occupied: found a file, expected a folder; move it away"
    assert files(tmp_path) == ["occupied"]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where nobody can write")
def test_a_read_only_folder_is_named(launch, tmp_path):
    assert "cannot write /proc/self/" in launch(*UNTRACKED, "runs=/proc/self", expect=1).stderr


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder where nobody can write")
def test_a_read_only_folder_is_found_before_any_data_is_read(tiny, monkeypatch):
    monkeypatch.setattr(build, "dataset", lambda config: pytest.fail("data was read"))
    with pytest.raises(RunError, match=r"^runs=/proc/self: cannot write /proc/self/"):
        execute(tiny("distiller=fitnet") | {"runs": "/proc/self"})


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint_and_the_same_command_goes_on(launch, tmp_path):
    """A limit on the size of files makes the kernel refuse a write, as a full disk does."""

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (450_000, resource.RLIM_INFINITY))

    overrides = (*UNTRACKED, "student=resnet14", "distiller=none")
    stopped = launch(*overrides, expect=1, preexec_fn=limited)
    assert "cannot write" in stopped.stderr
    assert "last.pt: File too large" in stopped.stderr
    (folder,) = (tmp_path / "runs").glob("*resnet14*")
    assert not list(folder.glob("*.partial"))
    assert "Traceback" in (folder / "run.log").read_text()
    assert "epoch 2/2" in launch(*overrides).stdout


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(launch, tmp_path):
    blow_up = ("schedule.milestones=[1]", "schedule.gamma=1e7", "batch_size=16")
    done = launch(*UNTRACKED, "distiller=none", *blow_up, "epochs=4", expect=1)
    assert "loss/task became NaN or infinite at epoch 2" in done.stderr
    (folder,) = (tmp_path / "runs").glob("*")
    kept = torch.load(folder / "last.pt", weights_only=True)["trainer"]
    assert kept["epoch"] == 1
    assert all(value.isfinite().all() for value in kept["student"].values())
    assert "NonFiniteLossError" in (folder / "run.log").read_text()


def test_a_weak_teacher_is_refused(tiny, tmp_path):
    torch.save(resnet8(10, 1, 8).state_dict(), tmp_path / "untrained.pt")
    config = tiny(f"teacher.checkpoint={tmp_path}/untrained.pt", "teacher.min_accuracy=90", "distiller=kd")
    with pytest.raises(CheckpointError, match=r"teacher.min_accuracy: found .* expected at least 90 %"):
        execute(config)
    assert files(tmp_path) == ["untrained.pt"]


def test_a_checkpoint_for_other_classes_or_another_network_is_refused(tiny, tmp_path):
    torch.save(resnet8(100, 1, 8).state_dict(), tmp_path / "hundred.pt")
    torch.save({"model": vgg8(10, 1, 8).state_dict()}, tmp_path / "vgg.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "hundred.pt").read_bytes()[:5000])
    before = files(tmp_path)
    expected = {
        "hundred.pt": "hundred.pt: found 100 classes, expected 10",
        "vgg.pt": "vgg.pt: is not a resnet8",
        "cut.pt": "cut.pt: cannot be read",
    }
    for name, message in expected.items():
        with pytest.raises(CheckpointError, match=message):
            execute(tiny(f"teacher.checkpoint={tmp_path}/{name}"))
    assert files(tmp_path) == before


@pytest.mark.slow
def test_a_failing_cell_does_not_stop_a_sweep(launch, tmp_path):
    done = launch("-m", *UNTRACKED, "distiller=none", "optimizer.lr=1000000,0.05", expect=1)
    assert "lr=1000000" in done.stdout
    assert "became NaN" in done.stdout + done.stderr
    assert len(list((tmp_path / "runs").glob("*/result.json"))) == 1


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGTERM, "SIGTERM"), pytest.param(signal.SIGINT, "", marks=pytest.mark.slow)]
)
def test_an_interrupted_run_is_killed_and_goes_on(number, name, launch, tmp_path):
    overrides = (*UNTRACKED, "distiller=none", "epochs=200")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch.py"), *last_of_each(*overrides)],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").glob("*/last.pt")) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(number)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"the same command goes on" in output
    (folder,) = (tmp_path / "runs").iterdir()
    assert "KeyboardInterrupt" in (folder / "run.log").read_text()
    assert not (folder / "result.json").exists()
