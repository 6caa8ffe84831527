"""Pairs of answers as the data doctor sees them: two conversations with one beginning.

Does not know: how pairs are written (preference.py), what is looked for (lints.py, look.py).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator

from luthier.data.render import Renderer
from luthier.spec.data import Chat, Example, Message, Preference, Problem, Rendered

Meaning = Example | Preference


def as_chats(pair: Preference) -> tuple[Chat, Chat]:
    """(the preferred conversation, the other one); answers within the prompt are context."""
    asked = tuple(dataclasses.replace(turn, weight=0) if turn.role == "assistant" else turn for turn in pair.prompt)
    return _chat(pair, asked, pair.preferred), _chat(pair, asked, pair.rejected)


def _chat(pair: Preference, asked: tuple[Message, ...], answer: tuple[Message, ...]) -> Chat:
    return Chat((*asked, *answer), pair.tools, line=pair.line, row=pair.row)


def field_of(pair: Preference, field: str, answer: str) -> str:
    """`messages[3].content` of one of the conversations in the words of a pair: `preferred[0].content`."""
    head, bracket, rest = field.partition("messages[")
    index, _, after = rest.partition("]")
    if head or not bracket or not index.isdecimal():
        return field
    place = int(index) - len(pair.prompt)
    return f"prompt[{index}]{after}" if place < 0 else f"{answer}[{place}]{after}"


def render_all(renderer: Renderer, meanings: Iterable[Meaning]) -> Iterator[tuple[Meaning, list[Rendered] | Problem]]:
    """What Renderer.try_render gives, for pairs too: the rows of both conversations, the preferred one first."""
    waiting: deque[Meaning] = deque()

    def examples() -> Iterator[Example]:
        for meaning in meanings:
            waiting.append(meaning)
            if isinstance(meaning, Preference):
                yield from as_chats(meaning)
            else:
                yield meaning

    done = renderer.try_render(examples())
    for _, rows in done:
        meaning = waiting.popleft()
        if not isinstance(meaning, Preference):
            yield meaning, rows
            continue
        others = next(done)[1]
        if isinstance(rows, Problem):
            yield meaning, rows
        else:
            yield meaning, others if isinstance(others, Problem) else rows + others
