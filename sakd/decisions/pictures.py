"""Decisions as pictures: a panel for each spot, below one another, at the width at which pages show them."""

import io
import itertools
import textwrap
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter

from sakd.data import Images
from sakd.decisions.measures import (
    changes_between,
    class_shares,
    equal_bins,
    random_changes,
    wilson,
)
from sakd.decisions.recorded import Record, Seen
from sakd.decisions.samples import pixels
from sakd.decisions.together import Together, varying

SUFFIXES = ("png", "svg")
DOTS = 150  # an inch, of a PNG
WIDTH = 8.0  # inches: at 800 pixels, text of 9 points is 12 pixels high
HEAD = 0.75  # inches: of the title, and of the axis below
PANEL = 2.0  # inches: of a spot, where nothing asks for more
SETTINGS = {
    "font.size": 9.5,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.5,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "svg.hashsalt": "sakd",
    "text.parse_math": False,  # names may have dollars
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SHARES = "cividis"  # tells shares apart by lightness, for the colour-blind alike
KAPPAS = "PuOr"  # orange below 0, violet above, white at 0
LEAST_KAPPA = 0.2  # that has full colour
NAMED_RUNS, WRITTEN = 30, 12  # beside a matrix; kappas are written into one of few runs
FOUND, RANDOM = "#0072B2", "#D55E00"  # Okabe and Ito's blue and vermilion; random is dashed, too
ROWS = 400  # of the bit map: more samples are averaged
NAMED_CLASSES = 20  # each has a tick; of more, every few
BINS = 10
ACROSS = 10  # samples shown side by side
ROW_OF_IMAGES = 1.5  # heights of an image, with what is written above it
CHARACTERS = 100  # of a line of the title

LINE = 0.3  # inches, of a group of runs beside random
# What is compared with random, its question, its axis, and whether that is in percent.
BESIDE_RANDOM = (
    ("spread", "the same samples?", "variance over samples,\nrandom's is 1", False),
    ("by_class", "by their class?", "share of it between\nclasses", True),
    ("changes", "steady over the epochs?", "decided otherwise than\nin the epoch before", True),
)
HIGHEST_LOW = 0.95  # of the shares at the dark end, lest small differences look large

Panel = Callable[[Axes, str], object]


def draw(record: Record, title: str, images: Images | None = None) -> dict[str, Figure]:
    """Every picture of a run's decisions, by name; those that need more than is known are left out.

    ``classes``: share kept by epoch and class; ``confidence``, ``loss``: share kept against the teacher's
    confidence and the student's loss, once the run is finished; ``samples``: decisions of single samples over
    the epochs; ``changes``: how many of them change; ``images``: the samples most and least distilled, where
    the training ``images`` are given, in the record's order. Raises DataError for an image that cannot be
    read.
    """
    with settings():
        figures = {"classes": _classes(record, title), "samples": _samples(record, title)}
        if len(record.epochs) > 1:
            figures["changes"] = _changes(record, title)
        seen = record.of("train")
        if seen is not None:
            figures["confidence"] = _confidence(record, seen, title)
            figures["loss"] = _loss(record, seen, title)
        if images is not None:
            figures["images"] = _images(record, title, images)
    return figures


def settings() -> AbstractContextManager:
    """The looks of these pictures; what a figure leaves open is decided when it is written, so there, too."""
    return matplotlib.rc_context(SETTINGS)


def content(figure: Figure, suffix: str) -> bytes:
    """A figure as the content of a ``png`` or ``svg`` file."""
    written = io.BytesIO()
    with settings():
        metadata = {"Date": None} if suffix == "svg" else None
        figure.savefig(written, format=suffix, dpi=DOTS, metadata=metadata)
    return written.getvalue()


def contents(figures: Mapping[str, Figure]) -> dict[str, bytes]:
    """Figures by name as files by name, each as PNG and as SVG."""
    return {
        f"{name}.{suffix}": content(figure, suffix) for name, figure in figures.items() for suffix in SUFFIXES
    }


def panels(
    spots: Sequence[str], text: str, title: str, panel: Panel, height: float = PANEL, share_x: bool = True
) -> Figure:
    """A figure with one axis for each spot, which ``panel(axis, spot)`` draws."""
    figure = Figure(figsize=(WIDTH, HEAD + (height + 0.35) * len(spots)), layout="constrained")
    axes = figure.subplots(len(spots), squeeze=False, sharex=share_x)[:, 0]
    for axis, spot in zip(axes, spots, strict=True):
        axis.set_title(spot, loc="left", fontweight="bold")
        panel(axis, spot)
    _titled(figure, text, title)
    return figure


def _titled(figure: Figure, text: str, title: str) -> None:
    lines = textwrap.wrap(text, CHARACTERS) + textwrap.wrap(title, CHARACTERS)
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=9.5)


def draw_agreement(together: Together) -> Figure:
    """The kappas of every pair, as a matrix for each spot, or one of all where spots are compared, too.

    Grey: a run with itself, not compared, or undefined, as where all samples are decided alike.
    """
    with settings():
        spots = list(dict.fromkeys(unit.spot for unit in together.units))
        is_across = (together.pairs["left_spot"] != together.pairs["right_spot"]).any()
        groups = {"all spots": together.units} if is_across else {}
        if not is_across:
            groups = {spot: [unit for unit in together.units if unit.spot == spot] for spot in spots}
            groups = {spot: units for spot, units in groups.items() if len(units) > 1}
        known = together.pairs["kappa"].abs()
        limit = max(LEAST_KAPPA, 0.0 if known.isna().all() else float(known.max()))
        kappas = {(pair.left, pair.right): pair.kappa for pair in together.pairs.itertuples()}
        places = {id(unit): place for place, unit in enumerate(together.units)}

        def panel(axis: Axes, group: str) -> None:
            units = groups[group]
            matrix = np.full((len(units), len(units)), np.nan)
            for (row, one), (column, other) in itertools.combinations(enumerate(units), 2):
                value = kappas.get((places[id(one)], places[id(other)]), np.nan)
                matrix[row, column] = matrix[column, row] = value
            names = [f"{unit.label} {unit.spot}" if is_across else unit.label for unit in units]
            shown = _matrix(axis, matrix, names, limit)
            if group == list(groups)[-1]:
                _bar(axis.figure, shown, "kappa")

        text = "Agreement of decisions beyond chance: Cohen's kappa (grey: undefined)"
        size = min(max(0.32 * max(map(len, groups.values())), 1.6), WIDTH - 2)
        return panels(list(groups), text, f"{len(together.runs)} runs", panel, size + 1, share_x=False)


def _matrix(axis: Axes, matrix: np.ndarray, names: Sequence[str], limit: float) -> AxesImage:
    axis.set_facecolor("0.8")
    shown = axis.imshow(matrix, cmap=KAPPAS, vmin=-limit, vmax=limit, interpolation="nearest")
    every = -(-len(names) // NAMED_RUNS)
    axis.set_xticks(range(0, len(names), every), names[::every], rotation=90)
    axis.set_yticks(range(0, len(names), every), names[::every])
    if len(names) <= WRITTEN:
        for row, column in np.argwhere(~np.isnan(matrix)):
            value = matrix[row, column]
            color = "white" if abs(value) > 0.6 * limit else "black"
            told = f"{value:.2f}".replace("-", "\N{MINUS SIGN}")
            axis.text(column, row, told, ha="center", va="center", color=color, fontsize=9)
    return shown


def draw_beside_random(together: Together) -> Figure | None:
    """What each run's decisions have that *random with the same rates* has not.

    A line for each group of runs and spot: a dot for each run, and a bar over all their ranges of random.
    None where nothing was decided.
    """
    random = varying(together.random)
    if random.empty:
        return None
    lines = list(random.groupby(["group", "spot"], sort=False))
    with settings():
        figure = Figure(figsize=(WIDTH, 2 * HEAD + LINE * len(lines)), layout="constrained")
        axes = figure.subplots(1, len(BESIDE_RANDOM), sharey=True)
        for axis, (measure, title, label, in_percent) in zip(axes, BESIDE_RANDOM, strict=True):
            for place, (_, alike) in enumerate(lines):
                low, high = alike[f"{measure}_low"].min(), alike[f"{measure}_bound"].max()
                axis.barh(
                    place, high - low, 0.7, low, color="0.8", edgecolor="0.6", label="random, 95 % of it"
                )
                axis.plot(
                    alike[measure],
                    [place] * len(alike),
                    "o",
                    color=FOUND,
                    markersize=5,
                    alpha=0.7,
                    label="a run",
                )
            axis.set_title(title, loc="left", fontweight="bold")
            axis.set_xlabel(label)
            axis.set_xlim(left=0)
            if in_percent:
                axis.xaxis.set_major_formatter(PercentFormatter(1))
            axis.grid(axis="x", color="0.9")
            axis.set_axisbelow(True)
        axes[0].set_yticks(range(len(lines)), [" ".join(names) for names, _ in lines])
        axes[0].set_ylim(len(lines) - 0.4, -0.6)
        handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
        figure.legend(handles.values(), handles, loc="outside lower right", ncols=2, frameon=False)
        _titled(figure, "What is kept, beside random with the same rates", f"{len(together.runs)} runs")
    return figure


# ---- over the epochs


def lowest_shown(shares: np.ndarray) -> float:
    """The share at the dark end of a picture: a round one, so that what differs can be told apart."""
    return min(HIGHEST_LOW, float(np.floor(20 * shares.min()) / 20))


def _classes(record: Record, title: str) -> Figure:
    names = np.unique(record.labels)
    shares = {spot: class_shares(record.kept_of(spot), record.labels) for spot in record.spots}
    low = min(map(lowest_shown, shares.values()))
    every = -(-len(names) // NAMED_CLASSES)
    every = every if every == 1 else 10 * -(-every // 10)

    def panel(axis: Axes, spot: str) -> None:
        shown = _over_epochs(axis, record, shares[spot].T, low)
        axis.set_yticks(range(0, len(names), every), names[::every])
        axis.set_ylabel("class")
        if spot == record.spots[-1]:
            axis.set_xlabel("epoch")
            _bar(axis.figure, shown, "distilled").formatter = PercentFormatter(1)

    height = min(max(0.18 * len(names), 1.2), 0.18 * NAMED_CLASSES)
    return panels(record.spots, "Share of the samples distilled, by class and epoch", title, panel, height)


def _samples(record: Record, title: str) -> Figure:
    def panel(axis: Axes, spot: str) -> None:
        kept = record.kept_of(spot)
        rows = kept[:, np.argsort(-kept.sum(0, dtype=np.int64), kind="stable")].T
        if len(rows) > ROWS:
            firsts = np.arange(ROWS) * len(rows) // ROWS
            sizes = np.diff([*firsts, len(rows)])[:, None]
            rows = np.add.reduceat(rows, firsts, axis=0, dtype=np.int64) / sizes
        shown = _over_epochs(axis, record, rows.astype(float), 0.0)
        axis.set_yticks([-0.5, len(rows) / 2 - 0.5, len(rows) - 0.5], ["most", "", "least"])
        axis.set_ylabel("samples, by how\noften distilled")
        if spot == record.spots[-1]:
            axis.set_xlabel("epoch")
            _bar(axis.figure, shown, "distilled").formatter = PercentFormatter(1)

    number = len(record.labels)
    each = "a line each" if number <= ROWS else f"a line for each {number / ROWS:,.0f}"
    text = f"Decisions of single samples over the epochs: {number:,} samples, {each}"
    return panels(record.spots, text, title, panel)


def _over_epochs(axis: Axes, record: Record, values: np.ndarray, low: float) -> AxesImage:
    """An image of values [rows, epochs] with the epochs' numbers below it."""
    first, last = record.epochs[0] - 0.5, record.epochs[-1] + 0.5
    shown = axis.imshow(
        values,
        cmap=SHARES,
        vmin=low,
        vmax=1,
        aspect="auto",
        interpolation="nearest",
        extent=(first, last, len(values) - 0.5, -0.5),
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return shown


def _bar(figure: Figure, shown: AxesImage, label: str) -> Colorbar:
    """Tell what the colours of all panels mean, below them."""
    return figure.colorbar(shown, ax=figure.axes, location="bottom", label=label, aspect=50, pad=0.01)


def _changes(record: Record, title: str) -> Figure:
    def panel(axis: Axes, spot: str) -> None:
        kept, later = record.kept_of(spot), record.epochs[1:]
        found, expected = changes_between(kept), random_changes(kept.mean(1))
        marker = "o" if len(later) < 40 else None
        axis.plot(later, found, color=FOUND, marker=marker, markersize=3, label="found")
        axis.plot(later, expected, color=RANDOM, linestyle="--", label="random, with the same rates")
        top = max(found.max(), expected.max()) or 0.1
        axis.set_ylim(-0.06 * top, 1.08 * top)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        _in_percent(axis, "samples")
        if spot == record.spots[-1]:
            _legend(axis)
            axis.set_xlabel("epoch")

    text = "Share of the samples that are decided otherwise than in the epoch before"
    return panels(record.spots, text, title, panel, 1.4)


def _in_percent(axis: Axes, label: str) -> None:
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_ylabel(label)
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)


def _legend(axis: Axes) -> None:
    """Tell what is drawn, below all panels, which draw alike."""
    handles = axis.get_legend_handles_labels()
    axis.figure.legend(*handles, loc="outside lower right", ncols=2, frameon=False)


# ---- for whom


def _confidence(record: Record, seen: Seen, title: str) -> Figure:
    text = f"Share distilled in epoch {record.epochs[-1]}, against the teacher's confidence"
    below = "teacher's confidence (about as many samples in each bin)"
    return _binned(record, seen.teacher_confidence, 4, text, below, title)


def _loss(record: Record, seen: Seen, title: str) -> Figure:
    text = f"Share distilled in epoch {record.epochs[-1]}, against the student's loss at the end"
    below = "student's cross-entropy (about as many samples in each bin)"
    return _binned(record, seen.student_loss, 2, text, below, title)


def _binned(record: Record, values: np.ndarray, digits: int, text: str, below: str, title: str) -> Figure:
    edges = equal_bins(values, BINS, digits)
    bins, places = len(edges) + 1, np.digitize(values, edges)
    sizes = np.bincount(places, minlength=bins)

    def panel(axis: Axes, spot: str) -> None:
        kept = record.kept_of(spot)[-1]
        counts = np.bincount(places, kept, minlength=bins)
        shares = counts / np.where(sizes > 0, sizes, np.nan)  # rounded edges may have nothing between them
        low, high = wilson(counts, sizes)
        axis.axhline(kept.mean(), color=RANDOM, linestyle="--", linewidth=1, label="all samples")
        axis.errorbar(
            np.arange(bins),
            shares,
            np.clip([shares - low, high - shares], 0, None),
            color=FOUND,
            fmt="o-",
            capsize=3,
            markersize=4,
            linewidth=1,
            label="of the bin, with 95 % interval",
        )
        axis.set_xlim(-0.5, bins - 0.5)
        axis.set_xticks(np.arange(bins - 1) + 0.5, [f"{edge:.{digits}g}" for edge in edges])
        _in_percent(axis, "distilled")
        if spot == record.spots[-1]:
            _legend(axis)
            axis.set_xlabel(below)

    return panels(record.spots, text, title, panel, 1.5)


def _images(record: Record, title: str, images: Images) -> Figure:
    def panel(axis: Axes, spot: str) -> None:
        rates = record.kept_of(spot).mean(0)
        for row, (most, rank) in enumerate((("most", -rates), ("least", rates))):
            bottom = -row * ROW_OF_IMAGES
            best = rates[rank.argmin()]
            alike = int((rates == best).sum())
            axis.text(
                0, bottom + 1.25, f"{most}: {alike:,} sample{'s' * (alike > 1)} in {best:.0%} of the epochs"
            )
            places = spread_over_classes(rank, record.labels, ACROSS)
            for left, (place, shown) in enumerate(zip(places, pixels(images, places), strict=True)):
                extent = (left, left + 0.9, bottom, bottom + 0.9)
                axis.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest", extent=extent)
                told = f"{record.labels[place]}  {rates[place]:.0%}"
                axis.text(left + 0.45, bottom + 0.95, told, ha="center", fontsize=9)
        axis.set(xlim=(0, ACROSS), ylim=(-ROW_OF_IMAGES, ROW_OF_IMAGES), aspect="equal")
        axis.axis("off")

    text = "The samples distilled most and least at each spot: label, and in how many of the epochs"
    return panels(record.spots, text, title, panel, 2 * ROW_OF_IMAGES * WIDTH / ACROSS)


def spread_over_classes(rank: np.ndarray, labels: np.ndarray, count: int) -> list[int]:
    """Places of the samples of the lowest rank, of as many classes as may be; of equal ones the first."""
    order = np.lexsort((np.arange(len(rank)), rank))
    chosen: list[int] = []
    level = rank[order]
    for value in np.unique(level):
        alike = order[level == value]
        turn = np.zeros(len(alike), int)  # how many of its class come before it
        for label in np.unique(labels[alike]):
            own = labels[alike] == label
            turn[own] = np.arange(own.sum())
        in_turn = alike[np.lexsort((labels[alike], turn))]
        chosen += in_turn[: count - len(chosen)].tolist()
        if len(chosen) == count:
            break
    return chosen
