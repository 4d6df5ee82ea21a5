"""Batches of any data set: in an order drawn from a stream, or as they come; normalised on the device."""

from collections.abc import Generator, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from sakd.data.erasing import erase, rectangles
from sakd.data.sets import Dataset, Images


class Batch(NamedTuple):
    """Images with their labels and their places in the data set.

    ``images``: float32 [B, C, H, W], normalised; ``labels``, ``indices``: int64 [B].
    """

    images: Tensor
    labels: Tensor
    indices: Tensor


def train_batches(
    dataset: Dataset, batch_size: int, stream: torch.Generator, changes: torch.Generator | None = None
) -> Generator[Batch, None, None]:
    """One epoch of the training images, each once, in an order and augmented by draws from ``stream``.

    With ``changes``, what they are augmented by is drawn from there.
    The last batch is smaller where the size does not divide their number; a single image left over is
    dropped, since batch norm cannot use it.
    """
    train = dataset.train
    order = torch.randperm(len(train), generator=stream)
    if len(train) % batch_size == 1 < min(batch_size, len(train)):
        order = order[:-1]
    changes = stream if changes is None else changes
    share = dataset.augmentation.erasing
    drawn = rectangles(len(train), share, dataset.image_size, changes) if share else None
    images = train.augmented(order, batch_size, changes, dataset.augmentation)
    batches = _batches(train, dataset, order, batch_size, images)
    if drawn is None:
        yield from batches
        return
    for batch, own in zip(
        batches, drawn.to(train.labels.device, non_blocking=True).split(batch_size), strict=False
    ):
        yield batch._replace(images=erase(batch.images, own))


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """The number of batches that ``train_batches`` yields."""
    full, rest = divmod(samples, batch_size)
    return full + (rest > 1 or samples == 1)


MOST_IMAGES, MOST_PIXELS = 512, 2**23  # of a batch that is only evaluated


def evaluation_batches(
    images: Images, dataset: Dataset, batch_size: int | None = None
) -> Generator[Batch, None, None]:
    """Batches of all ``images`` in their order, not augmented.

    ``batch_size``: None for as many at once as a device takes easily.
    """
    batch_size = batch_size or min(MOST_IMAGES, max(1, MOST_PIXELS // dataset.image_size**2))
    yield from _batches(images, dataset, torch.arange(len(images)), batch_size, images.plain(batch_size))


def _batches(
    part: Images, dataset: Dataset, order: Tensor, batch_size: int, images: Iterator[Tensor]
) -> Iterator[Batch]:
    device = part.labels.device
    mean, std = channel_moments(dataset, device)
    for indices, pixels in zip(order.to(device, non_blocking=True).split(batch_size), images, strict=True):
        yield Batch(normalise(pixels, mean, std), part.labels[indices], indices)


def channel_moments(dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """The data set's mean and deviation, each [C, 1, 1]."""
    return tuple(torch.tensor(values, device=device)[:, None, None] for values in (dataset.mean, dataset.std))


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalise uint8 [B, C, H, W] to float32, as torchvision does it.

    ``mean``, ``std``: [C, 1, 1], of pixels in [0, 1].
    """
    return (images.float() / 255 - mean) / std
