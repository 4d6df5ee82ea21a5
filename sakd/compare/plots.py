"""Differences to ``fixed`` with their intervals, as a figure.

It has a panel for each pair, a line for each distiller.
"""

import io
import itertools
import math
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sakd.compare.statistics import LEVEL
from sakd.compare.table import BASELINE, PAIR, Comparison, ordered
from sakd.errors import ConfigError

SUFFIXES = (".svg", ".png")
# Okabe and Ito's colours, apart for the colour-blind too, with markers that tell the modes without any
# colour.
LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#000000", "P"),
)
COLUMNS = 3  # panels side by side
WIDTH, LINE, HEAD = 3.6, 0.17, 1.1  # inches: of a panel, of a mode's line, of a panel's title and axis
SETTINGS = {
    "font.size": 8,
    "svg.hashsalt": "sakd",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "0.92",
}
INK = "0.85"
ON_DARK = {  # what differs where the page behind is dark and shows through
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    "grid.color": "0.25",
}
LIGHTER = {"#0072B2": "#56B4E9", "#000000": "#FFFFFF"}  # of the colours, on dark


def check_plot(path: Path) -> None:
    """Raise ConfigError for what is neither an SVG nor a PNG file."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(
            f"--plot: found {str(path)!r}, expected a file that ends in {' or '.join(SUFFIXES)}"
        )


def plot(comparison: Comparison, suffix: str, on_dark: bool = False) -> bytes:
    """Draw the figure, and return a file's content; ``on_dark``, for a dark page to show through.

    Raises ConfigError where there are no differences.
    """
    groups = comparison.groups[comparison.groups["pairs"] > 0]
    if groups.empty:
        raise ConfigError(
            f"--plot: found no mode with a seed in common with {BASELINE}, expected differences to draw"
        )
    all_looks = [(LIGHTER.get(color, color) if on_dark else color, marker) for color, marker in LOOKS]
    looks = dict(zip(ordered(groups["spot_mode"]), itertools.cycle(all_looks), strict=False))
    panels = [panel for _, panel in groups.groupby(PAIR, sort=False)]
    across = min(COLUMNS, len(panels))
    down = math.ceil(len(panels) / across)
    tallest = max(panel["distiller"].nunique() for panel in panels)
    with matplotlib.rc_context(SETTINGS | (ON_DARK if on_dark else {})):
        height = down * (HEAD + LINE * tallest * (len(looks) + 1))
        figure = Figure(figsize=(max(WIDTH * across, 4.8), height), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.1)  # inches
        axes = list(figure.subplots(down, across, squeeze=False, sharex=True).flat)
        for axis, panel in zip(axes, panels, strict=False):
            _panel(axis, panel, looks)
        for axis in axes[len(panels) :]:
            axis.remove()
        unit = ", percentage points" if comparison.metric.endswith("accuracy") else ""
        figure.supxlabel(
            f"{comparison.metric}: difference to {BASELINE}{unit}, with {1 - LEVEL:.0%} interval", fontsize=8
        )
        handles = [
            Line2D([], [], color=color, marker=marker, label=mode) for mode, (color, marker) in looks.items()
        ]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False)
        content = io.BytesIO()
        figure.savefig(
            content,
            format=suffix.removeprefix("."),
            dpi=300,
            metadata={"Date": None} if suffix == ".svg" else None,
        )
    return content.getvalue()


def _panel(axis: Axes, groups: pd.DataFrame, looks: dict[str, tuple[str, str]]) -> None:
    """Draw one pair: each distiller's modes below one another, the number of pairs of seeds at the right."""
    distillers = list(groups["distiller"].unique())
    step = 1 / (len(looks) + 1)
    for group in groups.itertuples():
        color, marker = looks[group.spot_mode]
        mode = list(looks).index(group.spot_mode)
        y = distillers.index(group.distiller) + step * (mode - (len(looks) - 1) / 2)
        name = f"{group.teacher}-{group.student}-{group.distiller}-{group.spot_mode}"
        if not math.isnan(group.low):
            axis.plot([group.low, group.high], [y, y], color=color, linewidth=1.2, gid=f"interval-{name}")
        axis.plot(group.difference, y, color=color, marker=marker, markersize=4, gid=f"difference-{name}")
        axis.annotate(
            f"n = {group.pairs}",
            (1, y),
            (2, 0),
            ("axes fraction", "data"),
            "offset points",
            fontsize=6,
            color=color,
            va="center",
        )
    axis.axvline(0, color="0.5", linewidth=0.9, zorder=1)
    axis.set_yticks(range(len(distillers)), distillers)
    axis.set_ylim(len(distillers) - 0.5, -0.5)
    axis.tick_params("y", length=0)
    axis.tick_params("x", labelbottom=True)  # there may be no panel below
    axis.grid(axis="x", zorder=0)
    dataset, teacher, student = groups[PAIR].iloc[0]
    axis.set_title(f"{dataset}: {teacher} \N{RIGHTWARDS ARROW} {student}", fontsize=8, loc="left")
