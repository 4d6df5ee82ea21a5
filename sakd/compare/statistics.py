"""Differences between runs paired by seed: interval, tests, and what a test could show at all."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

LEVEL = 0.05  # of the tests; 1 - LEVEL is the intervals' confidence
# Differences equal to these are equal: subtraction makes 0.3 of 97.3 - 97.0 and not of 98.6 - 98.3.
DECIMALS = 9
ENUMERATED = 13  # up to this many differences all their signs are enumerated where ranks are tied
TABULATED = 50  # up to this many, scipy knows the distribution without ties


@dataclass(frozen=True)
class Paired:
    """The mean of n differences, its t interval, and two-sided p values.

    Each is NaN where n or the variance gives none.
    """

    pairs: int
    difference: float
    low: float
    high: float
    t_p: float
    wilcoxon_p: float


def paired(values: Sequence[float], baseline: Sequence[float]) -> Paired:
    """Test ``values`` minus ``baseline``, pair by pair; at least one pair.

    Differences that are all the same have no variance: then there is neither an interval nor a t-test.
    """
    differences = np.round(np.subtract(values, baseline), DECIMALS)
    low = high = t_p = wilcoxon_p = math.nan
    if np.ptp(differences) > 0:
        test = stats.ttest_1samp(differences, 0.0)
        t_p = float(test.pvalue)
        low, high = map(float, test.confidence_interval(1 - LEVEL))
    if len(differences) > 1:
        wilcoxon_p = signed_rank(differences)
    return Paired(len(differences), float(differences.mean()), low, high, t_p, wilcoxon_p)


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
