"""Images in memory, best on the device that trains: cropped and flipped there, without workers.

All draws of an epoch are made at its start from the data stream on the CPU, so that every device sees the
same batches.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.data.randaugment import RandAugment


@dataclass(frozen=True)
class Augmentation:
    """Random crop after zero-padding by ``crop_padding`` pixels (0: none), and horizontal flip.

    ``flip``: with probability ½, or never. ``rand_augment`` comes after both; ``erasing``, the share of the
    images of which a rectangle is erased, once they are normalised.
    """

    crop_padding: int = 0
    flip: bool = False
    rand_augment: RandAugment | None = None
    erasing: float = 0.0


@dataclass(frozen=True)
class ImageSet:
    """Images in memory, with their labels. A sample's index is its place here.

    ``images``: uint8 [N, C, H, W]; ``labels``: int64 [N].
    """

    images: Tensor
    labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.images.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: Tensor) -> "ImageSet":
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> "ImageSet":
        return ImageSet(self.images.to(device), self.labels.to(device))

    def augmented(
        self, order: Tensor, batch_size: int, stream: torch.Generator, augmentation: Augmentation
    ) -> Iterator[Tensor]:
        indices = order.to(self.images.device, non_blocking=True).split(batch_size)
        batches = (self.images[own] for own in indices)
        yield from changed(batches, len(self), batch_size, stream, augmentation, self.images.device)

    def plain(self, batch_size: int) -> Iterator[Tensor]:
        yield from self.images.split(batch_size)

    def checksum(self) -> str:
        return hashlib.sha256(
            self.images.cpu().numpy().tobytes() + self.labels.cpu().numpy().tobytes()
        ).hexdigest()

    def read(self, memory: Path, counting: object) -> tuple["ImageSet", list[str]]:
        return self, []  # all have been read


def changed(
    batches: Iterable[Tensor],
    count: int,
    batch_size: int,
    stream: torch.Generator,
    augmentation: Augmentation,
    device: torch.device,
) -> Iterator[Tensor]:
    """Batches of an epoch of ``count`` samples, in their order, changed by draws from ``stream``.

    Batches: uint8 [B, C, H, W], on the ``device``; the last may be missing, where it has a single sample.
    """
    shifts = torch.randint(0, 2 * augmentation.crop_padding + 1, (count, 2), generator=stream)
    flips = torch.rand(count, generator=stream) < 0.5
    draws = (draw.to(device, non_blocking=True).split(batch_size) for draw in (shifts, flips))
    augmented = (augment(images, augmentation, *own) for images, *own in zip(batches, *draws, strict=False))
    if augmentation.rand_augment is None:
        yield from augmented
        return
    yield from augmentation.rand_augment.each(augmented, count, batch_size, stream)


def augment(images: Tensor, augmentation: Augmentation, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crop and flip each image by its own draw.

    Images: [B, C, H, W]; ``shifts``: [B, 2], from 0 to 2 * padding, rows first; ``flips``: [B] bool.
    """
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
