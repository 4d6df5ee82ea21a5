"""SimKD: the student's last map, projected, goes through the teacher's own classifier.

Chen, Mei, Zhang, Wang, Feng, Chen, "Knowledge Distillation with the Reused Teacher Classifier", CVPR 2022.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sakd.distillers.at import to_common_size
from sakd.distillers.base import Distiller, check_at_last_stage, kept_mean
from sakd.errors import ConfigError
from sakd.networks import StagedNet
from sakd.networks.reused import Frozen
from sakd.ranges import NotNegative
from sakd.spots import Spot


class SimKD(Distiller):
    """Mean squared error of the student's projected last map and the teacher's.

    The student is a ``with_head_of`` (``distiller.product``): its last stage is the projector, and behind it
    is the teacher's head, frozen, whose weights it gets here. That whole network is trained, evaluated and
    left. Published without a cross-entropy, which can go without: nothing behind the projector learns.

    The loss is one of each sample, so that a spot mode takes samples out of it one by one; of these, what
    remains is the cross-entropy, if it has a weight.

    Raises ConfigError for a student with a head of its own, or a spot that is not the last map of both.
    """

    takes = "map"

    def __init__(
        self, student: StagedNet, teacher: StagedNet, where: str | Sequence[str], weight: NotNegative
    ):
        super().__init__(student, teacher, where, weight)
        if not isinstance(student.logits, Frozen):
            raise ConfigError(
                "found a student with a head of its own, expected distiller.product to give it the teacher's"
            )
        check_at_last_stage(self, where, student, teacher)
        # In a list, since their weights are not this module's.
        self.heads = [network.between(network.maps[-1], "logits") for network in (student, teacher)]

    @torch.no_grad()
    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)  # by now the teacher's weights are loaded
        own, given = (head.state_dict().values() for head in self.heads)
        for weight, of_teacher in zip(own, given, strict=True):
            weight.copy_(of_teacher)

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        student, teacher = to_common_size(student, teacher)
        return kept_mean((student - teacher).square().flatten(1).mean(dim=1), keep)
