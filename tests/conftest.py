"""What tests share: launching as a user does, and composing as launch.py does."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the cores; must be known before torch is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from torch import Tensor

from sakd import configuration, credentials
from sakd.data import Dataset
from sakd.training import Cohort, Trainer

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROOT = Path(__file__).parent.parent

# Two epochs of one small network on a part of the digits: a second or two.
TINY = ("dataset=digits", "teacher=resnet8", "student=resnet8", "dataset.train_samples=192", "epochs=2")


def other_family(distiller: str) -> str:
    """A teacher for a resnet8 that is as different as the distiller allows: deeper and wider, but for FSP's
    equal channels."""
    return "wrn_16_1" if distiller.startswith("fsp") else "vgg8"


def light(distiller: str) -> tuple[str, ...]:
    """Overrides that let a distiller start within a second."""
    semckd = (
        "distiller.losses.semckd.widening=0.02",
    )  # as published, projections from a VGG are 69 million weights
    pretraining = ("distiller.pretraining.epochs=1",)
    return {"semckd": semckd, "ft": pretraining, "fsp_init": pretraining}.get(distiller, ())


def last_of_each(*overrides: str) -> list[str]:
    """Overrides of which a later one takes the place of an earlier one: TINY with other values."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


def compose_config(*overrides: str) -> configuration.Config:
    """What launch.py makes of a command line."""
    from sakd.configuration.compose import resolve  # here, since tests of a GPU do without Hydra

    return resolve(compose_lazily(*overrides))


def compose_lazily(*overrides: str) -> "DictConfig":
    """As ``compose_config``, before interpolations are resolved and values checked."""
    from hydra import compose, initialize_config_dir

    from sakd.configuration.compose import register_resolvers

    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", list(overrides))


def skip_without_package_of(network: str) -> None:
    """Skip the test if ``network`` of conf/network is another package's, and that is not installed."""
    import yaml

    node = yaml.safe_load((ROOT / "conf/network" / f"{network}.yaml").read_text())
    if "build" in node:
        pytest.importorskip(node["build"].partition(".")[0])


@pytest.fixture
def tiny(tmp_path):
    """Composes a small, untracked run in a folder of the test's own."""

    def composed(*overrides: str) -> configuration.Config:
        return compose_config(*TINY, f"runs={tmp_path}/runs", "tracking=none", *overrides)

    return composed


@pytest.fixture
def launch(tmp_path):
    """Runs `python launch.py …` in a folder of the test's own."""

    def launched(
        *overrides: str, script: tuple[str, ...] = (), expect: int | None = 0, **keys
    ) -> subprocess.CompletedProcess:
        command = [sys.executable, *(script or (str(ROOT / "launch.py"),)), *last_of_each(*overrides)]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False, **keys
        )
        if expect is not None:
            assert done.returncode == expect, done.stdout + done.stderr
        return done

    return launched


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_a_terminal():
    """What a script starts in the background, or nohup, ignores some, and so would what a test starts."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _no_tracking_server():
    """Tests choose their store themselves, and whether it gets models and pictures, which take seconds."""
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["SAKD_TRACKING_MODEL"] = os.environ["SAKD_TRACKING_PICTURES"] = "false"


@pytest.fixture(autouse=True)
def _the_next_test_finds_what_this_one_found():
    """The environment, and what is known of stores: those with a password are handed on by it."""
    environment = dict(os.environ)
    yield
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    os.environ.update(environment)
    credentials._uris.clear()
    credentials._passwords.clear()


def fit(trainer: Trainer, dataset: Dataset, epochs: int, batch_size: int) -> list[dict[str, float]]:
    """Measurements of each epoch of a trainer that trains alone."""
    return [
        measured for _, measured in Cohort(trainer.teacher, {"": trainer}).fit(dataset, epochs, batch_size)
    ]


def tracked_cells(uri: str, experiment: str = "sakd") -> list[Any]:
    """The runs that a store has in an experiment, without those that stand for sweeps."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return [run for run in found if "sakd.sweep" not in run.data.tags]


def take_step(trainer: Trainer, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """What a trainer measures in one step, by name."""
    teacher_features = None if trainer.teacher is None else trainer.teacher.features(images)
    step = trainer.train_step(images, labels, indices, teacher_features, views=views_of(images, trainer))
    return dict(zip(trainer.measurements, step.measured, strict=True))


def views_of(images: Tensor, trainer: Trainer) -> dict:
    """The views that a trainer's distillers ask for, as a step gets them: the images, flipped."""
    flipped = images.flip(3)
    return {asked: (flipped, trainer.teacher.features(flipped)) for asked in trainer.views}
