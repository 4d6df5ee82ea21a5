"""A running average of a network's weights, which is measured and kept in the network's place."""

import copy

import torch

from sakd.networks import StagedNet


class Average:
    """A network whose weights and buffers follow those of ``source``: the exponential moving average.

    Each ``update`` keeps ``decay`` of what is there, and takes 1 - decay of what the source has; statistics
    of batch norm as well, and what is no floating point is copied. Polyak and Juditsky (SIAM J. Control and
    Optimization 1992), as Tarvainen and Valpola (NeurIPS 2017) have it.
    """

    def __init__(self, source: StagedNet, decay: float):
        self.network = copy.deepcopy(source).requires_grad_(False).eval()
        self.decay = decay
        pairs = list(zip(_tensors(self.network), _tensors(source), strict=True))
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def begin(self) -> None:
        """Start from what the source has now."""
        for own, current in (*self._averaged, *self._copied):
            own.copy_(current)

    @torch.no_grad()
    def update(self) -> None:
        """Follow a step of the source; a few launches, and no wait."""
        own, current = zip(*self._averaged, strict=True)
        torch._foreach_lerp_(own, current, 1 - self.decay)
        if self._copied:
            own, current = zip(*self._copied, strict=True)
            torch._foreach_copy_(own, current)


def _tensors(network: StagedNet) -> list[torch.Tensor]:
    """Parameters and buffers, each once, in an order that a copy has too."""
    return [*network.parameters(), *network.buffers()]
