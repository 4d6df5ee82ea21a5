"""VGG (Simonyan and Zisserman, ICLR 2015) with batch norm and one linear layer, as the distillation field uses it."""

from torch import Tensor, nn

from sakd.networks.staged import Pooled, StagedNet, initialise_convolutions


class PoolLargeMaps(nn.MaxPool2d):
    """Halves maps of at least 8x8. The field's VGG pools before its last stage at 64x64 images, but not at 32x32."""

    def __init__(self):
        super().__init__(2)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.shape[-1] >= 8 else x


def vgg(convolutions: tuple[int, ...], num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    """A stem and four stages with ``convolutions`` layers of 64, 128, 256, 512 and 512 channels; a stage first halves."""
    stages: dict[str, nn.Module] = {}
    pools = [None, nn.MaxPool2d(2), nn.MaxPool2d(2), nn.MaxPool2d(2), PoolLargeMaps()]
    channels = in_channels
    names = ["stem", "stage1", "stage2", "stage3", "stage4"]
    for name, pool, width, count in zip(names, pools, (64, 128, 256, 512, 512), convolutions, strict=True):
        layers: list[nn.Module] = [] if pool is None else [pool]
        for _ in range(count):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        stages[name] = nn.Sequential(*layers)
    stages["embedding"] = Pooled()
    stages["logits"] = nn.Linear(channels, num_classes)
    network = StagedNet(stages, "vgg", (in_channels, image_size, image_size))
    initialise_convolutions(network)
    nn.init.normal_(network.logits.weight, std=0.01)
    nn.init.zeros_(network.logits.bias)
    return network


def vgg8(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg((1, 1, 1, 1, 1), num_classes, in_channels, image_size)


def vgg11(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg((1, 1, 2, 2, 2), num_classes, in_channels, image_size)


def vgg13(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg((2, 2, 2, 2, 2), num_classes, in_channels, image_size)


def vgg16(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg((2, 2, 3, 3, 3), num_classes, in_channels, image_size)


def vgg19(num_classes: int, in_channels: int, image_size: int) -> StagedNet:
    return vgg((2, 2, 4, 4, 4), num_classes, in_channels, image_size)
