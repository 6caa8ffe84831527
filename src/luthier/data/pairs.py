"""Pairs of answers, as training and the data doctor see them: two conversations with one beginning.

Does not know: how pairs are written (preference.py), what is looked for (lints.py, look.py).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from luthier.data.formats import read_examples
from luthier.data.read import OnBytes, is_plain_text, read_records
from luthier.data.render import Renderer
from luthier.data.rows import RowReader, kind_of
from luthier.spec.data import Chat, Example, Message, Preference, Problem, Rendered

Meaning = Example | Preference


def read_pairs(path: Path, on_bytes: OnBytes | None = None) -> Iterator[Preference | Problem]:
    """Every record of `path` as a Preference, or its Problems; warnings about the file come last. Raises NotFound on
    the first step."""
    reader = RowReader(path.name, "preference")
    for record in read_records(path, on_bytes):
        if isinstance(record, Problem):
            yield record
            continue
        if (kind := kind_of(record.value)) != "preference":
            found = f"a {kind} record" if kind else "a record without two answers"
            wanted = "a preference record: what was asked, the preferred answer and another one"
            yield Problem(record.line, "", found, wanted, "See docs/data-formats.md.", record.row, file=path.name)
            continue
        row = reader.read(record)
        yield from row.problems
        if isinstance(row.meaning, Preference):
            yield row.meaning
    for key, (line, first, count) in reader.unknown.items():
        found = f"the key {key!r} in {count:,} record{'s' if count > 1 else ''}"
        yield Problem(line, key, found, "only what a pair has", "It was ignored.", first, "warning", path.name)


def read_meanings(path: Path, pairs: bool, on_bytes: OnBytes | None = None) -> Iterator[Meaning | Problem]:
    """The records of `path` as preference pairs, or as what is to be imitated. Raises NotFound on the first step."""
    return read_pairs(path, on_bytes) if pairs else read_examples(path, on_bytes)


def holds_pairs(path: Path) -> bool:
    """Whether the first record of a file is a preference pair. Raises NotFound."""
    if is_plain_text(path):
        return False
    first = next(iter(read_records(path)), None)
    return first is not None and not isinstance(first, Problem) and kind_of(first.value) == "preference"


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
            yield meaning, _of_pair(rows, meaning, "preferred")
        elif isinstance(others, Problem):
            yield meaning, _of_pair(others, meaning, "rejected")
        else:
            yield meaning, rows + others


def _of_pair(problem: Problem, pair: Preference, answer: str) -> Problem:
    return dataclasses.replace(problem, field=field_of(pair, problem.field, answer))
