"""CAT-KD: class activation maps.

Guo, Yan, Li, Lin, "Class Attention Transfer Based Knowledge Distillation", CVPR 2023.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, check_at_last_stage, kept_mean
from sakd.distillers.classifier import Classifier
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Width
from sakd.spots import Spot


def class_activation_maps(classifier: Classifier, last_map: Tensor, size: int) -> Tensor:
    """What each region of a last map [B, C, H, W] adds to each class's logit: [B, classes, size, size].

    The classifier is linear; its bias is no region's.
    """
    regions = F.adaptive_avg_pool2d(classifier.map(last_map), size)
    vectors = regions.permute(0, 2, 3, 1).flatten(0, 2)
    bias = classifier.logits(torch.zeros_like(vectors[:1]))
    maps = classifier.logits(vectors) - bias
    return maps.unflatten(0, (len(last_map), size, size)).permute(0, 3, 1, 2)


class CATKD(Distiller):
    """Mean squared difference of class activation maps, pooled and, where asked for, normalised.

    A map that is ``normalised`` has unit length over its positions, for each class by itself. ``size``: the
    height and width that they are pooled to. The loss is one of each sample, so that a spot mode takes
    samples out of it one by one. It trains the student's classifier, too.

    Raises ConfigError for a spot that is not the last map of both, or a network that does not pool it by its
    mean.
    """

    takes = "map"

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        size: Width,
        normalised: bool,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("size of CATKD", size, least=1, whole=True)
        self.student = Classifier(student, "student")
        self.teacher = Classifier(teacher, "teacher")
        check_at_last_stage(self, where, student, teacher)
        self.size, self.normalised = size, normalised

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        maps_s = class_activation_maps(self.student, student, self.size).flatten(2)
        with torch.no_grad():
            maps_t = class_activation_maps(self.teacher, teacher, self.size).flatten(2)
        if self.normalised:
            maps_s, maps_t = F.normalize(maps_s, dim=2), F.normalize(maps_t, dim=2)
        return kept_mean((maps_s - maps_t).square().flatten(1).mean(dim=1), keep)
