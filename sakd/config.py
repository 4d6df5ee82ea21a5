"""What a composed configuration means: resolvers, checks before any work, a run's identity, a teacher's own run.

Plain dictionaries throughout; nothing here needs torch or Hydra.
"""

import copy
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sakd.errors import CheckpointError, ConfigError, check_number, did_you_mean

Config = dict[str, Any]

KEYS = (
    *("seed", "epochs", "batch_size", "optimizer", "schedule", "student", "teacher", "dataset", "distiller", "spot_mode"),
    *("precision", "tracking", "device", "threads", "memory_format", "compile", "fold_batch_norm", "profile", "runs"),
)
# What a result does not depend on.
NOT_IDENTITY = (
    "device",
    "threads",
    "memory_format",
    "compile",
    "fold_batch_norm",
    "profile",
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
WHOLE_NUMBERS = {  # and the least that each may be
    f"{of}{key}": least for of in ("", "teacher.training.") for key, least in (("seed", 0), ("epochs", 1), ("batch_size", 2))
}
PRECISIONS = ("fp32", "tf32", "bf16")
WARM_UP_KEYS = ("name", "loss", "seed", "epochs", "batch_size", "optimizer", "schedule")
# Keys of the teacher that are not its network's.
TEACHER_KEYS = ("checkpoint", "min_accuracy", "training")


def register_resolvers() -> None:
    """``${times:a,b}`` multiplies; ``${share_of:n,[0.5, …]}`` gives whole numbers at those shares of n; ``${last_of:path}``
    is its last part; ``${choose:name,{at: 2.0, …},1.0}`` is the table's value for a name, or the last where it has none."""
    OmegaConf.register_new_resolver("times", lambda a, b: a * b, replace=True)
    OmegaConf.register_new_resolver("share_of", _share_of, replace=True)
    OmegaConf.register_new_resolver("last_of", lambda path: Path(path).absolute().name, replace=True)
    OmegaConf.register_new_resolver("choose", lambda name, table, otherwise: table.get(name, otherwise), replace=True)


def _share_of(whole: int, shares: Sequence[float]) -> ListConfig:
    return OmegaConf.create([round(share * whole) for share in shares])


def resolve(cfg: DictConfig) -> Config:
    """The composed configuration as plain values, checked. Raises ConfigError naming the key at fault."""
    try:
        _check_numbers(lambda key, otherwise: OmegaConf.select(cfg, key, default=otherwise))  # before any is computed with
        config = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, TypeError, ValueError) as error:
        key = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ConfigError(f"{key}{str(error).splitlines()[0]}") from error
    check(config)
    return config


def with_values(config: Config, values: Mapping[str, Any]) -> Config:
    """A copy with other values for keys that it has, by dotted path, checked. KeyError where they cannot just be put there."""
    config = copy.deepcopy(config)
    for path, value in values.items():
        *parents, leaf = path.split(".")
        node = config
        for key in parents:
            node = node[key] if isinstance(node, dict) else {}
        if isinstance(node[leaf], dict) or isinstance(value, (dict, list, str)):
            raise KeyError(path)  # nodes are merged, and text may hold an interpolation: for Hydra to do
        node[leaf] = value
    _check_numbers(partial(_find, config))
    check(config)
    return config


def _find(node: Any, path: str, otherwise: Any) -> Any:
    """The value at a dotted path, or ``otherwise`` where there is none."""
    for key in path.split("."):
        if not isinstance(node, dict) or key not in node:
            return otherwise
        node = node[key]
    return node


def _check_numbers(value_of: Callable[[str, Any], Any]) -> None:
    """``value_of(key, otherwise)``: an optimizer may have no learning rate."""
    for key, least in WHOLE_NUMBERS.items():
        _check_whole(key, value_of(key, None), least)
    check_number("optimizer.lr", value_of("optimizer.lr", 0.0))


def check(config: Config) -> None:
    """Raise an error for values that cannot be used, or that contradict each other."""
    for key in KEYS:
        if key not in config:
            raise ConfigError(f"{key}: found nothing, a run needs it")
    for key in config:
        if key not in KEYS:
            raise ConfigError(f"{key}: no such key; expected one of {', '.join(KEYS)}.{did_you_mean(key, KEYS)}")
    for key in ("dataset", "student", "teacher", "distiller", "spot_mode", "tracking", "optimizer"):
        if not isinstance(config[key], dict):
            raise ConfigError(f"{key}: found {config[key]!r}, expected keys and values")
    if not isinstance(config["runs"], str) or not config["runs"]:
        raise ConfigError(f"runs: found {config['runs']!r}, expected the path of a folder")
    _check_tracking(config["tracking"])
    _check_distiller(config["distiller"])
    if config["threads"] is not None:
        _check_whole("threads", config["threads"], 1)
    check_choice("precision", config["precision"], PRECISIONS)
    check_choice("teacher.training.precision", config["teacher"]["training"].get("precision"), PRECISIONS)
    check_choice("memory_format", config["memory_format"], ("contiguous", "channels_last"))
    check_choice("compile", config["compile"], ("none", "default", "graph"))
    for key in ("fold_batch_norm", "profile"):
        if not isinstance(config[key], bool):
            raise ConfigError(f"{key}: found {config[key]!r}, expected true or false")
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
    if not isinstance(checkpoint, (str, type(None))):
        raise ConfigError(f"teacher.checkpoint: found {checkpoint!r}, expected the path of a file, or null")
    if needs_teacher(config) and checkpoint is not None and not Path(checkpoint).is_file():
        raise CheckpointError(f"teacher.checkpoint: no file {checkpoint}; expected the teacher's weights")


def _check_tracking(tracking: Config) -> None:
    check_choice("tracking.name", tracking.get("name"), ("mlflow", "none"))
    if tracking["name"] == "none":
        return
    uri, experiment = tracking.get("uri"), tracking.get("experiment")
    if not isinstance(uri, str) or not re.match(r"[a-z0-9+]+://|databricks", uri):
        raise ConfigError(
            f"tracking.uri: found {uri!r}, expected a store such as sqlite:///mlflow.db or http://host:5000 "
            "(it comes from MLFLOW_TRACKING_URI where that is set)"
        )
    if not isinstance(experiment, str) or not experiment:
        raise ConfigError(f"tracking.experiment: found {experiment!r}, expected a name")


def _check_distiller(distiller: Config) -> None:
    losses = distiller.get("losses")
    if not isinstance(losses, dict) or not all(isinstance(node, dict) for node in losses.values()):
        raise ConfigError(f"distiller.losses: found {losses!r}, expected distillers by name")
    if not losses and distiller["name"] != "none":
        raise ConfigError(f"distiller.losses: found none, expected some for distiller={distiller['name']}, or distiller=none")
    if distiller.get("warm_up") is not None:
        _check_warm_up(distiller["warm_up"], losses)


def _check_warm_up(warm_up: Config, losses: Config) -> None:
    if not isinstance(warm_up, dict):
        raise ConfigError(f"distiller.warm_up: found {warm_up!r}, expected {', '.join(WARM_UP_KEYS)}, or null")
    for key in WARM_UP_KEYS:
        if key not in warm_up and key != "loss":
            raise ConfigError(f"distiller.warm_up.{key}: found nothing, a warm-up needs it")
    for key in warm_up:
        check_choice(f"distiller.warm_up.{key}: the key", key, WARM_UP_KEYS)
    if warm_up.get("loss") is None:
        check_choice("distiller.warm_up.name", warm_up["name"], list(losses))
    for key, least in (("seed", 0), ("epochs", 1), ("batch_size", 2)):
        _check_whole(f"distiller.warm_up.{key}", warm_up[key], least)


def check_choice(key: str, value: object, options: Sequence[str]) -> None:
    """Raise a ConfigError unless ``value`` is one of ``options``."""
    if value not in options:
        raise ConfigError(f"{key}: found {value!r}, expected one of {', '.join(options)}.{did_you_mean(value, options)}")


def require_accuracy(config: Config, accuracy: float, source: str) -> None:
    """Raise CheckpointError if a teacher with this test accuracy, in percent, is not good enough."""
    least = config["teacher"]["min_accuracy"]
    if accuracy < least:
        raise CheckpointError(
            f"teacher.min_accuracy: found {accuracy:.2f} % on the test images with {source}, expected at least {least} %"
        )


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


def warm_up_config(config: Config, teacher_stages: Sequence[str] | None) -> Config:
    """The configuration of the run that warms up this run's distiller; of nothing that it does not depend on.

    ``teacher_stages``: where, if it learns from the teacher alone; the teacher's network then stands for every student.
    """
    warm_up = copy.deepcopy(config["distiller"]["warm_up"])
    name, own_loss = warm_up.pop("name"), warm_up.pop("loss", None)
    loss = own_loss or copy.deepcopy(config["distiller"]["losses"][name])
    loss["weight"] = 1.0  # alone, it weighs nothing
    own = {**copy.deepcopy(config), **warm_up}
    if teacher_stages is not None:
        own["student"] = teacher_config(config)["student"]
        loss["where"] = list(teacher_stages)
    own["distiller"] = {"name": f"{config['distiller']['name']}_warm_up", "losses": {name: loss}, "warms_up": name}
    own["spot_mode"] = {"name": "fixed", "_target_": "sakd.spot_modes.Fixed"}
    if "experiment" in own["tracking"]:
        own["tracking"]["experiment"] += "-warm-ups"
    return own


def identity(config: Config) -> Config:
    """What a result depends on. A teacher's weights file counts by its content; without distillers there is no teacher."""
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
    """Short names, and every value by its dotted path, as text: what MLflow shows of a run, and what runs are chosen by."""
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
