"""The only loop: one or several students of one teacher, trained from the same batches."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext

import torch
from torch import Tensor

from sakd.data import (
    Asked,
    Batch,
    Dataset,
    Images,
    Mixing,
    evaluation_batches,
    mixed,
    steps_per_epoch,
    train_batches,
    view_batches,
)
from sakd.errors import ConfigError
from sakd.streams import GlobalDraws, stream, stream_seed
from sakd.training.execution import on_device
from sakd.training.graphs import Captured, Placed, unchanged
from sakd.training.measuring import RunningMeans, Score
from sakd.training.teacher import Teacher
from sakd.training.trainer import NO_VIEWS, Features, Step, Trainer

Measured = dict[str, float]
# Called after each step of a member with its name, epoch, step, the epoch's steps, and its means so far.
Progress = Callable[[str, int, int, int, Callable[[], Measured]], None]
Failed = Callable[[str, Exception], None]
# What puts batches into a place of their own, and what gives the teacher's features of the images there.
Teaching = tuple[Callable[[Batch], Batch], Callable[[Tensor], Features] | None]


class Member:
    """One trainer in a cohort, with what an epoch of it needs."""

    def __init__(self, name: str, trainer: Trainer):
        self.name, self.trainer = name, trainer
        self.epochs = 0  # the last that it is to train
        self.draws = GlobalDraws(trainer.device)
        self.train_step: Callable[..., Step] = trainer.train_step
        self.means: RunningMeans | None = None

    def begin_epoch(self) -> None:
        trainer = self.trainer
        trainer.begin_epoch()
        self.draws.restart(trainer.seed, "layers", trainer.epoch)
        self.means = RunningMeans(trainer.measurements, trainer.epoch)

    def capture(self) -> None:
        """Let steps be captured once and replayed, from here on."""
        trainer = self.trainer
        generators = list(trainer.streams.values())
        self.train_step = Captured(
            trainer.train_step,
            trainer.device,
            settings=trainer.captured_settings,
            refresh=trainer.refresh_captured,
            unchanged=lambda: unchanged(trainer.state_dict, generators, trainer.device),
            forget=trainer.forget_gradients,
            generators=generators,
            falls_back=trainer.execution.falls_back,
        )


class Cohort:
    """Trains students of one teacher together: each batch is drawn once, and the teacher sees it once.

    Every trainer takes its own steps, bit for bit (on the CPU) those that it would take alone. They may
    differ in student, distillers, spot mode, optimizers, schedule and epochs; teacher, seed, device,
    execution and how images are mixed are the same. So it is with further views of a batch: each is drawn
    once for all who ask for it. Trainers that have done different numbers of epochs catch up: at each epoch
    those train that have it before them.

    Raises ConfigError for trainers that cannot go together.
    """

    def __init__(self, teacher: Teacher | None, trainers: Mapping[str, Trainer]):
        if not trainers:
            raise ConfigError("found no trainers, expected at least one")
        first = next(iter(trainers.values()))
        for name, trainer in trainers.items():
            if trainer.teacher is not teacher:
                raise ConfigError(f"{name}: found another teacher, expected the cohort's own")
            for key in ("seed", "device", "execution", "mix"):
                found, expected = getattr(trainer, key), getattr(first, key)
                if found != expected:
                    raise ConfigError(f"{key} of {name}: found {found}, expected {expected} as of the others")
        self.teacher, self.seed, self.device, self.execution = (
            teacher,
            first.seed,
            first.device,
            first.execution,
        )
        self.mix = first.mix
        self.members = {name: Member(name, trainer) for name, trainer in trainers.items()}
        self.placed_mixing = lambda parts: parts
        self.placed, self.teacher_features = self._teaching()
        self.of_views: dict[Asked, Teaching] = {}  # likewise, once a view is seen
        self.clock = SharedClock(self.members)
        self._failed: Failed | None = None
        self._inside: Callable[[str], AbstractContextManager] = lambda name: nullcontext()
        if self.execution.captures_on(self.device):
            self.placed_mixing = Placed()
            for member in self.members.values():
                if member.trainer.captured:
                    member.capture()

    def fit(
        self,
        dataset: Dataset,
        epochs: int | Mapping[str, int],
        batch_size: int,
        progress: Progress | None = None,
        failed: Failed | None = None,
        inside: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    ) -> Iterator[tuple[str, Measured]]:
        """Train up to and with epoch number ``epochs``, of all or by name.

        Yields name and measurements of each member's epoch when it is done. A member's ``seconds`` are those
        of its own steps and its share of what all share. The caller may save the state of a trainer whose
        epoch was yielded; one that loads it goes on with the next epoch.

        What goes wrong in a member raises, such as NonFiniteLossError when a loss or a weight is not finite;
        or, with ``failed``, ends that member alone, after ``failed(name, error)``. Too little memory on a GPU
        always raises. ``inside(name)`` gives a context that all of a member's own work is done in.
        """
        self._failed, self._inside = failed, inside
        for name, member in self.members.items():
            member.epochs = epochs if isinstance(epochs, int) else epochs[name]
        dataset = dataset.to(self.device)
        for member in self._standing(self.members.values()):
            with self._alone(member):
                member.trainer.prepare(dataset, batch_size)
        while waiting := [m for m in self.members.values() if m.trainer.epoch < m.epochs]:
            epoch = min(member.trainer.epoch for member in waiting)
            with on_device(self.device):
                level = [member for member in waiting if member.trainer.epoch == epoch]
                done = self._epoch(level, dataset, batch_size, progress)
            for name, measured in done.items():
                if name in self.members:  # it has not been dropped since
                    yield name, measured

    def drop(self, name: str) -> None:
        """Go on without a member."""
        self.members.pop(name, None)

    def _epoch(
        self, members: list[Member], dataset: Dataset, batch_size: int, progress: Progress | None
    ) -> dict[str, Measured]:
        """Train and evaluate members that have done the same epochs.

        Returns the measurements of those that stand then.
        """
        self.clock = SharedClock(member.name for member in members)
        measured = self.train_epoch(members, dataset, batch_size, progress)
        seconds = self.clock.seconds()
        for name, of_epoch in measured.items():
            of_epoch["images_per_second"] = len(dataset.train) / seconds[name]
        tested = [member for member in members if member.trainer.tested]
        for split, images in (("val", dataset.val), ("test", dataset.test)):
            if images is not None and any(self._standing(tested)):
                for name, score in self._evaluate(tested, images, dataset).items():
                    measured[name] |= {f"{split}/{key}": value for key, value in score.items()}
        for member in self._standing(members):
            with self._alone(member):
                member.trainer.check_finite(measured[member.name])
        seconds = self.clock.seconds()
        return {
            member.name: measured[member.name] | {"seconds": seconds[member.name]}
            for member in self._standing(members)
        }

    def train_epoch(
        self, members: list[Member], dataset: Dataset, batch_size: int, progress: Progress | None = None
    ) -> dict[str, Measured]:
        """Pass once over the training images, for members that have done the same epochs.

        Returns means over the images of what steps measure, and learning rates, by the name of each member
        that stands. ``dataset`` is on the cohort's device; trainers are prepared.
        """
        for member in self._standing(members):
            with self._alone(member):
                member.begin_epoch()
        if self.teacher is not None:
            self.teacher.refold()  # its weights may have been loaded since
        epoch = members[0].trainer.epoch
        steps = steps_per_epoch(len(dataset.train), batch_size)
        with closing(self.batches(members, dataset, batch_size)) as batches:
            for step, drawn in enumerate(batches, 1):
                self.take_step(members, *drawn)
                for member in self._standing(members) if progress is not None else ():
                    with self._alone(member):
                        progress(member.name, epoch, step, steps, member.means.compute)
                if not any(self._standing(members)):
                    break
        measured: dict[str, Measured] = {}
        for member in self._standing(members):
            with self._alone(member):
                measured[member.name] = {"epoch": epoch} | member.means.compute() | member.trainer.end_epoch()
        return measured

    def batches(
        self, members: list[Member], dataset: Dataset, batch_size: int
    ) -> Generator[tuple[Batch, Mixing | None, Mapping[Asked, Batch]], None, None]:
        """The batches of the members' epoch, how each was mixed, and the views of it that members ask for."""
        epoch, steps = members[0].trainer.epoch, steps_per_epoch(len(dataset.train), batch_size)
        batches = train_batches(dataset, batch_size, stream(self.seed, "data", epoch))
        draws = stream_seed(self.seed, "mixing", epoch)
        with ExitStack() as opened:
            views = {
                asked: view_batches(dataset, batch_size, self.seed, epoch, asked)
                for member in members
                for asked in member.trainer.views
            }
            for own in (batches, *views.values()):
                opened.enter_context(closing(own))
            mixtures = mixed(batches, self.mix, steps, dataset.image_size, draws)
            for (batch, mixing), *in_views in zip(mixtures, *views.values(), strict=True):
                yield batch, mixing, dict(zip(views, in_views, strict=True))

    def take_step(
        self,
        members: list[Member],
        batch: Batch,
        mixing: Mixing | None = None,
        views: Mapping[Asked, Batch] = NO_VIEWS,
    ) -> dict[str, Step]:
        """Take one step of each member from the same batch.

        Its images may have been mixed; ``views``: the same samples in further views that members ask for.
        """
        batch, features = self._taught(batch, (self.placed, self.teacher_features))
        mixing = None if mixing is None else self.placed_mixing(mixing)
        seen = {}
        for asked, view in views.items():
            if asked not in self.of_views:
                self.of_views[asked] = self._teaching()
            placed, of_view = self._taught(view, self.of_views[asked])
            seen[asked] = placed.images, of_view
        taken = {}
        for member in self._standing(members):
            with self._alone(member), member.draws():
                taken[member.name] = member.train_step(*batch, features, mixing, seen)
                member.trainer.end_step()
        self._put_aside({member: taken[member.name] for member in self._standing(members)}, len(batch.labels))
        return taken

    def _teaching(self) -> Teaching:
        features = None if self.teacher is None else self.teacher.features
        if not self.execution.captures_on(self.device):
            return lambda batch: batch, features
        if features is not None:
            features = Captured(features, self.device, falls_back=self.execution.falls_back)
        return Placed(), features

    def _taught(self, batch: Batch, teaching: Teaching) -> tuple[Batch, Features | None]:
        """A batch in its place, and the teacher's features of it."""
        placed, teacher_features = teaching
        batch = placed(batch._replace(images=self.execution.arrange(batch.images)))
        features = None if teacher_features is None else teacher_features(batch.images)
        _join(teacher_features)
        return batch, features

    def _put_aside(self, taken: Mapping[Member, Step], samples: int) -> None:
        """Take in what a step has measured: for all members in one launch, since replays overwrite it."""
        for member in taken:
            _join(member.train_step)
        if taken:
            measured = [step.measured for step in taken.values()]
            copies = torch.cat(measured).split([len(values) for values in measured])
            for member, own in zip(taken, copies, strict=True):
                with self._alone(member):
                    member.means.add(own, samples)

    def _evaluate(self, members: list[Member], images: Images, dataset: Dataset) -> dict[str, Measured]:
        """Accuracies and losses of the members' students, all from the same batches."""
        scores = {member.name: Score(member.trainer.top5) for member in members}
        training = {member.name: member.trainer.evaluated.training for member in members}
        for member in self._standing(members):
            member.trainer.evaluated.eval()
        batches: Generator[Batch, None, None] = evaluation_batches(images, dataset)
        with closing(batches), torch.no_grad():
            for batch in batches:
                for member in self._standing(members):
                    with self._alone(member):
                        scores[member.name].add(member.trainer.evaluated(batch.images), batch.labels)
        for member in self._standing(members):
            member.trainer.evaluated.train(training[member.name])
        return {member.name: scores[member.name].compute() for member in self._standing(members)}

    def _standing(self, members: Iterable[Member]) -> Iterator[Member]:
        """Members that have not failed or been dropped, also while one after the other is looked at."""
        return (member for member in list(members) if self.members.get(member.name) is member)

    @contextmanager
    def _alone(self, member: Member) -> Iterator[None]:
        """Let what goes wrong inside be this member's alone, and so the time that passes."""
        with self.clock.of(member.name):
            try:
                with self._inside(member.name):
                    yield
            except torch.OutOfMemoryError:  # the others are in the way, too
                raise
            except Exception as error:
                if self._failed is None:
                    raise
                self.drop(member.name)
                self._failed(member.name, error)


class SharedClock:
    """Splits the time that passes among some.

    Each has its own, and an equal share of what is nobody's own.
    """

    def __init__(self, names: Iterable[str]):
        self.start = time.perf_counter()
        self.own = dict.fromkeys(names, 0.0)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count the time that passes inside as ``name``'s own."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.own[name] += time.perf_counter() - start

    def seconds(self) -> dict[str, float]:
        """Seconds so far, by name; their sum is the time that has passed."""
        shared = time.perf_counter() - self.start - sum(self.own.values())
        return {name: own + shared / len(self.own) for name, own in self.own.items()}


def _join(function: object) -> None:
    if isinstance(function, Captured):
        function.join()
