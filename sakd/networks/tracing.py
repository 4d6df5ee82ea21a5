"""Tracing networks with torch.fx (Reed et al., MLSys 2022) down to their layers."""

from torch import fx, nn


class LayerTracer(fx.Tracer):
    """Traces a network down to layers of torch.nn and what is derived from them, which stay whole.

    They may count batches or look at sizes.
    """

    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        homes = {base.__module__ for base in type(module).__mro__} - {
            "torch.nn.modules.module",
            "torch.nn.modules.container",
        }
        return super().is_leaf_module(module, path) or any(
            home.startswith("torch.nn.modules.") for home in homes
        )
