"""Logit distillation.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, kept_mean
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive
from sakd.spots import Spot

EPSILON = 1e-7  # the published code's


def standardised(logits: Tensor) -> Tensor:
    """Z-scores of each row of logits [B, classes]; 0 where a row's are all the same.

    Sun, Ren, Li, Wang, Cao, "Logit Standardization in Knowledge Distillation", CVPR 2024.
    """
    variance, mean = torch.var_mean(logits, dim=1, keepdim=True)
    deviation = torch.where(variance > 0, variance, 1).sqrt()  # at 0 its gradient would be none
    return (logits - mean) / (EPSILON + deviation)


def softened_divergence(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float | Tensor
) -> Tensor:
    """Divergence T² KL(softmax(z_t / T) || softmax(z_s / T)) of each row: [B, classes] twice to [B].

    ``temperature``: T, a number or a scalar tensor.
    """
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


class KD(Distiller):
    """Divergence of softened class probabilities at the logits, or with ``standardise`` of their z-scores."""

    takes = "vector"
    entry_by_entry = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        temperature: Positive,
        standardise: bool = False,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("temperature of KD", temperature, least=0, above=True)
        self.temperature, self.standardise = temperature, standardise

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        if self.standardise:
            student, teacher = standardised(student), standardised(teacher)
        return kept_mean(softened_divergence(student, teacher, self.temperature), keep)
