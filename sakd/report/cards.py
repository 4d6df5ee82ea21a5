"""What a report says of each run, and of runs that are alike: figures, curves, pictures, and what is wrong.

Nothing that lies damaged on the disk stops a report: it is said beside the run.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sakd.compare import Finished, ordered, read_folder
from sakd.compare.table import BASELINE, ROW
from sakd.configuration import short_names
from sakd.decisions import Recorded
from sakd.errors import RunError, in_one_line
from sakd.files import read_whole
from sakd.names import BEST, HEADLINE
from sakd.report.charts import PERCENT, Chart, Curve, chart
from sakd.report.pictures import Picture, of_decisions
from sakd.report.selection import Found
from sakd.runs import Metrics, read_metrics
from sakd.runs.code import Code
from sakd.runs.record import FILE, read_record
from sakd.sweeps import Standing

UNFINISHED = ("failed", "lost")
LINES = 25  # of a log's end
DETAILED = 6  # of so few runs, all is shown that `sakd spots` draws
ACCURACY, KEPT = "/accuracy", "kept/"


@dataclass(frozen=True)
class Card:
    """A run, as the page shows it."""

    number: int  # on the page, from 1
    names: dict[str, str]
    epochs: int  # to be done
    standing: Standing
    result: Mapping[str, Any] | None
    metrics: list[Metrics]
    compared: Finished | None  # as it takes part in the comparison, if it does
    charts: list[Chart]
    pictures: list[Picture]
    log: str  # the end of it, of a run that failed
    troubles: list[str]  # what of it could not be read

    @property
    def anchor(self) -> str:
        """Where it is on the page."""
        return f"run-{self.number}"

    @property
    def has_failed(self) -> bool:
        return self.standing.state in UNFINISHED

    @property
    def chooses(self) -> bool:
        """True if its spot mode has left something out."""
        return any(value < 1 for line in self.metrics for key, value in line.items() if key.startswith(KEPT))

    @property
    def accuracy(self) -> float | None:
        """On the test images, of the last epoch so far, percent; so are the next two."""
        return self._measured("accuracy", HEADLINE)

    @property
    def best_accuracy(self) -> float | None:
        return self._measured("best_accuracy", BEST)

    @property
    def teacher_accuracy(self) -> float | None:
        return self._last.get("teacher/accuracy")

    @property
    def kept(self) -> float | None:
        """Share of the decisions of the last epoch that were to distil, percent; the mean over the spots."""
        shares = [value for key, value in self._last.items() if key.startswith(KEPT)]
        return 100 * sum(shares) / len(shares) if shares else None

    @property
    def seconds(self) -> float | None:
        return sum(line["seconds"] for line in self.metrics) if self.metrics else None

    @property
    def code(self) -> Code | None:
        if self.result is None:
            return None
        stored = self.result["code"]
        return Code(stored["commit"], *map(stored.get, ("changed", "snapshot", "version")))

    def _measured(self, in_result: str, in_metrics: str) -> float | None:
        return self._last.get(in_metrics) if self.result is None else self.result["student"][in_result]

    @property
    def _last(self) -> Metrics:
        return self.metrics[-1] if self.metrics else {}


def cards(runs: Sequence[Found], left_out: Counter[str]) -> list[Card]:
    """A card for each run. ``left_out`` counts what is no student to compare."""
    in_detail = len(runs) <= DETAILED
    return [_card(number, run, left_out, in_detail) for number, run in enumerate(runs, 1)]


def _card(number: int, run: Found, left_out: Counter[str], in_detail: bool) -> Card:
    troubles = [run.trouble] if run.trouble else []

    def attempt(read: Any, absent: Any) -> Any:
        try:
            return read()
        except RunError as error:
            troubles.append(in_one_line(error))
            return absent

    metrics = attempt(lambda: read_metrics(run.folder), [])
    compared = attempt(lambda: read_folder(run.folder, left_out), None) if run.result is not None else None
    pictures = attempt(lambda: _pictures(run, in_detail), [])
    log = attempt(lambda: _end_of_log(run), "") if run.standing.state in UNFINISHED else ""
    return Card(
        number,
        short_names(run.config),
        int(run.config["epochs"]),
        run.standing,
        run.result,
        metrics,
        compared,
        _charts(metrics),
        pictures,
        log,
        list(dict.fromkeys(troubles)),
    )


def _pictures(run: Found, in_detail: bool) -> list[Picture]:
    if not (run.folder / FILE).exists():
        return []
    data = None if run.result is None else run.result["data_sha256"]
    decided = Recorded(run.folder.resolve().name, run.config, read_record(run.folder), data)
    return list(of_decisions(decided, in_detail))


def _end_of_log(run: Found) -> str:
    """Of the run's own log, or its job's where it did not come to have one."""
    path = run.folder / "run.log"
    if not path.exists() and run.standing.log:
        path = Path(run.standing.log)
    lines = (read_whole(path) or b"").decode(errors="replace").splitlines()
    return "\n".join(lines[-LINES:])


# ---- curves of one run


def _charts(metrics: Sequence[Metrics]) -> list[Chart]:
    """Accuracies, losses and kept shares over the epochs, as far as they were measured."""
    keys = dict.fromkeys([HEADLINE, *(key for line in metrics for key in line)])
    accuracies = {key: key.removesuffix(ACCURACY) for key in keys if key.endswith(ACCURACY)}
    losses = {key: key.removeprefix("loss/") for key in keys if key.startswith("loss/")}
    shares = {key: key.removeprefix(KEPT) for key in keys if key.startswith(KEPT)}
    drawn = [
        chart("Accuracy, %", _curves(metrics, accuracies), PERCENT),
        chart("Losses", _curves(metrics, losses)),
        chart("Distilled, % of the images", _curves(metrics, shares, 100), PERCENT),
    ]
    return [each for each in drawn if each is not None]


def _curves(metrics: Sequence[Metrics], labels: Mapping[str, str], times: float = 1) -> Iterator[Curve]:
    """A curve for each measurement that has a label; the teacher's is what others stand against."""
    for style, (key, label) in enumerate(labels.items()):
        yield Curve(label, *_over_epochs(metrics, key, times), None if label == "teacher" else style)


# ---- curves of several runs


def accuracies(told: Iterable[Card]) -> list[Chart]:
    """Accuracies on the test images: a chart for each row of the comparison, a curve for each run, in the
    colour of its spot mode."""
    students = [card for card in told if card.metrics and card.names["spot_mode"] != "none"]
    styles = mode_styles(card.names["spot_mode"] for card in students)
    drawn = []
    for row, alike in _by_row(students):
        curves = [
            Curve(
                mode,
                *_over_epochs(card.metrics, HEADLINE),
                styles[mode],
                f"{mode}, seed {card.names['seed']}",
            )
            for mode in styles
            for card in alike
            if card.names["spot_mode"] == mode
        ]
        drawn.append(chart(row, curves, PERCENT))
    return [each for each in drawn if each is not None]


def kept_shares(told: Iterable[Card]) -> list[Chart]:
    """Shares kept at each spot, percent, means over alike runs: a chart for each row and spot mode that
    leaves something out."""
    drawn = []
    for row, alike in _by_row(card for card in told if card.chooses):
        for mode in ordered(card.names["spot_mode"] for card in alike):
            lines = [line for card in alike if card.names["spot_mode"] == mode for line in card.metrics]
            keys = dict.fromkeys(key for line in lines for key in line if key.startswith(KEPT))
            curves = [
                Curve(key.removeprefix(KEPT), *_means(lines, key), style) for style, key in enumerate(keys)
            ]
            drawn.append(chart(f"{row}, {mode}", curves, PERCENT))
    return [each for each in drawn if each is not None]


def mode_styles(modes: Iterable[str]) -> dict[str, int | None]:
    """Styles by spot mode, in order; as in the comparison's plot, which draws differences to the baseline."""
    baseline, *others = ordered({BASELINE, *modes})
    return {baseline: None} | {mode: style for style, mode in enumerate(others)}


def _by_row(told: Iterable[Card]) -> Iterator[tuple[str, list[Card]]]:
    """Cards by row of the comparison, called by its distiller, and by its pair where there are several."""
    rows: dict[tuple[str, ...], list[Card]] = defaultdict(list)
    for card in told:
        rows[tuple(card.names[key] for key in ROW)].append(card)
    several = len({row[:-1] for row in rows}) > 1
    for (dataset, teacher, student, distiller), alike in rows.items():
        pair = f"{dataset}: {teacher} \N{RIGHTWARDS ARROW} {student}, " * several
        yield f"{pair}{distiller}", alike


def _over_epochs(metrics: Sequence[Metrics], key: str, times: float = 1) -> tuple[list[float], list[float]]:
    """Epochs, and what was measured in them."""
    lines = [line for line in metrics if key in line]
    return [line["epoch"] for line in lines], [times * line[key] for line in lines]


def _means(lines: Iterable[Metrics], key: str) -> tuple[list[float], list[float]]:
    """Epochs, and in percent the mean of a share over the runs that have measured it."""
    by_epoch: dict[float, list[float]] = defaultdict(list)
    for line in lines:
        if key in line:
            by_epoch[line["epoch"]].append(100 * line[key])
    epochs = sorted(by_epoch)
    return epochs, [sum(by_epoch[epoch]) / len(by_epoch[epoch]) for epoch in epochs]
