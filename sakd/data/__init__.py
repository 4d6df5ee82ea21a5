"""Data sets, in memory or in files, and the batches drawn from them."""

from importlib import import_module
from typing import Any

from sakd.data.batches import Batch, evaluation_batches, steps_per_epoch, train_batches
from sakd.data.memory import Augmentation, ImageSet
from sakd.data.mixing import Mix, Mixing, mixed
from sakd.data.randaugment import RandAugment
from sakd.data.sets import (
    OPTIONAL_IN_MEMORY,
    PROMISES,
    PROMISES_IN_MEMORY,
    Dataset,
    Images,
    assemble,
    check_promises,
    check_reader,
)
from sakd.data.views import Asked, View, view_batches

# Readers, and the module of each. No module has a reader's name: `sakd.data.digits` would be the module.
READERS = {
    "cifar10": "cifar",
    "cifar100": "cifar",
    "digits": "handwritten",
    "fashion_mnist": "idx",
    "image_folder": "files",
    "image_table": "table",
    "small_images": "small",
    "stand_in": "handwritten",
    "tiny_imagenet": "tiny",
    "torchvision_images": "published",
}

__all__ = [
    "OPTIONAL_IN_MEMORY",
    "PROMISES",
    "PROMISES_IN_MEMORY",
    "READERS",
    "Asked",
    "Augmentation",
    "Batch",
    "Dataset",
    "ImageSet",
    "Images",
    "Mix",
    "Mixing",
    "RandAugment",
    "View",
    "assemble",
    "check_promises",
    "check_reader",
    "cifar10",
    "cifar100",
    "digits",
    "evaluation_batches",
    "fashion_mnist",
    "image_folder",
    "image_table",
    "mixed",
    "small_images",
    "stand_in",
    "steps_per_epoch",
    "tiny_imagenet",
    "torchvision_images",
    "train_batches",
    "view_batches",
]


def __getattr__(name: str) -> Any:
    """Import a reader once it is asked for.

    Some need torchvision, which takes a second, and the digits do not.
    """
    if name not in READERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{READERS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
