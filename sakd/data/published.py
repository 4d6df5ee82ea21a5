"""Classification data sets of torchvision, by the name of their class: SVHN, EuroSAT, Pets, …"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor

from sakd.data.held_out import check_test_fraction, with_test_images
from sakd.data.memory import ImageSet
from sakd.data.pictures import MODES
from sakd.data.sets import calling
from sakd.errors import ConfigError, DataError, did_you_mean
from sakd.ranges import BelowOne, Folder, Text


def _calls(
    source: str, train: Mapping[str, Any], test: Mapping[str, Any] | None, test_fraction: float, **_: Any
) -> dict[str, dict[str, Any]]:
    """The class of torchvision's and its arguments for each part. Raises ConfigError for what is no class."""
    made = getattr(torchvision.datasets, source, None)
    if not isinstance(made, type) or not issubclass(made, torchvision.datasets.VisionDataset):
        near = did_you_mean(source, torchvision.datasets.__all__)
        raise ConfigError(
            f"dataset.source: found {source!r}, expected a class of torchvision.datasets.{near}"
        )
    check_test_fraction(test_fraction, "dataset.test", is_there=test is not None)
    target = {"_target_": f"torchvision.datasets.{source}"}
    return {key: target | dict(own) for key, own in (("train", train), ("test", test)) if own is not None}


@calling(_calls)
def torchvision_images(
    source: Text,
    root: Folder,
    download: bool,
    train: Mapping[str, Any],
    test: Mapping[str, Any] | None,
    test_fraction: BelowOne,
    channels: int,
    image_size: int,
) -> tuple[ImageSet, ImageSet]:
    """Training and test images of ``torchvision.datasets.<source>``, read into memory.

    ``train`` and ``test``: its arguments for either, such as ``{split: train}``. Without ``test`` a fixed
    stratified ``test_fraction`` of what is read is held out. Images of another size are resized.

    Raises ConfigError for a class or arguments that there are not, DataError if the files are not there.
    """
    if channels not in MODES:
        raise ConfigError(f"dataset.channels: found {channels}, expected 1 (grey) or 3 (RGB)")
    _calls(source, train, test, test_fraction)
    made, parts = getattr(torchvision.datasets, source), []
    for key, arguments in (("train", train), ("test", test)):
        if arguments is not None:
            opened = _opened(made, f"dataset.{key}", root, download, arguments)
            parts.append(_in_memory(opened, source, channels, image_size))
    return with_test_images(parts, test_fraction, source)


def _opened(made: type, key: str, root: str, download: bool, arguments: Mapping[str, Any]) -> Any:
    try:
        return made(root, **arguments, **({"download": True} if download else {}))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}: {made.__name__} does not take {dict(arguments)} ({error})") from error
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"dataset.root={root}: cannot open {made.__name__} there ({' '.join(str(error).split())}); "
            "dataset.download=true fetches it, where there is a network"
        ) from error


def _in_memory(opened: Any, source: str, channels: int, size: int) -> ImageSet:
    images, labels = torch.empty(len(opened), channels, size, size, dtype=torch.uint8), []
    for place in range(len(opened)):
        try:
            image, label = opened[place]
        except Exception as error:  # whatever decoding a file raises
            raise DataError(
                f"{source}: image {place} cannot be read ({error}); expected a whole one"
            ) from error
        if not isinstance(image, Image.Image) or not isinstance(label, (int, np.integer)):
            raise DataError(
                f"{source}: found a {type(image).__name__} and a {type(label).__name__}, expected an image "
                "and the number of its class"
            )
        image = image.convert(MODES[channels])
        image = image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BILINEAR)
        images[place] = pil_to_tensor(image)
        labels.append(int(label))
    return ImageSet(images, torch.tensor(labels, dtype=torch.int64))
