"""Measurements of an epoch: means over its steps, and a network's score on images.

They are kept on the device.
"""

import math
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing

import torch
from torch import Tensor
from torch.nn import functional as F

from sakd.data import Batch
from sakd.errors import NonFiniteLossError
from sakd.networks import StagedNet


class RunningMeans:
    """Means of measurements over samples; the first step at which one was not finite.

    What a step measured is put aside on the device, and summed up when it is asked for: that costs no launch.
    """

    def __init__(self, names: Sequence[str], epoch: int):
        self.names, self.epoch = names, epoch
        self.samples = self.steps = 0
        self.sums = torch.zeros(len(names))
        self._aside: list[tuple[Tensor, int]] = []

    def add(self, measured: Tensor, samples: int) -> None:
        """Take in a step's measurements.

        ``measured``: [M], one for each name, means over ``samples``; nobody else may write into it.
        """
        self._aside.append((measured, samples))

    def compute(self) -> dict[str, float]:
        """The means so far; waits for the device.

        Raises NonFiniteLossError naming what was first not finite.
        """
        if self._aside:
            measured, samples = zip(*self._aside, strict=True)
            self._aside.clear()
            for of_step, number in zip(torch.stack(measured).cpu(), samples, strict=True):
                self._sum_up(of_step, number)
        means = {
            name: total / self.samples for name, total in zip(self.names, self.sums.tolist(), strict=True)
        }
        assert all(map(math.isfinite, means.values()))
        return means

    def _sum_up(self, measured: Tensor, samples: int) -> None:
        self.steps += 1
        finite = measured.isfinite()
        if not bool(finite.all()):
            names = ", ".join(
                name for name, fine in zip(self.names, finite.tolist(), strict=True) if not fine
            )
            raise NonFiniteLossError(
                f"{names} became NaN or infinite at epoch {self.epoch}, step {self.steps}; expected finite "
                "losses. A lower learning rate or distillation weight may help."
            )
        self.samples += samples
        self.sums += measured * samples


class Score:
    """Counts images that a network gets right, and sums its cross-entropy, on the device.

    With ``top5`` also images whose class is among the five likeliest.
    """

    def __init__(self, top5: bool = False):
        self.top5 = top5
        self.correct = self.in_first = self.loss = self.samples = 0

    @torch.no_grad()
    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Take in a batch. ``logits``: [B, classes]; ``labels``: int64 [B]."""
        logits = logits.float()
        self.correct += (logits.argmax(1) == labels).sum()
        if self.top5:
            self.in_first += (logits.topk(5, dim=1).indices == labels[:, None]).sum()
        self.loss += F.cross_entropy(logits, labels, reduction="sum")
        self.samples += len(labels)

    def compute(self) -> dict[str, float]:
        """``accuracy`` (and ``top5``) in percent and mean cross-entropy ``loss``; waits for the device."""
        accuracy, loss = 100 * int(self.correct) / self.samples, float(self.loss) / self.samples
        top5 = {"top5": 100 * int(self.in_first) / self.samples} if self.top5 else {}
        return {"accuracy": accuracy, "loss": loss, **top5}


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


def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """A bool scalar: True if all values are finite, in a few launches for hundreds of tensors."""
    floats = [tensor for tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not floats:
        return torch.tensor(True)
    # Their largest magnitudes: NaN or infinite where any value is, while a sum of squares might overflow.
    return torch.stack(torch._foreach_norm(floats, math.inf)).isfinite().all()


def broken(measured: Mapping[str, float]) -> list[str]:
    """Names of evaluation losses that are not finite."""
    return [
        f"{split}/loss" for split in ("val", "test") if not math.isfinite(measured.get(f"{split}/loss", 0.0))
    ]
