"""Parts of a training step as ``launch.py`` would build them, over images of CIFAR-100's shape that lie in no
file."""

import torch

from sakd.configuration import Config, build, compose
from sakd.data import Dataset, ImageSet
from sakd.networks import StagedNet
from sakd.streams import initialising, stream
from sakd.training import Execution, Trainer

CLASSES, CHANNELS, IMAGE_SIZE = 100, 3, 32  # CIFAR-100's
LR = 0.01  # of the student's optimizer; the cost of a step does not depend on it


def choices(group: str) -> list[str]:
    """The names in a group of ``conf/``."""
    return sorted(compose.choices(group))


def composed(*overrides: str) -> Config:
    """The configuration of a run on CIFAR-100."""
    return compose.compose_one(["dataset=cifar100", f"optimizer.lr={LR}", *overrides])


def network(name: str) -> StagedNet:
    node = composed(f"student={name}", "distiller=none")["student"]
    with initialising(0, name):
        return build.make(node, "student")


def trainer(
    teacher: str,
    student: str,
    distiller: str,
    mode: str,
    samples: int,
    batch_size: int,
    device: torch.device,
    execution: Execution,
) -> Trainer:
    """A trainer that is ready to step, over ``samples`` training images of ``dataset``. Raises ConfigError
    where the distiller is not defined for the networks."""
    config = composed(
        f"teacher={teacher}",
        f"student={student}",
        f"distiller={distiller}",
        f"spot_mode={mode}",
        f"batch_size={batch_size}",
        f"precision={execution.precision}",
        f"memory_format={execution.memory_format}",
        f"compile={execution.compile}",
        f"fold_batch_norm={execution.fold_batch_norm}",
    )
    built = build.trainer(config, build.parts(config), device)
    built.prepare(dataset(samples, device))
    return built


def dataset(samples: int, device: torch.device) -> Dataset:
    """Labels of CIFAR-100's shape, each class equally often; all images are one, so they need no memory."""
    labels = torch.arange(samples, device=device) % CLASSES
    image = torch.zeros(1, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.uint8, device=device)
    images = ImageSet(image.expand(samples, -1, -1, -1), labels)
    return Dataset(images, images, None, CLASSES, IMAGE_SIZE, (0.5,) * CHANNELS, (0.25,) * CHANNELS)


def batch(size: int, samples: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Fixed random images, with labels and indices that agree with ``dataset``."""
    draws = stream(0, "benchmark")
    images = torch.randn(size, CHANNELS, IMAGE_SIZE, IMAGE_SIZE, generator=draws)
    indices = torch.randperm(samples, generator=draws)[:size]
    return images.to(device), (indices % CLASSES).to(device), indices.to(device)
