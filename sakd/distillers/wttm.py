"""Weighted transformed teacher matching.

Zheng and Yang, "Knowledge Distillation Based on Transformed Teacher Matching", ICLR 2024.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from sakd.distillers.base import Distiller, kept_mean
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive
from sakd.spots import Spot


class WTTM(Distiller):
    """Divergence of the student's probabilities from powers of the teacher's, as they are normalised.

    The student's logits have no temperature; that of the teacher's is 1 / ``power``. A sample weighs what the
    powers sum to, which is more where the teacher is less sure. It stands in the place of KD.
    """

    takes = "vector"
    entry_by_entry = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        power: Positive,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("power of WTTM", power, least=0, above=True)
        self.power = power

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        log_powers = self.power * teacher.log_softmax(dim=1)
        log_sum = log_powers.logsumexp(dim=1, keepdim=True)
        log_teacher, log_student = log_powers - log_sum, student.log_softmax(dim=1)
        rows = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim=1)
        return kept_mean(log_sum.exp().squeeze(1) * rows, keep)
