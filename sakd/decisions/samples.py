"""The images of a run's own data, as the run read them: to be shown, and their files to be named."""

import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from sakd.configuration import Config, build
from sakd.data import READERS, Dataset, Images
from sakd.decisions.recorded import Recorded
from sakd.errors import DataError, SakdError

SMALL = 32  # pixels of a side: such images are shown without being asked for


def images_of(run: Recorded, split: str) -> Images:
    """The ``train`` or ``test`` images of a run, in the order of its record; nothing is downloaded.

    Raises ConfigError or DataError where they are not at hand, or are others than the run learned from.
    """
    images = getattr(dataset_of(run.name, run.config, run.data_sha256), split)
    labels = run.record.labels if split == "train" else run.record.of(split).labels
    if not np.array_equal(images.labels.numpy(), labels):
        raise DataError(
            f"{run.name}: found {len(images):,} {split} images with other labels than its record has, "
            f"expected its {len(labels):,}"
        )
    return images


def dataset_of(
    called: str, config: Config, sha256: str | None, changed: Mapping[str, Any] = MappingProxyType({})
) -> Dataset:
    """The data set of a run's configuration, read where it is, by this process, but for what is ``changed``.

    Raises ConfigError or DataError where the images are not at hand, or have another checksum than
    ``sha256``, unless that is None; ``called`` is the run in the message.
    """
    node = config["dataset"]
    reading = {"download": False, "workers": 0, "pin_memory": False}
    own = {key: value for key, value in reading.items() if key in node}
    dataset = build.dataset({**config, "dataset": {**node, **own, **changed}})
    if sha256 is not None and dataset.checksum != sha256:
        raise DataError(
            f"{called}: found images with checksum {dataset.checksum}, expected {sha256}, from which it "
            "learned"
        )
    return dataset


def small_images(run: Recorded) -> Images | None:
    """The training images of a run, where they are small, at hand, and those that it learned from.

    None where that is not so, and where others' code would have to read them.
    """
    node = run.config["dataset"]
    size = node.get("image_size")
    if not isinstance(size, int) or size > SMALL or not _is_of_sakd(node):
        return None
    try:
        return images_of(run, "train")
    except SakdError:
        return None


def _is_of_sakd(node: Config) -> bool:
    """True if a data set is read by this package alone: nothing in its configuration names other code."""
    own = node.get("_target_") in [f"sakd.data.{reader}" for reader in READERS]
    return own and json.dumps(node, default=str).count("_target_") == 1


def pixels(images: Images, places: Sequence[int]) -> list[np.ndarray]:
    """Images as they are evaluated: uint8 [H, W], or [H, W, 3] where they have colours."""
    chosen = images[torch.tensor(places, dtype=torch.int64)]
    shown = torch.cat(list(chosen.plain(len(places)))).permute(0, 2, 3, 1).numpy()
    return list(shown if shown.shape[3] == 3 else shown[..., 0])


def file_names(run: Recorded, split: str) -> list[str] | None:
    """The file of each image of a split; None where many are in one file.

    Raises as ``images_of``.
    """
    reader = build.target_of(run.config["dataset"], "dataset")
    return images_of(run, split).files() if getattr(reader, "in_files", False) else None
