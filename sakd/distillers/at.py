"""Attention transfer (Zagoruyko and Komodakis, "Paying More Attention to Attention", ICLR 2017)."""

from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, kept_mean
from sakd.spots import Spot


def attention_maps(features: Tensor) -> Tensor:
    """Mean over channels of the squared features [B, C, H, W], flattened and L2-normalised: [B, HW]."""
    return F.normalize(features.square().mean(dim=1).flatten(1), dim=1)


def to_common_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps [B, C, H, W], the larger average-pooled to the smaller's height and width."""
    size = tuple(min(a, b) for a, b in zip(student.shape[-2:], teacher.shape[-2:], strict=True))
    return tuple(f if f.shape[-2:] == size else F.adaptive_avg_pool2d(f, size) for f in (student, teacher))


class AT(Distiller):
    """Mean squared difference of attention maps, at every stage."""

    takes = "map"

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        student, teacher = to_common_size(student, teacher)
        return kept_mean((attention_maps(student) - attention_maps(teacher)).square().mean(dim=1), keep)
