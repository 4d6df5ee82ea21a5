"""The test images of a data set that brings none: a fixed stratified part of its images."""

import logging
from collections.abc import Sequence

from sakd.data.sets import Images, stratified
from sakd.errors import ConfigError

log = logging.getLogger("sakd")


def check_test_fraction(fraction: float | None, split: str, *, is_there: bool) -> None:
    """Raise ConfigError unless there is the one or the other: the test ``split``, or a part to hold out."""
    if is_there and fraction:
        raise ConfigError(
            f"dataset.test_fraction: found {fraction} beside the test split ({split}); expected one or the "
            "other"
        )
    if not is_there and not fraction:
        raise ConfigError(
            f"dataset.test_fraction: found none, and no test split ({split}); expected a share above 0, or a "
            "test split"
        )


def with_test_images(parts: Sequence[Images], fraction: float | None, where: str) -> tuple[Images, Images]:
    """Training and test images: the two ``parts``, or those of the only one, of which a part is held out.

    It is the same in every run: a stratified ``fraction``, whatever the seed is. Raises ConfigError if that
    is no image, or leaves none.
    """
    if len(parts) == 2:
        return parts[0], parts[1]
    (everything,) = parts
    count = round(fraction * len(everything))
    if not 0 < count < len(everything):
        raise ConfigError(
            f"dataset.test_fraction: found {fraction}, which holds out {count} of {len(everything)} images; "
            "expected some, and some to train on"
        )
    is_test = stratified(everything.labels, count)
    text = (
        f"{where}: of {len(everything):,} images {count:,} are held out as test images, in each run the same"
    )
    log.info("%s", text, extra={"news": (f"test images of {where}", text)})
    return everything[~is_test], everything[is_test]
