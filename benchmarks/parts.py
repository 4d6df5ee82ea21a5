"""Parts of a training step, as ``launch.py`` would build them.

Images are of CIFAR-100's shape and lie in no file.
"""

from collections.abc import Mapping, Sequence

import torch

from sakd.configuration import Config, build, compose
from sakd.data import Batch, Dataset, ImageSet
from sakd.networks import StagedNet
from sakd.streams import initialising, stream
from sakd.training import Cohort, Execution, Teacher, Trainer
from sakd.training.graphs import Captured

CLASSES, CHANNELS, IMAGE_SIZE = 100, 3, 32  # CIFAR-100's
LR = 0.01  # of the student's optimizer; the cost of a step does not depend on it


def choices(group: str) -> list[str]:
    """Names in a group of ``conf/``, sorted."""
    return sorted(compose.choices(group))


def composed(*overrides: str) -> Config:
    """The configuration of a run on CIFAR-100."""
    return compose.compose_one(["dataset=cifar100", f"optimizer.lr={LR}", *overrides])


def network(name: str) -> StagedNet:
    node = composed(f"student={name}", "distiller=none")["student"]
    with initialising(0, name):
        return build.make(node, "student")


def run_config(
    pair: Sequence[str], distiller: str, mode: str, batch_size: int, execution: Execution
) -> Config:
    """The configuration of a run of one teacher and student."""
    return composed(
        f"teacher={pair[0]}",
        f"student={pair[1]}",
        f"distiller={distiller}",
        f"spot_mode={mode}",
        f"batch_size={batch_size}",
        f"precision={execution.precision}",
        f"memory_format={execution.memory_format}",
        f"compile={execution.compile}",
        f"fold_batch_norm={execution.fold_batch_norm}",
    )


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
        for member in self.members:
            member.begin_epoch()

    def __call__(self) -> object:
        return self.cohort.take_step(self.members, self.inputs)

    def captured_bytes(self) -> int:
        """Memory on the device that captured steps have for themselves, also while none is replayed."""
        functions = (self.cohort.teacher_features, *(member.train_step for member in self.members))
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


def batch(size: int, samples: int, device: torch.device) -> Batch:
    """Fixed random images, with labels and indices that agree with ``dataset``."""
    draws = stream(0, "benchmark")
    images = torch.randn(size, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=draws)
    indices = torch.randperm(samples, generator=draws)[:size]
    return Batch(images.to(device), (indices % CLASSES).to(device), indices.to(device))
