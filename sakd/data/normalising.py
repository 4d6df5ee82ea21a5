"""A network with its normalisation inside."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sakd.data.batches import normalise


class Normalising(nn.Module):
    """A network behind the normalisation that it was trained with.

    It takes images as they are stored, uint8 [B, C, H, W] (or the same numbers in floating point), and gives
    logits [B, classes]. ``mean`` and ``std``: per channel, of pixels in [0, 1].
    """

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network(normalise(images, self.mean, self.std))
