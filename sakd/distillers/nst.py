"""Neuron selectivity transfer, with the squared polynomial kernel.

Huang and Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", 2017, arXiv
1707.01219.
"""

from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.at import to_common_size
from sakd.distillers.base import Distiller, kept_mean
from sakd.spots import Spot


def kernel_means(a: Tensor, b: Tensor) -> Tensor:
    """Mean over channel pairs of the squared inner product of channels' maps.

    Takes [B, C, P] and [B, D, P] to [B], through the C x D products of each sample, never a tensor of C x D x
    P.
    """
    b = b.transpose(1, 2)
    # At one position PyTorch would compile a kernel for CUDA, which takes a C compiler where it runs.
    products = a * b if a.is_cuda and a.shape[2] == 1 else a @ b
    return products.square().mean(dim=(1, 2))


class NST(Distiller):
    """Squared maximum mean discrepancy between the channels' maps, each normalised over its positions."""

    takes = "map"

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        s, t = (F.normalize(maps.flatten(2), dim=2) for maps in to_common_size(student, teacher))
        return kept_mean(kernel_means(t, t) + kernel_means(s, s) - 2 * kernel_means(s, t), keep)
