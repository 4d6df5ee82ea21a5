"""RandAugment of whole batches: images that drew the same operation are changed in one call.

Cubuk, Zoph, Shlens, Le, "RandAugment: Practical automated data augmentation with a reduced search space",
NeurIPS 2020; operations, magnitudes and borders are those of torchvision's v2.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sakd.errors import ConfigError
from sakd.ranges import Magnitude, Operations

STEPS = 31  # of magnitudes, from 0
CHANNELS = (1, 3)  # of images that torchvision's operations take


@dataclass(frozen=True)
class RandAugment:
    """Each image goes through ``operations`` of them, by draw, each of one ``magnitude`` from 0 to 30."""

    operations: Operations
    magnitude: Magnitude

    def draw(self, count: int, stream: torch.Generator) -> Tensor:
        """Each image's operations: int64 [count, operations] on the CPU, places among ``operations_of``."""
        return torch.randint(2 * len(OPERATIONS), (count, self.operations), generator=stream)

    def each(
        self, batches: Iterable[Tensor], count: int, batch_size: int, stream: torch.Generator
    ) -> Iterator[Tensor]:
        """Change an epoch's batches of ``count`` samples by draws from ``stream``."""
        return map(self, batches, self.draw(count, stream).split(batch_size))

    def __call__(self, images: Tensor, drawn: Tensor) -> Tensor:
        """Change each image by what it drew. ``images``: uint8 [B, C, H, W]; ``drawn``: on the CPU.

        The groups are known on the CPU: nothing but torchvision's own copies of small matrices waits for the
        images' device, outside of steps.
        """
        for own in drawn.unbind(1):
            order = own.argsort(stable=True)
            sizes = own.bincount(minlength=2 * len(OPERATIONS)).tolist()
            groups = images[order.to(images.device, non_blocking=True)].split(sizes)
            changed = torch.cat([self._change(group, place) for place, group in enumerate(groups)])
            images = changed[order.argsort().to(images.device, non_blocking=True)]
        return images

    def _change(self, images: Tensor, place: int) -> Tensor:
        """Let images, perhaps none, go through one operation; every other place is of its other sign."""
        operation, largest = OPERATIONS[place // 2]
        if not len(images):
            return images
        size = images.shape[-1] if operation in (translate_x, translate_y) else 1
        magnitude = float(torch.linspace(0, largest * size, STEPS)[self.magnitude])
        return operation(images, -magnitude if place % 2 else magnitude)


def check_channels(key: str, found: object, channels: int) -> None:
    """Raise ConfigError, naming ``key``, where images have other channels than the operations take."""
    if channels not in CHANNELS:
        raise ConfigError(
            f"{key}: found {found} with dataset.channels={channels}, expected null: its operations are of "
            "images in grey or RGB"
        )


def functional() -> object:
    """torchvision's functions, imported once they are needed: that takes a second."""
    from torchvision.transforms.v2 import functional

    return functional


def affine(images: Tensor, translate: list[int], shear: list[float], center: list[float] | None) -> Tensor:
    keys = {"angle": 0.0, "scale": 1.0, "translate": translate, "shear": shear, "center": center}
    return functional().affine(images, **keys)


def translate_x(images: Tensor, pixels: float) -> Tensor:
    return affine(images, [int(pixels), 0], [0.0, 0.0], None)


def translate_y(images: Tensor, pixels: float) -> Tensor:
    return affine(images, [0, int(pixels)], [0.0, 0.0], None)


def shear_x(images: Tensor, slope: float) -> Tensor:
    return affine(images, [0, 0], [math.degrees(math.atan(slope)), 0.0], [0, 0])


def shear_y(images: Tensor, slope: float) -> Tensor:
    return affine(images, [0, 0], [0.0, math.degrees(math.atan(slope))], [0, 0])


# Each with its largest magnitude, of which translations' is a share of the side. Those whose magnitude has no
# sign take it as a size.
OPERATIONS: tuple[tuple[Callable[[Tensor, float], Tensor], float], ...] = (
    (lambda images, _: images, 0.0),
    (shear_x, 0.3),
    (shear_y, 0.3),
    (translate_x, 150 / 331),
    (translate_y, 150 / 331),
    (lambda images, degrees: functional().rotate(images, degrees), 30.0),
    (lambda images, more: functional().adjust_brightness(images, 1 + more), 0.9),
    (lambda images, more: functional().adjust_saturation(images, 1 + more), 0.9),
    (lambda images, more: functional().adjust_contrast(images, 1 + more), 0.9),
    (lambda images, more: functional().adjust_sharpness(images, 1 + more), 0.9),
    (lambda images, less: functional().posterize(images, 8 - round(abs(less))), 4.0),
    (lambda images, share: functional().solarize(images, 255 * (1 - abs(share))), 1.0),
    (lambda images, _: functional().autocontrast(images), 0.0),
    (lambda images, _: functional().equalize(images), 0.0),
)
