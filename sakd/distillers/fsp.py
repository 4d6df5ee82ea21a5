"""Flow of the solution procedure.

Yim, Joo, Bae, Kim, "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer
Learning", CVPR 2017.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from sakd.distillers.at import to_common_size
from sakd.distillers.base import Distiller, Features, at_least_float32, kept_mean
from sakd.errors import ConfigError
from sakd.networks import StagedNet
from sakd.ranges import NotNegative
from sakd.spots import Spot, spots_at


def flow(lower: Tensor, upper: Tensor) -> Tensor:
    """Mean over positions of products of two maps' channels: [B, C, H, W] and [B, D, H', W'] to [B, C, D].

    The larger map is average-pooled to the smaller's size.
    """
    lower, upper = (maps.flatten(2) for maps in to_common_size(lower, upper))
    return lower @ upper.transpose(1, 2) / lower.shape[2]


class FSP(Distiller):
    """Mean squared difference of the flows between consecutive stages, from the stem on.

    A flow is kept where its upper stage's spot is. Both networks need the same channels at each stage. The
    paper lets the student begin with this loss alone; so does a pretraining with it.

    Raises ConfigError for stages with different channels, or the stem alone.
    """

    takes = "map"

    def __init__(
        self, student: StagedNet, teacher: StagedNet, where: str | Sequence[str], weight: NotNegative
    ):
        super().__init__(student, teacher, where, weight)
        self.spots.sort(key=lambda spot: student.index(spot.student))
        stem = [spot for spot in spots_at("stem", student, teacher) if spot not in self.spots]
        self.flows = list(pairwise([*stem, *self.spots]))
        if not self.flows:
            raise ConfigError(
                f"where={where}: found one stage, expected two or more; a flow is between stages"
            )
        for spot in [*stem, *self.spots]:
            (of_student, *_), (of_teacher, *_) = spot.student_shape, spot.teacher_shape
            if of_student != of_teacher:
                raise ConfigError(
                    f"where={where}: found {of_student} channels in the student and {of_teacher} in the "
                    f"teacher at {spot.name}; FSP compares channel with channel and needs as many in both "
                    "networks"
                )

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        return self.differences(student_features, teacher_features, keep)

    def differences(
        self, student_features: Features, teacher_features: Features, keep: Mapping[Spot, Tensor]
    ) -> Tensor:
        """Sum over the flows of their mean squared difference, times n_kept / B."""
        losses = []
        for lower, upper in self.flows:
            of_student = flow(
                *(at_least_float32(student_features[stage]) for stage in (lower.student, upper.student))
            )
            of_teacher = flow(
                *(at_least_float32(teacher_features[stage]) for stage in (lower.teacher, upper.teacher))
            )
            losses.append(kept_mean((of_student - of_teacher).square().mean(dim=(1, 2)), keep[upper]))
        return torch.stack(losses).sum()

    def pretrained(self, student: StagedNet) -> nn.Module:
        return student.between(None, self.spots[-1].student)

    def pretraining_loss(self, student: StagedNet, images: Tensor, teacher_features: Features) -> Tensor:
        everything = torch.ones(len(images), dtype=torch.bool, device=images.device)
        features = student.features(images)
        with torch.autocast(images.device.type, enabled=False):  # sums over positions outgrow half precision
            return self.differences(features, teacher_features, dict.fromkeys(self.spots, everything))
