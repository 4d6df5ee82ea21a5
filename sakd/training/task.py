"""What a student learns from labels, beside what it learns from its teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Literal

import torch
from annotated_types import MinLen
from torch import Tensor
from torch.nn import functional as F

from sakd.data import Mix, Mixing
from sakd.errors import ConfigError
from sakd.ranges import BelowOne, NotNegative, Positive

# What distillers say of themselves that cannot do with mixed images, and why not.
UNMIXED = {
    "uses_labels": "takes each image for one of its class; expected 0, or a distiller without labels",
    "uses_views": "compares views of one image; expected 0, or a distiller without views",
}


@dataclass(frozen=True)
class Task:
    """Cross-entropy with the labels.

    ``weight``: what it counts beside distillers; 0: these are all that the student learns from.
    ``class_weights``: of each class, or ``balanced``: every class of the training images counts alike, and
    their mean over the images is 1. ``mixup``, ``cutmix``: as ``Mix`` has them.
    """

    weight: NotNegative = 1.0
    label_smoothing: BelowOne = 0.0
    class_weights: Annotated[list[Positive], MinLen(2)] | Literal["balanced"] | None = None
    mixup: NotNegative = 0.0
    cutmix: NotNegative = 0.0

    @property
    def mix(self) -> Mix:
        return Mix(self.mixup, self.cutmix)

    @property
    def is_plain(self) -> bool:
        """Whether its loss is the cross-entropy itself."""
        return (self.weight, self.label_smoothing, self.class_weights) == (1, 0, None)

    def weights_of_classes(self, labels: Tensor, classes: int) -> Tensor | None:
        """Weights float32 [classes] on the labels' device, None where all count alike.

        ``labels``: int64 [N], of the training images.
        """
        if self.class_weights is None:
            return None
        if self.class_weights == "balanced":
            counts = labels.cpu().bincount(minlength=classes)
            return (len(labels) / (counts > 0).sum() / counts).where(counts > 0, 0).to(labels.device)
        return torch.tensor(self.class_weights, dtype=torch.float32, device=labels.device)

    def loss(
        self, logits: Tensor, labels: Tensor, mixing: Mixing | None = None, by_class: Tensor | None = None
    ) -> Tensor:
        """The loss as it counts, a scalar.

        ``logits``: float32 [B, classes]; ``labels``: int64 [B]; ``by_class``: from ``weights_of_classes``.
        With class weights, the mean over the batch is one by its samples' weights. Where images are mixed,
        it is the loss with their own labels and that with the others', by their share.
        """
        loss = self._cross_entropy(logits, labels, by_class)
        if mixing is not None:
            loss = self._cross_entropy(logits, mixing.labels, by_class).lerp(loss, mixing.share)
        return loss if self.weight == 1 else self.weight * loss

    def _cross_entropy(self, logits: Tensor, labels: Tensor, by_class: Tensor | None) -> Tensor:
        return F.cross_entropy(logits, labels, by_class, label_smoothing=self.label_smoothing)

    def check_distillers(self, distillers: Mapping[str, object]) -> None:
        """Raise ConfigError for distillers, by name, that cannot do with mixed images.

        They may be given as classes.
        """
        for key, trait in product(("mixup", "cutmix"), UNMIXED):
            for name, distiller in distillers.items():
                if getattr(self, key) and getattr(distiller, trait, False):
                    raise ConfigError(
                        f"task.{key}: found {getattr(self, key)} with distiller.losses.{name}, which "
                        f"{UNMIXED[trait]}"
                    )
