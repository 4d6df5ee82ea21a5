"""Networks as sequences of named stages, one file per family."""

from sakd.networks.cut import foreign
from sakd.networks.mobilenet import MobileNetV2, MobileNetV2_half
from sakd.networks.resnet import (
    ResNet18,
    ResNet34,
    ResNet50,
    ResNet101,
    ResNet152,
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
from sakd.networks.shufflenet import ShuffleNetV1, ShuffleNetV2
from sakd.networks.staged import Shape, StagedNet
from sakd.networks.vgg import (
    vgg8,
    vgg8_imagenet,
    vgg11,
    vgg11_imagenet,
    vgg13,
    vgg13_imagenet,
    vgg16,
    vgg16_imagenet,
    vgg19,
    vgg19_imagenet,
)
from sakd.networks.wrn import wrn_16_1, wrn_16_2, wrn_28_10, wrn_40_1, wrn_40_2

__all__ = [
    "MobileNetV2",
    "MobileNetV2_half",
    "ResNet18",
    "ResNet34",
    "ResNet50",
    "ResNet101",
    "ResNet152",
    "Shape",
    "ShuffleNetV1",
    "ShuffleNetV2",
    "StagedNet",
    "foreign",
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
    "vgg8_imagenet",
    "vgg11",
    "vgg11_imagenet",
    "vgg13",
    "vgg13_imagenet",
    "vgg16",
    "vgg16_imagenet",
    "vgg19",
    "vgg19_imagenet",
    "wrn_16_1",
    "wrn_16_2",
    "wrn_28_10",
    "wrn_40_1",
    "wrn_40_2",
]
