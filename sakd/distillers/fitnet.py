"""FitNets: the student's hint, through a regressor, against the teacher's.

Romero, Ballas, Kahou, Chassang, Gatta, Bengio, "FitNets: Hints for Thin Deep Nets", ICLR 2015.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from sakd.distillers.base import Distiller, kept_mean
from sakd.networks import StagedNet
from sakd.ranges import NotNegative
from sakd.spots import Spot, adapter


class FitNet(Distiller):
    """Mean squared error between the teacher's hint and the student's, through a learned regressor.

    The regressor's batch norm sees the whole batch; rows are masked behind it.
    """

    def __init__(
        self, student: StagedNet, teacher: StagedNet, where: str | Sequence[str], weight: NotNegative
    ):
        super().__init__(student, teacher, where, weight)
        self.regressors = nn.ModuleDict(
            {spot.name: adapter(spot.student_shape, spot.teacher_shape) for spot in self.spots}
        )

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        squared_error = (self.regressors[spot.name](student) - teacher).square()
        return kept_mean(squared_error.flatten(1).mean(dim=1), keep)
