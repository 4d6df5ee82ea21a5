"""Decisions as text: of one run, and of several beside one another."""

import io
import math
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table

from sakd.decisions.looked import AtSpot, course, look, milestones
from sakd.decisions.measures import LEVEL, Bounds, Difference, mean_over_pairs
from sakd.decisions.recorded import Record, Recorded
from sakd.decisions.together import Together, varying

ABSENT, MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"
WIDTH = 160  # of a page that is no terminal
EXTREMES = 3  # classes named at either end
LISTED = 30  # pairs; of more only what they have in common is told
NAMED = 10  # samples that were never, or always, distilled
INTERVAL = f"{1 - LEVEL:.0%} interval"
RANDOM = (
    "Random: draws that treat all samples alike, at each epoch's rate; ranges hold 95 % of what they give."
)

VARIANCE = "Variance: over samples, of how often each was kept, in units of what random has;"

Lines = list[list[str]]  # the first is the head


def page(parts: Sequence[Lines | str]) -> str:
    """Tables and paragraphs, one below another."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else WIDTH
    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False)
    for number, part in enumerate(parts):
        if number:
            console.print()
        if isinstance(part, str):
            console.print(part)
            continue
        head, *body = part
        table = Table(head[0], box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
        for name in head[1:]:
            table.add_column(name, justify="right")
        for line in body:
            table.add_row(*line)
        console.print(table)
    return "".join(f"{line.rstrip()}\n" for line in console.file.getvalue().splitlines())


def percent(share: float) -> str:
    """A share as ``"12.3 %"``; one that is not quite all or nothing is not rounded to it."""
    if math.isnan(share):
        return ABSENT
    shown = f"{100 * share:.1f}"
    if shown in ("100.0", "0.0") and share not in (0, 1):
        shown = ">99.9" if share > 0.5 else "<0.1"
    return f"{shown} %".replace("-", MINUS)


def number(value: float) -> str:
    return ABSENT if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}".replace("-", MINUS)


def between(bounds: Bounds, show: Callable[[float], str] = number) -> str:
    low, high = bounds
    return ABSENT if math.isnan(low) else f"{show(low)} to {show(high)}"


# ---- one run


def of_one(run: Recorded, last: int) -> str:
    """What one run's spot mode decided."""
    record = run.record
    spots = look(record, last)
    classes = np.unique(record.labels)
    head = (
        f"{run.name}\nspot_mode={run.names['spot_mode']}, {run.progress}, "
        f"{len(record.labels):,} training samples of {len(classes)} classes. "
        "Kept: distilled at the spot, or by a weight above one half."
    )
    window = min(last, len(record.epochs))
    return page(
        [
            head,
            _over_time(record.epochs, spots),
            _by_class(classes, spots, window),
            *_agreement(spots, int(record.epochs[-1])),
            _beside_random(spots),
            *_constant_samples(record, spots),
            "\n".join(_notes(run, spots)),
        ]
    )


def _over_time(epochs: np.ndarray, spots: Sequence[AtSpot]) -> Lines:
    shown = milestones(len(epochs))
    head = ["spot", *(f"kept, epoch {epochs[place]}" for place in shown), "over time, 0 to 100 %"]
    lines = ([*(percent(spot.shares[place]) for place in shown), course(spot.shares)] for spot in spots)
    return [head, *([spot.spot, *line] for spot, line in zip(spots, lines, strict=True))]


def _by_class(classes: np.ndarray, spots: Sequence[AtSpot], window: int) -> Lines:
    epochs = "last epoch" if window == 1 else f"last {window} epochs"
    lines = [["spot", f"most distilled classes, {epochs}", "least distilled classes"]]
    for spot in spots:
        if spot.by_class.min() == spot.by_class.max():
            lines.append([spot.spot, f"all alike, {percent(spot.by_class[0])}", ABSENT])
            continue
        order = np.argsort(-spot.by_class, kind="stable")
        ends = order[:EXTREMES], order[::-1][: min(EXTREMES, len(order) - EXTREMES)]
        lines.append(
            [
                spot.spot,
                *(
                    ", ".join(f"{classes[place]} ({percent(spot.by_class[place])})" for place in end)
                    for end in ends
                ),
            ]
        )
    return lines


def _agreement(spots: Sequence[AtSpot], epoch: int) -> Iterator[Lines]:
    if spots[0].teacher_right is None:
        return
    yield [
        [
            f"kept in epoch {epoch}",
            "teacher right",
            "wrong",
            f"difference ({INTERVAL})",
            "student wrong",
            "right",
            f"difference ({INTERVAL})",
        ],
        *([spot.spot, *_sides(spot.teacher_right), *_sides(spot.student_wrong)] for spot in spots),
    ]


def _sides(found: Difference) -> list[str]:
    told = ABSENT
    if not math.isnan(found.difference):
        bounds = between((found.low, found.high), _points)
        told = f"{_points(found.difference)} ({bounds})"
    return [percent(found.among), percent(found.others), told]


def _points(share: float) -> str:
    return f"{100 * share:+.1f}".replace("-", MINUS)


def _beside_random(spots: Sequence[AtSpot]) -> Lines:
    head = ["variance", "between classes", "changes", "never kept", "always kept"]
    lines = [["beside random", *(column for name in head for column in (name, "random"))]]
    for at_spot in spots:
        random = at_spot.random
        classes = random.by_class_bound
        lines.append(
            [
                at_spot.spot,
                number(random.spread),
                between(random.spread_bounds),
                percent(random.by_class),
                ABSENT if math.isnan(classes) else f"up to {percent(classes)}",
                percent(random.changes),
                between(random.changes_bounds, percent),
                f"{random.never:,}",
                f"{random.never_random:,.1f}",
                f"{random.always:,}",
                f"{random.always_random:,.1f}",
            ]
        )
    return lines


def _constant_samples(record: Record, spots: Sequence[AtSpot]) -> Iterator[Lines | str]:
    """The first of the samples that were never and always distilled, where the spot decided anything."""
    lines = [["spot", "distilled", "samples", f"the first {NAMED}: index (label)"]]
    for spot in spots:
        for which, places in (("never", spot.never), ("always", spot.always)):
            if len(places) and spot.constant is None:
                first = places[:NAMED]
                samples = zip(record.indices[first], record.labels[first], strict=True)
                named = ", ".join(f"{index} ({label})" for index, label in samples)
                lines.append([spot.spot, which, f"{len(places):,}", named])
    if len(lines) > 1:
        yield lines
        yield (
            "All of them: the same command with --spot and --never or --always, which lists them, also with "
            "--format csv or json."
        )


def _notes(run: Recorded, spots: Sequence[AtSpot]) -> Iterator[str]:
    constant = [f"{spot.spot}: {spot.constant} (nothing was chosen)" for spot in spots if spot.constant]
    if constant:
        yield "; ".join(constant) + "."
    if spots[0].teacher_right is not None:
        yield (
            "Right and wrong are the finished run's student and its teacher on the training images, without "
            "augmentation; differences in percentage points, with Newcombe's interval."
        )
    elif run.is_finished:
        yield (
            "Where teacher and student are right, and what the policy does without noise, is not known: the "
            "run had record_spots=false at its end."
        )
    else:
        yield (
            "Not finished: where teacher and student are right, and what the policy does without noise, is "
            "known once it is."
        )
    yield (
        f"{RANDOM} {VARIANCE} above 1, the same samples are kept again and again. Between classes: how much "
        "of it lies there. Changes: samples decided otherwise than in the epoch before, on average. Never, "
        "always: numbers of samples."
    )


# ---- several runs


def of_several(together: Together) -> str:
    """Whether runs agree beyond chance, pair by pair and on average, and what they have beyond random."""
    window = "last epoch" if together.last == 1 else f"last {together.last} epochs"
    runs = "1 run" if len(together.runs) == 1 else f"{len(together.runs)} runs of one data set"
    head = (
        f"{runs}, {len(together.units[0].kept):,} training samples: what most of the {window} decided, "
        "compared by Cohen's kappa (0: as chance agrees, 1: always)."
    )
    parts: list[Lines | str] = [head]
    if len(together.pairs) <= LISTED:
        parts.append(_pairs(together))
    parts.append(_kinds(together))
    random = varying(together.random)
    if len(random):  # what is constant is told below
        parts.append(_random(random))
    parts.append("\n".join(_notes_on_several(together)))
    return page(parts)


def _pairs(together: Together) -> Lines:
    lines = [
        [
            "pair",
            "",
            "spot",
            "kept",
            "kept",
            "agree",
            "chance",
            "kappa",
            INTERVAL,
            "within classes",
            "policies",
        ]
    ]
    for pair in together.pairs.itertuples():
        units = together.units[pair.left], together.units[pair.right]
        constant = [unit.constant for unit in units if unit.constant]
        value = f"undefined: {constant[0]}" if constant else number(pair.kappa)
        lines.append(
            [
                pair.left_label,
                pair.right_label,
                _spots(pair),
                percent(pair.left_kept),
                percent(pair.right_kept),
                percent(pair.agreement),
                percent(pair.chance),
                value,
                between((pair.low, pair.high)),
                number(pair.kappa_in_classes),
                number(pair.policies),
            ]
        )
    return lines


def _spots(pair: Any) -> str:
    same = pair.left_spot == pair.right_spot
    return pair.left_spot if same else f"{pair.left_spot}, {pair.right_spot}"


def _kinds(together: Together) -> Lines:
    head = ["pairs that differ in", "spot", "pairs", "mean kappa", f"{INTERVAL} over runs", "least", "most"]
    lines = [[*head, "above 0", "below 0", "undefined", "within classes", "policies"]]
    runs = np.array([unit.run for unit in together.units])
    pairs = together.pairs.assign(spot=[_spots(pair) for pair in together.pairs.itertuples()])
    order = ["differ", "spot"]
    firsts = {name: {value: place for place, value in enumerate(pairs[name].unique())} for name in order}
    pairs = pairs.sort_values(order, key=lambda column: column.map(firsts[column.name]), kind="stable")
    for (differ, spot), alike in pairs.groupby(order, sort=False):
        ends = runs[alike[["left", "right"]].to_numpy()]
        mean, bounds = mean_over_pairs(alike["kappa"].to_numpy(), ends)
        lines.append(
            [
                differ,
                spot,
                f"{len(alike):,}",
                number(mean),
                between(bounds),
                number(alike["kappa"].min()),
                number(alike["kappa"].max()),
                f"{(alike['low'] > 0).sum():,}",
                f"{(alike['high'] < 0).sum():,}",
                f"{alike['kappa'].isna().sum():,}",
                number(alike["kappa_in_classes"].mean()),
                number(alike["policies"].mean()),
            ]
        )
    return lines


def _random(random: pd.DataFrame) -> Lines:
    head = ["beside random", "spot", "runs", "variance", "runs beyond random's", "between classes"]
    lines = [[*head, "runs beyond random's", "changes", "random's"]]
    for (group, spot), alike in random.groupby(["group", "spot"], sort=False):
        lines.append(
            [
                group,
                spot,
                str(len(alike)),
                number(alike["spread"].mean()),
                _beyond(alike["spread"], alike["spread_bound"]),
                percent(alike["by_class"].mean()),
                _beyond(alike["by_class"], alike["by_class_bound"]),
                percent(alike["changes"].mean()),
                percent(alike["changes_random"].mean()),
            ]
        )
    return lines


def _beyond(found: pd.Series, bounds: pd.Series) -> str:
    return ABSENT if found.isna().all() else f"{(found > bounds).sum()} of {found.notna().sum()}"


def _notes_on_several(together: Together) -> Iterator[str]:
    constant = Counter(f"{unit.spot} {unit.constant}" for unit in together.units if unit.constant)
    if constant:
        told = "; ".join(f"{what} in {count}" for what, count in constant.items())
        runs = len(together.runs)
        yield f"Kappa is undefined where a run decides all samples alike: {told} of {runs} runs."
    progress = sorted({run.progress for run in together.runs})
    yield f"Looked at: {'; '.join(progress)}."
    if len(together.runs) > 1 and any("seed" not in differ for differ in together.pairs["differ"]):
        yield (
            "Runs of one seed draw the same noise, epoch by epoch: pairs that do not differ in the seed "
            "agree by that, too."
        )
    yield (
        "Intervals of a kappa are asymptotic (Fleiss, Cohen and Everitt, 1969): where nothing but chance "
        "agrees, 2.5 % are above 0 and 2.5 % below. Intervals of a mean are over runs, by the jackknife; "
        "they take three. Within classes: kappa beyond what each class's own rates give. Policies: "
        "Spearman's correlation of the probabilities of the teacher, without noise, after the last epoch. "
        "Where nearly all or nearly nothing is kept, kappa rests on few samples."
    )
    yield (
        f"{RANDOM} {VARIANCE} above 1, the same samples are kept again and again. Between classes: how much "
        "of it lies there. Changes: samples decided otherwise than in the epoch before. All are means over "
        "runs."
    )
