"""The rows of a data file with their own bytes and what they mean, for commands that write rows again.

Training reads Examples (formats.py) or pairs of answers (pairs.py); here a record of either is a row like any other,
and what is not changed keeps its bytes. Does not know: what is done with rows.
"""

from __future__ import annotations

import dataclasses
import json
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from luthier.data.formats import Reader, detect
from luthier.data.messages import Findings
from luthier.data.moss import is_moss, read_moss
from luthier.data.preference import known_keys, read_preference
from luthier.data.read import OnBytes, Record, is_plain_text, read_records
from luthier.spec.data import Chat, Completion, Example, Message, Preference, Problem
from luthier.spec.errors import BadData

_SPECIAL = ("preference", "moss")
SHOWN = 20  # problems of a refusal
_SPACES = b" \t\r"


@dataclass(frozen=True, slots=True)
class Row:
    """One record: its bytes and value, and what it means. `meaning` is None when `problems` has an error."""

    record: Record
    meaning: Example | Preference | None
    problems: tuple[Problem, ...] = ()


def read_rows(path: Path, on_bytes: OnBytes | None = None) -> Iterator[Row | Problem]:
    """Every record of a JSON file as a Row, in order, and a Problem in place of each that is no JSON.

    Preference records and records to imitate do not mix in one file. Raises NotFound on the first step, and BadData for
    a .txt file, which is one document and has no rows.
    """
    if is_plain_text(path):
        raise BadData(
            f"{path} is plain text: one document, which has no rows.",
            hint="`luthier data convert` makes records of it: --from lines takes each line for a row.",
            param="file",
        )
    yield from rows_of(read_records(path, on_bytes, keep_raw=True), path.name)


def rows_of(records: Iterable[Record | Problem], file: str) -> Iterator[Row | Problem]:
    """What each record means, in order. A file has one format: that of its first record."""
    reader = RowReader(file)
    for record in records:
        yield record if isinstance(record, Problem) else reader.read(record)


class RowReader:
    """Records of one file to Rows, one at a time. `format` and its line, where an earlier record has decided it;
    `unknown` as formats.Reader has it."""

    def __init__(self, file: str, format: str | None = None, format_line: int = 0) -> None:
        self.file, self.line = file, format_line
        self.special = format if format in _SPECIAL else ""
        self.reader = Reader(file, None if self.special else format, format_line)

    @property
    def unknown(self) -> dict[str, list[int]]:
        return self.reader.unknown

    def read(self, record: Record) -> Row:
        kind = kind_of(record.value)
        if self.reader.format is None and not self.special and kind in _SPECIAL:
            self.special, self.line = kind, record.line
        if self.special:
            findings = Findings(self.file, record.line, record.row)
            meaning = _special(record, kind, self.special, self.line, findings)
            if kind == "preference" == self.special and not findings.failed:
                self.reader.note_unknown(record.value, known_keys(record.value), record)
            return Row(record, None if findings.failed else meaning, tuple(findings.problems))
        found = list(self.reader.read(record))
        problems = tuple(item for item in found if isinstance(item, Problem))
        return Row(record, next((item for item in found if not isinstance(item, Problem)), None), problems)


def kind_of(value: Any) -> str | None:
    """The format of a record: a name in formats.FORMATS, "preference", "moss", or None."""
    return "moss" if is_moss(value) else detect(value)


def _special(
    record: Record, kind: str | None, wanted: str, line: int, findings: Findings
) -> Example | Preference | None:
    """What formats.py does not read: preference records, which are no examples to imitate, and MOSS records, which have
    to be converted."""
    if kind != wanted:
        hint = "Put each format into a file of its own."
        findings.error("", "a record of another format", f"a {wanted} record, as in line {line}", hint)
        return None
    if kind == "preference":
        return read_preference(record, findings)
    chat = read_moss(record.value, findings)
    return chat and dataclasses.replace(chat, line=record.line, row=record.row)


def good_rows(path: Path, on_bytes: OnBytes | None, todo: str) -> Iterator[tuple[Record, Example | Preference]]:
    """Rows of a file without errors. Raises BadData with every problem, after the last row, when there are some."""
    problems: list[Problem] = []
    count = 0
    for row in read_rows(path, on_bytes):
        found = [row] if isinstance(row, Problem) else [p for p in row.problems if p.severity == "error"]
        count += len(found)
        problems += found[: max(0, SHOWN - len(problems))]
        if not isinstance(row, Problem) and row.meaning is not None and not count:
            yield row.record, row.meaning
    if count:
        raise BadData(
            f"{path}: {count:,} problem{'s' if count > 1 else ''}, so it was not {todo}; the first: {problems[0]}",
            problems=problems,
            hint="Correct these rows, or leave them out: luthier data fix FILE --drop unreadable --drop invalid -o OUT",
            param="file",
        )


# -- what rows have in common ------------------------------------------------------------------------------------------


def parts(meaning: Example | Preference) -> tuple[str, str]:
    """(what is asked, what is to be learnt) as texts: turns before the first learnt answer, and that answer.

    Plain text asks nothing. A preference's answer is the preferred one.
    """
    if isinstance(meaning, Chat):
        first = next((n for n, turn in enumerate(meaning.messages) if turn.role == "assistant" and turn.weight), 0)
        return _said(meaning.messages[:first]), _said(meaning.messages[first : first + 1], roles=False)
    if isinstance(meaning, Preference):
        return _said(meaning.prompt), _said(meaning.preferred, roles=False)
    if isinstance(meaning, Completion):
        return meaning.prompt, meaning.completion
    return "", meaning.text


def _said(turns: Iterable[Message], roles: bool = True) -> str:
    lines = []
    for turn in turns:
        calls = [json.dumps([call.name, call.arguments], sort_keys=True) for call in turn.tool_calls]
        lines.append("\n".join([f"{turn.role}:" if roles else "", turn.content, *calls]).strip("\n"))
    return "\n".join(lines)


def normal(text: str) -> str:
    """What is the same to a reader comes out equal: compatibility forms, case and white space do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def said(meaning: Example | Preference) -> str:
    """All texts of a row that cost tokens: of a preference the preferred answer alone."""
    if isinstance(meaning, Chat):
        return _said(meaning.messages, roles=False)
    if isinstance(meaning, Preference):
        return _said((*meaning.prompt, *meaning.preferred), roles=False)
    return "".join(parts(meaning))


# -- writing rows again ------------------------------------------------------------------------------------------------


class Lines:
    """Rows to a file of JSON Lines, or to an array where each element keeps its own layout."""

    def __init__(self, handle: IO[bytes], array: bool = False) -> None:
        self.handle = handle
        self.array = array
        self.count = 0

    def add(self, record: Record) -> None:
        self.add_raw(whole(record) if self.array else on_one_line(record))

    def add_raw(self, raw: bytes) -> None:
        if self.array:
            self.handle.write((b",\n" if self.count else b"[\n") + raw)
        else:
            self.handle.write(raw + b"\n")
        self.count += 1

    def end(self) -> None:
        if self.array:
            self.handle.write(b"\n]\n" if self.count else b"[]\n")


def whole(record: Record) -> bytes:
    return record.raw.strip(_SPACES)


def on_one_line(record: Record) -> bytes:
    """The record's own bytes; of one that stands on several lines, its value written again on one."""
    if b"\n" in record.raw:
        return json.dumps(record.value, ensure_ascii=False).encode()
    return record.raw


def is_array(path: Path) -> bool:
    """Whether a file is a JSON array. Raises NotFound."""
    with open(path, "rb") as handle:
        return handle.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip(b" \t\r\n").startswith(b"[")
