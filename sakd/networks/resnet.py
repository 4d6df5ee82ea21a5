"""ResNets (He et al., CVPR 2016) for CIFAR and for ImageNet.

Those for CIFAR are of section 4.2, beside their kin of four times the width.
"""
# ruff: noqa: N802, networks are called what the field calls them

from torch import Tensor, nn
from torch.nn import functional as F

from sakd.networks.staged import Pooled, Renames, StagedNet, initialise_convolutions


def shortcut(in_channels: int, channels: int, stride: int) -> nn.Sequential | None:
    """A convolution where a block changes the shape; None where it takes the block's input itself."""
    if stride == 1 and in_channels == channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))


class Padded(nn.Module):
    """Every second position where the map is halved, and channels of zeros at either end: no weights.

    The shortcut of the first ResNets for CIFAR (He et al. 2016, option A).
    """

    def __init__(self, more: int, stride: int):
        super().__init__()
        self.before, self.after, self.stride = more // 2, more - more // 2, stride

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


def padded_shortcut(in_channels: int, channels: int, stride: int) -> Padded | None:
    """As ``shortcut``, without weights."""
    return None if stride == 1 and in_channels == channels else Padded(channels - in_channels, stride)


class BasicBlock(nn.Module):
    make_shortcut = staticmethod(shortcut)

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = self.make_shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu(out, inplace=True)


class PaddedBlock(BasicBlock):
    make_shortcut = staticmethod(padded_shortcut)


class Bottleneck(nn.Module):
    """A residual block whose 3x3 convolution works on a quarter of ``channels``, its output's."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        inner = channels // 4
        self.conv1 = nn.Conv2d(in_channels, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut(in_channels, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu(out, inplace=True)


def residual_network(
    family: str,
    block: type[BasicBlock] | type[Bottleneck],
    blocks: tuple[int, ...],
    widths: tuple[int, ...],
    renames: Renames,
    num_classes: int,
    in_channels: int,
    image_size: int,
) -> StagedNet:
    """A stem and a stage for each of ``blocks``, with ``widths`` channels.

    From stage 2 on each stage halves the map.
    """
    stages: dict[str, nn.Module] = {
        "stem": nn.Sequential(
            nn.Conv2d(in_channels, widths[0], 3, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
    }
    for number, count in enumerate(blocks, 1):
        before, width, stride = widths[number - 1], widths[number], 1 if number == 1 else 2
        stages[f"stage{number}"] = nn.Sequential(
            block(before, width, stride), *(block(width, width, 1) for _ in range(count - 1))
        )
    stages["embedding"] = Pooled()
    stages["logits"] = nn.Linear(widths[-1], num_classes)
    network = StagedNet(stages, family, (in_channels, image_size, image_size), renames)
    initialise_convolutions(network)
    return network


BODY: Renames = ((r"^stem\.0\.", "conv1."), (r"^stem\.1\.", "bn1."), ("^stage", "layer"))
NARROW, WIDE = (16, 16, 32, 64), (32, 64, 128, 256)


def resnet(
    depth: int, widths: tuple[int, int, int, int], num_classes: int, in_channels: int, image_size: int
) -> StagedNet:
    """A ResNet for CIFAR of depth 6n + 2: a stem and three stages of n blocks.

    Stages have ``widths`` channels each; stages 2 and 3 halve the map. The wide ones count as a family of
    their own, as in the published pairs: resnet32x4 to resnet32 is "different".
    """
    family = "resnet" if widths == NARROW else "resnet_x4"
    blocks = ((depth - 2) // 6,) * 3
    renames = (*BODY, (r"\.shortcut\.", ".downsample."), ("^logits", "fc"))
    return residual_network(family, BasicBlock, blocks, widths, renames, num_classes, in_channels, image_size)


def padded_resnet(depth: int, num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """A ResNet for CIFAR of depth 6n + 2 with shortcuts that have no weights."""
    renames, blocks = (*BODY, ("^logits", "linear")), ((depth - 2) // 6,) * 3
    return residual_network(
        "resnet", PaddedBlock, blocks, NARROW, renames, num_classes, in_channels, image_size
    )


def large_resnet(
    block: type[BasicBlock] | type[Bottleneck],
    blocks: tuple[int, int, int, int],
    num_classes: int,
    in_channels: int,
    image_size: int,
) -> StagedNet:
    """A ResNet for ImageNet behind a 3x3 stem that keeps small images whole, as the field has it."""
    widths = (64, 64, 128, 256, 512) if block is BasicBlock else (64, 256, 512, 1024, 2048)
    renames = (*BODY, ("^logits", "linear"))
    return residual_network("ResNet", block, blocks, widths, renames, num_classes, in_channels, image_size)


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


def resnet20a(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return padded_resnet(20, num_classes, in_channels, image_size)


def resnet32a(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return padded_resnet(32, num_classes, in_channels, image_size)


def resnet44a(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return padded_resnet(44, num_classes, in_channels, image_size)


def resnet56a(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return padded_resnet(56, num_classes, in_channels, image_size)


def resnet110a(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return padded_resnet(110, num_classes, in_channels, image_size)


def resnet8x4(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(8, WIDE, num_classes, in_channels, image_size)


def resnet32x4(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return resnet(32, WIDE, num_classes, in_channels, image_size)


def ResNet18(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return large_resnet(BasicBlock, (2, 2, 2, 2), num_classes, in_channels, image_size)


def ResNet34(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return large_resnet(BasicBlock, (3, 4, 6, 3), num_classes, in_channels, image_size)


def ResNet50(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return large_resnet(Bottleneck, (3, 4, 6, 3), num_classes, in_channels, image_size)


def ResNet101(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return large_resnet(Bottleneck, (3, 4, 23, 3), num_classes, in_channels, image_size)


def ResNet152(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return large_resnet(Bottleneck, (3, 8, 36, 3), num_classes, in_channels, image_size)
