"""Students that are trained together end as each would alone, bit for bit; and what goes wrong in one is
its own."""

import json
import signal
import subprocess
import sys
import threading
import time
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from sakd.configuration import build, prerequisites
from sakd.data import train_batches
from sakd.errors import ConfigError, NonFiniteLossError, WithdrawnError
from sakd.networks import StagedNet, resnet8
from sakd.runs import Run, last_words
from sakd.runs.job import execute, execute_together
from sakd.streams import initialising, stream
from sakd.training import Cohort, SharedClock, Teacher, Trainer
from tests.conftest import ROOT, TINY, compose_config, fit, light, take_step, views_of
from tests.test_every_config import DISTILLING, MODES
from tests.test_resume import assert_same

CPU = torch.device("cpu")
SMALL = ("dataset.train_samples=48", "dataset.test_samples=32", "epochs=2", "tracking=none", "threads=1")
TIMES = ("seconds", "time", "images_per_second")
FAMILIES = {"same": "resnet14", "different": "vgg8", "different, of equal channels": "wrn_16_1"}


def small(*overrides: str) -> dict:
    return compose_config("student=resnet8", *SMALL, *overrides)


def timeless(measured: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in measured.items() if name not in TIMES}


def together(configs: dict[str, dict]) -> tuple[Cohort, dict[str, Trainer]]:
    """A cohort of what the configurations ask for, of one teacher with the weights that it starts with."""
    first = next(iter(configs.values()))
    network = build.parts(first).teacher
    teacher = Teacher(network, execution=build.execution(first))
    trainers = {
        name: build.trainer(config, build.parts(config, network), CPU, teacher)
        for name, config in configs.items()
    }
    return Cohort(teacher, trainers), trainers


def alone(config: dict, epochs: int) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = build.trainer(config, build.parts(config), CPU)
    return trainer, fit(trainer, build.dataset(config), epochs, config["batch_size"])


def assert_as_alone(configs: dict[str, dict], epochs: int | dict[str, int] = 2) -> None:
    """States and measurements of each member are those of a trainer alone."""
    cohort, trainers = together(configs)
    first = next(iter(configs.values()))
    measured = {name: [] for name in configs}
    for name, of_epoch in cohort.fit(build.dataset(first), epochs, first["batch_size"]):
        measured[name].append(of_epoch)
    for name, config in configs.items():
        own, expected = alone(config, epochs if isinstance(epochs, int) else epochs[name])
        assert_same(trainers[name].state_dict(), own.state_dict(), name)
        assert list(map(timeless, measured[name])) == list(map(timeless, expected)), name


@pytest.mark.parametrize(
    ("family", "mode"),
    [
        pytest.param(family, mode, marks=() if family != "same" and mode == "adaptive" else pytest.mark.slow)
        for family in FAMILIES
        for mode in MODES
    ],
)
def test_a_cohort_of_every_distiller_is_each_of_them_alone(family, mode):
    equal_channels = [name for name in DISTILLING if name.startswith("fsp")]
    names = {"different": [name for name in DISTILLING if name not in equal_channels]}.get(family, DISTILLING)
    names = equal_channels if "equal" in family else names
    keys = (f"teacher={FAMILIES[family]}", f"spot_mode={mode}", "batch_size=24")
    assert_as_alone({name: small(*keys, f"distiller={name}", *light(name)) for name in names})


def test_members_differ_in_student_optimizer_schedule_mode_and_epochs():
    configs = {
        "plain": small("distiller=at"),
        "other student": small("distiller=at", "student=vgg8"),
        "other rate": small("distiller=kd", "optimizer.lr=0.01", "spot_mode=anti"),
        "other optimizer": small(
            "distiller=kd", "optimizer._target_=torch.optim.Adam", "~optimizer.momentum"
        ),
        "other schedule": small("distiller=sp", "schedule.milestones=[1]", "spot_mode=random"),
    }
    assert_as_alone(configs, {name: epochs for epochs, name in enumerate(configs, 1)})


def with_dropout(seed: int) -> StagedNet:
    with initialising(seed, "student"):
        stages = dict(resnet8(10, 1, 8).named_children())
    stages["logits"] = nn.Sequential(nn.Dropout(0.5), stages["logits"])
    return StagedNet(stages, "own", (1, 8, 8))


def test_members_with_dropout_draw_as_each_would_alone():
    sgd = partial(torch.optim.SGD, lr=0.05)
    dataset = build.dataset(small())
    trainers = {str(seed): Trainer(with_dropout(seed), optimizer=sgd, seed=7) for seed in (1, 2, 3)}
    dict(Cohort(None, trainers).fit(dataset, 2, 16))
    for seed, found in trainers.items():
        own = Trainer(with_dropout(int(seed)), optimizer=sgd, seed=7)
        torch.seed()  # what was drawn before does not count
        fit(own, dataset, 2, 16)
        assert_same(found.state_dict(), own.state_dict())


def test_a_member_that_is_added_later_catches_up():
    configs = {"old": small("distiller=at"), "new": small("distiller=sp")}
    dataset = build.dataset(configs["old"])
    first, _ = alone(configs["old"], 1)
    cohort, trainers = together(configs)
    trainers["old"].prepare(dataset)
    trainers["old"].load_state_dict(deepcopy(first.state_dict()))
    order = [(name, measured["epoch"]) for name, measured in cohort.fit(dataset, 3, 64)]
    assert order == [("new", 1), ("old", 2), ("new", 2), ("old", 3), ("new", 3)]
    for name, config in configs.items():
        assert_same(trainers[name].state_dict(), alone(config, 3)[0].state_dict())


@pytest.mark.parametrize("distiller", DISTILLING)
def test_a_step_writes_into_nothing_that_is_shared(distiller):
    """PyTorch counts every write into a tensor."""
    config = small("teacher=resnet14", f"distiller={distiller}", "spot_mode=adaptive", *light(distiller))
    trainer = build.trainer(config, build.parts(config), CPU)
    dataset = build.dataset(config)
    trainer.prepare(dataset)
    images, labels, indices = next(iter(train_batches(dataset, 16, stream(0, "data", 1))))
    features = trainer.teacher.features(images)
    shared = {"images": images, "labels": labels, "indices": indices, **features}
    views = views_of(images, trainer)
    for place, (view, of_view) in enumerate(views.values()):
        shared |= {f"view {place}": view} | {f"view {place} {name}": own for name, own in of_view.items()}
    shared |= dict(trainer.teacher.network.state_dict())
    versions, values = {n: t._version for n, t in shared.items()}, deepcopy(shared)
    trainer.train_step(images, labels, indices, features, views=views)
    assert {name: tensor._version for name, tensor in shared.items()} == versions
    for name, tensor in shared.items():
        assert torch.equal(tensor, values[name]), name


def test_what_a_step_returns_tells_of_each_sample():
    config = small("distiller=at", "spot_mode=random", "spot_mode.p=0.5")
    trainer = build.trainer(config, build.parts(config), CPU)
    dataset = build.dataset(config)
    trainer.prepare(dataset)
    batch = next(iter(train_batches(dataset, 16, stream(0, "data", 1))))
    step = trainer.train_step(*batch, trainer.teacher.features(batch.images))
    assert set(step.losses) == {"task", "kd", "at"}
    assert step.kept.shape == (16, len(trainer.spots))
    assert step.kept.dtype == torch.bool
    named = dict(zip(trainer.measurements, step.measured, strict=True))
    for k, spot in enumerate(trainer.spots):
        assert named[f"kept/{spot.name}"] == step.kept[:, k].float().mean()
    assert {f"loss/{name}": loss for name, loss in step.losses.items()}.items() <= named.items()


def test_trainers_that_cannot_go_together_are_refused():
    config = small("distiller=kd")
    cohort, trainers = together({"a": config, "b": config})
    other = build.trainer(config, build.parts(config), CPU)
    with pytest.raises(ConfigError, match="c: found another teacher"):
        Cohort(cohort.teacher, trainers | {"c": other})
    seeded = build.trainer(small("distiller=kd", "seed=1"), build.parts(config), CPU, cohort.teacher)
    with pytest.raises(ConfigError, match="seed of c: found 1, expected 0"):
        Cohort(cohort.teacher, trainers | {"c": seeded})


def test_the_seconds_of_all_are_the_time_that_passed():
    """To each its own, and an equal share of the rest."""
    start = time.perf_counter()
    clock = SharedClock(["a", "b"])
    with clock.of("a"):
        time.sleep(0.2)
    time.sleep(0.1)
    with clock.of("b"):
        time.sleep(0.05)
    seconds = clock.seconds()
    assert sum(seconds.values()) == pytest.approx(time.perf_counter() - start, abs=0.01)
    assert seconds["a"] - seconds["b"] == pytest.approx(0.15, abs=0.02)


# ---- runs


def runs_of(tmp_path, *overrides: str) -> list[dict]:
    keys = ("teacher=resnet8", "epochs=3", *overrides, f"runs={tmp_path}/runs")
    return [
        small(*keys, f"distiller={distiller}", f"spot_mode={mode}")
        for distiller in ("kd", "at")
        for mode in ("fixed", "adaptive")
    ]


def test_runs_that_train_together_leave_what_each_leaves_alone(tmp_path):
    configs = runs_of(tmp_path)
    outcomes = execute_together(configs)
    for config in configs:
        run, own = Run(config), Run(config | {"runs": f"{tmp_path}/alone"})
        expected, found = execute(own.config), outcomes[run.name]
        assert found == run.result()
        assert (found["cohort"], expected["cohort"]) == (4, 1)
        different = ("seconds", "cohort", "teacher")
        assert {k: v for k, v in found.items() if k not in different} == {
            k: v for k, v in expected.items() if k not in different
        }
        assert found["teacher"]["sha256"] == expected["teacher"]["sha256"]
        assert run.weights.read_bytes() == own.weights.read_bytes()
        assert list(map(timeless, run.metrics())) == list(map(timeless, own.metrics()))
        assert found["seconds"] == sum(line["seconds"] for line in run.metrics())
    names = sorted(Run(config).name for config in configs)
    logs = {name: (tmp_path / "runs" / name / "run.log").read_text() for name in names}
    assert all(text.count("begins, with the code of") == 1 for text in logs.values())
    assert sorted(outcomes) == names
    assert execute_together(configs) == outcomes


def test_a_member_whose_loss_breaks_fails_alone(tmp_path):
    configs = runs_of(tmp_path)
    broken = configs[1]
    broken["optimizer"]["lr"] = 1e6
    outcomes = execute_together(configs, leave_failures=True)
    assert isinstance(outcomes[Run(broken).name], NonFiniteLossError)
    assert "Traceback" in (Run(broken).folder / "run.log").read_text()
    for config in (configs[0], *configs[2:]):
        assert outcomes[Run(config).name]["cohort"] == 4
        text = (Run(config).folder / "run.log").read_text()
        assert "Traceback" not in text
        assert "NaN" not in text
    again = execute_together(configs)
    assert isinstance(again[Run(broken).name], NonFiniteLossError)


def test_an_exception_in_one_distiller_ends_that_member_alone(tmp_path, monkeypatch):
    from sakd.distillers import AT

    loss, calls = AT.loss, []

    def breaks(self, *arguments):
        calls.append(self)
        if len(calls) == 5 and self is calls[0]:
            raise ZeroDivisionError("of all things")
        return loss(self, *arguments)

    monkeypatch.setattr(AT, "loss", breaks)
    configs = runs_of(tmp_path, "batch_size=16")
    outcomes = execute_together(configs)
    failed = [name for name, outcome in outcomes.items() if isinstance(outcome, Exception)]
    assert failed == [Run(configs[2]).name]
    assert "ZeroDivisionError: of all things" in (tmp_path / "runs" / failed[0] / "run.log").read_text()


def test_a_member_whose_folder_cannot_be_written_fails_alone(tmp_path, monkeypatch):
    """As on a full disk of one folder: a write of its checkpoint is refused by the file system."""
    configs = runs_of(tmp_path)
    blocked = Run(configs[3])
    save = Run.save_checkpoint

    def blocks(self, *arguments):
        if self.name == blocked.name and not (self.folder / "last.pt").exists():
            (self.folder / "last.pt").mkdir()  # nothing can be renamed over a folder
        return save(self, *arguments)

    monkeypatch.setattr(Run, "save_checkpoint", blocks)
    outcomes = execute_together(configs)
    assert "cannot write" in str(outcomes.pop(blocked.name))
    assert all(outcome["cohort"] == 4 for outcome in outcomes.values())
    (blocked.folder / "last.pt").rmdir()
    monkeypatch.setattr(Run, "save_checkpoint", save)
    assert execute(blocked.config)["cohort"] == 1


def test_a_member_that_cannot_be_built_fails_alone(tmp_path):
    configs = runs_of(tmp_path)
    configs[0]["optimizer"]["lr"] = -1.0
    outcomes = execute_together(configs, leave_failures=True)
    assert "optimizer.lr: found -1.0" in str(outcomes.pop(Run(configs[0]).name))
    assert "Traceback" in (Run(configs[0]).folder / "run.log").read_text()
    assert all(outcome["cohort"] == 3 for outcome in outcomes.values())


def test_a_teacher_that_is_not_good_enough_for_one_member_teaches_the_others(tmp_path):
    configs = runs_of(tmp_path)
    configs[0]["teacher"]["min_accuracy"] = 100.0
    outcomes = execute_together(configs)
    assert "teacher.min_accuracy" in str(outcomes.pop(Run(configs[0]).name))
    assert all(outcome["cohort"] == 3 for outcome in outcomes.values())


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    configs = runs_of(tmp_path)
    execute(configs[0])  # so that the teacher is there
    busy = Run(configs[1]).folder
    busy.mkdir()
    hold = "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]); lock.acquire()"
    command = [
        sys.executable,
        "-c",
        f"{hold}; print('held', flush=True); time.sleep(60)",
        str(busy / ".lock"),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        threading.Thread(target=lambda: (until_two_are_done(configs[2:]), other.kill())).start()
        outcomes = execute_together(configs)
    assert [outcomes[Run(config).name]["cohort"] for config in configs] == [1, 1, 2, 2]


def until_two_are_done(configs: list[dict]) -> None:
    while not all((Run(config).folder / "result.json").exists() for config in configs):
        time.sleep(0.05)


def statuses(tmp_path) -> dict[str, str]:
    """What MLflow has of each run in the folder, and of a sweep, by its name."""
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("sakd").experiment_id
    return {
        Path(run.data.tags["sakd.folder"]).name: run.info.status for run in client.search_runs([experiment])
    }


def test_a_member_that_is_withdrawn_ends_as_killed_and_the_others_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr("sakd.runs.job.SECONDS_BETWEEN_QUESTIONS", 0.0)
    configs = runs_of(tmp_path, "tracking=mlflow", f"tracking.uri=sqlite:///{tmp_path}/mlflow.db")
    gone, seen = Run(configs[2]), []
    begun, begin_epoch = [0], Trainer.begin_epoch

    def counted(self):
        begin_epoch(self)
        if self.teacher is not None:
            begun.append(self.epoch)

    monkeypatch.setattr(Trainer, "begin_epoch", counted)
    outcomes = execute_together(
        configs,
        withdrawn=lambda name: name == gone.name and begun[-1] == 3,
        ended=lambda name, outcome: seen.append((name, Run(configs[2]).is_held)),
    )
    assert isinstance(outcomes.pop(gone.name), WithdrawnError)
    assert all(isinstance(outcome, dict) for outcome in outcomes.values())
    assert seen[0] == (gone.name, False)  # its folder is free while the others train
    assert [line["epoch"] for line in gone.metrics()] == [1, 2]
    assert statuses(tmp_path) == dict.fromkeys(outcomes, "FINISHED") | {gone.name: "KILLED"}
    assert execute(gone.config)["student"]["best_epoch"] >= 1
    assert [line["epoch"] for line in gone.metrics()] == [1, 2, 3]


@pytest.mark.slow
def test_an_interruption_is_noted_for_every_member(tmp_path):
    overrides = ("distiller=kd,at", "spot_mode=fixed,adaptive", "epochs=2000", "teacher.training.epochs=1")
    command = [sys.executable, str(ROOT / "launch.py"), "-m", *TINY[:-1], *overrides, "threads=1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while len(list(tmp_path.glob("runs/*-seed0-*/last.pt"))) < 5:  # the teacher's too
            assert process.poll() is None
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert set(statuses(tmp_path).values()) == {"KILLED"}
    runs = [tmp_path / "runs" / name for name in statuses(tmp_path) if (tmp_path / "runs" / name).is_dir()]
    assert [last_words(run) for run in runs] == ["ended by SIGTERM"] * 4
    assert len(statuses(tmp_path)) == 5  # and the sweep


def test_members_without_a_log_fail_alone(tmp_path):
    configs = runs_of(tmp_path)
    no_log = Run(configs[0])
    (no_log.folder / "run.log").mkdir(parents=True)  # it cannot be opened
    configs[1]["optimizer"]["lr"] = -1.0  # its failure is to be noted where nothing can be
    broken = Run(configs[1])
    (broken.folder / "run.log").mkdir(parents=True)
    outcomes = execute_together(configs, leave_failures=True)
    assert "run.log" in str(outcomes.pop(no_log.name))
    assert "optimizer.lr: found -1.0" in str(outcomes.pop(broken.name))
    assert len(outcomes) == 2
    assert all(isinstance(outcome, dict) for outcome in outcomes.values())


def test_too_little_memory_for_one_alone_is_a_failure_and_for_the_teacher_everyones(tmp_path, monkeypatch):
    configs = runs_of(tmp_path)

    def never_enough(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "train_step", never_enough)
    outcomes = execute_together(configs, leave_failures=True)
    assert {str(outcome) for outcome in outcomes.values()} == {
        f"{Run(prerequisites(configs[0]).teacher).name}, which is needed first: OutOfMemoryError: CUDA "
        "out of memory"
    }
    alone = small("distiller=none", "student=resnet14", f"runs={tmp_path}/runs")
    with pytest.raises(torch.OutOfMemoryError):
        execute(alone)
    assert "out of memory" in last_words(Run(alone).folder)


def test_a_cohort_that_is_too_large_for_the_memory_is_split_and_goes_on(tmp_path, monkeypatch):
    configs = runs_of(tmp_path)
    step, failures = Trainer.train_step, []

    def with_little_memory(self, *arguments):
        if self.teacher is not None and self.epoch == 2 and "at" in self.distillers and not failures:
            failures.append(self)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", with_little_memory)
    outcomes = execute_together(configs)
    assert [outcome["cohort"] for outcome in outcomes.values()] == [2, 2, 2, 2]
    for config in configs:
        run, own = Run(config), Run(config | {"runs": f"{tmp_path}/alone"})
        monkeypatch.setattr(Trainer, "train_step", step)
        execute(own.config)
        assert run.weights.read_bytes() == own.weights.read_bytes()
        assert [line["epoch"] for line in run.metrics()] == [1, 2, 3]


def test_the_losses_of_a_step_are_those_that_the_epoch_reports(tmp_path):
    """One batch an epoch: its measurements are the epoch's means."""
    config = small("distiller=at", "spot_mode=fixed", "batch_size=48")
    first = build.trainer(config, build.parts(config), CPU)
    dataset = build.dataset(config)
    first.prepare(dataset)
    first.begin_epoch()
    batch = next(iter(train_batches(dataset, 48, stream(0, "data", 1))))
    expected = {name: float(value) for name, value in take_step(first, *batch).items()}
    _, (measured, _) = alone(config, 2)
    assert {name: measured[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert json.dumps(measured)
