"""Checks of a configuration's keys and values, before any work is done."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sakd import names
from sakd.configuration.prerequisites import Config, needs_teacher
from sakd.errors import CheckpointError, ConfigError, check_number, did_you_mean

KEYS = (  # of a run
    "seed",
    "epochs",
    "batch_size",
    "optimizer",
    "schedule",
    "precision",
    "student",
    "teacher",
    "dataset",
    "distiller",
    "spot_mode",
    "tracking",
    "device",
    "threads",
    "memory_format",
    "fold_batch_norm",
    "compile",
    "cohort",
    "profile",
    "runs",
)
WHOLE_NUMBERS = {  # and the least that each may be
    f"{of}{key}": least
    for of in ("", "teacher.training.")
    for key, least in (("seed", 0), ("epochs", 1), ("batch_size", 2))
}
PRECISIONS = ("fp32", "tf32", "bf16")
TRAINING_KEYS = ("seed", "epochs", "batch_size", "optimizer", "schedule", "precision")
PRETRAINING_KEYS = ("name", "loss", "seed", "epochs", "batch_size", "optimizer", "schedule")


def check_numbers(value_of: Callable[[str, Any], Any]) -> None:
    """Raise ConfigError for numbers with which nothing can be computed.

    ``value_of(key, otherwise)`` looks a key up: an optimizer may have no learning rate.
    """
    for key, least in WHOLE_NUMBERS.items():
        _check_whole(key, value_of(key, None), least)
    check_number("optimizer.lr", value_of("optimizer.lr", 0.0))


def check(config: Config) -> None:
    """Raise an error for values that cannot be used, or that contradict each other."""
    for key in KEYS:
        if key not in config:
            raise ConfigError(f"{key}: found nothing, a run needs it")
    for key in config:
        if key not in KEYS:
            raise ConfigError(
                f"{key}: no such key; expected one of {', '.join(KEYS)}.{did_you_mean(key, KEYS)}"
            )
    for key in ("dataset", "student", "teacher", "distiller", "spot_mode", "tracking", "optimizer"):
        if not isinstance(config[key], dict):
            raise ConfigError(f"{key}: found {config[key]!r}, expected keys and values")
    if not isinstance(config["runs"], str) or not config["runs"]:
        raise ConfigError(f"runs: found {config['runs']!r}, expected the path of a folder")
    _check_tracking(config["tracking"])
    _check_distiller(config["distiller"])
    _check_names(config)
    if config["threads"] is not None:
        _check_whole("threads", config["threads"], 1)
    _check_whole("cohort", config["cohort"], 1)
    check_choice("precision", config["precision"], PRECISIONS)
    _check_training(config["teacher"]["training"])
    check_choice("teacher.training.precision", config["teacher"]["training"]["precision"], PRECISIONS)
    check_choice("memory_format", config["memory_format"], ("contiguous", "channels_last"))
    check_choice("compile", config["compile"], ("none", "default", "graph"))
    for key in ("fold_batch_norm", "profile"):
        if not isinstance(config[key], bool):
            raise ConfigError(f"{key}: found {config[key]!r}, expected true or false")
    percent = config["teacher"]["min_accuracy"]
    if not isinstance(percent, (int, float)) or isinstance(percent, bool) or not 0 <= percent <= 100:
        raise ConfigError(f"teacher.min_accuracy: found {percent!r}, expected percent, from 0 to 100")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(config["device"])):
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
    checkpoint = config["teacher"]["checkpoint"]
    if not isinstance(checkpoint, (str, type(None))):
        raise ConfigError(f"teacher.checkpoint: found {checkpoint!r}, expected the path of a file, or null")
    if needs_teacher(config) and checkpoint is not None and not Path(checkpoint).is_file():
        raise CheckpointError(f"teacher.checkpoint: no file {checkpoint}; expected the teacher's weights")


def _check_training(training: Config) -> None:
    for key in TRAINING_KEYS:
        if key not in training:
            raise ConfigError(f"teacher.training.{key}: found nothing, the teacher's training needs it")
    for key in training:
        check_choice(f"teacher.training.{key}: the key", key, TRAINING_KEYS)


def _check_tracking(tracking: Config) -> None:
    check_choice("tracking.name", tracking.get("name"), ("mlflow", "none"))
    if tracking["name"] == "none":
        return
    uri, experiment = tracking.get("uri"), tracking.get("experiment")
    if not isinstance(uri, str) or not re.match(r"[a-z0-9+]+://|databricks", uri):
        raise ConfigError(
            f"tracking.uri: found {uri!r}, expected a store such as sqlite:///mlflow.db or http://host:5000 "
            "(it comes from MLFLOW_TRACKING_URI where that is set)"
        )
    names.check_name("tracking.experiment", experiment)


def _check_distiller(distiller: Config) -> None:
    losses = distiller.get("losses")
    if not isinstance(losses, dict) or not all(isinstance(node, dict) for node in losses.values()):
        raise ConfigError(f"distiller.losses: found {losses!r}, expected distillers by name")
    if not losses and distiller["name"] != "none":
        raise ConfigError(
            f"distiller.losses: found none, expected some for distiller={distiller['name']}, or "
            "distiller=none"
        )
    if distiller.get("pretraining") is not None:
        _check_pretraining(distiller["pretraining"], losses)


def _check_names(config: Config) -> None:
    """Check what folders, metrics and parameters are called by."""
    for node in ("dataset", "student", "teacher", "distiller", "spot_mode"):
        names.check_name(f"{node}.name", config[node].get("name"))
    for loss in config["distiller"]["losses"]:
        names.check_name("distiller.losses", loss)
    names.check_distinct("distiller.losses", config["distiller"]["losses"])


def _check_pretraining(pretraining: Config, losses: Config) -> None:
    if not isinstance(pretraining, dict):
        raise ConfigError(
            f"distiller.pretraining: found {pretraining!r}, expected {', '.join(PRETRAINING_KEYS)}, or null"
        )
    for key in PRETRAINING_KEYS:
        if key not in pretraining and key != "loss":
            raise ConfigError(f"distiller.pretraining.{key}: found nothing, a pretraining needs it")
    for key in pretraining:
        check_choice(f"distiller.pretraining.{key}: the key", key, PRETRAINING_KEYS)
    if pretraining.get("loss") is None:
        check_choice("distiller.pretraining.name", pretraining["name"], list(losses))
    for key, least in (("seed", 0), ("epochs", 1), ("batch_size", 2)):
        _check_whole(f"distiller.pretraining.{key}", pretraining[key], least)


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


def _check_whole(key: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}: found {value!r}, expected a whole number of at least {least}")
