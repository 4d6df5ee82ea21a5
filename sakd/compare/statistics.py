"""Differences between runs paired by seed: interval, tests, and what a test could show at all."""

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

LEVEL = 0.05  # of the tests; 1 - LEVEL is the intervals' confidence
POWER = 0.8  # with which a difference is to be shown, where it is there
# Differences equal to these are equal: subtraction makes 0.3 of 97.3 - 97.0 and not of 98.6 - 98.3.
DECIMALS = 9
ENUMERATED = 13  # up to this many differences all their signs are enumerated where ranks are tied
TABULATED = 50  # up to this many, scipy knows the distribution without ties


@dataclass(frozen=True)
class Paired:
    """The mean of n differences, its t interval, two-sided p values and the differences' sample deviation.

    ``could_show``: the smallest difference that so many pairs of such a deviation would have shown, as
    ``least_shown`` says. Each is NaN where n or the variance gives none.
    """

    pairs: int
    difference: float
    low: float
    high: float
    t_p: float
    wilcoxon_p: float
    deviation: float
    could_show: float


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Test ``values`` minus ``baseline``, pair by pair; at least one pair.

    Differences that are all the same have no variance: then there is neither an interval nor a t-test.
    """
    differences = np.round(np.subtract(values, baseline), DECIMALS)
    low = high = t_p = wilcoxon_p = deviation = could_show = math.nan
    if np.ptp(differences) > 0:
        test = stats.ttest_1samp(differences, 0.0)
        t_p = float(test.pvalue)
        low, high = map(float, test.confidence_interval(1 - LEVEL))
        deviation = float(differences.std(ddof=1))
        could_show = least_shown(deviation, len(differences))
    if len(differences) > 1:
        wilcoxon_p = signed_rank(differences)
    mean = float(differences.mean())
    return Paired(len(differences), mean, low, high, t_p, wilcoxon_p, deviation, could_show)


def power(difference: float, deviation: float, pairs: int) -> float:
    """The probability that a paired, two-sided t-test at LEVEL shows ``difference``, above 0, which is there.

    ``deviation``: of the pairs' differences. The square of a noncentral t is a noncentral F (Cohen,
    "Statistical Power Analysis for the Behavioral Sciences", 1988).
    """
    critical = stats.t.ppf(1 - LEVEL / 2, pairs - 1) ** 2
    return float(stats.ncf.sf(critical, 1, pairs - 1, pairs * (difference / deviation) ** 2))


def least_shown(deviation: float, pairs: int) -> float:
    """The difference that a t-test of so many pairs shows with POWER, tested alone."""
    enough = 1.0
    while power(enough, 1.0, pairs) < POWER:
        enough *= 2
    return deviation * float(optimize.brentq(lambda d: power(d, 1.0, pairs) - POWER, 0.0, enough))


def pairs_to_show(difference: float, deviation: float) -> int:
    """The number of pairs with which a t-test shows ``difference`` with POWER, tested alone."""
    enough = 2
    while power(difference, deviation, enough) < POWER:
        enough *= 2
    return bisect.bisect_left(range(enough), POWER, lo=2, key=lambda n: power(difference, deviation, n))


def signed_rank(differences: np.ndarray) -> float:
    """The two-sided p of Wilcoxon's test; zeros are dropped.

    It is exact, but for ties among more than 13 and for more than 50.
    """
    differences = differences[differences != 0]
    n = len(differences)
    if n == 0:
        return 1.0
    tied = len(np.unique(np.abs(differences))) < n
    if not tied and n <= TABULATED:
        method = "exact"
    else:
        method = stats.PermutationMethod(n_resamples=2**ENUMERATED) if n <= ENUMERATED else "asymptotic"
    return float(stats.wilcoxon(differences, method=method).pvalue)


def least_signed_rank(pairs: Any) -> Any:
    """The smallest p that Wilcoxon's test can give, for a number of pairs or each of an array.

    All differences are then of one sign, two of 2^n cases.
    """
    return 2.0 ** (1 - pairs)


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjust p values for testing all together.

    Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979. NaN is no test: it stays, and does
    not count. Adjusted values grow with each p, so those of the smallest possible p values are the smallest
    possible.
    """
    p_values = np.asarray(p_values, dtype=float)
    adjusted = p_values.copy()
    order = np.argsort(p_values)[: np.count_nonzero(~np.isnan(p_values))]  # NaN sorts last
    steps = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps * p_values[order]), 1.0)
    return adjusted


def pairs_needed(tests: int) -> int:
    """The number of pairs that let Wilcoxon's test reach LEVEL after Holm's correction over ``tests``."""
    return math.ceil(1 + math.log2(tests / LEVEL))
