"""Outputs of stages that are no maps [B, C, H, W] of their own, brought to maps and back.

A network's own pass never leaves its layout: what a stage gives to the next is what it gave uncut. Maps are
for those outside, who compare features and graft networks together.
"""

from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn

from sakd.errors import ConfigError

LayoutName = Literal["NCHW", "NHWC", "tokens"]


class ChannelsLast(nn.Module):
    """Maps [B, H, W, C], as Swin has them."""

    def to_map(self, x: Tensor) -> Tensor:
        return x.permute(0, 3, 1, 2)

    def forward(self, features: Tensor) -> Tensor:
        """The layout of a map [B, C, H, W]."""
        return features.permute(0, 2, 3, 1)


class Tokens(nn.Module):
    """Tokens [B, N, C]: those of a square grid, row by row, behind ``extra`` ones of classes and registers.

    The map has the grid's alone. Where a map comes from another network, as in a grafted one, the others are
    the mean of the grid's.
    """

    def __init__(self, extra: int):
        super().__init__()
        self.extra = extra

    def to_map(self, x: Tensor) -> Tensor:
        grid = x[:, self.extra :]
        side = isqrt(grid.shape[1])
        return grid.transpose(1, 2).unflatten(2, (side, side))

    def forward(self, features: Tensor) -> Tensor:
        """The layout of a map [B, C, H, W]."""
        grid = features.flatten(2).transpose(1, 2)
        return torch.cat([grid.mean(1, keepdim=True).expand(-1, self.extra, -1), grid], dim=1)


class ToMap(nn.Module):
    """The map of what a stage gave."""

    def __init__(self, layout: ChannelsLast | Tokens):
        super().__init__()
        self.layout = layout

    def forward(self, x: Tensor) -> Tensor:
        return self.layout.to_map(x)


def layout_of(name: LayoutName, output: object, key: str) -> ChannelsLast | Tokens | None:
    """The layout called ``name`` of a stage's ``output``; None for maps with their channels first.

    Of N tokens the largest square number are the grid's, and come last. Raises ConfigError, naming ``key``,
    if the output has not as many dimensions.
    """
    if name == "NCHW":
        return None
    dimensions, words = {"NHWC": (4, "maps [B, H, W, C]"), "tokens": (3, "tokens [B, N, C]")}[name]
    if not isinstance(output, Tensor) or output.dim() != dimensions:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(f"{key}: found {name}, but the stage's output is of {shape}; expected {words}")
    return ChannelsLast() if name == "NHWC" else Tokens(output.shape[1] - isqrt(output.shape[1]) ** 2)
