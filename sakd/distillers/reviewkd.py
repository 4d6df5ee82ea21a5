"""ReviewKD (Chen, Liu, Zhao, Jia, "Distilling Knowledge via Knowledge Review", CVPR 2021)."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.base import Distiller, Features, at_least_float32, kept_mean
from sakd.errors import check_number
from sakd.networks import Shape, StagedNet
from sakd.ranges import NotNegative, Width
from sakd.spots import Spot

POOLED = (4, 2, 1)  # heights and widths; each counts half of the one before


def hierarchical_distance(a: Tensor, b: Tensor) -> Tensor:
    """Weighted mean of the mean squared differences of maps, and of the maps pooled to smaller ones.

    Takes [B, C, H, W] twice to [B].
    """
    sizes = [size for size in POOLED if size < min(a.shape[-2:])]
    pairs = [(a, b), *((F.adaptive_avg_pool2d(a, size), F.adaptive_avg_pool2d(b, size)) for size in sizes)]
    weights = [0.5**level for level in range(len(pairs))]
    distances = [
        weight * (a - b).square().flatten(1).mean(dim=1)
        for weight, (a, b) in zip(weights, pairs, strict=True)
    ]
    return torch.stack(distances).sum(dim=0) / sum(weights)


class Fusion(nn.Module):
    """A student's level fused with what comes down from the deeper ones, by attention maps of both.

    From that, the teacher's level.
    """

    def __init__(self, student_shape: Shape, teacher_shape: Shape, width: int, deepest: bool):
        super().__init__()
        self.teacher_size = teacher_shape[1:]
        self.reduce = nn.Sequential(nn.Conv2d(student_shape[0], width, 1, bias=False), nn.BatchNorm2d(width))
        self.attend = None if deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        expand = nn.Conv2d(width, teacher_shape[0], 3, padding=1, bias=False)
        self.expand = nn.Sequential(expand, nn.BatchNorm2d(teacher_shape[0]))
        for convolution in (self.reduce[0], self.expand[0]):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, level: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """The fused level in the teacher's shape, and as it is handed down.

        ``level``: [B, C, H, W]; ``deeper``: what the next deeper fusion handed down, None at the deepest.
        """
        fused = self.reduce(level)
        if self.attend is not None:
            deeper = F.interpolate(deeper, fused.shape[-2:])
            own, others = self.attend(torch.cat([fused, deeper], dim=1)).split(1, dim=1)
            fused = own * fused + others * deeper
        fused = F.interpolate(fused, self.teacher_size)
        return self.expand(fused), fused


def as_map(shape: Shape) -> Shape:
    """A vector's shape as that of a map of one position."""
    return shape if len(shape) == 3 else (*shape, 1, 1)


class ReviewKD(Distiller):
    """Distance of the student's levels, fused from the deepest up, from the teacher's of the same spot.

    A spot's mask takes rows out of its own comparison alone: whether a row is kept at one spot does not
    change what that row hands to the shallower ones. Fusions, with their batch norms, see the whole batch.
    The levels are the spots, so that of networks of unequal depth the deeper one's last stages are left out;
    a vector is a map of one position. Maps are compared as stages give them, behind their activation (the
    published code takes the teacher's before it).

    ``max_width``: channels in which levels are fused, if the student's deepest level has not fewer.
    """

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        max_width: Width,
        ramp_epochs: NotNegative,
    ):
        super().__init__(student, teacher, where, weight, ramp_epochs)
        check_number("max_width of ReviewKD", max_width, least=1, whole=True)
        self.spots.sort(key=lambda spot: student.index(spot.student), reverse=True)
        deepest = self.spots[0]
        width = min(max_width, deepest.student_shape[0])
        self.fusions = nn.ModuleDict(
            {
                spot.name: Fusion(
                    as_map(spot.student_shape), as_map(spot.teacher_shape), width, spot is deepest
                )
                for spot in self.spots
            }
        )

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        losses, handed_down = [], None
        for spot in self.spots:
            f_s = at_least_float32(student_features[spot.student]).reshape(-1, *as_map(spot.student_shape))
            f_t = at_least_float32(teacher_features[spot.teacher]).reshape(-1, *as_map(spot.teacher_shape))
            reviewed, handed_down = self.fusions[spot.name](f_s, handed_down)
            losses.append(kept_mean(hierarchical_distance(reviewed, f_t), keep[spot]))
        return torch.stack(losses).sum()
