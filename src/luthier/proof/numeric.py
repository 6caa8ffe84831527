"""Numeric answers: the one number that an answer comes to, compared as a number and in no looser way.

GSM8K's convention (Cobbe et al., 2021): the final answer follows `####`. Without that mark the last number counts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

from luthier.proof.metrics import Scored, is_exact, mean
from luthier.spec.data import Example

MARK = "####"
# A number is no part of a word (x2) or of another number; a minus that follows one is a subtraction. Commas count only
# where they part thousands.
_NUMBER = re.compile(
    r"(?<![\w.])(?:(?<![)%])[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?(?!\d)",
    re.ASCII,
)
_ONLY = re.compile(r"\s*[$€£¥]?\s*" + _NUMBER.pattern + r"\s*[%.]?\s*", re.ASCII)


def number_of(text: str) -> Decimal | None:
    """The number that `text` comes to: the first after its last `####`, else the last one; None without any."""
    text = text.replace("−", "-")
    _, mark, after = text.rpartition(MARK)
    found = _NUMBER.findall(after)
    if mark:
        return _value(found[0]) if found else None
    return _value(found[-1]) if found else None


def is_number(text: str) -> bool:
    """Whether a reference is meant as a number: nothing but one, or one after `####` at its end."""
    text = text.replace("−", "-")
    _, _, after = text.rpartition(MARK)
    return _ONLY.fullmatch(after) is not None


def _value(text: str) -> Decimal:
    return Decimal(text.replace(",", ""))


def numeric(answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]) -> Scored:
    """1 where both come to the same number (42, 42.0 and 4.2e1 are the same), else 0."""
    del examples
    pairs = [(number_of(answer), number_of(right)) for answer, right in zip(answers, wanted, strict=True)]
    right = [float(found is not None and found == number) for found, number in pairs]
    exact = [float(is_exact(*pair)) for pair in zip(answers, wanted, strict=True)]
    answered = [float(found is not None) for found, _ in pairs]
    return Scored(right, {"exact_match": mean(exact), "answers_with_a_number": mean(answered)})
