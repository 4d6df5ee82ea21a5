"""A teacher is certified before it teaches: loaded strictly, its file's checksum taken, its accuracy measured."""

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sakd.data import Dataset, evaluation_batches
from sakd.networks import StagedNet
from sakd.networks.checkpoints import load_weights, parse_weights
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


def certify(teacher: StagedNet, name: str, path: Path, dataset: Dataset, device: torch.device) -> Certificate:
    """Load ``path`` into ``teacher`` and measure it. Raises CheckpointError if the file does not fit."""
    raw = path.read_bytes()
    load_weights(teacher, parse_weights(raw, path), name, path)
    test = dataset.test.to(device)
    accuracy = evaluate(teacher.to(device), evaluation_batches(test, dataset))["accuracy"]
    return Certificate(name, accuracy, hashlib.sha256(raw).hexdigest(), str(path))
