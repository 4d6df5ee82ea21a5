"""Curriculum temperature, in its global form.

Li, Li, Yang, Zhao, Song, Luo, Li, Yang, "Curriculum Temperature for Knowledge Distillation", AAAI 2023.
"""

from collections.abc import Sequence
from math import cos, pi

import torch
from torch import Tensor, nn

from sakd.distillers.base import Distiller, kept_mean
from sakd.distillers.kd import softened_divergence, standardised
from sakd.errors import check_number
from sakd.networks import StagedNet
from sakd.ranges import Finite, NotNegative, Positive
from sakd.spots import Spot


class CTKD(Distiller):
    """KD at a temperature that is learned against the student: it moves to where the loss is larger.

    The temperature is ``least_temperature`` + ``temperature_span`` x sigmoid of a parameter that starts at
    ``initial_logit``, one for all samples and spots. The student's optimizer trains it, weight decay and all,
    by its gradient times -λ; λ rises along a cosine from 0 to 1 over the first ``curriculum_epochs``. Logits
    are compared as they are, or with ``standardise`` by their z-scores. It stands in the place of KD.
    """

    takes = "vector"
    entry_by_entry = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        least_temperature: Positive,
        temperature_span: NotNegative,
        initial_logit: Finite,
        curriculum_epochs: NotNegative,
        standardise: bool = False,
    ):
        super().__init__(student, teacher, where, weight)
        check_number("least_temperature of CTKD", least_temperature, least=0, above=True)
        check_number("temperature_span of CTKD", temperature_span, least=0)
        check_number("initial_logit of CTKD", initial_logit)
        check_number("curriculum_epochs of CTKD", curriculum_epochs, least=0)
        self.least_temperature, self.temperature_span = least_temperature, temperature_span
        self.curriculum_epochs, self.standardise = curriculum_epochs, standardise
        self.logit = nn.Parameter(torch.tensor(float(initial_logit)))
        # A tensor, so that a captured step sees it change.
        self.register_buffer("reversal", torch.ones(()), persistent=False)

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        done = min(epoch / self.curriculum_epochs, 1) if self.curriculum_epochs else 1
        self.reversal.fill_((1 - cos(pi * done)) / 2)

    def temperature(self) -> Tensor:
        """The temperature, a scalar, whose gradient reaches the parameter reversed."""
        fixed = self.logit.detach()
        reversed_logit = fixed + self.reversal * (fixed - self.logit)  # its value to the last bit
        return self.least_temperature + self.temperature_span * reversed_logit.sigmoid()

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        if self.standardise:
            student, teacher = standardised(student), standardised(teacher)
        return kept_mean(softened_divergence(student, teacher, self.temperature()), keep)
