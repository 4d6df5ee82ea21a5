"""MobileNetV1 (Howard et al., arXiv:1704.04861, 2017), the small student of ImageNet's published pairs."""
# ruff: noqa: N802, networks are called what the field calls them

from collections import OrderedDict

from torch import nn

from sakd.networks.mobilenet import rectified
from sakd.networks.staged import Pooled, StagedNet

STEM = 32  # channels
# The paper's table 1: channels and stride of each pair of convolutions; and how many of them are a stage.
PAIRS = (
    *((64, 1), (128, 2), (128, 1)),
    *((256, 2), (256, 1)),
    *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    *((1024, 2), (1024, 1)),
)
STAGES = (3, 2, 6, 2)

SHARED = (("^stem", "model.0"), (r"^stage\d", "model"), ("^logits", "fc"))


def separable(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """A convolution of each map alone, and one of all maps, 1x1."""
    return nn.Sequential(
        *rectified(nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)),
        *rectified(nn.Conv2d(in_channels, channels, 1, bias=False)),
    )


def MobileNetV1(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    stem = nn.Sequential(*rectified(nn.Conv2d(in_channels, STEM, 3, stride=2, padding=1, bias=False)))
    stages: dict[str, nn.Module] = {"stem": stem}
    channels, pairs = STEM, iter(enumerate(PAIRS, 1))
    for number, count in enumerate(STAGES, 1):
        blocks = OrderedDict()  # by the number of the pair, as in the shared checkpoints
        for place, (width, stride) in (next(pairs) for _ in range(count)):
            blocks[str(place)] = separable(channels, width, stride)
            channels = width
        stages[f"stage{number}"] = nn.Sequential(blocks)
    stages["embedding"] = Pooled()
    stages["logits"] = nn.Linear(channels, num_classes)
    return StagedNet(stages, "mobilenetv1", (in_channels, image_size, image_size), SHARED)
