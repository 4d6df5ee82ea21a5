"""Logit distillation.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, kept_mean
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive
from sakd.spots import Spot


def softened_divergence(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """Divergence T² KL(softmax(z_t / T) || softmax(z_s / T)) of each row: [B, classes] twice to [B]."""
    log_student = F.log_softmax(student_logits / temperature, dim=1)
    log_teacher = F.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)


class KD(Distiller):
    """Divergence of softened class probabilities at the logits."""

    takes = "vector"

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        temperature: Positive,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("temperature of KD", temperature, least=0, above=True)
        self.temperature = temperature

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        return kept_mean(softened_divergence(student, teacher, self.temperature), keep)
