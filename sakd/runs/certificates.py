"""Certificates of teachers: what is measured of each before it teaches.

It is loaded strictly, its file's checksum taken, its accuracy measured.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from sakd.data import Dataset, evaluation_batches
from sakd.errors import RunError
from sakd.files import explained, read_json, with_checksum, write_whole
from sakd.networks.checkpoints import load_weights, parse_weights
from sakd.process import tf32
from sakd.runs.stored import is_percent
from sakd.training import Certificate, Teacher, evaluate


def certify(
    teacher: Teacher,
    name: str,
    path: Path,
    dataset: Dataset,
    certificates: Path,
    accept: Callable[[Certificate], None],
    asked: str | None = None,
) -> None:
    """Load ``path``, or the part of it that is ``asked`` for, into ``teacher``, measure and certify it.

    It is measured in float32, and not again where the folder ``certificates`` has a file's word for these
    very weights, network and test images. ``accept`` raises what it has against the teacher; nothing is
    written then.

    Raises CheckpointError if the file does not fit, RunError if its certificate is damaged or another's.
    """
    raw = path.read_bytes()
    load_weights(teacher.network, parse_weights(raw, path), name, path, asked)
    sha256 = hashlib.sha256(raw).hexdigest()
    subject = f"{sha256} {name} {dataset.test.checksum()} {dataset.mean} {dataset.std}"
    subject += "" if asked is None else f" {asked}"
    kept = certificates / f"{hashlib.sha256(subject.encode()).hexdigest()[:16]}.json"
    known = _known_accuracy(kept, subject)
    accuracy = _measured(teacher, dataset) if known is None else known
    certificate = Certificate(name, accuracy, sha256, str(path))
    accept(certificate)
    if known is None:
        with explained(kept):
            certificates.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps(with_checksum({"subject": subject, "accuracy": accuracy})).encode())
    teacher.certificate = certificate


def _measured(teacher: Teacher, dataset: Dataset) -> float:
    """Accuracy on the test images, percent."""
    test = dataset.test.to(teacher.device)
    with tf32(False):  # the same for every student, whatever its precision
        return evaluate(teacher.network, evaluation_batches(test, dataset))["accuracy"]


def _known_accuracy(path: Path, subject: str) -> float | None:
    """Accuracy of the ``subject`` in percent, as the file at ``path`` has it; None if there is none."""
    known = read_json(path)
    if known is None:
        return None
    if known.get("subject") != subject or not is_percent(known.get("accuracy")):
        raise RunError(
            f"{path}: is not a certificate of {subject[:12]}…; move the file away to measure it again"
        )
    return known["accuracy"]
