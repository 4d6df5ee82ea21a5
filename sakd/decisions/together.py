"""Do spot modes of several runs agree on samples beyond chance, and is what they keep more than random?"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from sakd.decisions.measures import BesideRandom, beside_random, kappa, majority
from sakd.decisions.recorded import Recorded
from sakd.errors import RunError

DIGITS = 8  # of the end of a run's name, where nothing else tells it from another
SAME = "nothing told apart by names"


@dataclass(frozen=True)
class Unit:
    """What one run decided at one spot: ``kept`` by most of its last epochs, bool [N]."""

    run: int  # place among the runs
    label: str
    spot: str
    kept: np.ndarray
    probability: np.ndarray | None  # of the teacher, without noise, float32 [N]; None if not known

    @property
    def constant(self) -> str | None:
        """``"always kept"`` or ``"never kept"`` where all samples are decided alike, else None."""
        return {1.0: "always kept", 0.0: "never kept"}.get(self.kept.mean())


@dataclass(frozen=True)
class Together:
    """Runs beside one another.

    ``labels``: the names that tell runs apart. ``pairs``: a row for each pair of units: ``left`` and
    ``right`` (places in ``units``), their runs, labels, spots and shares kept, ``differ`` (what tells them
    apart), samples kept by ``both``, ``left_only``, ``right_only``, ``neither``, the ``agreement``, that of
    ``chance``, ``kappa`` with ``low`` and ``high``, ``kappa_in_classes``, beyond chance at each class's own
    rates, and ``policies``, Spearman's correlation of the probabilities of the teacher. ``random``: a row for
    each unit, its ``group`` (the label without the seed) and BesideRandom: what was found, and between which
    ``…_low`` and ``…_bound`` 95 % of random's are.
    """

    runs: list[Recorded]
    labels: list[str]
    units: list[Unit]
    pairs: pd.DataFrame
    random: pd.DataFrame
    last: int


def beside(runs: Sequence[Recorded], last: int, across: bool = False) -> Together:
    """Compare runs at spots of the same name, with ``across`` at all spots; the last so many epochs decide.

    Raises RunError if a run is given twice, learned from other images, or there is nothing to compare.
    """
    _check_comparable(runs)
    labels, groups = _labels(runs)
    units, rows = [], []
    for place, run in enumerate(runs):
        seen = run.record.of("train")
        policy = None if seen is None else seen.probability
        for column, spot in enumerate(run.record.spots):
            kept = run.record.kept_of(spot)
            probability = None if policy is None else policy[:, column]
            units.append(Unit(place, labels[place], spot, majority(kept, last), probability))
            random = beside_random(kept, run.record.labels)
            rows.append({"run": run.name, "group": groups[place], "spot": spot} | _flat(random))
    ends = [
        (left, right)
        for left, right in itertools.combinations(range(len(units)), 2)
        if across or (units[left].spot == units[right].spot and units[left].run != units[right].run)
    ]
    if not ends:
        spots = "; ".join(
            f"{label}: {', '.join(run.record.spots)}" for label, run in zip(labels, runs, strict=True)
        )
        raise RunError(f"found no spot that two of these runs have ({spots}), expected one")
    pairs = _pairs(runs, units, np.array(ends), runs[0].record.labels)
    looked_at = max(len(run.record.epochs) for run in runs)
    return Together(list(runs), labels, units, pairs, pd.DataFrame(rows), min(last, looked_at))


def _flat(random: BesideRandom) -> dict[str, float]:
    return {
        "spread": random.spread,
        "spread_low": random.spread_bounds[0],
        "spread_bound": random.spread_bounds[1],
        "by_class": random.by_class,
        "by_class_low": 0.0,
        "by_class_bound": random.by_class_bound,
        "changes": random.changes,
        "changes_low": random.changes_bounds[0],
        "changes_bound": random.changes_bounds[1],
        "changes_random": random.changes_random,
    }


def varying(random: pd.DataFrame) -> pd.DataFrame:
    """Those rows of ``Together.random`` where something was decided."""
    return random[random[["spread", "by_class", "changes_random"]].fillna(0).any(axis=1)]


def _check_comparable(runs: Sequence[Recorded]) -> None:
    first, *others = runs
    names = [run.name for run in runs]
    for name in names:
        if names.count(name) > 1:
            raise RunError(f"{name}: found this run {names.count(name)} times, expected each once")
    for run in others:
        told = _other_data(first, run)
        if told is not None:
            found, expected = told
            raise RunError(
                f"{run.name}: found {found}, expected {expected} as in {first.name}: only runs of the same "
                "images can be compared"
            )


def _other_data(first: Recorded, other: Recorded) -> tuple[str, str] | None:
    """What tells the images of two runs apart: of the other, and of the first; None if nothing does."""
    records = other.record, first.record
    counts = [len(record.labels) for record in records]
    if counts[0] != counts[1]:
        return tuple(f"{count:,} training samples" for count in counts)
    for name in ("indices", "labels"):
        if not np.array_equal(*(getattr(record, name) for record in records)):
            return f"training samples with other {name}", "the same"
    checksums = other.data_sha256, first.data_sha256
    if None not in checksums and checksums[0] != checksums[1]:
        return tuple(f"images with checksum {checksum}" for checksum in checksums)
    return None


def _labels(runs: Sequence[Recorded]) -> tuple[list[str], list[str]]:
    """The names in which runs differ, and those without the seed.

    Runs that differ in other things than their names have the end of their folder's name, too.
    """
    names = [run.names for run in runs]
    differing = [key for key in names[0] if len({own[key] for own in names}) > 1] or ["seed"]
    shown = [{key: f"seed {own[key]}" if key == "seed" else own[key] for key in differing} for own in names]
    labels = [" ".join(own.values()) for own in shown]
    groups = [" ".join(value for key, value in own.items() if key != "seed") for own in shown]
    labels = [
        label if labels.count(label) == 1 else f"{label} {run.name[-DIGITS:]}"
        for label, run in zip(labels, runs, strict=True)
    ]
    return labels, [group or own["spot_mode"] for group, own in zip(groups, names, strict=True)]


def _differ(left: Recorded, right: Recorded) -> str:
    """Which names tell two runs apart: ``"distiller, seed"``."""
    if left is right:
        return "spot"
    names, others = left.names, right.names
    return ", ".join(key for key in names if names[key] != others[key]) or SAME


def _pairs(
    runs: Sequence[Recorded], units: Sequence[Unit], ends: np.ndarray, labels: np.ndarray
) -> pd.DataFrame:
    kept = np.array([unit.kept for unit in units], np.float32)  # counts up to 16 million are exact
    together = (kept @ kept.T).astype(np.int64)
    left, right = ends.T
    both, alone = together[left, right], np.diagonal(together)
    left_only, right_only = alone[left] - both, alone[right] - both
    neither = kept.shape[1] - both - left_only - right_only
    tables = np.stack([both, left_only, right_only, neither], -1).reshape(-1, 2, 2)
    found = kappa(tables)
    in_classes = _chance_in_classes(kept, labels)[left, right]
    frame = pd.DataFrame({"left": left, "right": right})
    for side, places in (("left", left), ("right", right)):
        frame[f"{side}_run"] = [runs[units[place].run].name for place in places]
        frame[f"{side}_label"] = [units[place].label for place in places]
        frame[f"{side}_spot"] = [units[place].spot for place in places]
        frame[f"{side}_kept"] = alone[places] / kept.shape[1]
    differ = functools.cache(lambda one, other: _differ(runs[one], runs[other]))
    frame["differ"] = [differ(units[a].run, units[b].run) for a, b in ends.tolist()]
    frame["both"], frame["left_only"], frame["right_only"], frame["neither"] = (
        both,
        left_only,
        right_only,
        neither,
    )
    frame["agreement"], frame["chance"] = found.agreement, found.chance
    frame["kappa"], frame["low"], frame["high"] = found.value, found.low, found.high
    rest = np.where(np.isnan(found.value) | (in_classes > 1 - 1e-12), np.nan, 1 - in_classes)
    frame["kappa_in_classes"] = (found.agreement - in_classes) / rest
    frame["policies"] = _rank_correlations(units)[left, right]
    return frame


def _rank_correlations(units: Sequence[Unit]) -> np.ndarray:
    """Spearman's correlation of probabilities: [units, units], NaN where they are unknown or all alike."""
    unknown = np.full(len(units[0].kept), np.nan)
    known = [unknown if unit.probability is None else unit.probability for unit in units]
    ranks = pd.DataFrame(np.array(known)).rank(axis=1).to_numpy()
    apart = ranks - ranks.mean(1, keepdims=True)
    lengths = np.sqrt((apart**2).sum(1, keepdims=True))
    scaled = apart / np.where(lengths > 0, lengths, np.nan)
    return scaled @ scaled.T


def _chance_in_classes(kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The agreement that chance gives at each class's own rates: [units, units], of ``kept`` [units, N]."""
    _, places, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    shares = np.array([np.bincount(places, own) for own in kept]) / sizes
    weights = sizes / sizes.sum()
    return (shares * weights) @ shares.T + ((1 - shares) * weights) @ (1 - shares).T
