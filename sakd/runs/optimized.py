"""What a launch returns of a run: the measurement by which a sweeper looks for better values."""

from collections.abc import Mapping, Sequence
from typing import Any

from sakd.configuration import Config
from sakd.configuration.check import check_choice
from sakd.errors import RunError
from sakd.names import BEST
from sakd.runs.stored import Metrics

KEY = "optimized_metric"


def check_optimized(config: Config, of_steps: Sequence[str]) -> None:
    """Raise ConfigError unless a run measures what ``optimized_metric`` names; ``of_steps``: what its steps
    do."""
    splits = ("val", "test") if config["dataset"]["val_fraction"] else ("test",)
    scores = ("accuracy", "loss", "top5") if config.get("top5") else ("accuracy", "loss")
    measured = [f"{split}/{score}" for split in splits for score in scores]
    if config.get(KEY) is not None:
        check_choice(KEY, config[KEY], [*measured, BEST, *of_steps, "seconds"])


def is_share_of_images(config: Config) -> bool:
    """True if more is better of what is returned: images that a network gets right."""
    return config.get(KEY) is None or config[KEY].endswith(("accuracy", "top5"))


def optimized(config: Config, result: Mapping[str, Any], metrics: Sequence[Metrics]) -> float:
    """The last epoch's value of what ``optimized_metric`` names; by default accuracy on validation images, or
    on test images where there are none.

    Raises RunError for a finished run that has not measured it.
    """
    wanted = config.get(KEY)
    if wanted is None:
        student = result["student"]
        return student["accuracy"] if student["val_accuracy"] is None else student["val_accuracy"]
    if not metrics or wanted not in metrics[-1]:
        found = ", ".join(metrics[-1]) if metrics else "none"
        raise RunError(f"{KEY}: found {wanted!r}, expected a measurement of {result['run']}: {found}")
    return metrics[-1][wanted]
