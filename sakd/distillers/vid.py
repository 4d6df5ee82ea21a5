"""Variational information distillation.

Ahn, Hu, Damianou, Lawrence, Dai, "Variational Information Distillation for Knowledge Transfer", CVPR 2019.
"""

from collections.abc import Sequence
from math import expm1, log
from typing import Annotated

import torch
from annotated_types import Gt, Le
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.at import to_common_size
from sakd.distillers.base import Distiller, kept_mean
from sakd.networks import StagedNet
from sakd.ranges import NotNegative
from sakd.spots import Spot

EPSILON = 1e-5  # the least variance


class VariationalBound(nn.Module):
    """A Gaussian of the teacher's features given the student's.

    Its mean is by three 1x1 convolutions; it has a variance per channel.
    """

    def __init__(self, student_channels: int, teacher_channels: int, initial_variance: float):
        super().__init__()
        self.mean = nn.Sequential(
            nn.Conv2d(student_channels, teacher_channels, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(teacher_channels, teacher_channels, 1, bias=False),
        )
        self.scale = nn.Parameter(
            torch.full((teacher_channels, 1, 1), log(expm1(initial_variance - EPSILON)))
        )

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Negative log-likelihood, up to a constant, of each row: maps [B, C, H, W] of one size to [B]."""
        variance = F.softplus(self.scale) + EPSILON
        surprise = (self.mean(student) - teacher).square() / variance + variance.log()
        return surprise.flatten(1).mean(dim=1) / 2


class VID(Distiller):
    """Negative log-likelihood of the teacher's maps, predicted from the student's, at every stage.

    Variances are learned, so the loss can fall below 0.
    """

    takes = "map"

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        initial_variance: Annotated[float, Gt(EPSILON), Le(500)],
    ):
        super().__init__(student, teacher, where, weight)
        self.bounds = nn.ModuleDict(
            {
                spot.name: VariationalBound(spot.student_shape[0], spot.teacher_shape[0], initial_variance)
                for spot in self.spots
            }
        )

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        return kept_mean(self.bounds[spot.name](*to_common_size(student, teacher)), keep)
