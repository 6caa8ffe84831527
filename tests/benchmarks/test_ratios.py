"""Ratios pair what was measured together; a step's time is taken where it was measured."""

from __future__ import annotations

import pytest
from benchmarks.training import ratios
from hypothesis import given
from hypothesis import strategies as some

TIMES = some.lists(some.floats(0.01, 100.0), min_size=1, max_size=9)


def test_a_noisy_round_hits_both_alike() -> None:
    found = ratios.ratio([10.0, 30.0, 12.0], [5.0, 15.0, 6.0])
    assert (found.median, found.low, found.high, found.rounds) == (2.0, 2.0, 2.0, 3)
    assert str(found) == "2.00x (2.00 to 2.00)"


@given(TIMES)
def test_the_interval_holds_the_median_and_stays_within_what_was_seen(times: list[float]) -> None:
    found = ratios.ratio(times, [1.0] * len(times))
    assert min(times) <= found.low <= found.median <= found.high <= max(times)


@given(TIMES)
def test_the_interval_is_the_same_every_time(times: list[float]) -> None:
    assert ratios.interval(times) == ratios.interval(times)


@pytest.mark.parametrize(("others", "ours"), [([], []), ([1.0], [1.0, 2.0]), ([0.0], [1.0])])
def test_unpaired_times_are_refused(others: list[float], ours: list[float]) -> None:
    with pytest.raises(ValueError, match="wanted pairs of positive times"):
        ratios.ratio(others, ours)


@pytest.mark.parametrize(
    ("seconds", "unfinished", "wanted"),
    [
        ([9.0, 2.0, 4.0, 3.0], None, (3.0, "median of 3 steps after the first")),
        ([9.0], (4, 1.0), (9.0, "its first step")),
        ([], (1200, 1600, 60.0), (80.0, "1,200 of a step's 1,600 tokens, scaled")),
    ],
)
def test_a_steps_time(
    seconds: list[float], unfinished: tuple[int, int, float] | None, wanted: tuple[float, str]
) -> None:
    assert ratios.step_time(seconds, unfinished) == wanted


def test_a_run_without_a_micro_batch_has_no_time() -> None:
    with pytest.raises(ValueError, match="not even a micro-batch"):
        ratios.step_time([], None)


def test_rounds_turn_around() -> None:
    assert [ratios.order("ABC", number) for number in range(3)] == [list("ABC"), list("CBA"), list("ABC")]
