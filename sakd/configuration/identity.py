"""A run's identity: what its result depends on, its digest, and the names that it goes by."""

import copy
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sakd.configuration.prerequisites import Config, needs_teacher

# What a result does not depend on.
NOT_IDENTITY = (
    "device",
    "threads",
    "memory_format",
    "compile",
    "fold_batch_norm",
    "profile",
    "cohort",
    "runs",
    "tracking",
    "dataset.root",
    "dataset.download",
    "dataset.workers",
    "dataset.pin_memory",
    "dataset.recipe",
    "teacher.checkpoint",
    "teacher.min_accuracy",
)


def identity(config: Config) -> Config:
    """What a result depends on. A teacher's weights file counts by its content; without distillers there is
    no teacher."""
    own = copy.deepcopy(config)
    if not needs_teacher(own):
        del own["teacher"], own["spot_mode"]
        own["distiller"] = {"name": "none"}
    elif own["teacher"]["checkpoint"] is not None:
        path = Path(own["teacher"]["checkpoint"])
        own["teacher"]["sha256"] = _sha256_as_of(path, path.stat().st_mtime_ns, path.stat().st_size)
        del own["teacher"]["training"]
    for path in NOT_IDENTITY:
        _drop(own, path.split("."))
    return own


def _drop(node: Config, path: list[str]) -> None:
    for key in path[:-1]:
        node = node.get(key, {})
    node.pop(path[-1], None)


def digest(config: Config) -> str:
    """Ten hexadecimal digits of the identity."""
    canonical = json.dumps(_whole(identity(config)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:10]


def _whole(node: Any) -> Any:
    """1.0 is written as 1: the same number is the same run."""
    if isinstance(node, Mapping):
        return {key: _whole(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_whole(value) for value in node]
    return int(node) if isinstance(node, float) and node.is_integer() else node


def short_names(config: Config) -> dict[str, str]:
    """What a run is called by, in tables and in MLflow."""
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
    """Short names, and every value by its dotted path, as text: what MLflow shows of a run, and what runs are
    chosen by."""
    return short_names(config) | {key: str(value) for key, value in flatten(config) if key != "seed"}


def run_name(config: Config, digest: str) -> str:
    names = short_names(config)
    return "-".join([*list(names.values())[:-1], f"seed{names['seed']}", digest])


def flatten(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves with dotted paths; lists count as leaves."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


@lru_cache
def _sha256_as_of(path: Path, changed: int, size: int) -> str:
    """A sweep's cells have one file, read once; a file that was changed since is read again."""
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            total.update(part)
    return total.hexdigest()
