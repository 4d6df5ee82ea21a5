"""Normalised knowledge distillation.

Yang, Zeng, Yuan, Li, "From Knowledge Distillation to Self-Knowledge Distillation: A Unified
Approach with Normalized Loss and Customized Soft Labels", ICCV 2023.
"""

from collections.abc import Sequence

from torch import Tensor

from sakd.distillers.base import Distiller, check_at_logits, kept_mean, targets
from sakd.distillers.dkd import decoupled
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive
from sakd.spots import Spot


class NKD(Distiller):
    """Cross-entropies with the teacher's target probability, and with its others among themselves.

    The target class counts by the teacher's probability of it, without temperature; the other classes'
    probabilities, softened, are normalised among themselves in both networks. It stands in the place of KD.

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
    ):
        super().__init__(student, teacher, where, weight)
        check_at_logits(self, where)
        check_number("target_weight of NKD", target_weight, least=0)
        check_number("others_weight of NKD", others_weight, least=0)
        check_number("temperature of NKD", temperature, least=0, above=True)
        self.target_weight, self.others_weight, self.temperature = target_weight, others_weight, temperature

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        is_target = targets(self.labels[indices], student)
        of_target = (teacher.softmax(dim=1) * student.log_softmax(dim=1) * is_target).sum(dim=1)
        _, others_s = decoupled(student / self.temperature, is_target)
        _, others_t = decoupled(teacher / self.temperature, is_target)
        of_others = (others_t.exp() * others_s).sum(dim=1)  # the target has 0 in others_s
        rows = self.target_weight * of_target + self.others_weight * self.temperature**2 * of_others
        return kept_mean(-rows, keep)
