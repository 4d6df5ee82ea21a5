"""Mean and deviation of a data set's pixels, computed exactly from its training images."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sakd.errors import DataError
from sakd.files import explained, read_json, with_checksum, write_whole

if TYPE_CHECKING:
    from sakd.data.sets import Images

DECIMALS = 4  # as the field writes them
AT_ONCE = 512  # images
LEVELS = 256

# Called with what is counted and how many there are; what it gives is called with how many more are done.
Counting = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
Moments = tuple[tuple[float, ...], tuple[float, ...]]


def remembered_moments(
    images: "Images",
    folder: Path,
    counting: Counting,
) -> Moments:
    """Mean and deviation of images, from ``folder`` if it has them; else they are computed, and kept there.

    Raises DataError if a channel is the same everywhere, RunError if what is kept is damaged.
    """
    checksum = images.checksum()
    kept = folder / f"{checksum[:16]}.json"
    known = read_json(kept)
    if known is not None and known.get("images") == checksum:
        return tuple(known["mean"]), tuple(known["std"])
    with counting("computing mean and deviation of the training images", len(images)) as advance:
        mean, std = moments(images, advance)
    with explained(kept):
        folder.mkdir(parents=True, exist_ok=True)
    content = {"images": checksum, "mean": mean, "std": std}
    write_whole(kept, json.dumps(with_checksum(content)).encode())
    return mean, std


def moments(images: "Images", advance: Callable[[int], None] = lambda more: None) -> Moments:
    """Mean and deviation of each channel, of pixels in [0, 1]: from counts, so exact in any order.

    Raises DataError if a channel is the same everywhere.
    """
    counts = 0
    for batch in images.plain(AT_ONCE):
        channels = batch.transpose(0, 1).flatten(1).cpu()
        counts = counts + torch.stack([channel.bincount(minlength=LEVELS) for channel in channels])
        advance(len(batch))
    levels, shares = torch.arange(LEVELS).double() / 255, counts.double() / counts.sum(1, keepdim=True)
    mean = (shares * levels).sum(1)
    std = (shares * (levels - mean[:, None]) ** 2).sum(1).sqrt()
    rounded = [tuple(round(value, DECIMALS) for value in values.tolist()) for values in (mean, std)]
    if min(rounded[1]) == 0:
        raise DataError(
            "dataset.std: found 0 for a channel, which is the same in all training images; expected some "
            "deviation, or one that is given"
        )
    return tuple(rounded)
