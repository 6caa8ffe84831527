"""Whether an answer does what was asked of its form: each check is a pure function of the answer and one wanted value.

An item names some checks; all of them must hold. Does not know: prompts, models.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Check = Callable[[str, Any], bool]
_EDGES = " \t\n.,!?:;\"'`*()[]“”‘’。，！？：；、「」"
_CHINESE = re.compile(r"[\u4e00-\u9fff]")
_FENCE = re.compile(r"^```[a-z]*\n(.*?)\n?```$", re.DOTALL)


def passes(answer: str, wanted: dict[str, Any]) -> bool:
    """Whether `answer` passes every check of `wanted`, {name of CHECKS: value}. An empty answer passes none."""
    text = answer.strip()
    return bool(text) and all(CHECKS[name](text, value) for name, value in wanted.items())


def _bare(text: str) -> str:
    """Without white space and punctuation at both ends, in small letters."""
    return text.strip(_EDGES).casefold()


def _words(text: str) -> list[str]:
    return text.split()


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _one_of(text: str, wanted: list[str]) -> bool:
    return _bare(text) in {_bare(word) for word in wanted}


def _contains(text: str, wanted: list[str]) -> bool:
    return all(word.casefold() in text.casefold() for word in wanted)


def _contains_any(text: str, wanted: list[str]) -> bool:
    return any(word.casefold() in text.casefold() for word in wanted)


def _numbered(text: str, wanted: int) -> bool:
    """Exactly `wanted` lines, numbered 1, 2, 3 ... each with something behind its number."""
    lines = _lines(text)
    return len(lines) == wanted and all(
        re.match(rf"{number}\s*[.)、:：．]\s*\S", line) for number, line in enumerate(lines, 1)
    )


def _listed(text: str, wanted: list[str]) -> bool:
    """The wanted entries, one a line, with or without a bullet or number before them."""
    found = [_bare(re.sub(r"^(?:[-*•]|\d+[.)、:：．])\s*", "", line)) for line in _lines(text)]
    return found == [_bare(word) for word in wanted]


def _equals(text: str, wanted: str) -> bool:
    """The same, capitals and doubled spaces aside."""
    return " ".join(text.casefold().split()) == " ".join(wanted.casefold().split())


def _equals_case(text: str, wanted: str) -> bool:
    """The same in capitals too, punctuation at the ends aside."""
    return text.strip(_EDGES) == wanted


def _json(text: str, wanted: Any) -> bool:
    """The wanted value as JSON, with or without a code fence around it."""
    fenced = _FENCE.match(text)
    try:
        found = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return False
    return bool(found == wanted)


def _json_within(text: str, wanted: Any) -> bool:
    """The first JSON object or list in the text is the wanted one; words may stand around it."""
    for found in re.finditer(r"[\[{]", text):
        try:
            value, _ = json.JSONDecoder().raw_decode(text, found.start())
        except (ValueError, RecursionError):
            continue
        return bool(value == wanted)
    return False


def _starts(text: str, wanted: str) -> bool:
    return _bare(_words(text)[0]) == _bare(wanted)


def _chinese(text: str, wanted: bool) -> bool:
    """Whether most characters, spaces aside, are Chinese ones."""
    solid = "".join(text.split())
    return (2 * len(_CHINESE.findall(solid)) > len(solid)) is wanted


CHECKS: dict[str, Check] = {
    "one_of": _one_of,
    "contains": _contains,
    "contains_any": _contains_any,
    "numbered": _numbered,
    "lines": _listed,
    "equals": _equals,
    "equals_case": _equals_case,
    "json": _json,
    "json_within": _json_within,
    "starts": _starts,
    "chinese": _chinese,
    "at_least_words": lambda text, wanted: len(_words(text)) >= wanted,
    "at_most_words": lambda text, wanted: len(_words(text)) <= wanted,
    "at_most_lines": lambda text, wanted: len(_lines(text)) <= wanted,
    "at_least_characters": lambda text, wanted: len(text) >= wanted,
    "at_most_characters": lambda text, wanted: len(text) <= wanted,
}
