"""What may be said of a launcher, checked before anything is submitted."""

from collections.abc import Mapping
from typing import Any

from sakd.errors import ConfigError, check_number

# Keys of hydra.launcher as submitit's executors have them in common, and as its SLURM executor has them.
GENERIC = ("gpus_per_node", "cpus_per_task", "mem_gb", "timeout_min")
SLURM = (
    "partition",
    "account",
    "qos",
    "constraint",
    "nodelist",
    "exclude",
    "signal_delay_s",
    "array_parallelism",
)
OURS = (
    "dependency",
    "kill-on-invalid-dep",
    "array",
    "job-name",
    "output",
    "error",
    "open-mode",
    "signal",
    "requeue",
)


def is_local(launcher: Mapping[str, Any]) -> bool:
    return str(launcher["_target_"]).endswith(".LocalLauncher")


def check(launcher: Mapping[str, Any]) -> None:
    """Raises ConfigError naming the key at fault, or where it is neither hydra/launcher=slurm nor local."""
    if is_local(launcher):
        _whole(launcher, "processes", 1, optional=True)
        return
    if not str(launcher["_target_"]).endswith(".SlurmLauncher"):
        raise ConfigError(f"hydra/launcher: found {launcher['_target_']}, expected slurm or local")
    for key in ("partition", "account", "qos", "constraint", "nodelist", "exclude"):
        _kind(launcher, key, str, "text", optional=True)
    _whole(launcher, "gpus_per_node", 0, optional=True)
    _whole(launcher, "cpus_per_task", 1, optional=True)
    _whole(launcher, "timeout_min", 1)
    _whole(launcher, "signal_delay_s", 0)
    _whole(launcher, "max_num_timeout", 0)
    _whole(launcher, "array_parallelism", 1)
    if launcher["mem_gb"] is not None:
        check_number("hydra.launcher.mem_gb", launcher["mem_gb"], 0, above=True)
    _kind(launcher, "wait", bool, "true or false")
    _kind(launcher, "setup", list, "a list of shell commands")
    _kind(launcher, "additional_parameters", dict, "options of sbatch by name")
    for key in launcher["additional_parameters"]:
        plain = str(key).replace("_", "-")
        if plain in OURS or key in launcher:
            better = f"hydra.launcher.{key}" if key in launcher else "none: sakd sets it itself"
            raise ConfigError(f"hydra.launcher.additional_parameters: found {key}, expected {better}")


def _whole(launcher: Mapping[str, Any], key: str, least: int, optional: bool = False) -> None:
    if not (optional and launcher[key] is None):
        check_number(f"hydra.launcher.{key}", launcher[key], least, whole=True)


def _kind(launcher: Mapping[str, Any], key: str, kind: type, expected: str, optional: bool = False) -> None:
    if not isinstance(launcher[key], kind) and not (optional and launcher[key] is None):
        raise ConfigError(
            f"hydra.launcher.{key}: found {launcher[key]!r}, expected {expected}{' or null' * optional}"
        )
