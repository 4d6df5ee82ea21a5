"""A network with another one's head: what SimKD trains, and what it leaves."""

from torch import nn

from sakd.networks.layouts import ToMap
from sakd.networks.staged import Shape, StagedNet
from sakd.ranges import Width


class Frozen(nn.Sequential):
    """Modules that nothing trains: always in eval, without gradients of their weights."""

    def __init__(self, *modules: nn.Module):
        super().__init__(*modules)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "Frozen":
        return super().train(False)


def projector(source: Shape, target: Shape, narrowing: int) -> nn.Sequential:
    """Convolutions of 1x1, 3x3 and 1x1 from one map's channels to another's, with batch norm and ReLU.

    Between them there are ``narrowing`` times fewer channels than at the end. A larger map is pooled to the
    other's size first; a smaller one keeps its own.
    """
    width = max(target[0] // narrowing, 1)
    larger = source[1:] != target[1:] and all(a >= b for a, b in zip(source[1:], target[1:], strict=True))
    layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(target[1:])] if larger else []
    for before, after, kernel in ((source[0], width, 1), (width, width, 3), (width, target[0], 1)):
        convolution = nn.Conv2d(before, after, kernel, padding=kernel // 2, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


def with_head_of(body: StagedNet, head: StagedNet, narrowing: Width) -> StagedNet:
    """The maps of ``body``, a projector as one stage more, and the frozen embedding and logits of ``head``.

    ``narrowing``: of the projector. Its output has the shape of the last map of ``head``, or is smaller.

    Raises ConfigError where the head cannot take it.
    """
    last = body.maps[-1]
    stages = {name: body.get_submodule(name) for name in body.names[: body.index(last) + 1]}
    projecting = projector(body.shapes[last], head.shapes[head.maps[-1]], narrowing)
    if last in body.layouts:
        projecting = nn.Sequential(ToMap(body.layouts[last]), projecting)
    stages[f"stage{len(body.maps) + 1}"] = projecting
    stages["embedding"] = Frozen(*head.between(head.maps[-1], "embedding"))
    stages["logits"] = Frozen(*head.between("embedding", "logits"))
    return StagedNet(stages, body.family, body.input_shape, layouts=body.named_layouts)
