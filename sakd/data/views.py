"""Further views of training images: the same images in the same order, changed by draws of their own."""

from collections.abc import Generator
from dataclasses import dataclass, replace

from sakd.data.batches import Batch, train_batches
from sakd.data.randaugment import RandAugment
from sakd.data.sets import Dataset
from sakd.errors import ConfigError
from sakd.ranges import Share
from sakd.streams import stream


@dataclass(frozen=True)
class View:
    """What another view of each image has in the place of the data set's own RandAugment and erasing.

    It is cropped and flipped as the data set's images are, or goes through the transforms of images in files,
    by draws of its own. ``erasing``: the share of the images of which a rectangle is erased.

    Raises ConfigError for a ``rand_augment`` that is none.
    """

    rand_augment: RandAugment | None
    erasing: Share

    def __post_init__(self):
        if not isinstance(self.rand_augment, RandAugment | None):
            raise ConfigError(f"rand_augment: found {self.rand_augment!r}, expected a RandAugment or none")


Asked = tuple[int, View]  # a view, and its place among those of who asks for it


def view_batches(
    dataset: Dataset, batch_size: int, seed: int, epoch: int, asked: Asked
) -> Generator[Batch, None, None]:
    """The batches of an epoch in another view, sample by sample those of the data set's own.

    It is drawn from a stream of its place: the same whichever other views there are, or none.
    """
    place, view = asked
    augmentation = replace(dataset.augmentation, rand_augment=view.rand_augment, erasing=view.erasing)
    return train_batches(
        replace(dataset, augmentation=augmentation),
        batch_size,
        stream(seed, "data", epoch),
        changes=stream(seed, f"view/{place}", epoch),
    )
