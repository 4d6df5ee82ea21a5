"""The pictures of the idea: `python docs/pictures/draw.py` writes each beside this file, as SVG and PNG."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
TEACHER, STUDENT, POLICY, QUIET = "#0072B2", "#D55E00", "#009E73", "#8C8C8C"  # Okabe and Ito's
SETTINGS = {"font.size": 10, "svg.hashsalt": "sakd", "svg.fonttype": "path"}
STAGES = ("stage 1", "stage 2", "stage 3", "logits")
CHOSEN = (True, False, True, True)  # the teacher, at each spot, for one image


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty picture whose coordinates are inches."""
    figure = Figure((width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes, x: float, y: float, text: str, colour: str, width: float = 1.15, height: float = 0.55
) -> None:
    """A box with a text, around (x, y)."""
    corner = (x - width / 2, y - height / 2)
    shape = FancyBboxPatch(
        corner,
        width,
        height,
        "round,pad=0,rounding_size=0.08",
        facecolor=colour + "22",
        edgecolor=colour,
        lw=1.5,
    )
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center")


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    wide: bool = True,
) -> None:
    """An arrow; one that is not ``wide`` is thin and dashed."""
    style = {"lw": 2.4} if wide else {"lw": 1, "linestyle": (0, (4, 3))}
    head = {"arrowstyle": "-|>", "mutation_scale": 11, "shrinkA": 0, "shrinkB": 0}
    axes.add_patch(FancyArrowPatch(start, end, color=colour, **head, **style))


def idea() -> Figure:
    """One image on its way through the grafted network."""
    figure, axes = canvas(10.4, 5.2)
    up, middle, down = 4.2, 3.1, 2.0
    columns = [2.1, 4.15, 6.2, 8.25]
    axes.text(0.15, up, "teacher", color=TEACHER, weight="bold", va="center")
    axes.text(0.15, down, "student", color=STUDENT, weight="bold", va="center")
    axes.text(0.55, middle, "an image", ha="center", va="center")
    for y in (up, down):
        arrow(axes, (0.75, middle + (0.2 if y == up else -0.2)), (columns[0] - 0.6, y), QUIET, wide=False)
    for place, (x, stage, teacher) in enumerate(zip(columns, STAGES, CHOSEN, strict=True)):
        box(axes, x, up, stage, TEACHER)
        box(axes, x, down, stage, STUDENT)
        spot = x + 0.75
        colour = TEACHER if teacher else STUDENT
        arrow(axes, (x + 0.58, up), (spot, middle + 0.22), TEACHER if teacher else QUIET, wide=teacher)
        arrow(axes, (x + 0.58, down), (spot, middle - 0.22), QUIET if teacher else STUDENT, wide=not teacher)
        axes.add_patch(Circle((spot, middle), 0.21, facecolor=colour, edgecolor="black", lw=1, zorder=3))
        letter = "T" if teacher else "S"
        axes.text(spot, middle, letter, color="white", weight="bold", ha="center", va="center", zorder=4)
        if place + 1 < len(columns):
            beyond = columns[place + 1] - 0.58
            arrow(axes, (spot + 0.22, middle + 0.08), (beyond, up), colour)
            arrow(axes, (spot + 0.22, middle - 0.08), (beyond, down), colour)
        arrow(axes, (spot, 0.98), (spot, middle - 0.23), POLICY, wide=False)
        told, ink = ("distilled here", "black") if teacher else ("not distilled", QUIET)
        axes.text(spot, up + 0.62, told, ha="center", va="center", color=ink)
    drawn = "policy: one linear layer on both networks' embeddings draws T or S, spot by spot"
    box(axes, 5.6, 0.7, drawn, POLICY, 8.2)
    told = "Wide arrows carry the chosen features into the next stage of both networks, by adapters (grafts)."
    axes.text(5.6, 0.2, told, ha="center", va="center", fontsize=8.5)
    return figure


def cohort() -> Figure:
    """One batch and one pass of the teacher, for several students."""
    figure, axes = canvas(9.2, 3.4)
    box(axes, 1.2, 1.7, "one batch,\naugmented once", QUIET, 1.7, 0.8)
    box(axes, 3.9, 1.7, "one pass of\nthe teacher", TEACHER, 1.7, 0.8)
    arrow(axes, (2.08, 1.7), (3.02, 1.7), QUIET)
    for y, name in ((2.9, "AT, fixed"), (2.1, "AT, adaptive"), (1.3, "CRD, adaptive"), (0.5, "SP, anti")):
        box(axes, 6.6, y, name, STUDENT, 1.7)
        box(axes, 8.3, y, "folder, log", QUIET, 1.2)
        arrow(axes, (4.78, 1.7), (5.72, y), TEACHER)
        arrow(axes, (7.48, y), (7.67, y), QUIET)
    axes.text(6.6, 0.08, "each the run that it would be alone", ha="center", fontsize=8.5)
    return figure


def identity() -> Figure:
    """From a command to a folder, and what the same command does there next."""
    figure, axes = canvas(10.4, 3.4)
    box(axes, 1.25, 1.7, "python launch.py\ndistiller=at seed=1", QUIET, 2.1, 0.8)
    box(axes, 3.95, 1.7, "every value that the\nresult depends on", POLICY, 2.0, 0.8)
    box(axes, 6.25, 1.7, "digest:\nthe folder's name", POLICY, 1.6, 0.8)
    arrow(axes, (2.32, 1.7), (2.93, 1.7), QUIET)
    arrow(axes, (4.97, 1.7), (5.43, 1.7), POLICY)
    found = (
        (2.9, "nothing there", "it trains"),
        (2.1, "last.pt", "it goes on"),
        (1.3, "locked", "another trains it"),
        (0.5, "result.json", "it is shown"),
    )
    for y, there, then in found:
        axes.text(7.65, y + 0.05, there, va="bottom", fontsize=8.5)
        arrow(axes, (7.07, 1.7), (7.55, y), POLICY, wide=False)
        arrow(axes, (7.6, y), (8.75, y), QUIET)
        box(axes, 9.5, y, then, STUDENT, 1.4)
    return figure


def main() -> None:
    with matplotlib.rc_context(SETTINGS):
        for draw in (idea, cohort, identity):
            figure = draw()
            for suffix in ("svg", "png"):
                path = HERE / f"{draw.__name__}.{suffix}"
                metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                figure.savefig(path, dpi=150, facecolor="white", metadata=metadata)


if __name__ == "__main__":
    main()
