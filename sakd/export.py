"""Students of finished runs for others' tools.

Weights get the names that the field's checkpoint files share.
"""

import hashlib
import io
from pathlib import Path

import torch

from sakd.configuration import build
from sakd.errors import CheckpointError, RunError
from sakd.files import write_whole
from sakd.networks.checkpoints import load_weights, parse_weights, shared_weights
from sakd.runs import read_config, read_result


def export_checkpoint(run: Path, output: Path) -> None:
    """Write to ``output`` the student of the finished run in the folder ``run``.

    Its weights are under "model", beside its name, its epoch and its accuracy in percent.

    Raises RunError if there is no such run or it is not finished, CheckpointError if its weights are not what
    it stored or its network has no shared names; nothing is written then.
    """
    if not (run / "config.yaml").is_file():
        raise RunError(f"{run}: found no config.yaml, expected a run's folder")
    result = read_result(run)
    if result is None:
        raise RunError(
            f"{run}: found no result.json, expected a finished run; the command that started it also "
            "finishes it"
        )
    config = read_config(run)
    if "pretrains" in config["distiller"]:
        raise RunError(
            f"{run}: found a pretraining ({config['distiller']['name']}), expected the run of a student "
            "or a teacher"
        )
    node = config["student"]
    name, path = node["name"], run / "student.safetensors"
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected the run's weights")
    raw = path.read_bytes()
    if hashlib.sha256(raw).hexdigest() != result["student_sha256"]:
        raise CheckpointError(
            f"{path}: expected checksum {result['student_sha256']}, as in result.json; the file was changed"
        )
    network = build.student_network(config)
    load_weights(network, parse_weights(raw, path), name, path)
    weights = shared_weights(network)
    if not weights:
        raise CheckpointError(
            f"{run}: found {name}, expected a network whose weights have names that the field shares"
        )
    student = result["student"]
    content = io.BytesIO()
    torch.save(
        {"model": weights, "name": name, "epoch": result["epochs"], "accuracy": student["accuracy"]}, content
    )
    write_whole(output, content.getbuffer())
