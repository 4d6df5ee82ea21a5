"""Pretraining, before the student learns: FT's paraphraser, FSP's first stages of the student."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sakd.distillers import Distiller
from sakd.names import safe
from sakd.networks import StagedNet
from sakd.spots import Fixed
from sakd.training.execution import Execution
from sakd.training.schedules import Schedule
from sakd.training.teacher import Teacher
from sakd.training.trainer import NO_VIEWS, Features, Step, Trainer, Views, spots_of


class Pretraining(Trainer):
    """Trains what ``distiller.pretrained(student)`` names, by ``distiller.pretraining_loss`` alone.

    There are no labels, no spot mode and no tests. Arguments as a Trainer's; ``name`` is the loss's.
    """

    tested = False

    def __init__(
        self,
        student: StagedNet,
        teacher: Teacher,
        name: str,
        distiller: Distiller,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Schedule | Callable[[Optimizer], LRScheduler] | None = None,
        clip_gradients: float | None = None,
        accumulate: int = 1,
        seed: int = 0,
        device: torch.device | str = "cpu",
        execution: Execution = Execution(),  # noqa: B008, immutable
    ):
        self.name, self.distiller = name, distiller
        self.pretrained = distiller.pretrained(student).requires_grad_(True)
        everything = Fixed(spots_of(student, teacher.network, [distiller]), student, teacher.network)
        super().__init__(
            student,
            teacher,
            {name: distiller},
            everything,
            optimizer=optimizer,
            schedule=schedule,
            clip_gradients=clip_gradients,
            accumulate=accumulate,
            seed=seed,
            device=device,
            execution=execution,
        )

    @property
    def measurements(self) -> tuple[str, ...]:
        return (safe(f"loss/{self.name}"),)

    @property
    def product(self) -> nn.Module:
        return self.pretrained

    def learned(self) -> Iterator[nn.Parameter]:
        return self.pretrained.parameters()

    def train_step(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        teacher_features: Features | None = None,
        mixing: None = None,
        views: Views = NO_VIEWS,
    ) -> Step:
        images = self.execution.arrange(images)
        with self.execution.autocast(self.device):
            loss = self.distiller.pretraining_loss(self.student, images, teacher_features)
        self.steppers["student"].backward(loss, len(images))
        if self.steps_now:
            self.steppers["student"].step()
        return Step({self.name: loss.detach()}, None, loss.detach().reshape(1))
