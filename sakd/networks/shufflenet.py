"""ShuffleNets (Zhang et al., CVPR 2018; Ma et al., ECCV 2018) for small images.

They have a 1x1 stem, and no pooling behind it.
"""
# ruff: noqa: N802, networks are called what the field calls them

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.networks.staged import Pooled, StagedNet

STEM = 24

BODY = ((r"^stem\.0\.", "conv1."), (r"^stem\.1\.", "bn1."), ("^stage", "layer"), ("^logits", "linear"))
HEAD = ((r"^embedding\.0\.", "conv2."), (r"^embedding\.1\.", "bn2."))


def shuffled(x: Tensor, groups: int) -> Tensor:
    """Channels of [B, C, H, W] dealt out anew: the first of each group, then the second of each, …"""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleUnit(nn.Module):
    """The unit of version 1: grouped 1x1 convolutions, their channels shuffled between.

    With stride 2 the pooled input is appended. The field rectifies behind the depthwise convolution too; the
    paper does not.
    """

    def __init__(self, in_channels: int, channels: int, stride: int, groups: int):
        super().__init__()
        self.stride, self.groups = stride, 1 if in_channels == STEM else groups
        own = channels if stride == 1 else channels - in_channels
        inner = own // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, groups=self.groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, own, 1, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(own)

    def forward(self, x: Tensor) -> Tensor:
        out = shuffled(F.relu(self.bn1(self.conv1(x)), inplace=True), self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out = out + x if self.stride == 1 else torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], 1)
        return F.relu(out, inplace=True)


class SplitUnit(nn.Module):
    """The unit of version 2: half of the channels passes untouched, the other through a bottleneck.

    Then both are shuffled.
    """

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(half, half, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, groups=half, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        untouched, out = x.chunk(2, 1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = F.relu(self.bn3(self.conv3(out)), inplace=True)
        return shuffled(torch.cat([untouched, out], 1), 2)


class DownUnit(nn.Module):
    """The unit of version 2 that halves the map, on both sides.

    Each side gives half of ``channels``.
    """

    def __init__(self, in_channels: int, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = nn.Conv2d(
            in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels, bias=False
        )
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(in_channels, half, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = nn.Conv2d(half, half, 3, stride=2, padding=1, groups=half, bias=False)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = nn.Conv2d(half, half, 1, bias=False)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        left = self.bn1(self.conv1(x))
        left = F.relu(self.bn2(self.conv2(left)), inplace=True)
        right = F.relu(self.bn3(self.conv3(x)), inplace=True)
        right = self.bn4(self.conv4(right))
        right = F.relu(self.bn5(self.conv5(right)), inplace=True)
        return shuffled(torch.cat([left, right], 1), 2)


def stem(in_channels: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, STEM, 1, bias=False), nn.BatchNorm2d(STEM), nn.ReLU(inplace=True)
    )


def ShuffleNetV1(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """ShuffleNet of 3 groups and full width. Weights start as PyTorch draws them, as in the field."""
    stages: dict[str, nn.Module] = {"stem": stem(in_channels)}
    channels = STEM
    for number, (width, count) in enumerate(((240, 4), (480, 8), (960, 4)), 1):
        rest = (ShuffleUnit(width, width, 1, groups=3) for _ in range(count - 1))
        stages[f"stage{number}"] = nn.Sequential(ShuffleUnit(channels, width, 2, groups=3), *rest)
        channels = width
    stages["embedding"] = Pooled()
    stages["logits"] = nn.Linear(channels, num_classes)
    return StagedNet(stages, "shufflenetv1", (in_channels, image_size, image_size), BODY)


def ShuffleNetV2(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """ShuffleNet v2 of full width. Weights start as PyTorch draws them, as in the field."""
    stages: dict[str, nn.Module] = {"stem": stem(in_channels)}
    channels = STEM
    for number, (width, count) in enumerate(((116, 3), (232, 7), (464, 3)), 1):
        stages[f"stage{number}"] = nn.Sequential(
            DownUnit(channels, width), *(SplitUnit(width) for _ in range(count))
        )
        channels = width
    stages["embedding"] = Pooled(
        nn.Conv2d(channels, 1024, 1, bias=False), nn.BatchNorm2d(1024), nn.ReLU(inplace=True)
    )
    stages["logits"] = nn.Linear(1024, num_classes)
    return StagedNet(stages, "shufflenetv2", (in_channels, image_size, image_size), (*BODY, *HEAD))
