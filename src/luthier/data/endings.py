"""How prompts and completions end, for records without a chat template: the ending that most have, and who lacks it.

Does not know: files, how an ending is added (fix.py).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from luthier.data.prepare import COMPLETION_ENDINGS, PROMPT_ENDINGS

_KEPT_ENDINGS = 1_000
_KEPT_ROWS = 20
# A marker word or signs that end no sentence, and the space around them: "\n\nAnswer:", " ->", "\n\n###\n\n".
_MARK = re.compile(r"(?:(?:^|\s)[A-Za-z]{1,12})?\s*[^\w\s.?!。？！,;\"'”’)\]}、，]{1,12}\s*$|\s+$")
_KNOWN_PROMPT = tuple(sorted(PROMPT_ENDINGS, key=len, reverse=True))
_KNOWN_COMPLETION = tuple(
    sorted((ending for ending in COMPLETION_ENDINGS if ending != "."), key=len, reverse=True)
)  # a full stop ends sentences, too
MOST = 0.5  # the share of rows from which an ending is the file's own


def prompt_ending(prompt: str) -> str:
    """The separator that `prompt` ends with; "" for none."""
    return _ending(prompt, _KNOWN_PROMPT)


def completion_ending(completion: str) -> str:
    """The end marker that `completion` ends with; "" for none."""
    return _ending(completion, _KNOWN_COMPLETION)


def _ending(text: str, known: tuple[str, ...]) -> str:
    for ending in known:
        if text.endswith(ending):
            return ending
    found = _MARK.search(text[-40:])
    return found[0] if found else ""


@dataclass
class Endings:
    """How often each ending was seen, and the first rows that have it."""

    seen: dict[str, tuple[int, list[int]]] = field(default_factory=dict)

    def add(self, ending: str, row: int, count: int = 1) -> None:
        if ending not in self.seen and len(self.seen) >= _KEPT_ENDINGS:
            ending = ""  # so many endings are none
        before, rows = self.seen.get(ending, (0, []))
        self.seen[ending] = (before + count, rows if len(rows) >= _KEPT_ROWS else [*rows, row])

    def merge(self, other: Endings, offset: int) -> None:
        for ending, (count, rows) in other.seen.items():
            self.add(ending, rows[0] + offset, count)
            kept = self.seen[ending if ending in self.seen else ""][1]
            kept.extend(row + offset for row in rows[1 : 1 + _KEPT_ROWS - len(kept)])

    @property
    def total(self) -> int:
        return sum(count for count, _ in self.seen.values())

    def common(self) -> str:
        """The ending that most rows have; "" when there is none."""
        marked = {ending: count for ending, (count, _) in self.seen.items() if ending}
        most = max(marked, key=lambda ending: marked[ending], default="")
        return most if most and marked[most] >= MOST * self.total else ""

    def without(self, ending: str) -> tuple[int, list[int]]:
        """(number of rows that end otherwise, the first of them in order)."""
        others = [found for other, found in self.seen.items() if other != ending]
        return sum(count for count, _ in others), sorted(row for _, rows in others for row in rows)[:_KEPT_ROWS]
