"""Features before the activation that a stage ends in, and the batch norm that they come from."""

import operator

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from sakd.errors import ConfigError
from sakd.networks.folded import graph_of
from sakd.networks.staged import StagedNet

RELUS = (F.relu, torch.relu)
ADDITIONS = (operator.add, operator.iadd, torch.add)


class BeforeActivation:
    """What a stage of a network in eval gives before its ReLU, from the output of the stage before it.

    Where a stage ends in no ReLU, its output itself; and if no batch norm gives that, as in a WRN, what the
    batch norm that the next stage begins with makes of it. ``norm`` is the batch norm. Modules are the
    network's own: it is no module, so that who holds it has no weight a second time.

    Raises ConfigError where no batch norm is found, and for the first stage, which has none before it.
    """

    def __init__(self, network: StagedNet, stage: str):
        names = network.names
        if stage == names[0]:
            raise ConfigError(f"found {stage}, the first stage, expected one with another before it")
        self.before = names[names.index(stage) - 1]
        is_plain = not {self.before, stage} & network.layouts.keys()
        graph = graph_of(network.get_submodule(stage)) if is_plain else None
        norm = None if graph is None else self._cut(network.get_submodule(stage), graph)
        if norm is None and graph is not None:
            norm = _first_norm(network.get_submodule(names[names.index(stage) + 1]))
            self.stages = nn.Sequential(network.get_submodule(stage), norm)
        if norm is None:
            raise ConfigError(
                f"found no batch norm before the activation of {stage} of a {network.family} network, "
                "expected one"
            )
        self.norm = norm

    def _cut(self, stage: nn.Module, graph: fx.Graph) -> nn.BatchNorm2d | None:
        """Cut ``stage`` before its last ReLU, where there is one; the batch norm that ends the rest."""
        end = graph.output_node().args[0]
        while _calls(end, stage, nn.ReLU) or end.target in RELUS:
            end = end.all_input_nodes[0]
        graph.output_node().args = (end,)
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
        self.stages = fx.GraphModule(stage, graph)
        candidates = end.all_input_nodes if end.target in ADDITIONS else [end]
        norms = [node.target for node in candidates if _calls(node, stage, nn.BatchNorm2d)]
        return stage.get_submodule(norms[0]) if norms else None

    def __call__(self, features: Tensor) -> Tensor:
        """Maps of the output of the stage ``before``: [B, …] to [B, C, H, W]."""
        return self.stages(features)


def _calls(node: fx.Node, stage: nn.Module, kind: type[nn.Module]) -> bool:
    return node.op == "call_module" and isinstance(stage.get_submodule(node.target), kind)


def _first_norm(stage: nn.Module) -> nn.BatchNorm2d | None:
    """The batch norm that the input of ``stage`` enters first, if it does."""
    graph = graph_of(stage)
    if graph is None:
        return None
    (start,) = (node for node in graph.nodes if node.op == "placeholder")
    norms = [user.target for user in start.users if _calls(user, stage, nn.BatchNorm2d)]
    return stage.get_submodule(norms[0]) if norms else None
