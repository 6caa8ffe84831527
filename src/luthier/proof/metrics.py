"""What a metric is, and the plainest one, exact match. The table of all of them is choose.METRICS.

A metric is a pure function of answers, references and examples. It scores each row by itself; the score of a way is
the rows' (weighted) mean, so an interval and a paired test need nothing but the rows' scores. What is no mean of rows
(BLEU, macro F1) stands in `details`. Does not know: models, how answers came to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from luthier.spec.data import Example

Details = dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Scored:
    """One way's answers, measured: a score for each row, and further figures over all of them."""

    rows: list[float]
    details: Details = field(default_factory=dict)

    def __add__(self, details: Details) -> Scored:
        return Scored(self.rows, {**self.details, **details})


Score = Callable[[Sequence[str], Sequence[str], Sequence[Example]], Scored]  # (answers, wanted, examples)


@dataclass(frozen=True, slots=True)
class Metric:
    """`pass_mark`: from which score on a row counts as passed; None where there is no such line."""

    name: str
    words: str  # what a score is
    score: Score
    pass_mark: float | None = 1.0
    higher_is_better: bool = True


def is_exact(answer: str, wanted: str) -> bool:
    """The same text, white space at both ends aside."""
    return answer.strip() == wanted.strip()


def exact_match(answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]) -> Scored:
    """1 for an answer that is its reference to the letter, white space at both ends aside; else 0."""
    del examples
    return Scored([float(is_exact(answer, right)) for answer, right in zip(answers, wanted, strict=True)])


def mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
