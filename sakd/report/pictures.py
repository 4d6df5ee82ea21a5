"""Pictures as what a page has in itself: each the text of its bytes."""

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from matplotlib import colormaps
from PIL import Image

from sakd.compare import Comparison
from sakd.compare.plots import plot
from sakd.decisions import Recorded, keeps_all, samples
from sakd.decisions import pictures as decisions
from sakd.decisions.measures import class_shares
from sakd.errors import ConfigError

LEVELS = 64  # of lightness
COLUMNS, ROWS = 80, 100  # of a picture of shares at most; more epochs or classes are averaged


@dataclass(frozen=True)
class Picture:
    """``kind``: how the page shows it, ``shares`` with their scale or any other ``figure``; ``source``: its
    bytes, as a data URI."""

    kind: str
    title: str
    words: str  # what is to be seen, for those who do not see it
    source: Markup
    low: float = 0.0  # of shares: what the dark end means; the light end is all


def comparison_plot(comparison: Comparison) -> dict[str, Markup] | None:
    """Differences with their intervals, for a ``light`` and a ``dark`` page; None where there are none."""
    try:
        return {
            name: data_uri(plot(comparison, ".svg", on_dark=name == "dark"), "svg+xml")
            for name in ("light", "dark")
        }
    except ConfigError:
        return None


def of_decisions(run: Recorded, all_of_them: bool) -> Iterator[Picture]:
    """What a run's card shows of the record of its decisions: for each spot where not all was kept, the share
    of each class's images by epoch.

    With ``all_of_them`` also what `sakd spots` draws: half a megabyte, and seconds.
    """
    record = run.record
    if not record.epochs.size or not record.labels.size:
        return
    if keeps_all(record):
        return
    if all_of_them:
        for name, figure in decisions.draw(record, run.name, samples.small_images(run)).items():
            source = data_uri(decisions.content(figure, "png"), "png")
            yield Picture("figure", name, f"{run.name}: {name}, by its decisions", source)
        return
    classes = np.unique(record.labels)
    for spot in record.spots:
        shares = class_shares(record.kept_of(spot), record.labels).T
        if shares.min() < 1:
            where = (
                f"{spot}: classes {classes[0]} to {classes[-1]}, "
                f"epochs {record.epochs[0]} to {record.epochs[-1]}"
            )
            yield _shares(where, _averaged(_averaged(shares, ROWS).T, COLUMNS).T)


def _shares(title: str, shares: np.ndarray) -> Picture:
    """``shares`` [classes, epochs], a row of pixels for each class."""
    low = decisions.lowest_shown(shares)
    levels = np.round((shares - low) / (1 - low) * (LEVELS - 1)).astype(np.uint8)
    image = Image.fromarray(levels)
    image.putpalette(
        (255 * colormaps[decisions.SHARES](np.linspace(0, 1, LEVELS))[:, :3]).astype(np.uint8).tobytes()
    )
    content = io.BytesIO()
    image.save(content, "PNG", optimize=True)
    words = (
        f"{title}: share of each class's images that was distilled, "
        f"from {shares.min():.1%} to {shares.max():.1%}"
    )
    return Picture("shares", title, words, data_uri(content.getvalue(), "png"), low)


def _averaged(values: np.ndarray, most: int) -> np.ndarray:
    """At most that many rows, each the mean of neighbours."""
    if len(values) <= most:
        return values
    firsts = np.arange(most) * len(values) // most
    sizes = np.diff([*firsts, len(values)])
    return np.add.reduceat(values, firsts) / sizes[:, None]


def data_uri(content: bytes, kind: str) -> Markup:
    """An image as its own address. It is no text, in which a password could stand or seem to."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(content).decode()}")
