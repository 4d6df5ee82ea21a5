"""Curves over epochs as coordinates, which the page draws in its own colours, light or dark."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 320, 170  # of the drawing, in units of about a pixel
LEFT, RIGHT, TOP, BOTTOM = 40, 8, 8, 22  # margins, for the numbers at the axes
POINTS = 120  # of a curve: more could not be told apart
STYLES = 8  # colours and dashes that the page knows
LEAST_PART = 1e-3  # of a value: what differs less is not magnified
EVERYWHERE, PERCENT = (-math.inf, math.inf), (0.0, 100.0)  # ends of axes


@dataclass(frozen=True)
class Curve:
    """A measurement over epochs. ``style``: the number of its colour; None for what others stand against."""

    label: str
    epochs: Sequence[float]
    values: Sequence[float]
    style: int | None
    tip: str = ""  # shown where it is pointed at; by default the label


@dataclass(frozen=True)
class Drawn:
    """A curve to be drawn: ``points`` as SVG has them."""

    style: str  # a class of the page's
    points: str
    tip: str


@dataclass(frozen=True)
class Tick:
    place: float
    text: str


@dataclass(frozen=True)
class Chart:
    """A chart to be drawn; ``legend``: names with their styles, each once."""

    title: str
    lines: list[Drawn]
    legend: dict[str, str]
    across: list[Tick]
    up: list[Tick]


def chart(title: str, curves: Iterable[Curve], ends: tuple[float, float] = EVERYWHERE) -> Chart | None:
    """A chart of the curves, whose axis is not drawn past ``ends``; None where they have no finite value."""
    curves = [_thinned(curve) for curve in curves]
    values = np.array([value for curve in curves for value in curve.values], float)
    epochs = np.array([epoch for curve in curves for epoch in curve.epochs], float)
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    up, (low, high) = _ticks(values.min(), values.max(), ends)
    first, last = epochs.min(), max(epochs.max(), epochs.min() + 1)
    across = MaxNLocator(5, integer=True).tick_values(first, last)
    across = across[(across >= first) & (across <= epochs.max())]
    return Chart(
        title,
        [
            Drawn(_style(curve), _points(curve, (first, last), (low, high)), curve.tip or curve.label)
            for curve in curves
        ],
        {curve.label: _style(curve) for curve in curves},
        [Tick(_x(epoch, (first, last)), f"{epoch:g}") for epoch in across],
        [Tick(_y(value, (low, high)), f"{value:g}") for value in up],
    )


def _ticks(low: float, high: float, ends: tuple[float, float]) -> tuple[np.ndarray, tuple[float, float]]:
    """Round numbers around these, but not past ``ends``; and where the axis begins and ends."""
    middle, least = (low + high) / 2, LEAST_PART * max(abs(low), abs(high), LEAST_PART)
    ticks = MaxNLocator(4).tick_values(min(low, middle - least), max(high, middle + least))
    within = ticks[(ticks >= ends[0]) & (ticks <= ends[1])]
    return within, (max(ticks[0], ends[0]), min(ticks[-1], ends[1]))


def _style(curve: Curve) -> str:
    return "baseline" if curve.style is None else f"style{curve.style % STYLES}"


def _thinned(curve: Curve) -> Curve:
    count = len(curve.values)
    if count <= POINTS:
        return curve
    places = np.unique(np.linspace(0, count - 1, POINTS).round().astype(int))
    epochs, values = (np.asarray(each)[places] for each in (curve.epochs, curve.values))
    return Curve(curve.label, epochs, values, curve.style, curve.tip)


def _points(curve: Curve, epochs: tuple[float, float], values: tuple[float, float]) -> str:
    places = [
        f"{_x(epoch, epochs):.1f},{_y(value, values):.1f}"
        for epoch, value in zip(curve.epochs, curve.values, strict=True)
        if np.isfinite(value)
    ]
    return " ".join(places * 2 if len(places) == 1 else places)  # a single one is drawn as a dot


def _x(epoch: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return LEFT + (WIDTH - LEFT - RIGHT) * (epoch - low) / (high - low)


def _y(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)
