"""A network as a sequence of named stages."""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sakd.errors import ConfigError, did_you_mean
from sakd.networks.layouts import ChannelsLast, LayoutName, Tokens, ToMap, layout_of

Shape = tuple[int, ...]  # of one sample: (channels, height, width) of a map, (width,) of a vector
# Regular expressions and what stands for them.
Renames = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


class StagedNet(nn.Sequential):
    """Stages in order: ``stem, stage1 … stageN, embedding, logits``.

    To cut the network is to slice it. ``embedding`` is the pooled, flattened vector [B, d]; ``logits`` is [B,
    classes]; all before are maps [B, C, H, W].

    ``family`` tells which networks are of one design; ``shapes`` gives every stage's output shape for one
    sample. ``renames`` make, one after the other, a weight's name in the field's shared checkpoint files of
    the name it has here.

    ``layouts``: names of layouts, by stage, of those whose own output is no such map (`networks/layouts.py`).

    Raises ConfigError if images of ``input_shape`` (channels, height, width) cannot pass through, or a
    stage's output is not such a tensor.
    """

    def __init__(
        self,
        stages: Mapping[str, nn.Module],
        family: str,
        input_shape: Shape,
        renames: Renames = (),
        layouts: Mapping[str, LayoutName] | None = None,
    ):
        super().__init__(OrderedDict(stages))
        self.layouts: dict[str, ChannelsLast | Tokens] = {}
        self.named_layouts = dict(layouts or {})
        self.family = family
        self.renames = tuple(renames)
        self.input_shape = tuple(input_shape)
        self.shapes = self._measure_shapes()

    @property
    def names(self) -> list[str]:
        """Names of the stages, in order."""
        return list(self._modules)

    @property
    def maps(self) -> list[str]:
        """Names of the stages ``stage1 … stageN`` in order, without the stem.

        They are what the field calls a network's layers.
        """
        return [name for name in self.names if name.startswith("stage")]

    @property
    def classes(self) -> int:
        return self.shapes["logits"][0]

    def shared_names(self) -> dict[str, str]:
        """Names of all weights in the field's shared checkpoint files, by their names here.

        Empty if there are none.
        """
        names = {own: own for own in self.state_dict()} if self.renames else {}
        for pattern, replacement in self.renames:
            names = {own: re.sub(pattern, replacement, shared) for own, shared in names.items()}
        return names

    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Outputs of all stages, by name. ``images``: [B, C, H, W], normalised."""
        outputs = {}
        x = images
        for name, stage in self._modules.items():
            x = stage(x)
            outputs[name] = x if name not in self.layouts else self.layouts[name].to_map(x)
        return outputs

    def between(self, after: str | None, upto: str) -> nn.Sequential:
        """The stages behind ``after`` (None: from the images) up to and with ``upto``.

        Modules are shared, not copied. Raises ConfigError if the network has no such stage or ``after`` does
        not come before ``upto``.
        """
        first = 0 if after is None else self.index(after) + 1
        last = self.index(upto) + 1
        if first >= last:
            raise ConfigError(
                f"stage '{after}' does not come before '{upto}' in the order {', '.join(self.names)}"
            )
        stages = OrderedDict(list(self._modules.items())[first:last])
        if after in self.layouts:
            stages = OrderedDict(from_map=self.layouts[after]) | stages
        if upto in self.layouts:
            stages["to_map"] = ToMap(self.layouts[upto])
        return nn.Sequential(stages)

    def index(self, name: str) -> int:
        """The place of a stage in the order. Raises ConfigError if there is no such stage."""
        if name not in self._modules:
            raise ConfigError(
                f"no stage '{name}': this network has "
                f"{', '.join(self.names)}.{did_you_mean(name, self.names)}"
            )
        return self.names.index(name)

    def _measure_shapes(self) -> dict[str, Shape]:
        training = self.training
        try:
            with torch.no_grad():
                x = torch.zeros(1, *self.input_shape)
                for stage, layout in self.named_layouts.items():
                    raw = nn.Sequential(*list(self.eval())[: self.index(stage) + 1])(x)
                    found = layout_of(layout, raw, f"layouts.{stage}")
                    self.layouts |= {} if found is None else {stage: found}
                outputs = self.eval().features(x)
        except RuntimeError as error:
            c, h, w = self.input_shape
            raise ConfigError(
                f"image_size: {h}x{w} images with {c} channels cannot pass through this {self.family} "
                f"network, whose stages halve them too often ({error})"
            ) from error
        finally:
            self.train(training)
        return {name: self._shape(name, output) for name, output in outputs.items()}

    def _shape(self, name: str, output: object) -> Shape:
        expected, dimensions = ("a vector", 2) if name in ("embedding", "logits") else ("a map", 4)
        if not isinstance(output, Tensor) or output.dim() != dimensions:
            found = (
                f"a tensor of {tuple(output.shape[1:])}"
                if isinstance(output, Tensor)
                else f"a {type(output).__name__}"
            )
            raise ConfigError(
                f"{name}: found {found} for an image in this {self.family} network, expected {expected}"
            )
        return tuple(output.shape[1:])


class Pooled(nn.Sequential):
    """Mean of a map [B, C, H, W] over its positions: [B, C].

    Modules given are applied to the map first.
    """

    def __init__(self, *before: nn.Module):
        super().__init__(*before, nn.AdaptiveAvgPool2d(1), nn.Flatten(1))


def initialise_convolutions(network: nn.Module) -> None:
    """Draw normal weights with variance 2 / fan-out, and zero biases (He et al. 2015).

    The field's CIFAR networks start from these.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
