"""Relational knowledge distillation (Park, Kim, Lu, Cho, "Relational Knowledge Distillation", CVPR 2019)."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, is_kept, kept_count, kept_pair_mean, kept_pairs, weighed
from sakd.networks import StagedNet
from sakd.ranges import NotNegative
from sakd.spots import Spot


def relative_distances(embeddings: Tensor, keep: Tensor) -> Tensor:
    """Euclidean distances [B, B] between rows [B, d], relative to their mean.

    The mean is of the positive ones among kept rows.
    """
    squared = embeddings.square().sum(dim=1)
    distances = (squared[:, None] + squared[None, :] - 2 * embeddings @ embeddings.T).clamp_min(1e-12).sqrt()
    others = ~torch.eye(len(keep), dtype=torch.bool, device=keep.device)
    positive = kept_pairs(keep) * others
    mean = weighed(distances, positive).sum() / kept_count(positive)
    return torch.where(is_kept(positive), distances, 0) / torch.where(mean > 0, mean, 1)


def angles(embeddings: Tensor) -> Tensor:
    """Cosines [B, B, B] of the angle at row i between the directions to rows j and k, of rows [B, d]."""
    directions = F.normalize(embeddings[None, :] - embeddings[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


class RKD(Distiller):
    """Smooth L1 between the networks' relative distances, and between their angles, among the kept rows."""

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        distance_weight: NotNegative,
        angle_weight: NotNegative,
    ):
        super().__init__(student, teacher, where, weight)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        student, teacher = student.flatten(1), teacher.flatten(1)
        by_distance = F.smooth_l1_loss(
            relative_distances(student, keep), relative_distances(teacher, keep), reduction="none"
        )
        by_angle = F.smooth_l1_loss(angles(student), angles(teacher), reduction="none")
        at_vertex = weighed(by_angle, keep).sum(dim=2) / kept_count(keep)
        return self.distance_weight * kept_pair_mean(by_distance, keep) + self.angle_weight * kept_pair_mean(
            at_vertex, keep
        )
