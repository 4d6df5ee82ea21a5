"""Networks as sequences of named stages, one file per family."""

from sakd.networks.resnet import (
    resnet8,
    resnet8x4,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from sakd.networks.staged import Shape, StagedNet
from sakd.networks.vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from sakd.networks.wrn import wrn_16_1, wrn_16_2, wrn_28_10, wrn_40_1, wrn_40_2

__all__ = [
    "Shape",
    "StagedNet",
    "resnet8",
    "resnet8x4",
    "resnet14",
    "resnet20",
    "resnet32",
    "resnet32x4",
    "resnet44",
    "resnet56",
    "resnet110",
    "vgg8",
    "vgg11",
    "vgg13",
    "vgg16",
    "vgg19",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_28_10",
    "wrn_40_1",
    "wrn_40_2",
]
