"""Correlation congruence, in the form that its authors gave to the field's shared code.

Peng, Jin, Liu, Li, Wu, Liu, Zhou, Zhang, "Correlation Congruence for Knowledge Distillation", ICCV 2019.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sakd.distillers.base import Distiller, is_kept, kept_count, weighed
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Width
from sakd.spots import Spot


def neighbours_mean(differences: Tensor, keep: Tensor) -> Tensor:
    """Mean inner product of consecutive kept rows of [B, d], times n_kept / B.

    It is 0 with fewer than two.
    """
    order = torch.argsort(~is_kept(keep), stable=True)
    kept_first, keep = differences[order], keep[order]
    products = (kept_first[:-1] * kept_first[1:]).sum(dim=1)
    both_kept = keep[:-1] * keep[1:]
    return weighed(products, both_kept).sum() / kept_count(both_kept) * keep.sum() / len(keep)


class CC(Distiller):
    """Products of neighbouring rows' absolute differences between both networks' embeddings.

    The embeddings are linear. The student's is learned; the teacher's is learned too, in every spot mode, or
    with ``teacher_embedding`` "frozen" stays as it was drawn at random.

    The authors of the spot modes learn it in fixed and leave it frozen in adaptive and anti, so that their
    modes differ in more than in where they distil. Here modes differ in where alone, either way; "frozen" is
    their adaptive and anti, "learned" their fixed.
    """

    takes = "vector"

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        embedding_width: Width,
        teacher_embedding: Literal["learned", "frozen"],
    ):
        super().__init__(student, teacher, where, weight)
        widths = {spot.name: (spot.student_shape[0], spot.teacher_shape[0]) for spot in self.spots}
        self.embed_student = nn.ModuleDict(
            {name: nn.Linear(s, embedding_width) for name, (s, _) in widths.items()}
        )
        self.embed_teacher = nn.ModuleDict(
            {name: nn.Linear(t, embedding_width) for name, (_, t) in widths.items()}
        ).requires_grad_(teacher_embedding == "learned")

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        differences = (self.embed_student[spot.name](student) - self.embed_teacher[spot.name](teacher)).abs()
        return neighbours_mean(differences, keep)
