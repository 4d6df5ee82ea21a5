"""VGG (Simonyan and Zisserman, ICLR 2015) with batch norm.

One form is that of the distillation field, for small images, the other is for larger ones.
"""

from torch import Tensor, nn

from sakd.networks.staged import Pooled, Renames, StagedNet, initialise_convolutions
from sakd.ranges import Share, Width

WIDTHS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {  # by depth: of the stem and of each stage
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class PoolLargeMaps(nn.MaxPool2d):
    """Halves maps of at least 8x8.

    The field's VGG pools before its last stage at 64x64 images, but not at 32x32.
    """

    def __init__(self):
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] >= 8 else x


BODY: Renames = (
    (r"^stem\.", "block0."),
    # Pools lie outside of the field's blocks.
    (r"^stage(\d)\.(\d+)\.", lambda name: f"block{name[1]}.{int(name[2]) - 1}."),
)


def convolutional_stages(depth: int, last_pool: nn.Module, in_channels: int) -> dict[str, nn.Module]:
    """A stem and four stages of 3x3 convolutions, with 64, 128, 256, 512 and 512 channels.

    A stage first halves the map.
    """
    stages: dict[str, nn.Module] = {}
    pools = [None, nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2), last_pool]
    channels = in_channels
    names = ["stem", "stage1", "stage2", "stage3", "stage4"]
    for name, pool, width, count in zip(names, pools, WIDTHS, CONVOLUTIONS[depth], strict=True):
        layers: list[nn.Module] = [] if pool is None else [pool]
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        stages[name] = nn.Sequential(*layers)
    return stages


def initialised(network: StagedNet) -> StagedNet:
    initialise_convolutions(network)
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
    return network


def vgg(depth: int, num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """VGG for small images: one linear layer ends it.

    The map before the last stage is halved only where it is large.
    """
    stages = convolutional_stages(depth, PoolLargeMaps(), in_channels)
    stages |= {"embedding": Pooled(), "logits": nn.Linear(WIDTHS[-1], num_classes)}
    renames = (*BODY, ("^logits", "classifier"))
    return initialised(StagedNet(stages, "vgg", (in_channels, image_size, image_size), renames))


def large_vgg(
    depth: int, num_classes: int, in_channels: int, image_size: int, hidden: Width, dropout: Share
) -> StagedNet:
    """VGG for images of 32x32 and larger, as the paper has it for 224x224.

    The map is always halved, and three linear layers are at the end. The embedding is the last ``hidden``
    vector, not the 25088 pooled values: adapters between two such would have 600 million weights.
    """
    stages = convolutional_stages(depth, nn.MaxPool2d(2), in_channels)
    stages["embedding"] = nn.Sequential(
        nn.MaxPool2d(2),
        nn.AdaptiveAvgPool2d(7),
        nn.Flatten(1),
        nn.Linear(WIDTHS[-1] * 7 * 7, hidden),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
    )
    stages["logits"] = nn.Sequential(nn.Dropout(dropout), nn.Linear(hidden, num_classes))
    head = {r"^embedding\.3": "classifier.0", r"^embedding\.6": "classifier.3", r"^logits\.1": "classifier.6"}
    renames = (*BODY, *head.items())
    return initialised(StagedNet(stages, "vgg_imagenet", (in_channels, image_size, image_size), renames))


def vgg8(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg(8, num_classes, in_channels, image_size)


def vgg11(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg(11, num_classes, in_channels, image_size)


def vgg13(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg(13, num_classes, in_channels, image_size)


def vgg16(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg(16, num_classes, in_channels, image_size)


def vgg19(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg(19, num_classes, in_channels, image_size)


def vgg8_imagenet(
    num_classes: int, in_channels: int, image_size: int, hidden: Width, dropout: Share
) -> StagedNet:
    return large_vgg(8, num_classes, in_channels, image_size, hidden, dropout)


def vgg11_imagenet(
    num_classes: int, in_channels: int, image_size: int, hidden: Width, dropout: Share
) -> StagedNet:
    return large_vgg(11, num_classes, in_channels, image_size, hidden, dropout)


def vgg13_imagenet(
    num_classes: int, in_channels: int, image_size: int, hidden: Width, dropout: Share
) -> StagedNet:
    return large_vgg(13, num_classes, in_channels, image_size, hidden, dropout)


def vgg16_imagenet(
    num_classes: int, in_channels: int, image_size: int, hidden: Width, dropout: Share
) -> StagedNet:
    return large_vgg(16, num_classes, in_channels, image_size, hidden, dropout)


def vgg19_imagenet(
    num_classes: int, in_channels: int, image_size: int, hidden: Width, dropout: Share
) -> StagedNet:
    return large_vgg(19, num_classes, in_channels, image_size, hidden, dropout)
