"""Wide residual networks (Zagoruyko and Komodakis, BMVC 2016).

Their blocks are pre-activation, so stage outputs are not rectified.
"""

from torch import Tensor, nn
from torch.nn import functional as F

from sakd.networks.staged import Pooled, StagedNet, initialise_convolutions


class PreActivationBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None
        if in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x), inplace=True)
        out = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        # A block that changes the width takes its shortcut from the activated input, the others from the
        # input itself.
        return out + (x if self.shortcut is None else self.shortcut(active))


SHARED = (
    (r"^stem\.", "conv1."),
    (r"^stage(\d)\.", r"block\1.layer."),
    (r"\.shortcut\.", ".convShortcut."),
    (r"^embedding\.0\.", "bn1."),
    ("^logits", "fc"),
)


def wide_resnet(depth: int, width: int, num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """A wide ResNet of depth 6n + 4: a stem of 16 channels and three stages of n blocks.

    Stages have 16, 32 and 64 times ``width`` channels.
    """
    blocks = (depth - 4) // 6
    widths = (16, 16 * width, 32 * width, 64 * width)
    stages: dict[str, nn.Module] = {"stem": nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False)}
    for number in (1, 2, 3):
        stride = 1 if number == 1 else 2
        first = PreActivationBlock(widths[number - 1], widths[number], stride)
        rest = (PreActivationBlock(widths[number], widths[number], 1) for _ in range(blocks - 1))
        stages[f"stage{number}"] = nn.Sequential(first, *rest)
    stages["embedding"] = Pooled(nn.BatchNorm2d(widths[3]), nn.ReLU(inplace=True))
    stages["logits"] = nn.Linear(widths[3], num_classes)
    network = StagedNet(stages, "wrn", (in_channels, image_size, image_size), SHARED)
    initialise_convolutions(network)
    nn.init.zeros_(network.logits.bias)
    return network


def wrn_16_1(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return wide_resnet(16, 1, num_classes, in_channels, image_size)


def wrn_16_2(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return wide_resnet(16, 2, num_classes, in_channels, image_size)


def wrn_40_1(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return wide_resnet(40, 1, num_classes, in_channels, image_size)


def wrn_40_2(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return wide_resnet(40, 2, num_classes, in_channels, image_size)


def wrn_28_10(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return wide_resnet(28, 10, num_classes, in_channels, image_size)
