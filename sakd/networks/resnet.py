"""CIFAR ResNets (He et al., CVPR 2016, section 4.2), and their four times wider kin of the distillation literature."""

from torch import Tensor, nn
from torch.nn import functional as F

from sakd.networks.staged import Pooled, StagedNet, initialise_convolutions


class BasicBlock(nn.Module):
    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu(out, inplace=True)


NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)


def resnet(depth: int, widths: tuple[int, int, int, int], num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """Depth 6n + 2: a stem and three stages of n blocks, ``widths`` channels each; stages 2 and 3 halve the map.

    The wide ones count as a family of their own, as in the published pairs: resnet32x4 to resnet32 is "different".
    """
    blocks = (depth - 2) // 6
    family = "resnet" if widths == NARROW else "resnet_x4"
    stages = {
        "stem": nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU(inplace=True)
        )
    }
    for number in (1, 2, 3):
        before, width, stride = widths[number - 1], widths[number], 1 if number == 1 else 2
        stages[f"stage{number}"] = nn.Sequential(
            BasicBlock(before, width, stride), *(BasicBlock(width, width, 1) for _ in range(blocks - 1))
        )
    stages["embedding"] = Pooled()
    stages["logits"] = nn.Linear(widths[3], num_classes)
    network = StagedNet(stages, family, (in_channels, image_size, image_size))
    initialise_convolutions(network)
    return network


def resnet8(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(8, NARROW, num_classes, in_channels, image_size)


def resnet14(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(14, NARROW, num_classes, in_channels, image_size)


def resnet20(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(20, NARROW, num_classes, in_channels, image_size)


def resnet32(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(32, NARROW, num_classes, in_channels, image_size)


def resnet44(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(44, NARROW, num_classes, in_channels, image_size)


def resnet56(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(56, NARROW, num_classes, in_channels, image_size)


def resnet110(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(110, NARROW, num_classes, in_channels, image_size)


def resnet8x4(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(8, WIDE, num_classes, in_channels, image_size)


def resnet32x4(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(32, WIDE, num_classes, in_channels, image_size)
