"""The only training loop: a student alone, or a student that learns from a teacher at spots that a spot mode
chooses."""

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sakd.data import Batch, Dataset, evaluation_batches, steps_per_epoch, train_batches
from sakd.distillers import Distiller, distinct_spots
from sakd.errors import CheckpointError, ConfigError, NonFiniteLossError
from sakd.networks import StagedNet
from sakd.networks.folded import refold
from sakd.spots import Spot, SpotMode, all_spots, frozen_alias
from sakd.streams import drawing, initialising, stream, stream_seed
from sakd.training.execution import Execution

Progress = Callable[[int, int, int, Callable[[], dict[str, float]]], None]

NEVER = 2**62  # a step that is not reached


class Trainer:
    """Trains ``student``; with a teacher, distillers and a spot mode, distils it.

    ``optimizer`` and ``policy_optimizer`` build an optimizer from parameters, ``schedule`` builds a learning
    rate schedule from an optimizer and is stepped once an epoch, for both. Random numbers come from streams
    of ``seed``.

    Raises ConfigError if teacher, distillers and spot mode are not given together, or the spots contradict
    each other."""

    def __init__(
        self,
        student: StagedNet,
        teacher: StagedNet | None = None,
        distillers: Mapping[str, Distiller] | None = None,
        spot_mode: SpotMode | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Callable[[Optimizer], LRScheduler] | None = None,
        policy_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        execution: Execution = Execution(),  # noqa: B008, immutable
    ):
        given = [bool(part) for part in (teacher is not None, distillers, spot_mode is not None)]
        if any(given) != all(given):
            raise ConfigError(
                "found some of teacher, distillers and spot mode; expected all of them, or none"
            )
        self.device = torch.device(device)
        self.execution = execution
        execution.check(self.device)
        self.seed = seed
        self.epoch = 0  # epochs done
        self.student = self._placed(student).train()
        self.teacher = None if teacher is None else self._placed(teacher).requires_grad_(False).eval()
        self.distillers = self._placed(nn.ModuleDict(distillers or {})).train()
        self.spot_mode = None if spot_mode is None else self._placed(spot_mode).train()
        self.spots = spots_of(student, teacher, self.distillers.values()) if teacher else []
        if spot_mode is not None and list(spot_mode.spots) != self.spots:
            raise ConfigError(
                f"the spot mode is built for spots {[s.name for s in spot_mode.spots]}, "
                f"the distillers use {[s.name for s in self.spots]}"
            )
        self.optimizer = optimizer([parameter for parameter in self.learned() if parameter.requires_grad])
        self.schedules = {} if schedule is None else {"student": schedule(self.optimizer)}
        self.policy_optimizer = None
        if spot_mode is not None and spot_mode.learns:
            if policy_optimizer is None:
                raise ConfigError(
                    f"{type(spot_mode).__name__} learns: expected a policy_optimizer, found none"
                )
            self.policy_parameters = list(self.spot_mode.parameters())
            self.policy_optimizer = policy_optimizer(self.policy_parameters)
            if schedule is not None:
                self.schedules["policy"] = schedule(self.policy_optimizer)
            self.routed_student = frozen_alias(self.student, execution.fold_batch_norm)
        self.policy_stream = torch.Generator(device=self.device)
        self.distiller_streams = {name: torch.Generator(device=self.device) for name in self.distillers}
        self.prepared = False
        self.student_features = execution.function(self.student.features)
        if teacher is not None:
            self.frozen_teacher = frozen_alias(self.teacher, execution.fold_batch_norm)
            self.teacher_features = execution.function(self.frozen_teacher.features)
        self.step = execution.step(self)

    def _placed(self, module: nn.Module) -> nn.Module:
        return self.execution.place(module, self.device)

    def generators(self) -> list[torch.Generator]:
        """What a step draws random numbers from, beside the device's own generator (dropout)."""
        return [self.policy_stream, *self.distiller_streams.values()]

    def forget_gradients(self) -> None:
        for optimizer in (self.optimizer, self.policy_optimizer):
            if optimizer is not None:
                optimizer.zero_grad(set_to_none=True)

    @property
    def product(self) -> nn.Module:
        """What a finished training leaves."""
        return self.student

    def learned(self) -> Iterator[nn.Parameter]:
        """What the optimizer trains, but for what takes no gradients."""
        yield from self.student.parameters()
        yield from self.distillers.parameters()

    def prepare(self, dataset: Dataset) -> None:
        """Let the distillers build what depends on the training set; ``fit`` does it, and a saved state needs
        it first."""
        if self.prepared:
            return
        labels = dataset.train.labels.to(self.device)
        for name, distiller in self.distillers.items():
            with initialising(self.seed, f"prepare/{name}"):
                distiller.prepare(labels, dataset.classes, self.distiller_streams[name])
        self.distillers.to(self.device)
        self.prepared = True

    def train_step(self, images: Tensor, labels: Tensor, indices: Tensor) -> dict[str, Tensor]:
        """One update of the student, and of the policy where it learns.

        ``images``: float32 [B, C, H, W], normalised; ``labels``, ``indices``: int64 [B]. All measurements
        stay on the device: nothing here waits for it."""
        images = self.execution.arrange(images)
        with self.execution.networks(self.device):
            student = self.student_features(images)
        losses = {"task": F.cross_entropy(student["logits"].float(), labels)}
        measured = {"train/accuracy": 100 * (student["logits"].argmax(1) == labels).float().mean()}
        if self.teacher is not None:
            with torch.no_grad(), self.execution.networks(self.device):
                teacher = self.teacher_features(images)
            with torch.autocast(
                self.device.type, enabled=False
            ):  # networks may run in bfloat16, the rest in float32
                route = self.spot_mode.route(student, teacher, self.policy_stream)
                keep = dict(zip(self.spots, self.spot_mode.keep(route).unbind(1), strict=True))
                for name, distiller in self.distillers.items():
                    losses[name] = distiller(student, teacher, keep, indices)
            measured |= {f"kept/{spot.name}": kept.float().mean() for spot, kept in keep.items()}
        del student
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        losses = {name: loss.detach() for name, loss in losses.items()}
        if self.policy_optimizer is not None:  # once the student's pass is freed, but before its weights move
            measured["loss/policy"] = self._policy_step(images, labels, teacher, route, losses["task"])
        self.optimizer.step()
        return {f"loss/{name}": loss for name, loss in losses.items()} | measured

    def _policy_step(
        self, images: Tensor, labels: Tensor, teacher: Mapping[str, Tensor], route: Tensor, task_loss: Tensor
    ) -> Tensor:
        """Policy and adapters learn from the routed network; no gradient of it reaches the student or the
        distillers."""
        refold(self.routed_student)
        with self.execution.networks(self.device):
            loss = self.spot_mode.loss(
                self.routed_student, self.frozen_teacher, images, teacher, route, labels, task_loss
            )
        gradients = torch.autograd.grad(loss, self.policy_parameters)
        for parameter, gradient in zip(self.policy_parameters, gradients, strict=True):
            parameter.grad = gradient
        self.policy_optimizer.step()
        return loss.detach()

    def train_epoch(
        self, dataset: Dataset, batch_size: int, progress: Progress | None = None
    ) -> dict[str, float]:
        """One pass over the training images; means over them of what ``train_step`` measures.

        ``progress(epoch, step, steps, means)`` is called after each step; calling ``means()`` waits for the
        device.

        Raises NonFiniteLossError, naming the first loss and step, when the epoch ends or ``means`` is called.
        """
        self.epoch += 1
        self.policy_stream.manual_seed(stream_seed(self.seed, "policy", self.epoch))
        for name, own in self.distiller_streams.items():
            own.manual_seed(stream_seed(self.seed, f"distiller/{name}", self.epoch))
        for distiller in self.distillers.values():
            distiller.begin_epoch(self.epoch)
        if self.teacher is not None:
            refold(self.frozen_teacher)  # its weights may have been loaded since
        steps = steps_per_epoch(len(dataset.train), batch_size)
        means = RunningMeans(self.epoch)
        batches = train_batches(dataset, batch_size, stream(self.seed, "data", self.epoch))
        with (
            closing(batches),
            drawing(self.seed, "layers", self.epoch, self.device),
        ):  # the latter for dropout and the like
            for step, batch in enumerate(batches, 1):
                means.add(self.step(*batch), len(batch.labels), step)
                if progress is not None:
                    progress(self.epoch, step, steps, means.compute)
        measured = means.compute() | {f"lr/{name}": rate for name, rate in self.learning_rates().items()}
        for schedule in self.schedules.values():
            schedule.step()
        return measured

    def fit(
        self, dataset: Dataset, epochs: int, batch_size: int, progress: Progress | None = None
    ) -> Iterator[dict[str, float]]:
        """Train up to and with epoch number ``epochs``; yield each epoch's measurements when it is done.

        Raises NonFiniteLossError when a loss or a weight is not finite, before the epoch's measurements are
        yielded.

        The caller may save ``state_dict()`` between epochs; a trainer that loads it goes on with the next
        epoch."""
        dataset = dataset.to(self.device)
        self.prepare(dataset)
        while self.epoch < epochs:
            start = time.perf_counter()
            measured = self.train_epoch(dataset, batch_size, progress)
            seconds = time.perf_counter() - start
            measured["images_per_second"] = len(dataset.train) / seconds
            measured |= self.evaluate(dataset)
            self._check_finite(measured)
            yield {"epoch": self.epoch, **measured, "seconds": time.perf_counter() - start}

    def evaluate(self, dataset: Dataset) -> dict[str, float]:
        """The student's accuracies and losses on the images that it does not train on."""
        measured = {}
        for name, images in (("val", dataset.val), ("test", dataset.test)):
            if images is not None:
                results = evaluate(self.student, evaluation_batches(images, dataset))
                measured |= {f"{name}/{key}": value for key, value in results.items()}
        return measured

    def _check_finite(self, measured: Mapping[str, float]) -> None:
        """The last steps of an epoch can break weights without a training loss having shown it: they must not
        be saved."""
        broken = [
            f"{name}/loss" for name in ("val", "test") if not math.isfinite(measured.get(f"{name}/loss", 0.0))
        ]
        for name, module in (
            ("student", self.student),
            ("distillers", self.distillers),
            ("spot mode", self.spot_mode),
        ):
            values = (
                [] if module is None else [value.isfinite().all() for value in module.state_dict().values()]
            )
            if values and not bool(torch.stack(values).all()):
                broken.append(f"weights of the {name}")
        if broken:
            raise NonFiniteLossError(
                f"{', '.join(broken)} became NaN or infinite in epoch {self.epoch}; expected finite values. "
                "A lower learning rate or distillation weight may help."
            )

    def learning_rates(self) -> dict[str, float]:
        rates = {"student": self.optimizer.param_groups[0]["lr"]}
        if self.policy_optimizer is not None:
            rates["policy"] = self.policy_optimizer.param_groups[0]["lr"]
        return rates

    def _parts(self) -> dict[str, Any]:
        """All that changes in training, by name: not the teacher."""
        parts = {"student": self.student, "distillers": self.distillers, "optimizer": self.optimizer}
        parts |= {f"schedule/{name}": schedule for name, schedule in self.schedules.items()}
        if self.policy_optimizer is not None:
            parts |= {"spot_mode": self.spot_mode, "policy_optimizer": self.policy_optimizer}
        return parts

    def state_dict(self) -> dict[str, Any]:
        """All that changes; random streams are functions of the seed and the epoch."""
        return {"epoch": self.epoch} | {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Strict. Raises CheckpointError if the state is of another trainer."""
        parts = self._parts()
        if set(state) != {"epoch", *parts}:
            raise CheckpointError(f"found a state of {sorted(state)}, expected {sorted(['epoch', *parts])}")
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the state of {name} is for another trainer: {error}") from error
        self.epoch = state["epoch"]


class RunningMeans:
    """Means of measurements over samples, kept on the device, and the first step at which each was not
    finite."""

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.samples = 0
        self.sums: dict[str, Tensor] = {}
        self.first_bad: dict[str, Tensor] = {}

    def add(self, measured: Mapping[str, Tensor], samples: int, step: int) -> None:
        """``measured``: scalars, means over ``samples``."""
        self.samples += samples
        for name, value in measured.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros_like(value)
                self.first_bad[name] = torch.full((), NEVER, device=value.device)
            self.sums[name] += value * samples
            bad = torch.where(value.isfinite(), NEVER, step)
            self.first_bad[name] = torch.minimum(self.first_bad[name], bad)

    def compute(self) -> dict[str, float]:
        """The means so far. Raises NonFiniteLossError naming what was first not finite."""
        bad = {name: int(step) for name, step in self.first_bad.items()}
        first = min(bad.values())
        if first < NEVER:
            names = ", ".join(name for name, step in bad.items() if step == first)
            raise NonFiniteLossError(
                f"{names} became NaN or infinite at epoch {self.epoch}, step {first}; expected finite "
                "losses. "
                "A lower learning rate or distillation weight may help."
            )
        means = {name: float(total) / self.samples for name, total in self.sums.items()}
        assert all(map(math.isfinite, means.values()))
        return means


def spots_of(student: StagedNet, teacher: StagedNet, distillers: Iterable[Distiller]) -> list[Spot]:
    """The spots that a spot mode decides on for these distillers, in order, the logits last."""
    return all_spots(distinct_spots(distillers), student, teacher)


@torch.no_grad()
def evaluate(network: StagedNet, batches: Generator[Batch, None, None]) -> dict[str, float]:
    """``accuracy`` in percent and mean cross-entropy ``loss``, in eval mode; the network's mode is put
    back."""
    training = network.training
    network.eval()
    correct = loss = samples = 0
    with closing(batches):
        for images, labels, _ in batches:
            logits = network(images).float()
            correct += (logits.argmax(1) == labels).sum()
            loss += F.cross_entropy(logits, labels, reduction="sum")
            samples += len(labels)
    network.train(training)
    return {"accuracy": 100 * int(correct) / samples, "loss": float(loss) / samples}
