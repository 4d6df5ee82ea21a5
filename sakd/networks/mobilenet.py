"""MobileNetV2 (Sandler et al., CVPR 2018) for small images.

Maps are halved one time less, as the distillation field has it.
"""
# ruff: noqa: N802, networks are called what the field calls them

from collections import OrderedDict

from torch import Tensor, nn

from sakd.networks.staged import Pooled, StagedNet, initialise_convolutions


class InvertedResidual(nn.Sequential):
    """Expands its channels, convolves each map alone, and projects them without a nonlinearity."""

    def __init__(self, in_channels: int, channels: int, stride: int, expansion: int):
        inner = in_channels * expansion
        super().__init__(
            *rectified(nn.Conv2d(in_channels, inner, 1, bias=False)),
            *rectified(nn.Conv2d(inner, inner, 3, stride, padding=1, groups=inner, bias=False)),
            nn.Conv2d(inner, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.residual = stride == 1 and in_channels == channels

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return x + out if self.residual else out


def rectified(convolution: nn.Conv2d) -> tuple[nn.Module, ...]:
    return convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU(inplace=True)


# The paper's table 2: expansion, channels, blocks, stride of the first one; and which rows are a stage.
ROWS = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STAGES = ((0, 1), (2,), (3, 4), (5, 6))
EMBEDDING = 1280  # at every width up to 1

SHARED = (
    ("^stem", "conv1"),
    (r"^stage\d\.(\d\.\d)\.", r"blocks.\1.conv."),
    ("^embedding", "conv2"),
    ("^logits", "classifier.0"),
)


def mobilenet_v2(width: float, num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """MobileNetV2 of ``width`` times the paper's channels, at most 1.

    Stage outputs are not rectified.
    """
    channels = int(32 * width)
    stages: dict[str, nn.Module] = {
        "stem": nn.Sequential(
            *rectified(nn.Conv2d(in_channels, channels, 3, stride=2, padding=1, bias=False))
        )
    }
    for number, rows in enumerate(STAGES, 1):
        groups = OrderedDict()  # by the number of the row, as in the shared checkpoints
        for row in rows:
            expansion, full, count, stride = ROWS[row]
            blocks = []
            for first in [True] + [False] * (count - 1):
                blocks.append(
                    InvertedResidual(channels, int(full * width), stride if first else 1, expansion)
                )
                channels = int(full * width)
            groups[str(row)] = nn.Sequential(*blocks)
        stages[f"stage{number}"] = nn.Sequential(groups)
    stages["embedding"] = Pooled(*rectified(nn.Conv2d(channels, EMBEDDING, 1, bias=False)))
    stages["logits"] = nn.Linear(EMBEDDING, num_classes)
    network = StagedNet(stages, "mobilenetv2", (in_channels, image_size, image_size), SHARED)
    initialise_convolutions(network)
    nn.init.normal_(network.logits.weight, std=0.01)
    nn.init.zeros_(network.logits.bias)
    return network


def MobileNetV2(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return mobilenet_v2(1.0, num_classes, in_channels, image_size)


def MobileNetV2_half(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """MobileNetV2 of half width: what RepDistiller and mdistiller call MobileNetV2."""
    return mobilenet_v2(0.5, num_classes, in_channels, image_size)
