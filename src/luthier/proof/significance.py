"""How sure a figure is: intervals and paired tests over rows, seeded, so that a report repeats to the digit.

Scores between 0 and 1 get bootstrap intervals (BCa: Efron, 1987). Pass or fail gets closed forms instead, because the
bootstrap of 0 passes in 20 rows says "exactly 0": Wilson's score interval (1927) for a share, and Newcombe's method 10
(1998) for the difference of paired shares. Paired tests: McNemar's in its exact form (a binomial over the rows where
the two differ) for pass or fail, sign flips of the rows' differences (Fisher, 1935) for scores. All intervals are of
95%.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from luthier.spec.proof import LEVEL, Interval, Verdict

RESAMPLES = 5_000
FLIPS = 10_000
EXACT_ROWS = 12  # up to here all 2^n sign patterns are counted
_NORMAL = NormalDist()
Z = _NORMAL.inv_cdf(1 - LEVEL / 2)

Floats = npt.NDArray[np.float64]


def is_pass_fail(*scores: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for values in scores for value in values)


def interval_of(scores: Sequence[float], weights: Sequence[float], seed: int) -> Interval:
    """Of one way's (weighted) mean."""
    if is_pass_fail(scores) and len(set(weights)) <= 1:
        low, high = wilson(int(sum(scores)), len(scores))
        return Interval(low=low, high=high, method="Wilson score interval")
    return bootstrap(scores, weights, seed)


def interval_of_difference(
    scores: Sequence[float], others: Sequence[float], weights: Sequence[float], seed: int
) -> Interval:
    """Of the mean of `scores` less that of `others`, row by row."""
    if is_pass_fail(scores, others) and len(set(weights)) <= 1:
        low, high = newcombe(scores, others)
        return Interval(low=low, high=high, method="Newcombe's method 10 for paired shares")
    return bootstrap([one - other for one, other in zip(scores, others, strict=True)], weights, seed)


def test_of_difference(
    scores: Sequence[float], others: Sequence[float], weights: Sequence[float], seed: int
) -> tuple[float, str]:
    """(two-sided p-value, name of the test) of "there is no difference"."""
    if is_pass_fail(scores, others) and len(set(weights)) <= 1:
        gained = sum(one > other for one, other in zip(scores, others, strict=True))
        lost = sum(one < other for one, other in zip(scores, others, strict=True))
        return mcnemar(gained, lost), "McNemar's exact test"
    differences = [one - other for one, other in zip(scores, others, strict=True)]
    return sign_flips(differences, weights, seed), "paired permutation test"


def verdict(difference: float, interval: Interval, p_value: float, higher_is_better: bool) -> Verdict:
    """What may be said: only a difference that the test and the interval both show counts."""
    shown = p_value < LEVEL and not interval.low <= 0 <= interval.high
    if not shown:
        return "not shown to help"
    return "helped" if (difference > 0) == higher_is_better else "worse"


# -- pass or fail ------------------------------------------------------------------------------------------------------


def wilson(passed: int, rows: int) -> tuple[float, float]:
    """95% interval of a share."""
    share, square = passed / rows, Z * Z / rows
    middle = (share + square / 2) / (1 + square)
    reach = math.sqrt(share * (1 - share) * square + square * square / 4) / (1 + square)
    low = 0.0 if passed == 0 else max(0.0, middle - reach)
    return low, 1.0 if passed == rows else min(1.0, middle + reach)


def newcombe(scores: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """95% interval of the difference of two shares of the same rows."""
    pairs = list(zip(scores, others, strict=True))
    n = len(pairs)
    both, first, second = (pairs.count(pair) for pair in ((1, 1), (1, 0), (0, 1)))
    neither = n - both - first - second
    one, other = (both + first) / n, (both + second) / n
    (low, high), (other_low, other_high) = wilson(both + first, n), wilson(both + second, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    cross: float = both * neither - first * second
    if cross > 0:
        cross = max(cross - n / 2, 0)  # Newcombe's continuity correction
    phi = cross / math.sqrt(margins) if margins else 0.0

    def reach(of_one: float, of_other: float) -> float:
        return math.sqrt(max(0.0, of_one**2 - 2 * phi * of_one * of_other + of_other**2))

    difference = one - other
    below = reach(one - low, other_high - other)
    above = reach(high - one, other - other_low)
    return max(-1.0, difference - below), min(1.0, difference + above)


def mcnemar(gained: int, lost: int) -> float:
    """Exact two-sided p-value: how often a fair coin divides these rows as unevenly."""
    rows, fewer = gained + lost, min(gained, lost)
    tail = sum(math.comb(rows, n) for n in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**rows))


# -- scores ------------------------------------------------------------------------------------------------------------


def bootstrap(scores: Sequence[float], weights: Sequence[float], seed: int) -> Interval:
    """95% BCa interval of the weighted mean, rows drawn with replacement."""
    values, weight = np.asarray(scores, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    n = len(values)
    mean = float((values * weight).sum() / weight.sum())
    if n < 2 or np.ptp(values) == 0:
        return Interval(low=mean, high=mean, method="all rows are alike")
    means = np.sort(_resampled(values, weight, seed))
    below = float(((means < mean).sum() + (means == mean).sum() / 2) / len(means))
    bias = _NORMAL.inv_cdf(min(max(below, 1 / len(means)), 1 - 1 / len(means)))
    left_out = ((values * weight).sum() - values * weight) / (weight.sum() - weight)
    pull = left_out.mean() - left_out
    spread = float((pull**2).sum()) ** 1.5
    acceleration = float((pull**3).sum()) / (6 * spread) if spread else 0.0

    def bound(z: float) -> float:
        moved = bias + z
        share = _NORMAL.cdf(bias + moved / (1 - acceleration * moved))
        return float(np.quantile(means, share))

    return Interval(low=bound(-Z), high=bound(Z), method=f"bootstrap, BCa, {RESAMPLES:,} resamples")


def _resampled(values: Floats, weights: Floats, seed: int) -> Floats:
    random = np.random.default_rng(seed)
    n = len(values)
    means = np.empty(RESAMPLES)
    step = max(1, 2_000_000 // n)  # rows held at a time
    for start in range(0, RESAMPLES, step):
        picked = random.integers(0, n, size=(min(step, RESAMPLES - start), n))
        weight = weights[picked]
        means[start : start + len(picked)] = (values[picked] * weight).sum(axis=1) / weight.sum(axis=1)
    return means


def sign_flips(differences: Sequence[float], weights: Sequence[float], seed: int) -> float:
    """Two-sided p-value: how often rows with signs at random differ as much in sum. Rows without a difference change
    nothing; up to EXACT_ROWS others all patterns are counted."""
    moved = np.asarray(differences, dtype=np.float64) * np.asarray(weights, dtype=np.float64)
    moved = moved[moved != 0]
    if not len(moved):
        return 1.0
    seen = abs(float(moved.sum())) * (1 - 1e-9)  # sums in another order may differ in the last bits
    if len(moved) <= EXACT_ROWS:
        patterns = np.arange(2 ** len(moved))[:, None] >> np.arange(len(moved)) & 1
        return float((np.abs((2 * patterns - 1) @ moved) >= seen).mean())
    random = np.random.default_rng(seed)
    count, left = 0, FLIPS
    while left:
        part = min(left, max(1, 2_000_000 // len(moved)))
        signs = random.integers(0, 2, size=(part, len(moved))) * 2 - 1
        count += int((np.abs(signs @ moved) >= seen).sum())
        left -= part
    return (count + 1) / (FLIPS + 1)
