"""Hints at every stage, the teacher's stages in another order: comparators for what chooses layers.

Yu, Wen, Mou, "Revisiting Intermediate-Layer Matching in Knowledge Distillation: Layer-Selection Strategy
Doesn't Matter (Much)", 2025, arXiv 2502.04499.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sakd.distillers.at import to_common_size
from sakd.distillers.base import Distiller, Features, at_least_float32, kept_mean
from sakd.errors import ConfigError
from sakd.networks import StagedNet
from sakd.ranges import NotNegative
from sakd.spots import Spot, adapter

Matching = Literal["forward", "reversed", "random", "all_to_one"]


def matched(stages: Sequence[str], matching: Matching) -> list[str]:
    """The teacher's stage for each of the student's: its own, or that of the ``matching``.

    ``random`` is a permutation out of PyTorch's global generator; ``all_to_one`` is the last for all.
    """
    if matching == "reversed":
        return list(reversed(stages))
    if matching == "random":
        return [stages[place] for place in torch.randperm(len(stages)).tolist()]
    return [stages[-1]] * len(stages) if matching == "all_to_one" else list(stages)


class Matched(Distiller):
    """Mean squared error between the student's stages, through regressors, and stages of the teacher.

    The spots are pairs in order, as ever; the ``matching`` says with which of their teacher's stages the
    student's is compared instead of its own. A random one is drawn with the regressors' weights, once for a
    seed. A spot's mask takes rows out of the comparison of its student stage, whichever it is with: routes
    through the grafted network keep to the order.

    Each is FitNet's loss, with 1x1 regressors in the smaller map's size, so that a distant stage needs no
    larger one; a regressor's batch norm sees the whole batch.

    Raises ConfigError for a matching that is not known.
    """

    takes = "map"

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        matching: Matching,
    ):
        super().__init__(student, teacher, where, weight)
        if matching not in get_args(Matching):
            known = ", ".join(get_args(Matching))
            raise ConfigError(f"matching of Matched: found {matching!r}, expected one of {known}")
        self.taught_by = dict(
            zip(self.spots, matched([spot.teacher for spot in self.spots], matching), strict=True)
        )
        self.regressors = nn.ModuleDict(
            {
                spot.name: adapter((spot.student_shape[0], 1, 1), (teacher.shapes[stage][0], 1, 1))
                for spot, stage in self.taught_by.items()
            }
        )

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        losses = []
        for spot, stage in self.taught_by.items():
            f_s, f_t = student_features[spot.student], teacher_features[stage]
            f_s, f_t = to_common_size(at_least_float32(f_s), at_least_float32(f_t))
            errors = (self.regressors[spot.name](f_s) - f_t).square()
            losses.append(kept_mean(errors.flatten(1).mean(dim=1), keep[spot]))
        return torch.stack(losses).sum()
