"""Certificates of teachers: what is measured of each before it teaches.

It is loaded strictly, its file's checksum taken, its accuracy measured.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from sakd.data import Dataset, evaluation_batches
from sakd.files import read_json, write_whole
from sakd.networks.checkpoints import load_weights, parse_weights
from sakd.process import tf32
from sakd.training import Certificate, Teacher, evaluate


def certify(
    teacher: Teacher,
    name: str,
    path: Path,
    dataset: Dataset,
    certificates: Path,
    accept: Callable[[Certificate], None],
) -> None:
    """Load ``path`` into ``teacher``, measure it and give it its certificate.

    It is measured in float32, and not again where the folder ``certificates`` has a file's word for these
    very weights, network and test images. ``accept`` raises what it has against the teacher; nothing is
    written then.

    Raises CheckpointError if the file does not fit.
    """
    raw = path.read_bytes()
    load_weights(teacher.network, parse_weights(raw, path), name, path)
    sha256 = hashlib.sha256(raw).hexdigest()
    subject = f"{sha256} {name} {dataset.test.checksum()} {dataset.mean} {dataset.std}"
    kept = certificates / f"{hashlib.sha256(subject.encode()).hexdigest()[:16]}.json"
    known = read_json(kept)
    measured = known is not None and known.keys() == {"accuracy", "subject"} and known["subject"] == subject
    if measured:
        accuracy = known["accuracy"]
    else:
        test = dataset.test.to(teacher.device)
        with tf32(False):  # the same for every student, whatever its precision
            accuracy = evaluate(teacher.network, evaluation_batches(test, dataset))["accuracy"]
    certificate = Certificate(name, accuracy, sha256, str(path))
    accept(certificate)
    if not measured:
        certificates.mkdir(parents=True, exist_ok=True)
        write_whole(kept, json.dumps({"subject": subject, "accuracy": accuracy}).encode())
    teacher.certificate = certificate
