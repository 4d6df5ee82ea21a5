"""Random erasing: a rectangle of some images becomes their mean colour.

Zhong, Zheng, Kang, Li, Yang, "Random Erasing Data Augmentation", AAAI 2020;
sizes are drawn as torchvision does.
"""

import math

import torch
from torch import Tensor

SHARES = (0.02, 0.33)  # of the area
RATIOS = (0.3, 1 / 0.3)  # of height to width
TRIES = 10  # to find a rectangle within the image


def rectangles(count: int, share: float, size: int, stream: torch.Generator) -> Tensor:
    """Top, bottom, left and right, int64 [count, 4], of what to erase; empty but for a ``share`` of images.

    ``size``: of the images, in pixels.
    """
    chosen = torch.rand(count, generator=stream) < share
    areas = size**2 * torch.empty(count, TRIES).uniform_(*SHARES, generator=stream)
    ratios = torch.empty(count, TRIES).uniform_(*map(math.log, RATIOS), generator=stream).exp()
    sides = torch.stack([(areas * ratios).sqrt(), (areas / ratios).sqrt()], dim=2).round().long()
    fits = (sides < size).all(2)
    first = fits.int().argmax(1)
    sides = sides[torch.arange(count), first].where((chosen & fits.any(1))[:, None], 0)
    begins = (torch.rand(count, 2, generator=stream) * (size - sides + 1)).long()
    return torch.stack([begins, begins + sides], dim=2).flatten(1)


def erase(images: Tensor, rectangles: Tensor) -> Tensor:
    """Images, normalised, with 0 in their rectangles. ``images``: [B, C, H, W]; ``rectangles``: [B, 4]."""
    places = torch.arange(images.shape[-1], device=images.device)
    top, bottom, left, right = rectangles[:, :, None].unbind(1)
    rows, columns = (places >= top) & (places < bottom), (places >= left) & (places < right)
    return images.masked_fill((rows[:, :, None] & columns[:, None, :])[:, None], 0)
