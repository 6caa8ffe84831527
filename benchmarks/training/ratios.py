"""Ratios of times that were measured in turn, with intervals. Pure arithmetic.

Two systems are compared round by round: a round's ratio is the time of one over the time of the other in that round,
for neighbours on the machine change from round to round and hit both alike. Absolute times of different rounds are
never compared.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

DRAWS = 2000


@dataclass(frozen=True)
class Ratio:
    """A median of `rounds` ratios and the bounds that 95 % of bootstrapped medians keep to."""

    median: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        if self.rounds == 1:
            return f"{self.median:.2f}x (one round)"
        return f"{self.median:.2f}x ({self.low:.2f} to {self.high:.2f})"


def ratio(others: Sequence[float], ours: Sequence[float]) -> Ratio:
    """How many times longer `others[i]` took than `ours[i]`, over all rounds i.

    Raises ValueError for no round, different numbers of rounds or times that are not positive.
    """
    if not ours or len(ours) != len(others) or min(*ours, *others) <= 0:
        raise ValueError(f"wanted pairs of positive times, found {list(others)} and {list(ours)}")
    found = [theirs / own for theirs, own in zip(others, ours, strict=True)]
    low, high = interval(found)
    return Ratio(statistics.median(found), low, high, len(found))


def interval(values: Sequence[float], share: float = 0.95) -> tuple[float, float]:
    """Bootstrap interval of the median: deterministic, for the draws follow from a fixed seed."""
    chance = random.Random(0)
    medians = sorted(statistics.median(chance.choices(values, k=len(values))) for _ in range(DRAWS))
    cut = int(DRAWS * (1 - share) / 2)
    return medians[cut], medians[-1 - cut]


def step_time(seconds: Sequence[float], unfinished: Sequence[float] | None) -> tuple[float, str]:
    """Seconds of one optimizer step of a run, and in words where they come from.

    The median of the steps after the first, which warms up; the first if there is no other; and if not even that was
    finished when the run's seconds were spent, its finished micro-batches, scaled to all tokens of a step: `unfinished`
    holds (tokens computed, tokens of the step, seconds, ...).
    """
    if len(seconds) > 1:
        return statistics.median(seconds[1:]), f"median of {len(seconds) - 1} steps after the first"
    if seconds:
        return seconds[0], "its first step"
    if unfinished:
        tokens, whole, spent = unfinished[:3]
        return spent * whole / tokens, f"{tokens:,.0f} of a step's {whole:,.0f} tokens, scaled"
    raise ValueError("the run finished not even a micro-batch")


def order(systems: Sequence[str], number: int) -> list[str]:
    """Who runs when in round `number` (from 0): A B C, then C B A, so that no one always goes first."""
    return list(systems) if number % 2 == 0 else list(reversed(systems))
