"""Decoupled knowledge distillation.

Zhao, Cui, Song, Qiu, Liang, "Decoupled Knowledge Distillation", CVPR 2022.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, check_at_logits, kept_mean, targets
from sakd.distillers.kd import standardised
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive
from sakd.spots import Spot


def decoupled(logits: Tensor, is_target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the target class and all others together, and of the others among themselves.

    The first are [B, 2], the second [B, classes] with 0 at the target. ``logits``: [B, classes];
    ``is_target``: the same, True once a row.
    """
    others = logits.masked_fill(is_target, -torch.inf)
    target = torch.where(is_target, logits, 0).sum(dim=1)
    either = torch.stack([target, others.logsumexp(dim=1)], dim=1).log_softmax(dim=1)
    return either, others.log_softmax(dim=1).masked_fill(is_target, 0)


def divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each row's log-probabilities: [B, n] twice to [B]."""
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


class DKD(Distiller):
    """KD taken apart: the target class against the rest, and the rest among themselves.

    Each has a weight of its own; logits are compared as they are, or with ``standardise`` by their z-scores.
    It stands in the place of KD.

    Raises ConfigError for a spot that is not the logits: labels name their entries.
    """

    takes = "vector"
    uses_labels = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        target_weight: NotNegative,
        others_weight: NotNegative,
        temperature: Positive,
        ramp_epochs: NotNegative,
        standardise: bool = False,
    ):
        super().__init__(student, teacher, where, weight, ramp_epochs)
        check_at_logits(self, where)
        check_number("target_weight of DKD", target_weight, least=0)
        check_number("others_weight of DKD", others_weight, least=0)
        check_number("temperature of DKD", temperature, least=0, above=True)
        self.target_weight, self.others_weight, self.temperature = target_weight, others_weight, temperature
        self.standardise = standardise

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        if self.standardise:
            student, teacher = standardised(student), standardised(teacher)
        is_target = targets(self.labels[indices], student)
        either_s, others_s = decoupled(student / self.temperature, is_target)
        either_t, others_t = decoupled(teacher / self.temperature, is_target)
        rows = self.target_weight * divergence(either_s, either_t) + self.others_weight * divergence(
            others_s, others_t
        )
        return self.temperature**2 * kept_mean(rows, keep)
