"""Data sets, in memory or in files, and the batches drawn from them."""

from sakd.data.batches import Batch, evaluation_batches, steps_per_epoch, train_batches
from sakd.data.memory import Augmentation, ImageSet
from sakd.data.sets import Dataset, Images, assemble, check_promises

__all__ = [
    "Augmentation",
    "Batch",
    "Dataset",
    "ImageSet",
    "Images",
    "assemble",
    "check_promises",
    "evaluation_batches",
    "steps_per_epoch",
    "train_batches",
]
