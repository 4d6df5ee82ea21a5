"""Checks of a configuration's keys and values, before any work is done.

These are quick and need neither torch nor what is configured: a sweep's thousands of cells pass them one by
one. What constructors take is held to their annotations in `sakd.configuration.build`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

from sakd import names
from sakd.configuration.fits import check_schema, kind_of
from sakd.configuration.prerequisites import Config, is_trained, needs_teacher
from sakd.configuration.schema import Pixels, Precision, Whole
from sakd.errors import CheckpointError, ConfigError, did_you_mean
from sakd.ranges import BatchSize, Epochs, Folder, Name, Rate, Seed

PRECISIONS = get_args(Precision)
NODES = ("dataset", "student", "teacher", "distiller", "spot_mode", "tracking", "optimizer")
# What other values are computed from, in this order: a mistake in one is to be told by its own name.
SOURCES = {
    "dataset.recipe.epochs": Epochs,
    "dataset.recipe.teacher_epochs": Epochs,
    "dataset.recipe.batch_size": BatchSize,
    "dataset.recipe.pretraining_epochs": Epochs,
    "dataset.image_size": Pixels,
    "dataset.root": Folder,
    "student.name": Name,
    "distiller.name": Name,
    "seed": Seed,
    "epochs": Epochs,
    "batch_size": BatchSize,
    "teacher.training.seed": Seed,
    "teacher.training.epochs": Epochs,
    "teacher.training.batch_size": BatchSize,
    "optimizer.lr": Rate,
}
ABSENT = object()
OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "Adadelta", "NAdam", "RAdam")
SCHEDULES = ("MultiStepLR", "StepLR", "CosineAnnealingLR", "ExponentialLR", "LinearLR", "PolynomialLR")
# MLflow's own; others come with plug-ins.
STORES = (
    *("sqlite", "postgresql", "mysql", "mssql", "http", "https", "file", "databricks", "databricks-uc", "uc"),
)
# Where such stores can be, behind the beginning of a URI; what is a server's else is its driver's to say.
PORT = r"(:(\d{1,4}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d{2}|655[0-2]\d|6553[0-5]))?"
PLACES = (
    (r"sqlite(\+\w+)?://", r"/(?!:memory:)[^?].*", "a file, as sqlite:///mlflow.db: nothing else stays"),
    (
        r"https?://",
        rf"(.*@)?([^\s/:?#@\[\]]+|\[[\da-fA-F:.]+\]){PORT}([/?#]\S*)?",
        "a server, as http://host:5000",
    ),
)


def check_numbers(value_of: Callable[[str, Any], Any]) -> None:
    """Raise ConfigError for values with which others cannot be computed.

    ``value_of(key, otherwise)`` looks a key up: an optimizer may have no learning rate.
    """
    for key in NODES:
        _check_is_node(key, value_of(key, ABSENT))
    schedule = value_of("schedule", None)
    if schedule is not None:
        _check_is_node("schedule", schedule)
    for key, kind in SOURCES.items():
        value = value_of(key, ABSENT)
        if value is not ABSENT:
            kind_of(kind).check(key, value)


def _check_is_node(key: str, value: object) -> None:
    if value is ABSENT:
        raise ConfigError(f"{key}: found nothing, a run needs it")
    if isinstance(value, Mapping):
        return
    hint = ""
    for group, module, classes in (
        ("optimizer", "torch.optim", OPTIMIZERS),
        ("schedule", "torch.optim.lr_scheduler", SCHEDULES),
    ):
        if key == group and isinstance(value, str):
            alike = [name for name in classes if name.lower().startswith(value.lower()[:4])]
            hint = f"; another class: {group}._target_={module}.{(alike or classes)[0]}"
    raise ConfigError(f"{key}: found {value!r}, expected keys and values{hint}")


def check(config: Config) -> None:
    """Raise an error for values that cannot be used, or that contradict each other."""
    check_schema(config, Whole)
    _check_tracking(config["tracking"])
    _check_distiller(config["distiller"])
    _check_task(config)
    _check_rates(config)
    _check_names(config)
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?", config["device"]):
        raise ConfigError(f"device: found {config['device']!r}, expected auto, cpu, cuda or cuda:N")
    for network in ("student", "teacher"):
        for key, of_data in (
            ("num_classes", "classes"),
            ("in_channels", "channels"),
            ("image_size", "image_size"),
        ):
            found, expected = config[network].get(key), config["dataset"][of_data]
            if found is not None and found != expected:
                raise ConfigError(
                    f"{network}.{key}: found {found!r}, expected dataset.{of_data}, which is {expected!r}"
                )
    _check_measured(config)
    _check_files(config)


def _check_measured(config: Config) -> None:
    """Check that there is what is to be measured."""
    dataset, patience = config["dataset"], config.get("early_stop")
    if patience is not None and not dataset["val_fraction"]:
        raise ConfigError(
            f"early_stop: found {patience}, but dataset.val_fraction is 0; expected images held out to stop "
            "by, as with dataset.val_fraction=0.1"
        )
    if config.get("top5") and dataset["classes"] <= 5:
        raise ConfigError(
            f"top5: found true, but dataset.classes is {dataset['classes']}; expected more classes than five"
        )


def _check_files(config: Config) -> None:
    """Check that weights files are there, where they are asked for."""
    teacher = config["teacher"]
    of_teacher = {"teacher": teacher, "teacher.training": teacher["training"]}
    for key, node in {"student": config["student"], **(of_teacher if needs_teacher(config) else {})}.items():
        path, part = node.get("checkpoint"), node.get("checkpoint_part")
        if path is not None and not Path(path).is_file():
            whose = "the teacher's weights" if key == "teacher" else "weights to start from"
            raise CheckpointError(f"{key}.checkpoint: no file {path}; expected {whose}")
        if path is not None and node.get("pretrained") is not None:
            raise ConfigError(
                f"{key}.pretrained: found {node['pretrained']}, but {key}.checkpoint names a file; expected "
                "one of the two"
            )
        if path is None and part is not None:
            raise ConfigError(f"{key}.checkpoint_part: found {part}, but {key}.checkpoint names no file")
    started = [key for key in names.START_KEYS if teacher["training"].get(key) is not None]
    if needs_teacher(config) and is_trained(teacher) and started:
        raise ConfigError(
            f"teacher.training.{started[0]}: found weights to start from, but the teacher is not trained: "
            "its weights are brought; expected one of the two"
        )


def _check_tracking(tracking: Config) -> None:
    if tracking["name"] == "none":
        return
    for key in ("uri", "experiment"):
        if key not in tracking:
            raise ConfigError(f"tracking.{key}: found nothing, tracking=mlflow needs it")
    uri = tracking["uri"]
    scheme = re.match(r"([a-z0-9-]+)(\+[a-z0-9]+)?://|databricks$|databricks-uc$", uri)
    if scheme is None or (scheme[1] is not None and scheme[1] not in STORES and scheme[1] not in _plugins()):
        raise ConfigError(
            f"tracking.uri: found {uri!r}, expected a store such as sqlite:///mlflow.db or http://host:5000 "
            f"(one of {', '.join(STORES)}; it comes from MLFLOW_TRACKING_URI where that is set)"
        )
    for scheme, place, expected in PLACES:
        if re.match(scheme, uri) and not re.fullmatch(scheme + place, uri):
            raise ConfigError(f"tracking.uri: found {uri!r}, expected {expected}")
    names.check_name("tracking.experiment", tracking["experiment"])
    if tracking.get("system_metrics") and find_spec("psutil") is None:
        raise ConfigError(
            "tracking.system_metrics: found true, expected psutil to be there for it (pip install psutil, "
            "and nvidia-ml-py where there are GPUs)"
        )


@cache
def _plugins() -> tuple[str, ...]:
    """Schemes of stores that other packages add to MLflow."""
    return tuple(found.name for found in entry_points(group="mlflow.tracking_store"))


def _check_distiller(distiller: Config) -> None:
    losses, pretraining = distiller["losses"], distiller.get("pretraining")
    if not losses and distiller["name"] != "none":
        raise ConfigError(
            f"distiller.losses: found none, expected some for distiller={distiller['name']}, or "
            "distiller=none"
        )
    if pretraining is not None and distiller.get("product") is not None:
        raise ConfigError(
            "distiller.product: found one beside distiller.pretraining, expected one of the two"
        )
    if pretraining is not None and pretraining.get("loss") is None and pretraining["name"] not in losses:
        near = did_you_mean(pretraining["name"], losses)
        raise ConfigError(
            f"distiller.pretraining.name: found {pretraining['name']!r}, expected one of "
            f"{', '.join(losses)}, or a distiller.pretraining.loss.{near}"
        )


def _check_task(config: Config) -> None:
    task, classes = config.get("task", {}), config["dataset"]["classes"]
    losses = config["distiller"]["losses"]
    if task.get("weight") == 0 and not needs_teacher(config):
        raise ConfigError(
            "task.weight: found 0 with distiller=none, so that there is nothing to learn from; expected a "
            "number above 0, or a distiller"
        )
    if task.get("weight") == 0 and all(node.get("weight") == 0 for node in losses.values()):
        weights = ", ".join(f"distiller.losses.{name}.weight" for name in losses)
        raise ConfigError(
            f"task.weight: found 0, and {weights} too, so that there is nothing to learn from; expected one "
            "of them above 0"
        )
    weights = task.get("class_weights")
    if isinstance(weights, list) and len(weights) != classes:
        raise ConfigError(
            f"task.class_weights: found {len(weights)}, expected one for each of dataset.classes={classes}"
        )


def _check_rates(config: Config) -> None:
    """Check that rates by epoch are as many as the epochs."""
    rates = config["spot_mode"].get("p")
    for spot, rate in rates.items() if isinstance(rates, Mapping) else ():
        if isinstance(rate, list) and len(rate) != config["epochs"]:
            raise ConfigError(
                f"spot_mode.p.{spot}: found {len(rate)} rates, expected one number, or one for each of "
                f"epochs={config['epochs']}"
            )


def _check_names(config: Config) -> None:
    """Check what folders, metrics and parameters are called by."""
    for node in ("dataset", "student", "teacher", "distiller", "spot_mode"):
        names.check_name(f"{node}.name", config[node].get("name"))
    for loss in config["distiller"]["losses"]:
        names.check_name("distiller.losses", loss)
    names.check_distinct("distiller.losses", config["distiller"]["losses"])


def check_choice(key: str, value: object, options: Sequence[str]) -> None:
    """Raise ConfigError unless ``value`` is one of ``options``."""
    if value not in options:
        raise ConfigError(
            f"{key}: found {value!r}, expected one of {', '.join(options)}.{did_you_mean(value, options)}"
        )


def require_accuracy(least: float, accuracy: float, source: str) -> None:
    """Raise CheckpointError if a teacher's test accuracy is below the ``least`` one, both in percent.

    ``source``: where its weights are from.
    """
    if accuracy < least:
        raise CheckpointError(
            f"teacher.min_accuracy: found {accuracy:.2f} % on the test images with {source}, expected "
            f"at least {least} %"
        )
