"""SDD: logits of a map's regions, at several scales.

Luo, "Scale Decoupled Distillation", CVPR 2024.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, Features, at_least_float32, check_at_logits, kept_mean
from sakd.distillers.classifier import Classifier
from sakd.distillers.kd import softened_divergence
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive, Width
from sakd.spots import Spot


def logits_of_regions(classifier: Classifier, last_map: Tensor, sizes: Sequence[int]) -> Tensor:
    """Logits of the regions of a last map [B, C, H, W], for each of ``sizes``: [B, regions, classes].

    A size of 2 has 2 x 2 regions, each pooled by its mean; of 1, the whole map.
    """
    maps = classifier.map(last_map)
    vectors = torch.cat([F.adaptive_avg_pool2d(maps, size).flatten(2) for size in sizes], dim=2)
    regions = vectors.transpose(1, 2)
    return classifier.logits(regions.flatten(0, 1)).unflatten(0, regions.shape[:2])


class SDD(Distiller):
    """KD at the logits of the whole map and of its regions, a mean over all of these.

    Both networks' own classifiers give the regions' logits. A region in which the teacher is right where it
    is wrong of the whole, or the other way round, counts ``complementary_weight`` times.

    The rows are those that the spot at the logits keeps, for which the loss stands in the place of KD; it is
    one of each sample. Regions are pooled from the map itself; the published code pools the smaller sizes
    from 4 x 4 regions, which is the same for the maps of 8, 4 and 2 that it is for.

    Raises ConfigError for a spot that is not the logits, or a network that does not pool its last map by its
    mean.
    """

    takes = "vector"
    uses_labels = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        temperature: Positive,
        sizes: Annotated[list[Width], MinLen(1)],
        complementary_weight: NotNegative,
    ):
        super().__init__(student, teacher, where, weight)
        check_at_logits(self, where)
        check_number("temperature of SDD", temperature, least=0, above=True)
        check_number("complementary_weight of SDD", complementary_weight, least=0)
        for size in sizes:
            check_number("sizes of SDD", size, least=1, whole=True)
        self.student = Classifier(student, "student")
        self.teacher = Classifier(teacher, "teacher")
        self.temperature, self.sizes = temperature, tuple(sizes)
        self.complementary_weight = complementary_weight

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        last_map = at_least_float32(student_features[self.student.last_map])
        student = logits_of_regions(self.student, last_map, self.sizes)
        with torch.no_grad():
            last_map = at_least_float32(teacher_features[self.teacher.last_map])
            teacher = logits_of_regions(self.teacher, last_map, self.sizes)
            labels = self.labels[indices, None]
            right_of_whole = at_least_float32(teacher_features["logits"]).argmax(1, keepdim=True) == labels
            complementary = (teacher.argmax(2) == labels) != right_of_whole
            counts = 1 + (self.complementary_weight - 1) * complementary
        divergence = softened_divergence(student.flatten(0, 1), teacher.flatten(0, 1), self.temperature)
        (spot,) = self.spots
        return kept_mean((counts * divergence.view_as(counts)).mean(dim=1), keep[spot])
