"""Probabilistic knowledge transfer.

Passalis and Tefas, "Learning Deep Representations with Probabilistic Knowledge Transfer", ECCV 2018.
"""

from torch import Tensor

from sakd.distillers.base import Distiller, kept_pair_mean
from sakd.spots import Spot

EPSILON = 1e-7  # the published code's


def conditional_probabilities(embeddings: Tensor, keep: Tensor) -> Tensor:
    """Cosine similarities of rows [B, d], moved to [0, 1] and divided by their row's sum: [B, B].

    The sum is over the kept rows.
    """
    unit = embeddings / (embeddings.norm(dim=1, keepdim=True) + EPSILON)
    similarity = (unit @ unit.T + 1) / 2
    return similarity / (similarity * keep[None, :]).sum(dim=1, keepdim=True).clamp_min(EPSILON)


class PKT(Distiller):
    """Divergence between the two networks' conditional probabilities over the kept rows, at the embedding."""

    takes = "vector"

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        p_s, p_t = conditional_probabilities(student, keep), conditional_probabilities(teacher, keep)
        return kept_pair_mean(p_t * ((p_t + EPSILON) / (p_s + EPSILON)).log(), keep)
