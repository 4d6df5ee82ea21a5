"""Similarity-preserving distillation.

Tung and Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019.
"""

import torch
from torch import Tensor

from sakd.distillers.base import Distiller, is_kept, kept_pair_mean
from sakd.spots import Spot

EPSILON = 1e-12  # the least norm of a row


def similarity_rows(features: Tensor, keep: Tensor) -> Tensor:
    """Gram matrix [B, B] of the kept rows of features [B, …], its rows normalised.

    Rows and columns not kept are 0.
    """
    flat = features.flatten(1) * is_kept(keep)[:, None]
    gram = flat @ flat.T
    counted = gram if keep.dtype == torch.bool else gram * keep.sqrt()
    return gram / counted.norm(dim=1, keepdim=True).clamp_min(EPSILON)


class SP(Distiller):
    """Mean squared difference of the batch's similarity matrices, computed among the kept rows alone."""

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        difference = similarity_rows(student, keep) - similarity_rows(teacher, keep)
        return kept_pair_mean(difference.square(), keep)
