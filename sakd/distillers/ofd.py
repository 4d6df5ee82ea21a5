"""OFD: the teacher's features before their activation, behind a ReLU with a margin.

Heo, Kim, Yun, Park, Kwak, Choi, "A Comprehensive Overhaul of Feature Distillation", ICCV 2019.
"""

from collections.abc import Mapping, Sequence
from math import pi, sqrt

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.base import Distiller, Features, at_least_float32, kept_mean
from sakd.networks import StagedNet
from sakd.networks.activations import BeforeActivation
from sakd.ranges import NotNegative
from sakd.spots import Spot

RARE = 1e-3  # the share of negative values below which their mean is not computed, the published code's


def margins(norm: nn.BatchNorm2d) -> Tensor:
    """Each channel's mean of what is negative behind a batch norm, as a normal distribution has it: [C]."""
    mean, deviation = norm.bias.detach(), norm.weight.detach().abs()
    ratio = mean / deviation
    share = torch.special.ndtr(-ratio)  # of values below 0
    density = (-ratio.square() / 2).exp() / sqrt(2 * pi)
    return torch.where(share > RARE, mean - deviation * density / share, -3 * deviation)


def partial_distance(student: Tensor, target: Tensor) -> Tensor:
    """Sum of the squared differences of maps [B, C, H, W] of each row: [B].

    Where the target is not positive and the student's is below it, there is none.
    """
    counts = (student > target) | (target > 0)
    return torch.where(counts, (student - target).square(), 0).flatten(1).sum(dim=1)


class OFD(Distiller):
    """Partial squared distance of the student's maps to the teacher's before activation, at every stage.

    The student's pass through a 1x1 convolution and batch norm. The teacher's, no lower than a margin in each
    channel: the mean of its negative values. A stage counts half of the next deeper one. The loss is one of
    each sample, the batch norms apart, which see the whole batch.

    The teacher's stages run a second time for it, since features are what stages give behind their
    activation; the student's maps are those (the published code takes its, too, before). Where maps differ in
    size, the teacher's are pooled to the student's.

    Raises ConfigError for a teacher without batch norm before a stage's activation.
    """

    takes = "map"

    def __init__(
        self, student: StagedNet, teacher: StagedNet, where: str | Sequence[str], weight: NotNegative
    ):
        super().__init__(student, teacher, where, weight)
        self.connectors = nn.ModuleDict()
        for spot in self.spots:
            channels = spot.teacher_shape[0]
            convolution = nn.Conv2d(spot.student_shape[0], channels, 1, bias=False)
            nn.init.normal_(convolution.weight, std=sqrt(2 / channels))
            self.connectors[spot.name] = nn.Sequential(convolution, nn.BatchNorm2d(channels))
        self.before_activation = {
            spot.teacher: BeforeActivation(teacher, spot.teacher) for spot in self.spots
        }

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        losses = []
        for behind, spot in enumerate(reversed(self.spots)):
            student = self.connectors[spot.name](at_least_float32(student_features[spot.student]))
            with torch.no_grad():
                stage = self.before_activation[spot.teacher]
                teacher = stage(at_least_float32(teacher_features[stage.before]))
                teacher = F.adaptive_avg_pool2d(teacher, student.shape[-2:])
                target = torch.maximum(teacher, margins(stage.norm)[:, None, None])
            losses.append(kept_mean(partial_distance(student, target), keep[spot]) / 2**behind)
        return torch.stack(losses).sum()
