"""Measurements of an epoch: means over its steps, and a network's score on images.

They are kept on the device.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.data import Batch
from sakd.errors import NonFiniteLossError
from sakd.networks import StagedNet

NEVER = 2**62  # a step that is not reached


class RunningMeans:
    """Means of measurements over samples, kept on the device.

    Beside them, the first step at which each was not finite.
    """

    def __init__(self, names: Sequence[str], epoch: int):
        self.names, self.epoch = names, epoch
        self.samples = 0
        self.sums = self.first_bad = None

    def add(self, measured: Tensor, samples: int, step: int) -> None:
        """Take in a step's measurements.

        ``measured``: [M], one for each name, means over ``samples``.
        """
        self.samples += samples
        bad = torch.where(measured.isfinite(), NEVER, step)
        if self.sums is None:
            self.sums, self.first_bad = torch.zeros_like(measured), torch.full_like(bad, NEVER)
        self.sums += measured * samples
        self.first_bad = torch.minimum(self.first_bad, bad)

    def compute(self) -> dict[str, float]:
        """The means so far; waits for the device.

        Raises NonFiniteLossError naming what was first not finite.
        """
        bad = dict(zip(self.names, self.first_bad.tolist(), strict=True))
        first = min(bad.values())
        if first < NEVER:
            names = ", ".join(name for name, step in bad.items() if step == first)
            raise NonFiniteLossError(
                f"{names} became NaN or infinite at epoch {self.epoch}, step {first}; expected finite "
                "losses. A lower learning rate or distillation weight may help."
            )
        means = {
            name: total / self.samples for name, total in zip(self.names, self.sums.tolist(), strict=True)
        }
        assert all(map(math.isfinite, means.values()))
        return means


class Score:
    """Counts images that a network gets right, and sums its cross-entropy, on the device."""

    def __init__(self):
        self.correct = self.loss = self.samples = 0

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch. ``logits``: [B, classes]; ``labels``: int64 [B]."""
        logits = logits.float()
        self.correct += (logits.argmax(1) == labels).sum()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        self.samples += len(labels)

    def compute(self) -> dict[str, float]:
        """The ``accuracy`` in percent and mean cross-entropy ``loss``; waits for the device."""
        return {"accuracy": 100 * int(self.correct) / self.samples, "loss": float(self.loss) / self.samples}


@torch.no_grad()
def evaluate(network: StagedNet, batches: Generator[Batch, None, None]) -> dict[str, float]:
    """Measure ``accuracy`` in percent and mean cross-entropy ``loss`` of a network in eval.

    Its mode is put back.
    """
    score, training = Score(), network.training
    network.eval()
    with closing(batches):
        for images, labels, _ in batches:
            score.add(network(images), labels)
    network.train(training)
    return score.compute()


def broken(measured: Mapping[str, float]) -> list[str]:
    """Names of evaluation losses that are not finite."""
    return [
        f"{split}/loss" for split in ("val", "test") if not math.isfinite(measured.get(f"{split}/loss", 0.0))
    ]
