"""What some methods train before the student learns: a paraphraser of the teacher (FT), the student's stages
(FSP)."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sakd.data import Dataset
from sakd.distillers import Distiller
from sakd.networks import StagedNet
from sakd.spots import Fixed
from sakd.training.execution import Execution
from sakd.training.trainer import Trainer, spots_of


class Pretraining(Trainer):
    """Trains what ``distiller.pretrained(student)`` names, by ``distiller.pretraining_loss`` alone: no
    labels, no spot mode, no tests.

    Arguments as a Trainer's; ``name`` is the loss's.
    """

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet,
        name: str,
        distiller: Distiller,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        execution: Execution = Execution(),  # noqa: B008, immutable
    ):
        self.name, self.distiller = name, distiller
        self.pretrained = distiller.pretrained(student).requires_grad_(True)
        everything = Fixed(spots_of(student, teacher, [distiller]), student, teacher)
        keys = {
            "optimizer": optimizer,
            "schedule": schedule,
            "seed": seed,
            "device": device,
            "execution": execution,
        }
        super().__init__(student, teacher, {name: distiller}, everything, **keys)

    @property
    def product(self) -> nn.Module:
        return self.pretrained

    def learned(self) -> Iterator[nn.Parameter]:
        return self.pretrained.parameters()

    def train_step(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
        images = self.execution.arrange(images)
        with torch.no_grad(), self.execution.networks(self.device):
            teacher = self.teacher_features(images)
        with self.execution.networks(self.device):
            loss = self.distiller.pretraining_loss(self.student, images, teacher)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {f"loss/{self.name}": loss.detach()}

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        return {}
