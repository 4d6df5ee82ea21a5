"""Parts of a training step, as ``launch.py`` would build them.

Images are of CIFAR-100's shape and lie in no file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec

import torch

from benchmarks import kept
from sakd.configuration import Config, build, groups
from sakd.data import Augmentation, Batch, Dataset, ImageSet
from sakd.networks import StagedNet
from sakd.streams import initialising, stream
from sakd.training import Cohort, Execution, Teacher, Trainer
from sakd.training.graphs import Captured

CLASSES, CHANNELS, IMAGE_SIZE = 100, 3, 32  # CIFAR-100's
CROP_PADDING = 4
LR = 0.01  # of the student's optimizer; the cost of a step does not depend on it


def choices(group: str) -> list[str]:
    """Names in a group of ``conf/``, sorted."""
    return sorted(groups.choices(group))


def composed(*overrides: str) -> Config:
    """The configuration of a run on CIFAR-100."""
    from sakd.configuration import compose  # with Hydra

    return compose.compose_one(["dataset=cifar100", f"optimizer.lr={LR}", *overrides])


def chosen(names: Mapping[str, str], *overrides: str) -> Config:
    """The configuration with these choices, by group.

    One that was composed beforehand, without the overrides, where Hydra is not.
    """
    if find_spec("hydra") is None:
        return kept.composed(names)
    return composed(*(f"{group}={name}" for group, name in names.items()), *overrides)


def network(name: str) -> StagedNet:
    node = chosen({"student": name})["student"]
    with initialising(0, name):
        return build.make(node, "student", leave=build.OF_STUDENTS, kind=StagedNet)


def run_config(
    pair: Sequence[str], distiller: str, mode: str, batch_size: int, execution: Execution
) -> Config:
    """The configuration of a run of one teacher and student."""
    names = {"teacher": pair[0], "student": pair[1], "distiller": distiller, "spot_mode": mode}
    config = chosen(names, f"batch_size={batch_size}")
    return config | {"batch_size": batch_size} | asdict(execution)


def trainers(
    configs: Mapping[str, Config], samples: int, device: torch.device
) -> tuple[Teacher, dict[str, Trainer]]:
    """One teacher, and a trainer of it for each configuration.

    They are ready to step over ``samples`` training images. Raises ConfigError where a distiller is not
    defined for the networks.
    """
    first = next(iter(configs.values()))
    network = build.parts(first).teacher
    teacher = Teacher(network, device=device, execution=build.execution(first))
    made = {
        name: build.trainer(config, build.parts(config, network), device, teacher)
        for name, config in configs.items()
    }
    for trainer in made.values():
        trainer.prepare(dataset(samples, device))
    return teacher, made


class Steps:
    """Takes, each time it is called, a step of all trainers together, from the same batch, as in an epoch."""

    def __init__(self, teacher: Teacher, trainers: Mapping[str, Trainer], inputs: Batch):
        self.cohort, self.inputs = Cohort(teacher, trainers), inputs
        self.members = list(self.cohort.members.values())
        self.views = {asked: inputs for trainer in trainers.values() for asked in trainer.views}
        for member in self.members:
            member.begin_epoch()

    def __call__(self) -> object:
        return self.cohort.take_step(self.members, self.inputs, views=self.views)

    def captured_bytes(self) -> int:
        """Memory on the device that captured steps have for themselves, also while none is replayed."""
        teaching = [features for _, features in self.cohort.of_views.values()]
        functions = (self.cohort.teacher_features, *teaching, *(own.train_step for own in self.members))
        pools = {function.memory for function in functions if isinstance(function, Captured)}
        segments = torch.cuda.memory_snapshot() if pools else []
        return sum(part["total_size"] for part in segments if tuple(part["segment_pool_id"]) in pools)


def dataset(samples: int, device: torch.device) -> Dataset:
    """A data set of CIFAR-100's shape, each class equally often.

    All images are one, so they need no memory.
    """
    labels = torch.arange(samples, device=device) % CLASSES
    image = torch.zeros(1, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=device)
    images = ImageSet(image.expand(samples, -1, -1, -1), labels)
    return Dataset(images, images, None, CLASSES, IMAGE_SIZE, (0.5,) * CHANNELS, (0.25,) * CHANNELS)


def random_images(count: int) -> Dataset:
    """A data set of random images in CIFAR-100's shape, with its augmentation; on the CPU."""
    alike = dataset(count, torch.device("cpu"))
    pixels = torch.randint(
        0, 256, alike.train.images.shape, dtype=torch.uint8, generator=stream(0, "benchmark")
    )
    images = ImageSet(pixels, alike.train.labels)
    return replace(alike, train=images, augmentation=Augmentation(CROP_PADDING, flip=True))


def batch(size: int, samples: int, device: torch.device) -> Batch:
    """Fixed random images, with labels and indices that agree with ``dataset``."""
    draws = stream(0, "benchmark")
    images = torch.randn(size, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=draws)
    indices = torch.randperm(samples, generator=draws)[:size]
    return Batch(images.to(device), (indices % CLASSES).to(device), indices.to(device))
