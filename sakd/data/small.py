"""Folders of small images, all of one size: read into memory at the start, and from there on as CIFAR is."""

import logging
import os
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import Identity
from torchvision.transforms.v2.functional import pil_to_tensor

from sakd import data
from sakd.data.files import CHECKED_AT_ONCE, ImageFiles, checked_reading, found_in
from sakd.data.held_out import with_test_images
from sakd.data.memory import Augmentation, ImageSet, changed
from sakd.data.pictures import decode
from sakd.data.sets import Counting, in_files
from sakd.errors import ConfigError, DataError
from sakd.ranges import BelowOne, Folder, Processes

log = logging.getLogger("sakd")

MOST_BYTES = 2**31  # of images that are held in memory without being asked for


@dataclass(frozen=True)
class SmallImages(ImageFiles):
    """Image files of one size, cropped and flipped on the device by the draws that images in memory get.

    So batches are the same, bit for bit, whether the images are ``held`` in memory once they are read, or
    decoded when they are needed.
    """

    held: bool

    @property
    def size(self) -> int:
        return self.shape[-1]

    def augmented(
        self, order: Tensor, batch_size: int, stream: torch.Generator, augmentation: Augmentation
    ) -> Iterator[Tensor]:
        batches = self._in_order(order, batch_size)
        return changed(batches, len(self), batch_size, stream, augmentation, self.labels.device)

    def plain(self, batch_size: int) -> Iterator[Tensor]:
        return self._in_order(torch.arange(len(self)), batch_size)

    def read(self, memory: Path, counting: Counting) -> tuple["SmallImages | HeldImages", list[str]]:
        if not self.held:
            of_this_size = memory.with_name(f"{memory.name}_{self.size}")  # else another size would be whole
            return self, self.damaged(of_this_size, counting)
        images, errors = torch.empty(len(self), *self.shape, dtype=torch.uint8), []
        requests = (part.numpy() for part in torch.arange(len(self)).split(CHECKED_AT_ONCE))
        text = f"reading images of {self.folder} into memory"
        log.info("%s: %d", text, len(self))
        reading = closing(self.worked(_Decoder(self.folder, self.paths, self.shape), requests))
        with counting(text, len(self)) as advance, reading as answers:
            for places, pixels, errors_here in answers:
                images[places] = pixels
                errors += errors_here
                advance(len(places))
        return HeldImages(images, self.labels, self), errors

    def _in_order(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        decoder = _Decoder(self.folder, self.paths, self.shape)
        with closing(self.worked(decoder, (part.numpy() for part in order.split(batch_size)))) as answers:
            for _, pixels, errors in answers:
                if errors:
                    raise DataError(errors[0])
                yield pixels.to(self.labels.device, non_blocking=True)


@dataclass(frozen=True)
class HeldImages(ImageSet):
    """Images in memory that were read from ``files``, and are told from others by them."""

    files: SmallImages

    def __getitem__(self, indices: Tensor) -> "HeldImages":
        return HeldImages(self.images[indices], self.labels[indices], self.files[indices.cpu()])

    def to(self, device: torch.device) -> "HeldImages":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def checksum(self) -> str:
        return self.files.checksum()


@dataclass(frozen=True)
class _Decoder:
    """Images as a worker decodes them: places come back, uint8 [B, C, H, W], and why some cannot be read."""

    folder: str
    paths: np.ndarray
    shape: tuple[int, ...]

    def __getitem__(self, places: np.ndarray) -> tuple[np.ndarray, Tensor, list[str]]:
        images, errors = torch.zeros(len(places), *self.shape, dtype=torch.uint8), []
        for image, place in zip(images, places, strict=True):
            path = os.path.join(self.folder, os.fsdecode(self.paths[place]))
            try:
                image.copy_(pil_to_tensor(decode(path, self.shape[0], self.shape[-1])))
            except DataError as error:  # raised in a worker it would arrive as the worker's traceback
                errors.append(str(error))
        return places, images, errors


@in_files
def small_images(
    name: str,
    root: Folder,
    train: Folder,
    test: Folder | None,
    classes: int,
    channels: int,
    image_size: int,
    in_memory: Literal["auto"] | bool,
    workers: Processes,
    pin_memory: bool,
    test_fraction: BelowOne | None = None,  # stored configurations may be without it
) -> tuple[SmallImages, SmallImages]:
    """Images of ``image_size`` x ``image_size`` in ``root/train/<class>/…`` and ``root/test/<class>/…``.

    They are held in memory if ``in_memory`` is true, or ``"auto"`` and all together take at most 2 GiB there.
    Classes are in the order of their folders' names. Where there is no folder ``test``, a fixed stratified
    ``test_fraction`` is held out.

    Raises ConfigError for values that cannot be used, DataError if folders or classes are missing, empty or
    too many.
    """
    if name in data.READERS:
        raise ConfigError(
            f"dataset.name: found {name}, as which sakd.data.{name}'s own images are known; expected another"
        )
    workers = checked_reading(channels, workers, pin_memory)
    shape = (channels, image_size, image_size)
    found = found_in(root, train, test, test_fraction, classes)
    count = sum(len(labels) for *_, labels in found)
    held = count * channels * image_size**2 <= MOST_BYTES if in_memory == "auto" else in_memory
    how = (shape, Identity(), Identity(), workers, pin_memory, held)
    return with_test_images([SmallImages(*which, *how) for which in found], test_fraction, root)
