"""The images that a trained network is shown: its own run's, or another data set's."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor

from sakd.configuration import Config, build
from sakd.data import Dataset, Images
from sakd.decisions import samples
from sakd.errors import ConfigError
from sakd.trained.load import Trained

SPLITS = ("train", "val", "test")
MOST_IMAGES, MOST_PIXELS = 256, 2**22  # of a batch


def dataset_of(trained: Trained, overrides: Sequence[str]) -> Dataset:
    """The data set of a run, with ``dataset.KEY=VALUE`` for where it lies, or that of ``dataset=NAME``.

    Nothing is downloaded unless it is said. Raises ConfigError or DataError where the images are not at hand,
    or are others than the run learned from.
    """
    for text in overrides:
        key, equals, _ = text.partition("=")
        if not equals or key.partition(".")[0] != "dataset":
            raise ConfigError(
                f"{text}: found no key of a data set, expected dataset=NAME or dataset.KEY=VALUE"
            )
    if any(text.startswith("dataset=") for text in overrides):
        from sakd.configuration.compose import compose_one

        return build.dataset(compose_one(overrides))
    if trained.config is None:
        raise ConfigError(f"dataset: found none, expected dataset=NAME beside {trained.path}, a file alone")
    changed = _values(trained.config, overrides)
    return samples.dataset_of(trained.called, trained.config, trained.result["data_sha256"], changed)


def _values(config: Config, overrides: Sequence[str]) -> dict[str, Any]:
    """What overrides say of keys that the data set has."""
    changed = {}
    for text in overrides:
        key, _, value = text.removeprefix("dataset.").partition("=")
        if key not in config["dataset"]:
            raise ConfigError(f"dataset.{key}: no such key of {config['dataset']['name']}")
        changed[key] = yaml.safe_load(value)
    return changed


def part(dataset: Dataset, split: str) -> Images:
    """A part of a data set. Raises ConfigError if it has no validation images."""
    found = getattr(dataset, split)
    if found is None:
        raise ConfigError("--split: found val, expected train or test: dataset.val_fraction holds out none")
    return found


def check_fits(trained: Trained, dataset: Dataset, images: Images) -> None:
    """Raise ConfigError unless the network has an output for each class, and takes images of this shape."""
    if dataset.classes != trained.about.classes:
        raise ConfigError(
            f"dataset.classes: found {dataset.classes}, expected {trained.about.classes} as {trained.called} "
            "has; --linear-probe learns a classifier for others"
        )
    if tuple(images.shape) != trained.network.input_shape:
        raise ConfigError(
            f"dataset: found images of {tuple(images.shape)}, expected {trained.network.input_shape} as "
            f"{trained.called} takes"
        )


def batches(images: Images, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All images in order as they are stored, uint8 [B, C, H, W], with their labels, int64 [B]."""
    images = images.to(device)
    size = min(MOST_IMAGES, max(1, MOST_PIXELS // images.shape[-1] ** 2))
    yield from zip(images.plain(size), images.labels.split(size), strict=True)
