"""What a composed configuration means: resolvers, checks before any work, a run's identity, a teacher's own run.

Plain dictionaries throughout; nothing here needs torch or Hydra.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sakd.errors import CheckpointError, ConfigError

Config = dict[str, Any]

# What a result does not depend on.
NOT_IDENTITY = (
    "device",
    "threads",
    "runs",
    "tracking",
    "dataset.root",
    "dataset.download",
    "dataset.recipe",
    "teacher.checkpoint",
    "teacher.min_accuracy",
)
WHOLE_NUMBERS = {  # and the least that each may be
    f"{of}{key}": least for of in ("", "teacher.training.") for key, least in (("seed", 0), ("epochs", 1), ("batch_size", 2))
}
# Keys of the teacher that are not its network's.
TEACHER_KEYS = ("checkpoint", "min_accuracy", "training")


def register_resolvers() -> None:
    """``${times:a,b}`` multiplies; ``${share_of:n,[0.5, …]}`` gives whole numbers at those shares of n."""
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("share_of", lambda whole, shares: [round(share * whole) for share in shares], replace=True)


def resolve(cfg: DictConfig) -> Config:
    """The composed configuration as plain values, checked. Raises ConfigError naming the key at fault."""
    for key, least in WHOLE_NUMBERS.items():
        _check_whole(key, OmegaConf.select(cfg, key), least)  # before anything is computed from them
    try:
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from error
    check(config)
    return config


def check(config: Config) -> None:
    """Raise an error for values that cannot be used, or that contradict each other."""
    if config["threads"] is not None:
        _check_whole("threads", config["threads"], 1)
    percent = config["teacher"]["min_accuracy"]
    if not isinstance(percent, (int, float)) or isinstance(percent, bool) or not 0 <= percent <= 100:
        raise ConfigError(f"teacher.min_accuracy: found {percent!r}, expected percent, from 0 to 100")
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", str(config["device"])):
        raise ConfigError(f"device: found {config['device']!r}, expected auto, cpu, cuda or cuda:N")
    for network in ("student", "teacher"):
        for key, of_data in (("num_classes", "classes"), ("in_channels", "channels"), ("image_size", "image_size")):
            found, expected = config[network].get(key), config["dataset"][of_data]
            if found is not None and found != expected:
                raise ConfigError(f"{network}.{key}: found {found!r}, expected dataset.{of_data}, which is {expected!r}")
    checkpoint = config["teacher"]["checkpoint"]
    if needs_teacher(config) and checkpoint is not None and not Path(checkpoint).is_file():
        raise CheckpointError(f"teacher.checkpoint: no file {checkpoint}; expected the teacher's weights")


def _check_whole(key: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key}: found {value!r}, expected a whole number of at least {least}")


def needs_teacher(config: Config) -> bool:
    return bool(config["distiller"]["losses"])


def teacher_config(config: Config) -> Config:
    """The configuration of the run that trains this run's teacher: the same that a user would give it as a student alone."""
    training = config["teacher"]["training"]
    own = copy.deepcopy(config)
    own["student"] = {key: value for key, value in config["teacher"].items() if key not in TEACHER_KEYS}
    own |= copy.deepcopy(training)
    own["distiller"] = {"name": "none", "losses": {}}
    if "experiment" in own["tracking"]:
        own["tracking"]["experiment"] += "-teachers"
    return own


def identity(config: Config) -> Config:
    """What a result depends on. A teacher's weights file counts by its content; without distillers there is no teacher."""
    own = copy.deepcopy(config)
    if not needs_teacher(own):
        del own["teacher"], own["spot_mode"]
        own["distiller"] = {"name": "none"}
    elif own["teacher"]["checkpoint"] is not None:
        own["teacher"]["sha256"] = sha256_of(Path(own["teacher"]["checkpoint"]))
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


def run_name(config: Config) -> str:
    names = short_names(config)
    return "-".join([*list(names.values())[:-1], f"seed{names['seed']}", digest(config)])


def flatten(node: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Leaves with dotted paths; lists count as leaves."""
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, node


def sha256_of(path: Path) -> str:
    total = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(1 << 20), b""):
            total.update(part)
    return total.hexdigest()
