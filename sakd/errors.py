"""Errors that the user can mend. Each message names the key or file, what was found and what was expected."""

import math
from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


class SakdError(Exception):
    """An error that is shown without a traceback; the program ends with exit code 1."""


class ConfigError(SakdError, ValueError):
    """A key or a value of the configuration cannot be used."""


class DataError(SakdError):
    """A data file is missing, damaged, or not what its data set should be."""


class CheckpointError(SakdError):
    """A weights file is missing, damaged, or for another network or another number of classes."""


class ExportError(SakdError):
    """A network cannot be written in a format, or not so that it gives the same."""


class RunError(SakdError):
    """The folder of a run cannot be read or written."""


class RunHeldError(RunError):
    """Another process works on a run."""


class WithdrawnError(SakdError):
    """A run was cancelled while others of its cohort go on."""


class SlurmError(SakdError):
    """SLURM does not answer, or refuses."""


class CaptureError(SakdError):
    """A step cannot be captured as a CUDA graph."""


class NonFiniteLossError(SakdError):
    """A loss became NaN or infinite."""


def in_one_line(error: BaseException) -> str:
    """An error's message in one line, which is the same for all that fails alike.

    An error that is none of ours has its type before it.
    """
    if isinstance(error, KeyboardInterrupt):
        return f"ended by {error if str(error) else 'SIGINT'}"
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, SakdError) else f"{type(error).__name__}: {first}"


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """A hint, ``" Did you mean 'kd'?"``, or the empty string where nothing is near.

    Of equally near ones, a like beginning wins.
    """
    word = str(word)
    near = get_close_matches(word, [str(option) for option in options], n=5, cutoff=0.5)
    if not near:
        return ""

    def nearness(option: str) -> tuple[float, int]:
        beginning = next((i for i, (a, b) in enumerate(zip(word, option)) if a != b), len(word))  # noqa: B905
        return SequenceMatcher(None, word, option).ratio(), beginning

    best = max(near, key=nearness)
    return f" Did you mean '{best}'?"


def check_number(
    key: str, value: object, least: float = -math.inf, above: bool = False, whole: bool = False
) -> None:
    """Raise ConfigError unless ``value`` is a finite (or ``whole``) number.

    It must be at least ``least``, or with ``above``, above it.
    """
    number = (
        isinstance(value, int if whole else (int, float))
        and not isinstance(value, bool)
        and math.isfinite(value)
    )
    if not number or value < least or (above and value == least):
        bound = f" above {least:g}" if above else f" of at least {least:g}" if least > -math.inf else ""
        raise ConfigError(
            f"{key}: found {value!r}, expected a {'whole' if whole else 'finite'} number{bound}"
        )
