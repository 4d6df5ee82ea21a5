"""Pictures of a run's page: those in its folder ``pictures``, to which what is drawn at its end is added."""

import io
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sakd.errors import RunError, in_one_line
from sakd.files import explained, write_whole
from sakd.names import HEADLINE
from sakd.runs.record import FILE
from sakd.runs.stored import Metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger("sakd")

FOLDER = "pictures"
_at_work = threading.Lock()
# Okabe and Ito's colours, apart for the colour-blind too, with lines that tell without any colour.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
WIDTH, HEIGHT, DOTS = 8.0, 2.6, 100  # inches of the picture and of each panel; dots per inch
FONT = 10  # points
FEW = 40  # epochs, each of which has a dot

# Panels of the learning curves: how they are called, which metrics they show, and between which values.
PANELS: tuple[tuple[str, Callable[[str], bool], tuple[float, float] | None], ...] = (
    ("accuracy, %", lambda key: key.endswith("/accuracy"), None),
    ("loss", lambda key: key.startswith("loss/"), None),
    ("share distilled", lambda key: key.startswith("kept/"), (-0.03, 1.03)),
)


def learning_curves(folder: Path, lines: Sequence[Metrics]) -> "Mapping[str, Figure]":
    """Accuracies, losses and what was distilled, by epoch, below one another."""
    from matplotlib.figure import Figure

    shown = []
    measured = sorted(dict.fromkeys(key for line in lines for key in line), key=lambda key: key != HEADLINE)
    for label, belongs, limits in PANELS:
        keys = [key for key in measured if belongs(key)]
        if keys:
            shown.append((label, keys, limits))
    if not shown:
        return {}
    figure = Figure(figsize=(WIDTH, HEIGHT * len(shown)), layout="constrained")
    axes = figure.subplots(len(shown), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (label, keys, limits) in zip(axes, shown, strict=True):
        _panel(axis, keys, lines)
        axis.set_ylabel(label, fontsize=FONT)
        axis.set_ylim(limits)
    axes[-1].set_xlabel("epoch", fontsize=FONT)
    return {"learning_curves": figure}


def decisions(folder: Path, lines: Sequence[Metrics]) -> "Mapping[str, Figure]":
    """Who was distilled where, as `sakd spots` draws it; nothing where all always were, or none is known."""
    from sakd.decisions import keeps_all, pictures, samples
    from sakd.runs.find import read_recorded

    try:
        run = read_recorded(folder)
    except RunError as error:
        if (folder / FILE).exists():
            log.warning("MLflow gets no pictures of decisions: %s", error)
        return {}
    if keeps_all(run.record):
        return {}
    figures = pictures.draw(run.record, run.name, samples.small_images(run))
    return {f"spots_{name}": figure for name, figure in figures.items()}


# What is drawn when a run is over: each gets its folder and its epochs, and gives figures by name.
DRAWN: tuple[Callable[[Path, Sequence[Metrics]], "Mapping[str, Figure]"], ...] = (
    decisions,
    learning_curves,  # the last: where they are, all is drawn
)


def draw(folder: Path, lines: Sequence[Metrics]) -> None:
    """Draw what is not drawn yet of a run that is over into its folder ``pictures``.

    What cannot be drawn is said, and left out. Raises RunError where that cannot be written.
    """
    from sakd.decisions.pictures import settings

    if not lines or _is_newer(folder / FOLDER / "learning_curves.png", folder / "metrics.jsonl"):
        return
    with explained(folder / FOLDER):
        (folder / FOLDER).mkdir(exist_ok=True)
    for drawing in DRAWN:
        contents: dict[str, io.BytesIO] = {}
        try:
            with _at_work, settings():  # Matplotlib's settings are the process's
                for name, figure in drawing(folder, lines).items():
                    contents[name] = io.BytesIO()
                    figure.savefig(contents[name], format="png", dpi=DOTS)
        except Exception as error:  # the run is worth no less for it
            log.warning("MLflow gets no picture by %s: %s", drawing.__name__, in_one_line(error))
            continue
        for name, content in contents.items():
            write_whole(folder / FOLDER / f"{name}.png", content.getbuffer())


def found(folder: Path) -> list[Path]:
    """The pictures in a run's folder."""
    return sorted((folder / FOLDER).glob("*.png"))


def _is_newer(path: Path, other: Path) -> bool:
    try:
        return path.stat().st_mtime_ns >= other.stat().st_mtime_ns
    except FileNotFoundError:
        return False


def _panel(axis: "Axes", keys: Sequence[str], lines: Sequence[Metrics]) -> None:
    for place, key in enumerate(keys):
        measured = [(line["epoch"], line[key]) for line in lines if key in line]
        axis.plot(
            *zip(*measured, strict=True),
            color=COLOURS[place % len(COLOURS)],
            linestyle=STYLES[place % len(STYLES)],
            marker="." if len(lines) <= FEW else None,
            linewidth=1.5,
            label=key.removeprefix("loss/").removeprefix("kept/"),
        )
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=FONT - 1)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=FONT - 1, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
