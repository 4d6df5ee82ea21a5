"""DIST (Huang, You, Wang, Qian, Xu, "Knowledge Distillation from A Stronger Teacher", NeurIPS 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sakd.distillers.base import Distiller, is_kept, kept_count, kept_mean, weighed
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive
from sakd.spots import Spot

EPSILON = 1e-8  # the published code's


def correlation(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Pearson's correlation along ``dim`` of two tensors whose mean along it is 0."""
    return (a * b).sum(dim) / (a.norm(dim=dim) * b.norm(dim=dim) + EPSILON)


def centred_columns(rows: Tensor, keep: Tensor) -> Tensor:
    """Rows [B, d] less the kept rows' mean, times the root of their weight; 0 where a row is not kept."""
    kept = keep[:, None]
    centred = rows - weighed(rows, kept).sum(dim=0) / kept_count(keep)
    return weighed(centred, kept if keep.dtype == torch.bool else kept.sqrt())


class DIST(Distiller):
    """Departure of the networks' class probabilities from correlation, within rows and within classes.

    Within each row, it is between classes; within each class, between the kept rows, which takes two of them:
    with fewer this part is 0.
    """

    takes = "vector"
    entry_by_entry = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        inter_weight: NotNegative,
        intra_weight: NotNegative,
        temperature: Positive,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("inter_weight of DIST", inter_weight, least=0)
        check_number("intra_weight of DIST", intra_weight, least=0)
        check_number("temperature of DIST", temperature, least=0, above=True)
        self.inter_weight, self.intra_weight, self.temperature = inter_weight, intra_weight, temperature

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        p_s, p_t = ((logits / self.temperature).softmax(dim=1) for logits in (student, teacher))
        within_rows = correlation(
            p_s - p_s.mean(dim=1, keepdim=True), p_t - p_t.mean(dim=1, keepdim=True), dim=1
        )
        within_classes = correlation(centred_columns(p_s, keep), centred_columns(p_t, keep), dim=0)
        at_least_two = is_kept(keep).sum() > 1
        inter = kept_mean(1 - within_rows, keep)
        intra = torch.where(at_least_two, 1 - within_classes, 0).mean() * keep.sum() / len(keep)
        return self.temperature**2 * (self.inter_weight * inter + self.intra_weight * intra)
