"""Batches from images in memory: shuffled, augmented and normalised on the device, without workers.

All draws of an epoch are made at its start from the data stream on the CPU, so that every device sees the same batches.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.data.sets import Augmentation, Dataset, ImageSet


class Batch(NamedTuple):
    """``images``: float32 [B, C, H, W], normalised; ``labels``, ``indices``: int64 [B]."""

    images: Tensor
    labels: Tensor
    indices: Tensor


def train_batches(dataset: Dataset, batch_size: int, stream: torch.Generator) -> Iterator[Batch]:
    """One epoch of the training images, each once, in an order drawn from ``stream``.

    The last batch is smaller where the size does not divide their number; a single image left over is dropped, since batch
    norm cannot use it.
    """
    train, device = dataset.train, dataset.train.images.device
    order = torch.randperm(len(train), generator=stream)
    shifts = torch.randint(0, 2 * dataset.augmentation.crop_padding + 1, (len(train), 2), generator=stream)
    flips = torch.rand(len(train), generator=stream) < 0.5
    order, shifts, flips = (draws.to(device, non_blocking=True) for draws in (order, shifts, flips))
    mean, std = channel_moments(dataset, device)
    for start in range(0, len(train), batch_size):
        indices = order[start : start + batch_size]
        if len(indices) == 1 < min(batch_size, len(train)):
            return
        rows = slice(start, start + batch_size)
        images = augment(train.images[indices], dataset.augmentation, shifts[rows], flips[rows])
        yield Batch(normalise(images, mean, std), train.labels[indices], indices)


def steps_per_epoch(samples: int, batch_size: int) -> int:
    """How many batches ``train_batches`` yields."""
    full, rest = divmod(samples, batch_size)
    return full + (rest > 1 or samples == 1)


def evaluation_batches(images: ImageSet, dataset: Dataset, batch_size: int = 512) -> Iterator[Batch]:
    """All ``images`` in their order, not augmented."""
    mean, std = channel_moments(dataset, images.labels.device)
    for start in range(0, len(images), batch_size):
        indices = torch.arange(start, min(start + batch_size, len(images)), device=images.labels.device)
        part = images.images[start : start + batch_size]
        yield Batch(normalise(part, mean, std), images.labels[start : start + batch_size], indices)


def channel_moments(dataset: Dataset, device: torch.device) -> tuple[Tensor, Tensor]:
    """The data set's mean and deviation, each [C, 1, 1]."""
    return tuple(torch.tensor(values, device=device)[:, None, None] for values in (dataset.mean, dataset.std))


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 [B, C, H, W] to float32 with mean and deviation [C, 1, 1] taken off, as torchvision does it."""
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, augmentation: Augmentation, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop and flip each image by its own draw: images [B, C, H, W]; shifts [B, 2] from 0 to 2 * padding, rows first;
    flips [B] bool."""
    batch, channels, height, width = images.shape
    padding = augmentation.crop_padding
    if not padding and not augmentation.flip:
        return images
    padded = F.pad(images, [padding] * 4)
    rows = shifts[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, -1)
    if augmentation.flip:
        columns = torch.where(flips[:, None], width - 1 - columns, columns)
    columns = columns + shifts[:, 1:]
    picked = padded.gather(2, rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3]))
    return picked.gather(3, columns[:, None, None, :].expand(-1, channels, height, -1))
