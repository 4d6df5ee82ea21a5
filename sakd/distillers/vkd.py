"""VkD: the student's embedding, through an orthogonal projection, against the teacher's, normalised.

Miles, Elezi, Deng, "VkD: Improving Knowledge Distillation using Orthogonal Projections", CVPR 2024.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sakd.distillers.base import Distiller, kept_mean
from sakd.networks import StagedNet
from sakd.ranges import NotNegative
from sakd.spots import Spot


def orthonormal_columns(reflections: Tensor) -> Tensor:
    """The product of Householder reflections, its first columns: [n, k] to [n, k], with k at most n.

    Column i of ``reflections`` has the i-th reflection's vector below its place i, where it is 1.
    """
    # H_1 … H_k = I - V T V', T being the inverse of V'V's upper triangle with half of its diagonal: no loop
    # over k, and nothing that waits for the device, as a general solver does.
    identity = torch.eye(*reflections.shape, dtype=reflections.dtype, device=reflections.device)
    vectors = reflections.tril(-1) + identity
    products = vectors.T @ vectors
    inverse = products.triu(1) + products.diagonal().diag() / 2
    top = vectors[: vectors.shape[1]]
    return identity - vectors @ torch.linalg.solve_triangular(inverse, top.T, upper=True)


class OrthogonalProjection(nn.Module):
    """A linear map without bias that keeps inner products, as far as the widths let it.

    Its weight has orthonormal columns, or rows where it makes vectors narrower. It begins at random.
    """

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.narrows = width_out < width_in
        shape = max(width_in, width_out), min(width_in, width_out)
        self.reflections = nn.Parameter(torch.geqrf(torch.randn(shape))[0].tril(-1))

    @property
    def weight(self) -> Tensor:
        """[width_out, width_in]."""
        columns = orthonormal_columns(self.reflections)
        return columns.T if self.narrows else columns

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class VkD(Distiller):
    """Smooth L1 distance of the student's vector, projected orthogonally, to the teacher's, standardised.

    The teacher's vector is standardised in itself: mean 0 and variance 1 over its entries. The loss is one
    of each sample, so that a spot mode takes samples out of it one by one.

    All orthogonal maps are within reach of the published parametrisation and of this one, which is made of
    Householder reflections alike, without the fixed rotation that the published code puts before them.
    """

    takes = "vector"

    def __init__(
        self, student: StagedNet, teacher: StagedNet, where: str | Sequence[str], weight: NotNegative
    ):
        super().__init__(student, teacher, where, weight)
        self.projections = nn.ModuleDict(
            {
                spot.name: OrthogonalProjection(spot.student_shape[0], spot.teacher_shape[0])
                for spot in self.spots
            }
        )

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        projected = self.projections[spot.name](student)
        target = F.layer_norm(teacher, teacher.shape[1:])
        return kept_mean(F.smooth_l1_loss(projected, target, reduction="none").mean(dim=1), keep)
