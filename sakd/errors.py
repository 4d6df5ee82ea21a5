"""Errors that the user can mend. Each message names the key or file, what was found and what was expected."""

from collections.abc import Iterable
from difflib import get_close_matches


class SakdError(Exception):
    """Shown without a traceback; the program ends with exit code 1."""


class ConfigError(SakdError, ValueError):
    """A key or a value of the configuration cannot be used."""


class DataError(SakdError):
    """A data file is missing, damaged, or not what its data set should be."""


class CheckpointError(SakdError):
    """A weights file is missing, damaged, or for another network or another number of classes."""


class RunError(SakdError):
    """The folder of a run cannot be read or written."""


class NonFiniteLossError(SakdError):
    """A loss became NaN or infinite."""


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """``" Did you mean 'kd'?"``, or the empty string where nothing is near."""
    near = get_close_matches(str(word), [str(option) for option in options], n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""


def check_choice(key: str, value: object, options: Iterable[str]) -> None:
    """Raise a ConfigError unless ``value`` is one of ``options``."""
    options = list(options)
    if value not in options:
        raise ConfigError(f"{key}: found {value!r}, expected one of {', '.join(options)}.{did_you_mean(value, options)}")
