"""Folded convolutions that take along what follows them: ReLU, and the map that is added before it.

cuDNN does all of it in one call, where three or four operations would each pass over the map.
"""

import math
import operator
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F

from sakd.networks.folded import FoldedConv2d, Kept, graph_of
from sakd.networks.staged import StagedNet

RELU = (F.relu, torch.relu, "relu", "relu_")
ADD = (operator.add, operator.iadd, torch.add, "add", "add_")

Pairs = Sequence[Sequence[int]]  # a convolution's stride, padding and dilation, each of height and width


def convolution_relu(x: Tensor, weight: Tensor, bias: Tensor, added: Tensor | None, of: Pairs) -> Tensor:
    """max(0, convolution(x) + ``added``), by cuDNN; all maps are [B, C, H, W]."""
    if added is None:
        return torch.cudnn_convolution_relu(x, weight, bias, *of, groups=1)
    return torch.cudnn_convolution_add_relu(x, weight, added, 1.0, bias, *of, groups=1)


class _ConvolutionReLU(torch.autograd.Function):
    """``convolution_relu``, with gradients to its maps, not to weights."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        added: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        of: Pairs,
    ) -> Tensor:
        out = convolution_relu(x, weight, bias, added, of)
        ctx.save_for_backward(x, weight, out)
        ctx.of = of
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, out = ctx.saved_tensors
        of_x, of_added, *_ = ctx.needs_input_grad
        gradient = torch.ops.aten.threshold_backward(gradient, out, 0)  # of the sum, which is added's, too
        x_gradient = None
        if of_x:
            x_gradient, _, _ = torch.ops.aten.convolution_backward(
                gradient, x, weight, None, *ctx.of, False, (0, 0), 1, (True, False, False)
            )
        return x_gradient, gradient if of_added else None, None, None, None


class FusedConv2d(nn.Module):
    """A folded convolution with the ReLU behind it, and the addition between the two if there is one."""

    def __init__(self, folded: FoldedConv2d):
        super().__init__()
        self.folded = folded
        convolution, _ = folded.layers
        self.of = (convolution.stride, convolution.padding, convolution.dilation)

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        weight, bias = self.folded.weight, self.folded.bias
        # Autocast does not know this call.
        x, added = x.to(weight.dtype), None if added is None else added.to(weight.dtype)
        return _ConvolutionReLU.apply(x, added, weight, bias, self.of)


@torch.no_grad()
def fuse_activations(network: StagedNet) -> None:
    """Fuse folded convolutions with what follows them, stage by stage, where that can be.

    ``network`` is in eval, on a device with cuDNN, and must not be trained. What cuDNN cannot do, in a call
    that is tried here, stays as it is; so does a stage that computes something else than torch.fx has traced.
    """
    x = torch.linspace(-2, 2, math.prod(network.input_shape)).reshape(1, *network.input_shape)
    for name, stage in list(network.named_children()):
        on_cpu = deepcopy(stage).cpu().float()
        graph, output = graph_of(on_cpu), on_cpu(x.clone())
        if graph is not None and all(node.op != "get_attr" for node in graph.nodes):
            traced = ShapeProp(fx.GraphModule(on_cpu, graph)).propagate(x.clone())
            is_the_stage = torch.equal(traced.nan_to_num(), output.nan_to_num())
            if is_the_stage and _fuse(graph, stage):
                network.set_submodule(name, fx.GraphModule(stage, graph))
        x = output


def _fuse(graph: fx.Graph, stage: nn.Module) -> bool:
    """Fuse in ``stage`` and in its graph, whose nodes have shapes; True if there was something to fuse."""
    modules = dict(stage.named_modules(remove_duplicate=False))
    for node in graph.nodes:
        if node.op == "call_module" and type(modules[node.target]) is nn.Identity:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    fused = False
    for relu in graph.nodes:
        if not _is_relu(relu, modules):
            continue
        (end,) = relu.all_input_nodes
        start, added = next((way for way in _ways_to(end) if _fits(*way, end, modules)), (None, None))
        if start is None:
            continue
        module, (x,) = FusedConv2d(modules[start.target]), start.all_input_nodes
        if not _can(module, *(_shape(node) for node in (x, added) if node is not None)):
            continue
        stage.set_submodule(start.target, module)
        with graph.inserting_after(end):
            one = graph.call_module(start.target, (x, added))
        one.meta = relu.meta
        relu.replace_all_uses_with(one)
        for node in dict.fromkeys((relu, end, start)):
            graph.erase_node(node)
        fused = True
    return fused


def _is_relu(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.ReLU
    return node.op in ("call_function", "call_method") and node.target in RELU


def _ways_to(end: fx.Node) -> list[tuple[Any, Any]]:
    """What ``end`` may be: a convolution, with what is added to it or None."""
    is_sum = end.op in ("call_function", "call_method") and end.target in ADD
    if not is_sum or end.kwargs or len(end.users) > 1:
        return [(end, None)]
    first, second = end.args
    return [(first, second), (second, first)]


def _fits(start: Any, added: Any, end: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """True if ``start`` is a convolution that may wait until ``end`` and do all of it then."""

    def is_kept(node: fx.Node, kind: type[nn.Module]) -> bool:
        return node.op == "call_module" and isinstance(modules[node.target], kind)

    if not isinstance(start, fx.Node) or not is_kept(start, FoldedConv2d) or len(start.users) > 1:
        return False
    convolution = modules[start.target].layers[0]
    # PyTorch has kernels of its own for several groups, and cuDNN knows no padding by name.
    if convolution.groups > 1 or isinstance(convolution.padding, str):
        return False
    if added is start or isinstance(added, int | float):
        return False
    if added is not None and _shape(added) != _shape(start):
        return False
    meanwhile = []
    while start is not end:
        start = start.next
        meanwhile.append(start)
    return all(is_kept(node, Kept) for node in meanwhile[:-1])  # which write into no map


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    return getattr(node.meta.get("tensor_meta"), "shape", None)


def _can(module: FusedConv2d, *shapes: tuple[int, ...]) -> bool:
    """True if maps of these shapes can be given to it on its device."""
    weight = module.folded.weight
    try:
        module(*(torch.zeros(shape, dtype=weight.dtype, device=weight.device) for shape in shapes))
    except RuntimeError:
        return False
    return True
