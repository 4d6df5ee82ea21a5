"""The base of all distillers, and what they share."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from sakd.data import Asked, View
from sakd.errors import ConfigError, check_number
from sakd.networks import StagedNet
from sakd.plugin import Plugin
from sakd.ranges import NotNegative
from sakd.spots import Spot, spots_at

Features = Mapping[str, Tensor]
Seen = tuple[Features, Features]  # of a view of the images: the student's, the teacher's


class Distiller(Plugin):
    """*What* to distil: a published loss at each spot of a kind, over the rows kept there.

    A distiller sees features and masks; never labels' cross-entropy, optimizers, the policy or the networks,
    but for what a ``Classifier`` reads of them.
    A new one gives ``spot_loss``; a method that compares spots with each other overrides ``loss``. Modules
    that a spot needs are built in ``__init__`` from ``self.spots``; what depends on the training set (a
    memory bank) is built in ``prepare``. The teacher's features need no detaching: it runs without gradients.

    ``weight`` scales the loss; with ``ramp_epochs`` it begins small: at epoch e of the first ``ramp_epochs``
    it counts e / ramp_epochs of the whole.

    ``takes`` says which features the loss is defined for: "map", "vector" or "both"; ``entry_by_entry``, that
    it compares them so, and needs as many of both networks; ``uses_labels``, that it
    takes each image for one of its class alone, as ``self.labels`` has it: then none may be mixed.

    One that says ``uses_views`` names further ``views`` of each image, drawn anew in each epoch. Both
    networks see each in a pass of its own, from which the student learns the label, too, and ``loss`` gets
    what they made of them as one argument more. ``keep`` is of samples, each with all its views.

    A method with a stage of training before the student's own gives ``pretrained`` and ``pretraining_loss``;
    where that needs the teacher alone, ``pretraining_shared`` says that one pretraining serves all its
    students.

    Raises ConfigError for a weight or ``ramp_epochs`` below 0, or a spot with other features than it takes.
    """

    takes = "both"
    entry_by_entry = False
    uses_labels = False
    uses_views = False
    views: Sequence[View] = ()
    pretraining_shared = False

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        where: str | Sequence[str],
        weight: NotNegative,
        ramp_epochs: NotNegative = 0,
    ):
        super().__init__()
        check_number(f"weight of {type(self).__name__}", weight, least=0)
        check_number(f"ramp_epochs of {type(self).__name__}", ramp_epochs, least=0)
        self.spots = spots_at(where, student, teacher)
        for spot in self.spots:
            found = "map" if len(spot.student_shape) == 3 else "vector"
            if self.takes not in (found, "both"):
                raise ConfigError(
                    f"where={where}: found a {found} at {spot.name}, {type(self).__name__} takes "
                    f"{self.takes}s"
                )
            if self.entry_by_entry and spot.student_shape != spot.teacher_shape:
                raise ConfigError(
                    f"where={where}: found {spot.student_shape[0]} entries in the student and "
                    f"{spot.teacher_shape[0]} in the teacher at {spot.name}, {type(self).__name__} takes as "
                    "many of both"
                )
        self.weight, self.ramp_epochs = float(weight), ramp_epochs
        if ramp_epochs:  # a tensor, so that a captured step sees it change
            self.register_buffer("share", torch.ones(()), persistent=False)

    def begin_epoch(self, epoch: int) -> None:
        super().begin_epoch(epoch)
        if self.ramp_epochs:
            self.share.fill_(min(epoch / self.ramp_epochs, 1))

    def forward(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
        views: Sequence[Seen] = (),
    ) -> Tensor:
        """The loss as it counts, with its weight and ramp: a scalar.

        Arguments as those of ``loss``; ``views``: features of each of its ``views``, in their order.
        """
        own = (views,) if self.uses_views else ()
        weighted = self.weight * self.loss(student_features, teacher_features, keep, indices, *own)
        return self.share * weighted if self.ramp_epochs else weighted

    def loss(
        self,
        student_features: Features,
        teacher_features: Features,
        keep: Mapping[Spot, Tensor],
        indices: Tensor,
    ) -> Tensor:
        """The published loss, a scalar, summed over the spots.

        Features: by stage, [B, …]. ``keep[spot]``: [B], a mask, or weights in [0, 1]. ``indices``: [B], the
        samples' places in the training set.
        """
        losses = []
        for spot in self.spots:
            student = at_least_float32(student_features[spot.student])
            teacher = at_least_float32(teacher_features[spot.teacher])
            losses.append(self.spot_loss(spot, student, teacher, keep[spot], indices))
        return torch.stack(losses).sum()

    def spot_loss(
        self, spot: Spot, student: Tensor, teacher: Tensor, keep: Tensor, indices: Tensor
    ) -> Tensor:
        """The published loss on the kept rows times n_kept / B, a scalar; exactly 0 where none is kept.

        ``student``, ``teacher``: features [B, …] at the spot, float32 or more; ``keep``: [B], bool, or a
        weight of each row, which then counts as so many rows: sums over kept rows become weighted ones, the
        number of rows their sum of weights, and a pair of rows counts by the product. ``indices``: [B], the
        samples' places in the training set. Shapes must not depend on ``keep``.
        """
        raise NotImplementedError

    def pretrained(self, student: StagedNet) -> nn.Module:
        """The modules that a pretraining trains: this distiller's, or stages of the student.

        Raises ConfigError if there is no pretraining.
        """
        raise ConfigError(f"{type(self).__name__} has no pretraining")

    def pretraining_loss(self, student: StagedNet, images: Tensor, teacher_features: Features) -> Tensor:
        """The scalar that a pretraining minimises.

        ``images``: [B, C, H, W]; ``teacher_features``: of them.
        """
        raise NotImplementedError


def check_at_logits(distiller: Distiller, where: str | Sequence[str]) -> None:
    """Raise ConfigError for a spot of the distiller that is not the logits, whose entries labels name."""
    _check_at(distiller, where, ("logits", "logits"), "logits")


def check_at_last_stage(
    distiller: Distiller, where: str | Sequence[str], student: StagedNet, teacher: StagedNet
) -> None:
    """Raise ConfigError for a spot of the distiller that is not the last map of both networks."""
    _check_at(distiller, where, (student.maps[-1], teacher.maps[-1]), "last stage")


def _check_at(distiller: Distiller, where: object, stages: tuple[str, str], called: str) -> None:
    for spot in distiller.spots:
        if (spot.student, spot.teacher) != stages:
            raise ConfigError(
                f"where={where}: found {spot.name}, {type(distiller).__name__} takes the {called} alone"
            )


def targets(labels: Tensor, logits: Tensor) -> Tensor:
    """Where each row of logits [B, classes] has its label's entry, of ``labels`` [B]: bool [B, classes]."""
    return labels[:, None] == torch.arange(logits.shape[1], device=logits.device)


def at_least_float32(features: Tensor) -> Tensor:
    """Features in the precision that losses are computed in, also where a network gave half of it."""
    return features.to(torch.promote_types(features.dtype, torch.float32))


def kept_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Sum of kept ``values`` [B] over B: n_kept / B times their mean."""
    return weighed(values, keep).sum() / len(keep)


def kept_pair_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean of ``values`` [B, B] over pairs of kept rows, times n_kept / B; 0 where none is kept."""
    return weighed(values, kept_pairs(keep)).sum() / (kept_count(keep) * len(keep))


def weighed(values: Tensor, keep: Tensor) -> Tensor:
    """Values, each times its weight where ``keep``, of a shape that fits, has weights; 0 where not kept."""
    if keep.dtype == torch.bool:
        return torch.where(keep, values, 0)
    return torch.where(keep > 0, keep * values, 0)


def is_kept(keep: Tensor) -> Tensor:
    """The mask itself, or of weights those above 0."""
    return keep if keep.dtype == torch.bool else keep > 0


def kept_count(keep: Tensor) -> Tensor:
    """How many are kept, or the sum of their weights, to divide by: 1 where none is."""
    count = keep.sum()
    return count.clamp_min(1) if keep.dtype == torch.bool else torch.where(count > 0, count, 1)


def kept_pairs(keep: Tensor) -> Tensor:
    """Which pairs of rows are kept, or their weights: [B] to [B, B]."""
    return keep[:, None] * keep[None, :]


def distinct_spots(distillers: Iterable[Distiller]) -> set[Spot]:
    """All spots that any of the distillers uses."""
    return {spot for distiller in distillers for spot in distiller.spots}


def distinct_views(distillers: Iterable[Distiller]) -> tuple[Asked, ...]:
    """All views that any of the distillers asks for, each once, with its place among those of who asks."""
    return tuple(dict.fromkeys(asked for distiller in distillers for asked in enumerate(distiller.views)))
