"""MLKD: softened probabilities of two views of each image, compared by sample, by batch and by class.

Jin, Wang, Lin, "Multi-Level Logit Distillation", CVPR 2023.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn import functional as F

from sakd.data import View
from sakd.distillers.base import (
    Distiller,
    Features,
    Seen,
    at_least_float32,
    check_at_logits,
    is_kept,
    kept_count,
    kept_mean,
    kept_pairs,
    weighed,
)
from sakd.distillers.kd import standardised
from sakd.errors import ConfigError, check_number
from sakd.networks import StagedNet
from sakd.ranges import NotNegative, Positive
from sakd.spots import Spot


def share_up_to_median(values: Tensor, keep: Tensor) -> Tensor:
    """The share of the kept ``values`` [N] that are at most their median: a half, or more if some are equal.

    Of weights, it is the share of the weight; 0 where nothing is kept. A scalar.
    """
    weights = keep.to(values.dtype)
    up_to = weighed(values <= values[:, None], weights).sum(dim=1)  # the weight at or below each
    reaches_half = is_kept(keep) & (2 * up_to >= weights.sum())
    least = torch.where(reaches_half, up_to, torch.inf).amin()
    return torch.where(weights.sum() > 0, least / kept_count(weights), 0)


def log_softened(logits: Tensor, temperatures: Tensor) -> Tensor:
    """Logarithms of softmax(z / T) at each of the ``temperatures`` [T, 1, 1]: [B, C] to [T, B, C]."""
    return F.log_softmax(logits / temperatures, dim=2)


def divergences(log_s: Tensor, log_t: Tensor, temperatures: Tensor) -> Tensor:
    """KD's divergence of each row at each of the ``temperatures`` [T, 1, 1]: [T, B, C] twice to [T, B]."""
    pointwise = F.kl_div(log_s, log_t, reduction="none", log_target=True)
    return (temperatures**2 * pointwise).sum(dim=2)


def of_batch(p_s: Tensor, p_t: Tensor, keep: Tensor) -> Tensor:
    """Squared differences of the samples' p pᵀ over B, of probabilities [T, B, C]: a scalar."""
    difference = p_s @ p_s.mT - p_t @ p_t.mT
    return weighed(difference.square(), kept_pairs(keep)).sum() / len(keep)


def of_classes(p_s: Tensor, p_t: Tensor, keep: Tensor) -> Tensor:
    """Squared differences of the classes' pᵀ p over C, times n_kept / B, of probabilities [T, B, C]."""
    similarity_s, similarity_t = (weighed(p, keep[:, None]).mT @ p for p in (p_s, p_t))
    return (similarity_s - similarity_t).square().sum() / p_s.shape[2] * keep.sum() / len(keep)


class MLKD(Distiller):
    """KD at several ``temperatures``, of each image and of further ``views`` of it; and relations at these.

    Of the image itself: the divergence of KD, the squared difference of the samples' similarities, and that
    of the classes'. Of each of the ``views``: KD's divergence. With ``standardise``, divergences are those of
    the logits' z-scores.

    It does what the published code does. Its masks, of the samples and of the classes that the teacher is no
    surer of than of the median, meet losses that are means already: all that they do is to multiply these by
    their share, mostly a half. And a view is compared at ``view_temperatures`` alone; at the others the image
    itself stands once more in its place, unmasked.

    The rows are those that the spot at the logits keeps, each with all its views; medians, similarities and
    the teacher's confidence are of these rows alone. A policy sees the image itself, not its views. It stands
    in the place of KD.

    Raises ConfigError for a spot that is not the logits, or ``view_temperatures`` that are not among the
    others.
    """

    takes = "vector"
    uses_views = True

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        temperatures: Annotated[list[Positive], MinLen(1)],
        view_temperatures: list[Positive],
        views: Annotated[list[View], MinLen(1)],
        standardise: bool = False,
    ):
        super().__init__(student, teacher, where, weight)
        check_at_logits(self, where)
        for temperature in temperatures:
            check_number("temperatures of MLKD", temperature, least=0, above=True)
        for temperature in view_temperatures:
            if temperature not in temperatures:
                raise ConfigError(
                    f"view_temperatures of MLKD: found {temperature}, expected some of the temperatures "
                    f"{temperatures}"
                )
        self.views, self.standardise = tuple(views), standardise
        in_views = [temperature in view_temperatures for temperature in temperatures]
        self.register_buffer("temperatures", torch.tensor(temperatures)[:, None, None], persistent=False)
        self.register_buffer("in_views", torch.tensor(in_views)[:, None], persistent=False)

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
        views: Sequence[Seen],
    ) -> Tensor:
        (spot,) = self.spots
        kept = keep[spot]
        first = (student_features, teacher_features)
        compared = [self._log_softened(*seen, self.standardise) for seen in (first, *views)]
        own, *of_views = (divergences(*both, self.temperatures) for both in compared)
        of_views = [torch.where(self.in_views, of_view, own) for of_view in of_views]
        log_s, log_t = self._log_softened(*first) if self.standardise else compared[0]
        unsure, rare = self._masked(at_least_float32(teacher_features["logits"]), kept)
        by_sample = kept_mean(own.sum(dim=0), kept)
        by_batch, by_class = (relation(log_s.exp(), log_t.exp(), kept) for relation in (of_batch, of_classes))
        in_views = kept_mean(torch.stack(of_views).sum(dim=(0, 1)), kept)
        return unsure * (by_sample + by_batch) + rare * by_class + in_views

    def _log_softened(
        self, student: Features, teacher: Features, standardise: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Logarithms of both networks' softened probabilities, [T, B, C] each."""
        logits = [at_least_float32(features["logits"]) for features in (student, teacher)]
        z_s, z_t = map(standardised, logits) if standardise else logits
        return log_softened(z_s, self.temperatures), log_softened(z_t, self.temperatures)

    def _masked(self, teacher: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Shares of the samples, and of the classes, that the teacher is no surer of than of the median."""
        probabilities = teacher.softmax(dim=1)
        of_class = weighed(probabilities, keep[:, None]).sum(dim=0)
        every_class = torch.ones_like(of_class, dtype=torch.bool)
        return (
            share_up_to_median(probabilities.amax(dim=1), keep),
            share_up_to_median(of_class, every_class),
        )
