"""What a spot mode decided: of every training image in an epoch, and, in the end, of images as they come."""

from collections.abc import Generator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.data import Batch
from sakd.networks import StagedNet
from sakd.spots import SpotMode


def mostly(kept: Tensor) -> Tensor:
    """The mask itself, or of weights those above one half, as decisions are recorded."""
    return kept if kept.dtype == torch.bool else kept > 0.5


class KeptTable:
    """Who was kept where in the epoch under way, on the device: a step costs one launch and no wait.

    An image that the epoch leaves out (``sakd.data.train_batches``) was kept nowhere; one that was kept by a
    weight, where that is above one half.
    """

    def __init__(self, samples: int, spots: int, device: torch.device):
        self.table = torch.zeros(samples, spots, dtype=torch.bool, device=device)

    def begin_epoch(self) -> None:
        self.table.zero_()

    def add(self, indices: Tensor, kept: Tensor) -> None:
        """Take in a step. ``indices``: int64 [B]; ``kept``: [B, spots], a mask or weights."""
        self.table.index_copy_(0, indices, mostly(kept))

    def packed(self) -> np.ndarray:
        """The epoch's bits, uint8 [spots, ceil(samples / 8)], as ``numpy.packbits``; waits for the device."""
        return np.packbits(self.table.cpu().numpy().T, axis=1)


@torch.no_grad()
def seen(
    student: StagedNet, teacher: StagedNet, spot_mode: SpotMode, batches: Generator[Batch, None, None]
) -> dict[str, np.ndarray]:
    """What is to be said of each image of ``batches``, in their order, with both networks in eval.

    By name, for ``student`` and ``teacher``: ``…_confidence`` float32 [M], the largest softmax probability,
    ``…_right`` bool [M], ``…_loss`` float32 [M], the cross-entropy. Where the mode learns also
    ``probability`` float32 [M, spots] of the teacher, without noise; ``route`` bool [M, spots], True where
    that is the likelier choice; and ``kept`` bool [M, spots], what the mode makes of that route. The
    student's mode is put back.
    """
    parts: list[dict[str, Tensor]] = []
    training = student.training
    student.eval()
    with closing(batches):
        for images, labels, _ in batches:
            features = {"student": student.features(images), "teacher": teacher.features(images)}
            part = {}
            for name, own in features.items():
                logits = own["logits"].float()
                confidence, predicted = F.softmax(logits, dim=1).max(dim=1)
                part[f"{name}_confidence"] = confidence
                part[f"{name}_right"] = predicted == labels
                part[f"{name}_loss"] = F.cross_entropy(logits, labels, reduction="none")
            probability = spot_mode.probability(features["student"], features["teacher"])
            if probability is not None:
                route = probability >= 0.5
                kept = mostly(spot_mode.keep(route.float()))
                part |= {"probability": probability, "route": route, "kept": kept}
            parts.append(part)
    student.train(training)
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
