"""Layers of a network in eval that nothing trains: what need not be computed in each pass.

Batch norm is folded into the convolution before it, and weights are cast once to what a pass computes in.
"""

from collections import Counter
from copy import deepcopy

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sakd.networks.tracing import LayerTracer


class Kept(nn.Module):
    """A layer whose weights are computed from those of ``layers``, as these were at the last ``refold``."""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = layers  # in a tuple, since their weights are not this module's

    def refold(self) -> None:
        """Compute the weights anew, in place: a captured step finds them where they were."""
        raise NotImplementedError


class FoldedConv2d(Kept):
    """A convolution and the batch norm behind it, in eval, as one convolution with a bias.

    Gradients pass to its input, not to its weights (Jacob et al., CVPR 2018, section 3.2).
    """

    def __init__(self, convolution: nn.Conv2d, norm: nn.BatchNorm2d):
        super().__init__(convolution, norm)
        self.register_buffer("weight", torch.empty_like(convolution.weight), persistent=False)
        self.register_buffer("bias", torch.empty_like(norm.bias), persistent=False)
        self.refold()

    @torch.no_grad()
    def refold(self) -> None:
        convolution, norm = self.layers
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        torch.mul(convolution.weight, scale[:, None, None, None], out=self.weight)
        shift = -norm.running_mean if convolution.bias is None else convolution.bias - norm.running_mean
        torch.addcmul(norm.bias, shift, scale, out=self.bias)

    def forward(self, x: Tensor) -> Tensor:
        of = self.layers[0]
        return F.conv2d(x, self.weight, self.bias, of.stride, of.padding, of.dilation, of.groups)


class CastLayer(Kept):
    """A layer whose weights are kept as ``kind``: those that autocast would make of them in each pass.

    It has them under the layer's own names, for networks that read them by themselves.
    """

    def __init__(self, layer: nn.Module, kind: torch.dtype):
        super().__init__(layer)
        self.cast = deepcopy(layer).to(kind)

    @torch.no_grad()
    def refold(self) -> None:
        for cast, given in zip(self.cast.parameters(), self.layers[0].parameters(), strict=True):
            cast.copy_(given)

    @property
    def weight(self) -> Tensor:
        return self.cast.weight

    @property
    def bias(self) -> Tensor | None:
        return self.cast.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.cast(x)


def fold_batch_norm(network: nn.Sequential) -> None:
    """Fold batch norms into convolutions, stage by stage, where that can be; the rest stays as it is.

    ``network`` is in eval and must not be trained. A stage's output stays what it was: nothing is folded
    across stages.
    """
    for stage in network:
        for convolution, norm in foldable(stage):
            stage.set_submodule(
                convolution, FoldedConv2d(stage.get_submodule(convolution), stage.get_submodule(norm))
            )
            stage.set_submodule(norm, nn.Identity())


def cast_weights(network: nn.Module, kind: torch.dtype) -> None:
    """Keep as ``kind`` what autocast would cast to it in each pass: convolutions' and linear layers' weights.

    ``network``, whose batch norms are folded or not, must not be trained.
    """
    for path, module in list(network.named_modules()):
        if isinstance(module, FoldedConv2d):
            module.to(kind)
        elif type(module) in (nn.Conv2d, nn.Linear):
            network.set_submodule(path, CastLayer(module, kind))


def refold(network: nn.Module) -> None:
    """Compute what is kept of weights anew, after the network's weights or statistics have changed."""
    for module in network.modules():
        if isinstance(module, Kept):
            module.refold()


class _KeptLayerTracer(LayerTracer):
    """Leaves layers whole that have been folded or cast, too."""

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        return isinstance(module, Kept) or super().is_leaf_module(module, path)


def graph_of(stage: nn.Module) -> fx.Graph | None:
    """What a stage calls in eval, down to its layers; None where torch.fx cannot trace it."""
    try:
        with torch.random.fork_rng(devices=[]):  # a forward might draw, or count, by itself
            return _KeptLayerTracer().trace(deepcopy(stage).eval())
    except Exception:  # a forward may fail on a symbolic tensor with any kind
        return None


def foldable(stage: nn.Module) -> list[tuple[str, str]]:
    """Paths of convolutions, each with that of the batch norm that alone takes its output.

    There are none where torch.fx cannot trace the stage.
    """
    graph = graph_of(stage)
    if graph is None:
        return []
    nodes = graph.nodes
    calls = Counter(node.target for node in nodes if node.op == "call_module")
    places = Counter(id(module) for _, module in stage.named_modules(remove_duplicate=False))

    def only(node: object, kind: type[nn.Module]) -> nn.Module | None:
        """The layer that the node calls, if it is of that very kind, at one place and called once."""
        if not isinstance(node, fx.Node) or node.op != "call_module" or calls[node.target] > 1:
            return None
        module = stage.get_submodule(node.target)
        return module if type(module) is kind and places[id(module)] == 1 else None

    pairs = []
    for node in nodes:
        norm = only(node, nn.BatchNorm2d)
        if norm is None or not norm.affine or not norm.track_running_stats:
            continue
        (before,) = node.all_input_nodes
        convolution = only(before, nn.Conv2d)
        if convolution is not None and convolution.padding_mode == "zeros" and len(before.users) == 1:
            pairs.append((before.target, node.target))
    return pairs
