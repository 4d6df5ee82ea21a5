"""Identity of a run: what its result depends on, its digest, and the names that it goes by."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sakd import names
from sakd.configuration.prerequisites import Config, is_trained, needs_teacher

# What a run's identity leaves out, and why. config.yaml's comment and a table of docs/keys.md follow from it,
# by `sakd catalogue --write FILE`.
NOT_IDENTITY = {
    "device": "where it trains; results differ by rounding",
    "threads": "of the CPU; results differ by rounding",
    "memory_format": "how a step is carried out; results differ by rounding",
    "compile": "how a step is carried out; results differ by rounding",
    "fold_batch_norm": "how a step is carried out; results differ by rounding",
    "cohort": "who trains beside it; each trains as if alone",
    "profile": "what is noted of its steps",
    "record_spots": "what is noted of its decisions",
    "optimized_metric": "what a launch returns of it",
    "runs": "where its folder lies",
    "tracking": "where its metrics are mirrored",
    "dataset.root": "where the images lie; they are told apart by `dataset.name`",
    "dataset.download": "whether they are fetched",
    "dataset.workers": "processes that decode them",
    "dataset.pin_memory": "how they get to the device",
    "dataset.in_memory": "where the images are while it trains",
    "dataset.reads": "which keys its reader gets; the keys themselves count",
    "dataset.ignore_others": "whether keys may be there that nobody asks for",
    "dataset.recipe": "other keys' defaults, which count where they are used",
    "distiller.reference": "the paper",
    "distiller.pretraining.distiller": "whose pretraining a sum has; what it is counts",
    "student.checkpoint": "weights that it starts from; their content counts",
    "teacher.checkpoint": "a weights file; its content counts",
    "teacher.training.checkpoint": "weights that it starts from; their content counts",
    "teacher.min_accuracy": "what is refused; the teacher itself counts",
}

# What an absent key means. A key with this value does not count, so that a new key changes no digest.
# Entries stay: to take one out, or to change its value, is to change digests.
NEUTRAL = {
    "precision": "fp32",
    "schedule": None,
    "teacher.training.precision": "fp32",
    "teacher.training.schedule": None,
    "student.pretrained": None,
    "teacher.pretrained": None,
    "teacher.training.pretrained": None,
    "student.checkpoint_part": None,
    "teacher.checkpoint_part": None,
    "teacher.training.checkpoint_part": None,
    "dataset.crop_padding": 0,
    "dataset.flip": False,
    "dataset.val_fraction": 0,
    "dataset.train_samples": None,
    "dataset.test_samples": None,
    "dataset.test_fraction": None,
    "spot_mode.budget": 1,
    "distiller.losses.cc.teacher_embedding": "learned",
    "distiller.losses.kd.standardise": False,
    "distiller.losses.dkd.standardise": False,
    "distiller.losses.ctkd.standardise": False,
    "distiller.losses.mlkd.standardise": False,
    "distiller.pretraining": None,
    "distiller.pretraining.loss": None,
    "distiller.pretraining.schedule": None,
    "dataset.rand_augment": None,
    "dataset.erasing": 0,
    "task.weight": 1,
    "task.label_smoothing": 0,
    "task.class_weights": None,
    "task.mixup": 0,
    "task.cutmix": 0,
    "task": {},
    **{
        f"{node}schedule.{key}": value
        for node in ("", "teacher.training.", "distiller.pretraining.")
        for key, value in {"by": "epoch", "warmup_epochs": 0, "warmup_start": 0.01}.items()
    },
    "ema": None,
    "keep_best": False,
    "top5": False,
    "early_stop": None,
    **{
        f"{node}{key}": value
        for node in ("", "teacher.training.", "distiller.pretraining.")
        for key, value in {"clip_gradients": None, "accumulate": 1}.items()
    },
}


def digest(config: Config) -> str:
    """Digest of the identity: ten hexadecimal digits."""
    canonical = json.dumps(identity(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


# What of a configuration counts, in this order:
#
#   1. Numbers count by their value, 1.0 as 1; all else as it is written, a `_target_` as its text.
#   2. Without distillers there is no teacher: neither it nor spot mode and distiller count.
#   3. A weights file counts by its content; a teacher's in the place of the recipe that would train one.
#   4. What is in NOT_IDENTITY does not count.
#   5. What has its value of NEUTRAL does not count.
def identity(config: Config) -> Config:
    """Configuration of all that a result depends on, and of nothing else."""
    own = _plain(config)
    _count_content(own["student"])
    if not needs_teacher(own):
        del own["teacher"], own["spot_mode"]
        own["distiller"] = {"name": "none"}
    elif is_trained(own["teacher"]):
        _count_content(own["teacher"])
        del own["teacher"]["training"]
    else:
        _count_content(own["teacher"]["training"])
    for path in NOT_IDENTITY:
        node, key = _place(own, path)
        node.pop(key, None)
    for path, value in NEUTRAL.items():
        node, key = _place(own, path)
        if key in node and _is_same(node[key], value):
            del node[key]
    return own


def _count_content(node: Config) -> None:
    """Let a weights file count by its checksum."""
    if node.get("checkpoint") is not None:
        path = Path(node["checkpoint"])
        node["sha256"] = sha256_as_of(path, path.stat())


def without_effect(config: Config, overrides: Iterable[str]) -> list[str]:
    """Those overrides, as on a command line, that change nothing: of teacher and spot mode where none is
    used."""
    if needs_teacher(config):
        return []
    return [line for line in overrides if re.match(r"[+~]*(teacher|spot_mode|\w+@teacher)\b", line)]


def _plain(value: Any) -> Any:
    """A copy in which 1.0 is 1: the same number is the same run."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _place(config: Config, path: str) -> tuple[Config, str]:
    """The node that a dotted path's last key is in, and that key; an empty node where there is none."""
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node.get(parent)
        if not isinstance(node, dict):
            return {}, key
    return node, key


def _is_same(found: object, neutral: object) -> bool:
    """True if ``found`` is the neutral value, of the same type: ``False`` is another value than 0."""
    return type(found) is type(neutral) and found == neutral


def short_names(config: Config) -> dict[str, str]:
    """Names that a run is called by, in tables and in MLflow, and its seed."""
    distils = needs_teacher(config)
    return {
        "dataset": config["dataset"]["name"],
        "teacher": config["teacher"]["name"] if distils else "none",
        "student": config["student"]["name"],
        "distiller": config["distiller"]["name"],
        "spot_mode": config["spot_mode"]["name"] if distils else "none",
        "seed": str(config["seed"]),
    }


def parameters(config: Config) -> dict[str, str]:
    """Short names, and every value by its dotted path, as text.

    MLflow shows them of a run, and runs are chosen by them.
    """
    own = {names.safe(key): str(value) for key, value in flatten(config) if key != "seed"}
    return short_names(config) | own


def run_name(config: Config, digest: str) -> str:
    """Name of the run's folder, which lies in the folder of runs whatever its parts are called."""
    *parts, seed = short_names(config).values()
    return names.folder(*parts, f"seed{seed}", digest)


def flatten(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves of a configuration with their dotted paths; lists count as leaves."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def sha256_as_of(path: Path, status: os.stat_result) -> str:
    """Checksum of a file of this ``status``, which a sweep's cells share, read once.

    A file that was changed since, or has another size, is read again.
    """
    return _remembered(path, status.st_ino, status.st_ctime_ns, status.st_mtime_ns, status.st_size)


@lru_cache
def _remembered(path: Path, *status: int) -> str:
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            total.update(part)
    return total.hexdigest()
