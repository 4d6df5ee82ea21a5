"""Similarity-preserving distillation.

Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
"""

from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, kept_pair_mean
from sakd.spots import Spot


def similarity_rows(features: Tensor, keep: Tensor) -> Tensor:
    """Gram matrix [B, B] of the kept rows of features [B, …], its rows normalised.

    Rows and columns not kept are 0.
    """
    flat = features.flatten(1) * keep[:, None]
    return F.normalize(flat @ flat.T, dim=1)


class SP(Distiller):
    """Mean squared difference of the batch's similarity matrices, computed among the kept rows alone."""

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        difference = similarity_rows(student, keep) - similarity_rows(teacher, keep)
        return kept_pair_mean(difference.square(), keep)
