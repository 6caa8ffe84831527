"""Intervals and tests beside scipy's, beside textbook examples, and beside brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from luthier.proof import significance
from luthier.spec.proof import Interval

BITS = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40)


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_is_scipys(counts: tuple[int, int]) -> None:
    theirs = stats.binomtest(*counts).proportion_ci(method="wilson")
    assert significance.wilson(*counts) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_sign_test_over_rows_that_differ(gained: int, lost: int) -> None:
    theirs = stats.binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
    assert significance.mcnemar(gained, lost) == pytest.approx(theirs)


def test_newcombes_own_example() -> None:
    """Newcombe (1998), table III: 36 pairs both, 12 first only, 2 second only, 0 neither: -0.0569 to 0.3404 is for
    another method; method 10 gives 0.0562 to 0.3290 after the continuity correction."""
    pairs = [(1.0, 1.0)] * 36 + [(1.0, 0.0)] * 12 + [(0.0, 1.0)] * 2
    low, high = significance.newcombe([one for one, _ in pairs], [other for _, other in pairs])
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-4)


@given(BITS)
def test_newcombe_holds_the_difference_and_turns_with_the_sides(pairs: list[tuple[int, int]]) -> None:
    one, other = ([float(pair[n]) for pair in pairs] for n in (0, 1))
    low, high = significance.newcombe(one, other)
    difference = (sum(one) - sum(other)) / len(pairs)
    assert -1 <= low <= difference + 1e-12
    assert difference - 1e-12 <= high <= 1
    assert significance.newcombe(other, one) == pytest.approx((-high, -low))
    assert low < high  # never "exactly", however few or alike the rows are


def test_bca_is_scipys() -> None:
    values = np.random.default_rng(3).beta(0.5, 2, size=40)
    ours = significance.bootstrap(values.tolist(), [1.0] * 40, 5)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="BCa", rng=np.random.default_rng(1))
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.01)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.01)
    assert significance.bootstrap(values.tolist(), [1.0] * 40, 5) == ours


def test_rows_weigh_what_they_weigh() -> None:
    """A row of weight 3 counts as three in the mean; the interval is about that mean."""
    found = significance.bootstrap([0.1, 0.2, 0.9, 0.8, 0.4], [1, 1, 3, 1, 1], 0)
    assert found.low < (0.1 + 0.2 + 2.7 + 0.8 + 0.4) / 7 < found.high


@settings(max_examples=40)
@given(st.lists(st.integers(-3, 3), min_size=1, max_size=8))
def test_few_rows_are_flipped_in_every_way(differences: list[int]) -> None:
    seen = abs(sum(differences))
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((-1, 1), repeat=len(differences))
    ]
    brute = sum(total >= seen for total in sums) / len(sums)
    assert significance.sign_flips(differences, [1.0] * len(differences), 0) == pytest.approx(brute)


def test_many_rows_are_flipped_at_random_and_come_near_the_exact_value() -> None:
    values = [0.3, -0.1, 0.4, 0.2, -0.3, 0.5, 0.1, 0.2, -0.2, 0.6, 0.1, -0.4, 0.3, 0.2, 0.1]
    exact = stats.permutation_test(
        (values,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=False
    ).pvalue
    assert significance.sign_flips(values, [1.0] * 15, 0) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize(
    ("difference", "low", "high", "p", "higher", "said"),
    [
        (0.2, 0.1, 0.3, 0.01, True, "helped"),
        (-0.2, -0.3, -0.1, 0.01, True, "worse"),
        (-0.2, -0.3, -0.1, 0.01, False, "helped"),
        (0.2, -0.1, 0.3, 0.01, True, "not shown to help"),
        (0.2, 0.1, 0.3, 0.06, True, "not shown to help"),
        (0.0, 0.0, 0.0, 1.0, True, "not shown to help"),
    ],
)
def test_only_what_is_shown_is_said(
    difference: float, low: float, high: float, p: float, higher: bool, said: str
) -> None:
    assert significance.verdict(difference, Interval(low=low, high=high, method=""), p, higher) == said


def test_pass_or_fail_and_scores_have_their_own_tests() -> None:
    passes, fails, weights = [1.0] * 8, [0.0] * 8, [1.0] * 8
    assert significance.test_of_difference(passes, fails, weights, 0) == (2 / 2**8, "McNemar's exact test")
    assert significance.test_of_difference([0.5] * 8, fails, weights, 0) == (2 / 2**8, "paired permutation test")
    assert "Wilson" in significance.interval_of(passes, weights, 0).method
    assert "Newcombe" in significance.interval_of_difference(passes, fails, weights, 0).method
    assert significance.interval_of([0.5] * 8, weights, 0).method == "all rows are alike"
