"""A teacher is certified before it teaches: loaded strictly, its file's checksum taken, its accuracy measured."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sakd.config import sha256_of
from sakd.data import Dataset, evaluation_batches
from sakd.errors import CheckpointError
from sakd.networks import StagedNet
from sakd.networks.checkpoints import load_weights, read_weights
from sakd.trainer import evaluate


@dataclass(frozen=True)
class Certificate:
    """What is known of a teacher; ``accuracy`` in percent on the test images."""

    name: str
    accuracy: float
    sha256: str
    source: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def certify(
    teacher: StagedNet, name: str, path: Path, dataset: Dataset, min_accuracy: float, device: torch.device
) -> Certificate:
    """Load ``path`` into ``teacher`` and measure it.

    Raises CheckpointError if the file does not fit, or the accuracy is below ``min_accuracy`` percent.
    """
    load_weights(teacher, read_weights(path), name, path)
    test = dataset.test.to(device)
    accuracy = evaluate(teacher.to(device), evaluation_batches(test, dataset))["accuracy"]
    if accuracy < min_accuracy:
        raise CheckpointError(
            f"teacher.min_accuracy: found {accuracy:.2f} % on the test images with {path}, expected at least {min_accuracy} %"
        )
    return Certificate(name, accuracy, sha256_of(path), str(path))
