"""One student's training, step by step: alone, or from a teacher at spots that a spot mode chooses."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sakd.data import Asked, Dataset, Mix, Mixing, steps_per_epoch
from sakd.distillers import Distiller, Seen, distinct_spots, distinct_views
from sakd.errors import CheckpointError, ConfigError, NonFiniteLossError
from sakd.names import safe
from sakd.networks import StagedNet
from sakd.networks.folded import refold
from sakd.plugin import Plugin
from sakd.spots import Spot, SpotMode, all_spots, frozen_alias
from sakd.streams import initialising, stream_seed
from sakd.training.averaging import Average
from sakd.training.execution import Branch, Execution
from sakd.training.graphs import say_not_captured
from sakd.training.loss_scale import LossScale
from sakd.training.measuring import all_finite, broken
from sakd.training.optimizers import Stepper, check_capturable, check_skips, fuse
from sakd.training.recording import KeptTable
from sakd.training.schedules import Rates, Schedule
from sakd.training.snapshot import snapshot
from sakd.training.task import Task
from sakd.training.teacher import Teacher

Features = Mapping[str, Tensor]
Views = Mapping[Asked, tuple[Tensor, Features]]  # images in further views, and the teacher's features of them
NO_VIEWS: Views = {}
KEYS = {"student": "optimizer", "policy": "spot_mode.optimizer"}  # where optimizers are configured


class Step(NamedTuple):
    """Tensors that one step gives. They stay on the device: nothing here waits for it."""

    losses: dict[str, Tensor]  # scalars by name, as they count
    kept: Tensor | None  # [B, spots], a mask or weights: who was distilled where; None for a student alone
    measured: Tensor  # [M], one for each of the trainer's ``measurements``


class Trainer:
    """Trains ``student``; with a teacher, distillers and a spot mode, distils it.

    ``optimizer`` and ``policy_optimizer`` build an optimizer from parameters. ``schedule`` is that of both
    learning rates; one that is no Schedule builds PyTorch's from an optimizer, and goes on by epoch. The
    student's gradients have a norm of at most ``clip_gradients``, and optimizers step by the mean gradient of
    ``accumulate`` batches, or those that are left in an epoch. Random numbers come from streams of ``seed``.
    ``task``: what is learned from labels. With ``record_spots``, ``kept_table`` tells after an epoch who was
    kept where in it. With ``ema``, a decay, a running average of the student is what is measured and left;
    with ``top5``, evaluation measures that, too. A ``Cohort``, of this trainer alone or with others, runs it.

    Raises ConfigError if teacher, distillers and spot mode are not given together, or do not fit together, or
    a distiller does not fit the task.
    """

    tested = True  # whether the student is evaluated after each epoch

    def __init__(
        self,
        student: StagedNet,
        teacher: Teacher | None = None,
        distillers: Mapping[str, Distiller] | None = None,
        spot_mode: SpotMode | None = None,
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer],
        schedule: Schedule | Callable[[Optimizer], LRScheduler] | None = None,
        policy_optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        clip_gradients: float | None = None,
        accumulate: int = 1,
        task: Task = Task(),  # noqa: B008, immutable
        seed: int = 0,
        device: torch.device | str = "cpu",
        execution: Execution = Execution(),  # noqa: B008, immutable
        record_spots: bool = False,
        ema: float | None = None,
        top5: bool = False,
    ):
        task.check_distillers(distillers or {})
        given = [bool(part) for part in (teacher is not None, distillers, spot_mode is not None)]
        if any(given) != all(given):
            raise ConfigError(
                "found some of teacher, distillers and spot mode; expected all of them, or none"
            )
        self.device, self.execution, self.seed = torch.device(device), execution, seed
        execution.check(self.device)
        if teacher is not None and (teacher.device, teacher.execution) != (self.device, execution):
            raise ConfigError(
                f"the teacher is on {teacher.device} with {teacher.execution}; expected {self.device} with "
                f"{execution}, as the student"
            )
        self.task = task
        self.class_weights: Tensor | None = None  # once prepared
        self.epoch = 0  # epochs done
        self.top5 = top5
        self.teacher = teacher
        self.student = self._placed(student).train()
        self.average = None if ema is None else Average(self.student, ema)
        self.distillers = self._placed(nn.ModuleDict(distillers or {})).train()
        self.spot_mode = None if spot_mode is None else self._placed(spot_mode).train()
        self.spots = spots_of(student, teacher.network, self.distillers.values()) if teacher else []
        self.views = distinct_views(self.distillers.values())
        if spot_mode is not None and list(spot_mode.spots) != self.spots:
            raise ConfigError(
                f"the spot mode is built for spots {[s.name for s in spot_mode.spots]}, "
                f"the distillers use {[s.name for s in self.spots]}"
            )
        optimizers = {"student": optimizer([p for p in self.learned() if p.requires_grad])}
        if spot_mode is not None and spot_mode.learns:
            if policy_optimizer is None:
                raise ConfigError(
                    f"{type(spot_mode).__name__} learns: expected a policy_optimizer, found none"
                )
            self.policy_parameters = list(self.spot_mode.parameters())
            optimizers["policy"] = policy_optimizer(self.policy_parameters)
            self.routed_student = frozen_alias(self.student, execution.refolds_on(self.device))
        self.optimizer, self.policy_optimizer = optimizers["student"], optimizers.get("policy")
        self.schedule, self.accumulate = _as_schedule(schedule), accumulate
        self.batches, self.last_batch = 0, 0  # of the epoch: done; the number of them, where it is known
        for name, own in optimizers.items():
            if self.device.type == "cuda":
                fuse(own)
            if execution.scales_losses:
                check_skips(own, KEYS[name])
        self.captured = execution.captures_on(self.device) and self._can_be_captured(optimizers)
        clips = {"student": clip_gradients}
        self.steppers = {name: self._stepper(own, clips.get(name)) for name, own in optimizers.items()}
        self.schedules: dict[str, Rates] = {}
        self.first_rates: dict[str, float] = {}  # of the epoch under way
        self.streams = {name: torch.Generator(device=self.device) for name in self.plugins}
        self.prepared = False
        self.record_spots = record_spots and spot_mode is not None
        self.kept_table: KeptTable | None = None
        # Small kernels of both fill a GPU together: a captured step takes a sixth less time (AT, on an H100)
        # and the memory of both passes.
        self.policy_branch = Branch(self.device, apart=self.captured and self.policy_optimizer is not None)
        self._student_features = execution.compiled(self.student.features)

    def _stepper(self, optimizer: Optimizer, clip: float | None) -> Stepper:
        loss_scale = LossScale(self.device) if self.execution.scales_losses else None
        return Stepper(optimizer, self.device, self.captured, clip, loss_scale)

    def _can_be_captured(self, optimizers: Mapping[str, Optimizer]) -> bool:
        """Raise ConfigError for an optimizer whose steps cannot be captured, or say so and return False."""
        try:
            if self.accumulate > 1:
                raise ConfigError(
                    f"accumulate: found {self.accumulate}, with which steps are not captured; expected 1, or "
                    "compile=none"
                )
            for name, optimizer in optimizers.items():
                check_capturable(optimizer, KEYS[name], self.schedule is not None and self.schedule.by_step)
        except ConfigError as error:
            if not self.execution.falls_back:
                raise
            say_not_captured(error)
            return False
        return True

    def _placed(self, module: nn.Module) -> nn.Module:
        return self.execution.place(module, self.device)

    @property
    def plugins(self) -> dict[str, Plugin]:
        """Spot mode and distillers, by their random stream's name."""
        modes = {} if self.spot_mode is None else {"policy": self.spot_mode}
        return modes | {f"distiller/{name}": distiller for name, distiller in self.distillers.items()}

    @property
    def mix(self) -> Mix:
        """How its batches are mixed."""
        return self.task.mix

    @property
    def measurements(self) -> tuple[str, ...]:
        """Names of what a step measures, in order."""
        kept = [safe(f"kept/{spot.name}") for spot in self.spots]
        policy = [] if self.policy_optimizer is None else ["loss/policy"]
        losses = [safe(f"loss/{name}") for name in self.distillers]
        return ("loss/task", *losses, "train/accuracy", *kept, *policy)

    @property
    def evaluated(self) -> StagedNet:
        """The network that is measured: the student, or its running average."""
        return self.student if self.average is None else self.average.network

    def evaluated_in(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights of the network that is measured, in a ``state`` that was saved."""
        return state["student" if self.average is None else "average"]

    @property
    def product(self) -> nn.Module:
        """The module that a finished training leaves."""
        return self.evaluated

    def learned(self) -> Iterator[nn.Parameter]:
        """Parameters that the optimizer trains, but for those that take no gradients."""
        yield from self.student.parameters()
        yield from self.distillers.parameters()

    def prepare(self, dataset: Dataset, batch_size: int | None = None) -> None:
        """Let the plug-ins, and the schedules, build what depends on the training set, once.

        A saved state needs it before. A schedule by step and ``accumulate`` need the ``batch_size``: else
        ConfigError is raised.
        """
        if self.prepared:
            return
        self._count_steps(len(dataset.train), batch_size)
        labels = dataset.train.labels.to(self.device)
        self.class_weights = self.task.weights_of_classes(labels, dataset.classes)
        for name, plugin in self.plugins.items():
            with initialising(self.seed, f"prepare/{name.removeprefix('distiller/')}"):
                plugin.prepare(labels, dataset.classes, self.streams[name])
            plugin.to(self.device)
        if self.record_spots:
            self.kept_table = KeptTable(len(labels), len(self.spots), self.device)
        self.prepared = True

    def _count_steps(self, samples: int, batch_size: int | None) -> None:
        """Learn how many batches and steps an epoch has, and begin the schedules, which depend on it."""
        by_step = self.schedule is not None and self.schedule.by_step
        if batch_size is not None:
            self.last_batch = steps_per_epoch(samples, batch_size)
        elif by_step or self.accumulate > 1:
            raise ConfigError("batch_size: found None, expected the size by which steps are counted")
        steps = math.ceil(self.last_batch / self.accumulate)
        if self.schedule is not None:
            self.schedules = {
                name: Rates(stepper.optimizer, self.schedule, steps)
                for name, stepper in self.steppers.items()
            }

    def begin_epoch(self) -> None:
        """Start the epoch's random streams; count it, and tell the plug-ins."""
        self.epoch += 1
        self.batches = 0
        self.first_rates = self.learning_rates()
        if self.kept_table is not None:
            self.kept_table.begin_epoch()
        for name, plugin in self.plugins.items():
            self.streams[name].manual_seed(stream_seed(self.seed, name, self.epoch))
            plugin.begin_epoch(self.epoch)
        if self.average is not None and self.epoch == 1:
            self.average.begin()  # here: what is pretrained, and SimKD's head, come in once this is built

    def train_step(
        self,
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        teacher_features: Features | None = None,
        mixing: Mixing | None = None,
        views: Views = NO_VIEWS,
    ) -> Step:
        """Update the student, and the policy where it learns.

        ``images``: float32 [B, C, H, W], normalised; ``labels``, ``indices``: int64 [B];
        ``teacher_features``: the teacher's, by stage, of the same images; ``mixing``: where these were mixed,
        how; ``views``: those that the distillers ask for, perhaps among others. Nothing here waits for the
        device or writes into what it is given.
        """
        images = self.execution.arrange(images)
        with self.execution.autocast(self.device):
            student_features = self._student_features(images)
            seen = self._see(views)
        logits = student_features["logits"].float()
        task_loss = self.task.loss(logits, labels, mixing, self.class_weights)
        losses = {"task": task_loss + self._task_loss_of(seen, labels) if seen else task_loss}
        dominant = labels if mixing is None else mixing.dominant(labels)
        accuracy = 100 * (student_features["logits"].argmax(1) == dominant).float().mean()
        if self.policy_optimizer is not None:
            targets = labels if mixing is None else mixing.targets(labels, logits.shape[1])
            plain = task_loss if self.task.is_plain else F.cross_entropy(logits.detach(), targets)
        route = kept = None
        if self.teacher is not None:
            with torch.autocast(self.device.type, enabled=False):  # only networks may run in half precision
                route = self.spot_mode.route(student_features, teacher_features)
                kept = self.spot_mode.keep(route)
                self.policy_branch.fork()  # it needs no loss but the task's
                if self.kept_table is not None:
                    self.kept_table.add(indices, kept)
                keep = dict(zip(self.spots, kept.unbind(1), strict=True))
                for name, distiller in self.distillers.items():
                    losses[name] = distiller(
                        student_features,
                        teacher_features,
                        keep,
                        indices,
                        [seen[asked] for asked in enumerate(distiller.views)],
                    )
        del student_features, logits, seen
        self.steppers["student"].backward(torch.stack(list(losses.values())).sum(), len(images))
        losses = {name: loss.detach() for name, loss in losses.items()}
        measured = [*losses.values(), accuracy]
        if kept is not None:
            measured += kept.float().mean(0).unbind()
        if self.policy_optimizer is not None:  # once the student's pass is freed, but before its weights move
            with self.policy_branch.launching():
                measured.append(self._policy_step(images, targets, teacher_features, route, plain.detach()))
            self.policy_branch.join()
        if self.steps_now:
            self.steppers["student"].step()
            if self.average is not None:
                self.average.update()
        return Step(losses, kept, torch.stack(measured))

    def _see(self, views: Views) -> dict[Asked, Seen]:
        """Features of the views that distillers ask for.

        Each has a pass of its own, so that batch norm sees it apart.
        """
        seen = {}
        for asked in self.views:
            images, teacher_features = views[asked]
            seen[asked] = self._student_features(self.execution.arrange(images)), teacher_features
        return seen

    def _task_loss_of(self, seen: Mapping[Asked, Seen], labels: Tensor) -> Tensor:
        """The loss with the labels, summed over the views."""
        logits = [own["logits"].float() for own, _ in seen.values()]
        return torch.stack([self.task.loss(own, labels, by_class=self.class_weights) for own in logits]).sum()

    def _policy_step(
        self, images: Tensor, targets: Tensor, teacher_features: Features, route: Tensor, task_loss: Tensor
    ) -> Tensor:
        """Train policy and adapters from the routed network, and return its loss, a scalar.

        Gradients reach neither student nor distillers. ``targets``: labels [B], or what each class counts
        [B, classes]; ``task_loss``: the student's plain cross-entropy with them, since the routed network's
        is compared with it, whatever the student itself learns from labels.
        """
        refold(self.routed_student)
        with self.execution.autocast(self.device):
            loss = self.spot_mode.loss(
                self.routed_student, self.teacher.frozen, images, teacher_features, route, targets, task_loss
            )
        self.steppers["policy"].backward(loss, len(images), self.policy_parameters)
        if self.steps_now:
            self.steppers["policy"].step()
        return loss.detach()

    @property
    def steps_now(self) -> bool:
        """Whether the batch under way is the last of those whose gradients add up."""
        batch = self.batches + 1
        return batch % self.accumulate == 0 or batch == self.last_batch

    def end_step(self) -> None:
        """Count a batch, and go on with schedules by step, behind each step, which may have been replayed."""
        for rates in self.schedules.values():
            if rates.by_step and self.steps_now:
                rates.step()
        self.batches += 1

    def end_epoch(self) -> dict[str, float]:
        """Go on with schedules by epoch; the epoch's first rates, as ``lr/student`` and ``lr/policy``."""
        for rates in self.schedules.values():
            if not rates.by_step:
                rates.step()
        return {f"lr/{name}": rate for name, rate in self.first_rates.items()}

    def captured_settings(self) -> tuple[object, ...]:
        """Values with which a captured step goes stale when they change."""
        return tuple(stepper.settings for stepper in self.steppers.values())

    def refresh_captured(self) -> None:
        """Let a captured step see what may have changed without it going stale."""
        for stepper in self.steppers.values():
            stepper.fill()

    def learning_rates(self) -> dict[str, float]:
        """Learning rates of the student's optimizer, and of the policy's where there is one."""
        return {name: stepper.optimizer.param_groups[0]["lr"] for name, stepper in self.steppers.items()}

    def check_finite(self, measured: Mapping[str, float]) -> None:
        """Raise NonFiniteLossError if weights or evaluation losses are not finite.

        An epoch's last steps can break weights without a training loss having shown it: they must not be
        saved.
        """
        found = broken(measured)
        modules = {"student": self.student, "distillers": self.distillers, "spot mode": self.spot_mode}
        finite = {
            name: all_finite(module.state_dict().values())
            for name, module in modules.items()
            if module is not None
        }
        found += [f"weights of the {name}" for name, is_finite in finite.items() if not bool(is_finite)]
        if found:
            raise NonFiniteLossError(
                f"{', '.join(found)} became NaN or infinite in epoch {self.epoch}; expected finite values. "
                "A lower learning rate or distillation weight may help."
            )

    def forget_gradients(self) -> None:
        """Give gradients back, so that the next step makes them anew."""
        for stepper in self.steppers.values():
            stepper.images.clear()  # of a capture that failed between a backward pass and its step
            stepper.optimizer.zero_grad(set_to_none=True)

    def _parts(self) -> dict[str, Any]:
        """Parts that change in training, by name: not the teacher."""
        parts = {"student": self.student, "distillers": self.distillers, "optimizer": self.optimizer}
        parts |= {f"schedule/{name}": schedule for name, schedule in self.schedules.items()}
        scales = {name: stepper.loss_scale for name, stepper in self.steppers.items()}
        parts |= {f"loss_scale/{name}": scale for name, scale in scales.items() if scale is not None}
        if self.average is not None:
            parts["average"] = self.average.network
        if self.spot_mode is not None:
            parts["spot_mode"] = self.spot_mode
        if self.policy_optimizer is not None:
            parts["policy_optimizer"] = self.policy_optimizer
        return parts

    def _by_stepper(self) -> dict[str, Stepper]:
        """What loads the state of the optimizers among the parts."""
        names = {"student": "optimizer", "policy": "policy_optimizer"}
        return {names[name]: stepper for name, stepper in self.steppers.items()}

    def state_dict(self) -> dict[str, Any]:
        """State of all that changes; random streams are functions of the seed and the epoch."""
        return {"epoch": self.epoch} | {name: part.state_dict() for name, part in self._parts().items()}

    def snapshot(self) -> Callable[[], dict[str, Any]]:
        """The state as it is now, whatever is trained from here on.

        What is returned gives it, in any thread.
        """
        return snapshot(self.state_dict(), self.device)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state, strictly.

        Raises CheckpointError if it is another trainer's.
        """
        parts = self._parts()
        if set(state) != {"epoch", *parts}:
            raise CheckpointError(f"found a state of {sorted(state)}, expected {sorted(['epoch', *parts])}")
        try:
            for name, part in (parts | self._by_stepper()).items():
                part.load_state_dict(state[name])
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            told = " ".join(str(error).split())
            raise CheckpointError(f"the state of {name} is for another trainer: {told}") from error
        self.epoch = state["epoch"]


def _as_schedule(schedule: Schedule | Callable[[Optimizer], LRScheduler] | None) -> Schedule | None:
    if schedule is None or isinstance(schedule, Schedule):
        return schedule
    return Schedule(lambda optimizer, moves: schedule(optimizer))


def spots_of(student: StagedNet, teacher: StagedNet, distillers: Iterable[Distiller]) -> list[Spot]:
    """The spots that a spot mode decides on for these distillers, in order, the logits last."""
    return all_spots(distinct_spots(distillers), student, teacher)
