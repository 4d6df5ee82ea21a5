"""Names that everybody takes: MLflow, of metrics and parameters, and the file system, of runs' folders."""

import re
from collections.abc import Iterable

from sakd.errors import ConfigError

REFUSED = re.compile(r"[^\w.\- :/]")  # by MLflow, in names of metrics and parameters
UNSPEAKABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")  # control characters, line breaks
LONGEST = 250  # characters of MLflow's names
LONGEST_FOLDER = 225  # bytes of a folder's name, of 255: files are called after it, with endings
INSTEAD = "_"
# Keys of a network's node that say where its weights begin, and not what it is.
START_KEYS = ("checkpoint", "checkpoint_part", "pretrained")
HEADLINE = "test/accuracy"  # the measurement by which runs are told and compared: of the last epoch, percent
BEST = "test/best_accuracy"  # the best of it so far
VALIDATION = "val/accuracy"  # of images that are held out from training, where there are any


def safe(name: str) -> str:
    """The name of a metric or parameter as MLflow takes it: most often the name itself.

    What it refuses becomes ``_``: all but letters, digits and ``_-. :/``, and parts of a path that lead
    elsewhere.
    """
    parts = REFUSED.sub(INSTEAD, name).split("/")
    return "/".join(re.sub(r"^(\.?$|\.\.)", INSTEAD, part) for part in parts)[:LONGEST]


def folder(*parts: str) -> str:
    """The name of one folder: the parts, with ``-`` between them.

    What would lead elsewhere, or begins like an option or a hidden file, becomes ``_``. Where all is too long
    for the file system, long parts are cut.
    """
    parts = tuple(re.sub(r"^[-.]+|/|\.\.+", INSTEAD, part) for part in parts)
    lengths = range(LONGEST_FOLDER, 0, -1)
    names = ("-".join(_cut(part, length) for part in parts) for length in lengths)
    return next(name for name in names if len(name.encode()) <= LONGEST_FOLDER)


def _cut(text: str, length: int) -> str:
    """The beginning of a text, of at most so many bytes."""
    return text.encode()[:length].decode(errors="ignore")


def check_name(key: str, name: object) -> None:
    """Raise ConfigError unless ``name``, which ``key`` gives, can name anything."""
    if not isinstance(name, str) or not name.strip() or UNSPEAKABLE.search(name):
        raise ConfigError(f"{key}: found {name!r}, expected a name, in one line")


def check_distinct(key: str, names: Iterable[str]) -> None:
    """Raise ConfigError for two names that would be one in MLflow."""
    found: dict[str, str] = {}
    for name in names:
        if (other := found.setdefault(safe(name), name)) != name:
            raise ConfigError(
                f"{key}: found {other!r} and {name!r}, which are both {safe(name)!r} in MLflow; expected "
                "names that differ there, too"
            )
