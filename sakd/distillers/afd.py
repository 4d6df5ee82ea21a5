"""AFD: each of the teacher's stages teaches those of the student that an attention chooses.

Ji, Heo, Park, "Show, Attend and Distill: Knowledge Distillation via Attention-based Feature Matching",
AAAI 2021.
"""

from collections.abc import Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.base import Distiller, Features, at_least_float32, kept_mean
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Width
from sakd.spots import Spot


def spatial_maps(features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
    """Mean over channels of the squared features [B, C, H, W], L2-normalised: [B, HW].

    ``size``: the height and width that it is pooled to before.
    """
    energy = features.square().mean(dim=1)
    if size is not None:
        energy = F.adaptive_avg_pool2d(energy, size)
    return F.normalize(energy.flatten(1), dim=1)


def normalised_linear(width_in: int, width_out: int, rectified: bool = False) -> nn.Sequential:
    layers = [nn.Linear(width_in, width_out), nn.BatchNorm1d(width_out)]
    return nn.Sequential(*layers, *([nn.ReLU()] if rectified else []))


class AFD(Distiller):
    """Mean squared difference of attention maps between every stage of the teacher and of the student.

    Each teacher stage's differences are weighed by an attention to the student's stages, which is learned
    from the pooled features of both.

    All stages of both networks take part (the published code has every block), whatever the spots: these say
    which rows are kept. A spot's mask takes rows out of all comparisons of its teacher stage; a teacher stage
    without a spot of its own (beyond the student's depth) goes by the nearest. Where to put it in the student
    remains the attention's to say. Batch norms see the whole batch: given them, each teacher stage's term is
    n_kept / B times the published loss of the kept rows.

    ``width``: of queries and keys.
    """

    takes = "map"

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        width: Width,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("width of AFD", width, least=1, whole=True)
        self.width = width
        self.queries = nn.ModuleDict(
            {stage: normalised_linear(teacher.shapes[stage][0], width) for stage in teacher.maps}
        )
        self.keys = nn.ModuleDict(
            {
                stage: normalised_linear(student.shapes[stage][0], width, rectified=True)
                for stage in student.maps
            }
        )
        self.key_of_each = normalised_linear(width, width * len(teacher.maps))
        self.teacher_places = nn.Parameter(torch.empty(len(teacher.maps), width))
        self.student_places = nn.Parameter(torch.empty(len(student.maps), width))
        for places in (self.teacher_places, self.student_places):
            nn.init.xavier_normal_(places)
        self.spot_of = {
            stage: min(self.spots, key=lambda spot: abs(teacher.index(spot.teacher) - teacher.index(stage)))
            for stage in teacher.maps
        }

    def attention(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Shares of each teacher stage's attention that the student's stages get, of each sample: [B, T, S].

        Over S they sum to 1.
        """
        queries = torch.stack(
            [embed(teacher_features[stage].mean((2, 3))) for stage, embed in self.queries.items()], dim=1
        )
        keys = torch.stack(
            [embed(student_features[stage].mean((2, 3))) for stage, embed in self.keys.items()], dim=1
        )
        keys = self.key_of_each(keys.flatten(0, 1)).view(len(keys), len(self.keys), len(self.queries), -1)
        scores = (keys * queries[:, None]).sum(dim=3).transpose(1, 2)  # [B, T, S]
        scores = scores + self.teacher_places @ self.student_places.T
        return (scores / sqrt(self.width)).softmax(dim=2)

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        student_features = {stage: at_least_float32(student_features[stage]) for stage in self.keys}
        teacher_features = {stage: at_least_float32(teacher_features[stage]) for stage in self.queries}
        losses = []
        attention = self.attention(student_features, teacher_features)
        for (t, f_t), attended in zip(teacher_features.items(), attention.unbind(1), strict=True):
            target = spatial_maps(f_t)
            distances = torch.stack(
                [
                    (spatial_maps(f_s, f_t.shape[-2:]) - target).square().mean(dim=1)
                    for f_s in student_features.values()
                ],
                dim=1,
            )
            losses.append(kept_mean((attended * distances).sum(dim=1), keep[self.spot_of[t]]))
        return torch.stack(losses).sum()
