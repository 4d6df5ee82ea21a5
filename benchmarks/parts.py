"""Parts of a training step from ``conf/``, read with PyYAML alone: a machine to measure on may lack Hydra."""

import re
from collections.abc import Mapping
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
import yaml

from sakd.data import Dataset, ImageSet
from sakd.networks import StagedNet
from sakd.streams import initialising, stream
from sakd.training import Execution, Trainer, spots_of

CONF = Path(__file__).parent.parent / "conf"
CLASSES, CHANNELS, IMAGE_SIZE = 100, 3, 32  # CIFAR-100's
LR = 0.01  # of all optimizers; the cost of a step does not depend on it

Node = dict[str, Any]


def choices(group: str) -> list[str]:
    """The names in a group of ``conf/``."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def read(group: str, name: str, **known: object) -> Node:
    """A file of ``conf/`` over those that its defaults list names, with plain values.

    ``${group.key}`` is that key of the file, ``${key}`` one of ``known``; of ``${oc.select:path,otherwise}``
    there is only the otherwise, since no other group is read.
    """
    node = _merged(group, name)

    def resolved(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: resolved(inner) for key, inner in value.items()}
        asks = re.fullmatch(r"\$\{(.*)\}", value) if isinstance(value, str) else None
        if asks is None:
            return value
        if asks[1].startswith("oc.select:"):
            return yaml.safe_load(asks[1].rpartition(",")[2])
        own = asks[1].removeprefix(f"{group}.")
        return node[own] if own in node else known.get(asks[1], value)

    return resolved(node)


def _merged(group: str, name: str) -> Node:
    node = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    merged: Node = {}
    for base in node.pop("defaults", ["_self_"]):
        part = node if base == "_self_" else _merged(group, base)
        losses = merged.get("losses", {}) | part.get("losses", {})
        merged |= part | ({"losses": losses} if losses else {})
    return merged


def make(node: Node, *arguments: object, **keys: object) -> Any:
    """Call the node's ``_target_`` with its plain keys."""
    own = {key: value for key, value in node.items() if key not in ("_target_", "name", "optimizer")}
    return resolve_name(node["_target_"])(*arguments, **own, **keys)


def network(name: str) -> StagedNet:
    with initialising(0, name):
        return make(read("network", name), num_classes=CLASSES, in_channels=CHANNELS, image_size=IMAGE_SIZE)


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=LR, momentum=0.9, weight_decay=5e-4)


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
    """A trainer that is ready to step, over ``samples`` training images of ``dataset``."""
    student_net, teacher_net = network(student), network(teacher)
    with initialising(0, "parts"):
        nodes = read("distiller", distiller, batch_size=batch_size)["losses"]
        losses = {name: make(node, student_net, teacher_net) for name, node in nodes.items()}
        spots = spots_of(student_net, teacher_net, losses.values())
        spot_mode = make(read("spot_mode", mode), spots, student_net, teacher_net)
    keys = {"optimizer": sgd, "policy_optimizer": sgd, "device": device, "execution": execution}
    built = Trainer(student_net, teacher_net, losses, spot_mode, **keys)
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
