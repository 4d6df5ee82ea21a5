"""What a run has stored, read back: its measurements and its result, or what is wrong with them."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sakd.errors import RunError
from sakd.files import parse_json, read_json, read_whole

Metrics = dict[str, float]

WHOLE_BELOW = 2**63  # more is no number that was measured, and none of floating point perhaps


def read_result(folder: Path) -> dict[str, Any] | None:
    """The result of a run's folder; None while there is none.

    Raises RunError if the file is damaged or holds something else.
    """
    path = folder / "result.json"
    result = read_json(path)
    if result is not None:
        for key, (fits, expected) in _RESULT.items():
            _require(result, key, fits, expected, path)
        for key, (fits, expected) in _TEACHER.items():
            if result["teacher"] is not None:
                _require(result, f"teacher.{key}", fits, expected, path)
        for key, (fits, expected) in _PRETRAINING.items():
            if result.get("pretraining") is not None:
                _require(result, f"pretraining.{key}", fits, expected, path)
        for key, (fits, expected) in _BEST.items():
            if "best" in result:
                _require(result, f"best.{key}", fits, expected, path)
        if "cost" in result:
            _require(result, "cost", _are_costs, "counts by network", path)
    return result


def read_metrics(folder: Path, epochs: int | None = None) -> list[Metrics]:
    """Lines of a run's metrics.jsonl, of its first ``epochs`` only or of all.

    What a kill cut short at its end is left out. Raises RunError naming the line that is damaged or holds
    something else.
    """
    path = folder / "metrics.jsonl"
    *whole, _ = (read_whole(path) or b"").split(b"\n")
    return [_metrics(line, f"{path}: line {number}") for number, line in enumerate(whole[:epochs], 1)]


def last_metrics(folder: Path) -> Metrics | None:
    """The last of a run's metrics, without a look at those before; None where there is none."""
    path = folder / "metrics.jsonl"
    *_, last, _ = (b"", *(read_whole(path) or b"").rsplit(b"\n", 2))
    return _metrics(last, f"{path}: the last line") if last else None


def _metrics(line: bytes, where: str) -> Metrics:
    try:
        metrics = parse_json(line)
    except ValueError as error:
        raise RunError(f"{where}: {error}") from error
    for key in ("epoch", "seconds", "time"):
        if key not in metrics:
            raise RunError(f"{where}: found no {key}, expected the measurements of an epoch")
    for key, value in metrics.items():
        fits, expected = (
            _EPOCH if key == "epoch" else _PERCENT if key.endswith("accuracy") else (_is_number, "a number")
        )
        if not fits(value):
            raise RunError(f"{where}: found {value!r:.60} for {key}, expected {expected}")
    return metrics


def _require(content: Mapping[str, Any], key: str, fits: Any, expected: str, path: Path) -> None:
    value: Any = content
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            raise RunError(f"{path}: found no {key}, expected {expected}; move the file away")
        value = value[part]
    if not fits(value):
        raise RunError(f"{path}: found {value!r:.60} for {key}, expected {expected}; move the file away")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return isinstance(value, float) or abs(value) < WHOLE_BELOW


def is_percent(value: object) -> bool:
    """True for a number from 0 to 100."""
    return _is_number(value) and 0 <= value <= 100


def _is_epoch(value: object) -> bool:
    return _is_number(value) and value >= 1 and float(value).is_integer()


def _are_costs(value: object) -> bool:
    """True for parameters and multiply-adds (None where they could not be counted) by network."""
    counts = [
        cost.get(key) if isinstance(cost, dict) else "none"
        for cost in (value.values() if isinstance(value, dict) else [None])
        for key in ("parameters", "multiply_adds")
    ]
    return all(count is None or type(count) is int for count in counts)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_checksum(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64


# What fits, and how it is called.
_PERCENT = is_percent, "an accuracy of 0 to 100 %"
_PERCENT_OR_NONE = lambda value: value is None or is_percent(value), _PERCENT[1]  # None: a pretraining's
_EPOCH = _is_epoch, "the number of an epoch"
_NAME = _is_text, "a name"
_CHECKSUM = _is_checksum, "a checksum"

_RESULT = {
    "run": _NAME,
    "student.name": _NAME,
    "student.accuracy": _PERCENT_OR_NONE,
    "student.best_accuracy": _PERCENT_OR_NONE,
    "student.best_epoch": _EPOCH,
    "student_sha256": _CHECKSUM,
    "data_sha256": _CHECKSUM,
    "teacher": (lambda value: value is None or isinstance(value, dict), "what taught"),
    "kept": (
        lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
        "shares by spot",
    ),
    "seconds": (lambda value: _is_number(value) and 0 <= value < math.inf, "seconds"),
    "epochs": _EPOCH,
    "code.commit": (lambda value: value is None or isinstance(value, str), "a commit"),
}
_BEST = {"epoch": _EPOCH, "by": _NAME, "accuracy": _PERCENT, "sha256": _CHECKSUM}
_PRETRAINING = {"run": _NAME, "sha256": _CHECKSUM}
_TEACHER = {"name": _NAME, "accuracy": _PERCENT, "sha256": _CHECKSUM, "source": _NAME}
