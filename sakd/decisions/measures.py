"""Numbers about decisions: shares with intervals, agreement beyond chance, and what random would show."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from scipy.special import betaincinv, stdtrit

LEVEL = 0.05  # 1 - LEVEL is the confidence of all intervals
Z = NormalDist().inv_cdf(1 - LEVEL / 2)

Bounds = tuple[float, float]
NOWHERE = (math.nan, math.nan)


def wilson(kept: np.ndarray, of: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Wilson's score interval of each share ``kept`` / ``of``; of none it is NaN."""
    kept, of = np.asarray(kept, float), np.where(np.asarray(of) > 0, of, np.nan)
    share = kept / of
    middle = (share + Z**2 / (2 * of)) / (1 + Z**2 / of)
    half = Z * np.sqrt(share * (1 - share) / of + Z**2 / (4 * of**2)) / (1 + Z**2 / of)
    return middle - half, middle + half


@dataclass(frozen=True)
class Difference:
    """A share among some samples, the share among the others, and the first minus the second."""

    among: float
    others: float
    difference: float
    low: float
    high: float


def difference(kept: np.ndarray, among: np.ndarray) -> Difference:
    """How the share kept differs between the samples in ``among`` and the others; both bool [N].

    The interval is Newcombe's hybrid of Wilson's intervals ("Interval estimation for the difference between
    independent proportions", method 10, 1998). Where either group is empty all that needs it is NaN.
    """
    counts = np.array([kept[among].sum(), kept[~among].sum()])
    of = np.array([among.sum(), (~among).sum()])
    lows, highs = wilson(counts, of)
    (first, second), found = counts / np.where(of > 0, of, np.nan), math.nan
    found = first - second
    low = found - math.hypot(first - lows[0], highs[1] - second)
    high = found + math.hypot(highs[0] - first, second - lows[1])
    return Difference(float(first), float(second), float(found), low, high)


@dataclass(frozen=True)
class Kappa:
    """Cohen's kappa of each table, with the agreement that was found and the one that chance gives; [...]."""

    agreement: np.ndarray
    chance: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def kappa(tables: np.ndarray) -> Kappa:
    """Cohen's kappa of tables of counts [..., K, K], and its asymptotic interval.

    The standard error is that of Fleiss, Cohen and Everitt ("Large sample standard errors of kappa and
    weighted kappa", 1969). Where one of the two gave all samples the same, kappa is NaN: agreement is then
    what chance gives, whatever the other says.
    """
    totals = tables.sum((-2, -1))
    shares = tables / totals[..., None, None]
    rows, columns = shares.sum(-1), shares.sum(-2)
    same = np.diagonal(shares, axis1=-2, axis2=-1)
    agreement, chance = same.sum(-1), (rows * columns).sum(-1)
    constant = (rows.max(-1) == 1) | (columns.max(-1) == 1)
    chance_of_others = np.where(constant, np.nan, 1 - chance)
    value = (agreement - chance) / chance_of_others
    off = 1 - value[..., None]
    on_diagonal = (same * (1 - (rows + columns) * off) ** 2).sum(-1)
    margins = columns[..., :, None] + rows[..., None, :]
    beside = (shares * margins**2).sum((-2, -1)) - (same * (rows + columns) ** 2).sum(-1)
    variance = on_diagonal + off[..., 0] ** 2 * beside - (value - chance * off[..., 0]) ** 2
    half = Z * np.sqrt(np.maximum(variance, 0) / totals) / chance_of_others
    return Kappa(agreement, chance, value, np.maximum(value - half, -1), np.minimum(value + half, 1))


@dataclass(frozen=True)
class BesideRandom:
    """Decisions at a spot beside draws of every sample alike, independently, at each epoch's rate.

    ``spread``: variance over samples of how often each was kept, over that of such draws; ``by_class``: the
    share of that variance that lies between classes; ``changes``: share of samples whose decision is another
    than in the epoch before; ``always``, ``never``: numbers of samples kept in all epochs, in none. Bounds
    hold 95 % of what such draws give; ``…_random`` is their mean. NaN where nothing varies.
    """

    spread: float
    spread_bounds: Bounds
    by_class: float
    by_class_random: float
    by_class_bound: float
    changes: float
    changes_random: float
    changes_bounds: Bounds
    always: int
    always_random: float
    never: int
    never_random: float


def beside_random(kept: np.ndarray, labels: np.ndarray) -> BesideRandom:
    """Compare decisions bool [epochs, N] with random ones of the same rates; ``labels``: int64 [N].

    The number kept in each epoch is held fixed, as in a permutation of the samples within each epoch. Then
    epochs are uncorrelated; the variance of what they sum to, and that of changes, follow exactly, and bounds
    by the normal distribution.
    """
    epochs, samples = kept.shape
    rates = kept.mean(1)
    times = kept.sum(0, dtype=np.int64)
    spread, spread_bounds = _spread(rates, times)
    by_class, by_class_random, by_class_bound = _by_class(times, labels)
    changes, changes_random, changes_bounds = _changes(kept, rates)
    return BesideRandom(
        spread,
        spread_bounds,
        by_class,
        by_class_random,
        by_class_bound,
        changes,
        changes_random,
        changes_bounds,
        int((times == epochs).sum()),
        float(samples * np.prod(rates)),
        int((times == 0).sum()),
        float(samples * np.prod(1 - rates)),
    )


def _spread(rates: np.ndarray, times: np.ndarray) -> tuple[float, Bounds]:
    others = len(times) - 1
    variances = rates * (1 - rates) * len(times) / max(others, 1)  # over samples, of one epoch's decisions
    total = variances.sum()
    if (variances > 0).sum() < 2:
        return math.nan, NOWHERE
    deviation = math.sqrt(2 * (total**2 - (variances**2).sum()) / others) / total
    return float(times.var(ddof=1) / total), (1 - Z * deviation, 1 + Z * deviation)


def _by_class(times: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    """A variance's share between classes; its mean and 97.5 % point where classes do not matter."""
    _, places, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    classes, within = len(sizes) - 1, len(labels) - len(sizes)
    all_of_it = times.var() * len(times)
    if all_of_it == 0 or not classes or not within:
        return math.nan, math.nan, math.nan
    means = np.bincount(places, times) / sizes
    between = (sizes * (means - times.mean()) ** 2).sum()
    bound = betaincinv(classes / 2, within / 2, 1 - LEVEL / 2)
    return float(between / all_of_it), classes / (classes + within), float(bound)


def _changes(kept: np.ndarray, rates: np.ndarray) -> tuple[float, float, Bounds]:
    if len(kept) < 2:
        return math.nan, math.nan, NOWHERE
    found = changes_between(kept).mean()
    expected = random_changes(rates).mean()
    variances = rates * (1 - rates)
    deviation = 2 * math.sqrt((variances[1:] * variances[:-1]).sum() / (kept.shape[1] - 1)) / (len(kept) - 1)
    bounds = max(expected - Z * deviation, 0.0), min(expected + Z * deviation, 1.0)
    return float(found), float(expected), bounds


def changes_between(kept: np.ndarray) -> np.ndarray:
    """The share of samples decided otherwise than in the epoch before: [epochs - 1], of bool [epochs, N]."""
    return (kept[1:] != kept[:-1]).mean(1)


def random_changes(rates: np.ndarray) -> np.ndarray:
    """That share for independent draws of these rates, [epochs]."""
    return rates[1:] * (1 - rates[:-1]) + (1 - rates[1:]) * rates[:-1]


def majority(kept: np.ndarray, last: int) -> np.ndarray:
    """What most of the last epochs decided, bool [N], of bool [epochs, N]; in a tie the very last does."""
    window = kept[-last:]
    times = 2 * window.sum(0, dtype=np.int64)
    return (times > len(window)) | ((times == len(window)) & window[-1])


def class_shares(kept: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The share kept of each class, in the order of ``np.unique(labels)``: [epochs, classes]."""
    order = np.argsort(labels, kind="stable")
    _, firsts, sizes = np.unique(labels[order], return_index=True, return_counts=True)
    return np.add.reduceat(kept[:, order], firsts, axis=1, dtype=np.int64) / sizes


def equal_bins(values: np.ndarray, bins: int, digits: int) -> np.ndarray:
    """Edges between at most so many bins of about as many values each; they differ in so many digits."""
    edges = np.quantile(values, np.linspace(0, 1, bins + 1))
    inner = sorted({float(f"{edge:.{digits}g}") for edge in edges[1:-1]})
    return np.array([edge for edge in inner if edges[0] < edge <= edges[-1]])


def mean_over_pairs(values: np.ndarray, pairs: Sequence[tuple[int, int]]) -> tuple[float, Bounds]:
    """The mean of what was measured between pairs of runs, and its interval over runs; NaN does not count.

    The interval is a jackknife's, which leaves out one run after the other, with Student's t: pairs that
    share a run are not independent. It takes three runs.
    """
    there = ~np.isnan(values)
    values, ends = values[there], np.asarray(pairs).reshape(-1, 2)[there]
    if not len(values):
        return math.nan, NOWHERE
    runs, mean = np.unique(ends), float(values.mean())
    without = [values[(ends != run).all(1)] for run in runs]
    if len(runs) < 3 or not all(map(len, without)):
        return mean, NOWHERE
    means = np.array([left.mean() for left in without])
    others = len(runs) - 1
    half = stdtrit(others, 1 - LEVEL / 2) * math.sqrt(
        others / len(runs) * ((means - means.mean()) ** 2).sum()
    )
    return mean, (mean - half, mean + half)
