"""SemCKD: each of the student's stages learns from those of the teacher that an attention chooses.

Chen, Mei, Zhang, Wang, Feng, Chen, "Cross-Layer Distillation with Semantic Calibration", AAAI 2021.
"""

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.at import to_common_size
from sakd.distillers.base import Distiller, Features, at_least_float32, kept_mean
from sakd.errors import ConfigError, check_number
from sakd.networks import StagedNet
from sakd.ranges import BatchSize, Factor, NotNegative, Width
from sakd.spots import Spot


def batch_similarities(features: Tensor, width: int) -> Tensor:
    """Inner products of the batch's rows [B, …] with one another: [B, width].

    For the rows that a batch of ``width`` would have more, they are 0.
    """
    flat = features.flatten(1)
    return F.pad(flat @ flat.T, (0, width - len(flat)))


def relation_embedding(width_in: int, width_out: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(width_in, 2 * width_out), nn.ReLU(inplace=True), nn.Linear(2 * width_out, width_out)
    )


def projection(student_channels: int, width: int, teacher_channels: int) -> nn.Module:
    """Convolutions of 1x1, 3x3 and 1x1 from the student's channels to the teacher's.

    ``width``: the channels between.
    """
    return nn.Sequential(
        nn.Conv2d(student_channels, width, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.Conv2d(width, teacher_channels, 1, bias=False),
    )


class SemCKD(Distiller):
    """Mean squared error between every stage of the student, projected, and every stage of the teacher.

    Each sample's errors are weighed by an attention of the student's stages to the teacher's, which is
    learned from the batch's similarities.

    All stages of both networks take part, whatever the spots: these say which rows are kept. A spot's mask
    takes rows out of all comparisons of its student stage; a student stage without a spot of its own (beyond
    the teacher's depth) goes by the nearest. Where to look in the teacher remains the attention's to say.
    Attention and projections see the whole batch, as batch norm must: given both, each stage's term is n_kept
    / B times the published loss of the kept rows.

    ``batch_size``: the width of a row of similarities; a smaller batch is as one whose other rows resemble
    nothing (the published code skips it). ``reduction``: by what queries and keys are narrower than that.
    ``widening``: of the projections over the teacher's channels.

    Raises ConfigError, when it sees it, for a larger batch.
    """

    takes = "map"

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        batch_size: BatchSize,
        reduction: Width,
        widening: Factor,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("reduction of SemCKD", reduction, least=1, whole=True)
        check_number("batch_size of SemCKD", batch_size, least=reduction, whole=True)
        check_number("widening of SemCKD", widening, least=0, above=True)
        self.batch_size = batch_size
        widths = batch_size, batch_size // reduction
        self.queries = nn.ModuleDict({stage: relation_embedding(*widths) for stage in student.maps})
        self.keys = nn.ModuleDict({stage: relation_embedding(*widths) for stage in teacher.maps})
        self.projections = nn.ModuleDict()
        for s, t in product(student.maps, teacher.maps):
            c_s, c_t = student.shapes[s][0], teacher.shapes[t][0]
            self.projections[f"{s}-{t}"] = projection(c_s, max(1, round(widening * c_t)), c_t)
        self.spot_of = {
            stage: min(self.spots, key=lambda spot: abs(student.index(spot.student) - student.index(stage)))
            for stage in student.maps
        }

    def attention(self, student_features: Features, teacher_features: Features) -> Tensor:
        """Shares of each student stage's attention that the teacher's stages get, of each sample: [B, S, T].

        Over T they sum to 1.
        """
        queries, keys = (
            torch.stack(
                [
                    F.normalize(embed(batch_similarities(features[stage], self.batch_size)))
                    for stage, embed in embeddings.items()
                ],
                dim=1,
            )
            for features, embeddings in ((student_features, self.queries), (teacher_features, self.keys))
        )
        return (queries @ keys.transpose(1, 2)).softmax(dim=2)

    def distance(self, student_stage: str, teacher_stage: str, student: Tensor, teacher: Tensor) -> Tensor:
        """Mean squared error of each row, in the smaller map's size and the teacher's channels: [B]."""
        student, teacher = to_common_size(student, teacher)
        projected = self.projections[f"{student_stage}-{teacher_stage}"](student)
        return (projected - teacher).square().flatten(1).mean(dim=1)

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        if len(indices) > self.batch_size:
            raise ConfigError(
                f"batch_size of SemCKD: found {self.batch_size}, expected at least a batch's "
                f"{len(indices)} rows"
            )
        student_features = {stage: at_least_float32(student_features[stage]) for stage in self.queries}
        teacher_features = {stage: at_least_float32(teacher_features[stage]) for stage in self.keys}
        losses = []
        attention = self.attention(student_features, teacher_features)
        for (s, f_s), attended in zip(student_features.items(), attention.unbind(1), strict=True):
            distances = torch.stack(
                [self.distance(s, t, f_s, f_t) for t, f_t in teacher_features.items()], dim=1
            )
            losses.append(kept_mean((attended * distances).sum(dim=1), keep[self.spot_of[s]]))
        return torch.stack(losses).mean()
