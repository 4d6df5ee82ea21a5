"""Data sets, each read into memory once, and the batches drawn from them."""

from sakd.data.batches import Batch, evaluation_batches, steps_per_epoch, train_batches
from sakd.data.sets import Augmentation, Dataset, ImageSet, assemble, check_promises

__all__ = [
    "Augmentation",
    "Batch",
    "Dataset",
    "ImageSet",
    "assemble",
    "check_promises",
    "evaluation_batches",
    "steps_per_epoch",
    "train_batches",
]
