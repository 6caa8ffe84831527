"""Bytes -> records with their physical lines: JSON Lines, a JSON array, pretty-printed objects, or plain text.

Streams with bounded memory, whatever the size of the file; decides by content, except that `.txt` is plain text.
The locale plays no part: bytes are decoded as UTF-8 here or refused. Does not know: what a record means (formats.py).
"""

from __future__ import annotations

import codecs
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from luthier.data.strict_json import JsonFault, parse_json, scan_partial, scan_value, skip_space
from luthier.spec.data import Problem
from luthier.spec.errors import NotFound

OnBytes = Callable[[int, int], None]

MAX_RECORD = 32 << 20  # bytes of one line, or characters of one element of an array
TEXT_BLOCK = 65_536  # characters of one record of plain text
_CHUNK = 1 << 18
_HEAD = 1 << 16
_BLANK = b" \t\r\n"
_BOMS = (  # the UTF-32 marks first: the little-endian one begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_BINARIES = ((b"\x1f\x8b", "gzip"), (b"PK\x03\x04", "zip (or Excel)"), (b"PAR1", "Parquet"), (b"ARROW1", "Arrow"))
_JSON_SUFFIXES = frozenset({".json", ".jsonl", ".ndjson"})
_SAVE_AS_UTF8 = "Save the file again as UTF-8 (in an editor: Save with encoding; in a shell: iconv -t UTF-8)."


@dataclass(frozen=True, slots=True)
class Record:
    """One record: a JSON value, or a block of plain text (str). `line` is physical, `row` counts records; from 1.

    `raw` is its bytes as they stand in the file (a line without its line feed, an element of an array without the
    comma), when they were asked for.
    """

    line: int
    row: int
    value: Any
    raw: bytes = field(default=b"", compare=False, repr=False)


def is_plain_text(path: Path) -> bool:
    return path.suffix.lower() == ".txt"


def read_records(path: Path, on_bytes: OnBytes | None = None, *, keep_raw: bool = False) -> Iterator[Record | Problem]:
    """Every record of `path` in order, with a Problem in place of each that cannot be read.

    `on_bytes(done, total)` is called about every quarter MiB and once at the end; `keep_raw` fills Record.raw, except
    of plain text, whose value says it all. Raises NotFound, on the first step, when there is no such file or it cannot
    be opened.
    """
    with _open(path) as handle:
        head = handle.read(_HEAD)
        refusal = _refuse_by_head(path, head)
        if refusal is not None:
            yield refusal
            return
        start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        handle.seek(start)
        source = _Source(handle, path, start, on_bytes, keep_raw)
        first = head[start:].lstrip(_BLANK)
        layout = _layout(path, first)
        if layout == "text":
            yield from _text_blocks(source)
        elif layout == "lines":
            yield from _lines(source)
        elif layout is not None:
            yield from _Values(source, array=layout == "array").records()
        else:
            shown = repr(first[:20].decode("utf-8", "replace"))
            yield source.problem(1, f"a file that begins with {shown}", "JSON Lines, a JSON array, or .txt plain text")
        source.report(source.total)


def _layout(path: Path, first: bytes) -> Literal["text", "array", "values", "lines"] | None:
    """How a file whose bytes begin with `first` (white space aside) is read; None: not at all."""
    if is_plain_text(path):
        return "text"
    if first.startswith(b"["):
        return "array"
    if first.startswith(b"{") and _pretty(first):
        return "values"
    return "lines" if first.startswith(b"{") or not first or path.suffix.lower() in _JSON_SUFFIXES else None


def lines_start(path: Path) -> int | None:
    """Offset of the first line of a file of JSON Lines; None for other files. Raises NotFound."""
    with _open(path) as handle:
        head = handle.read(_HEAD)
    start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    lines = _refuse_by_head(path, head) is None and _layout(path, head[start:].lstrip(_BLANK)) == "lines"
    return start if lines else None


def read_span(path: Path, start: int, end: int) -> Iterator[Record | Problem]:
    """The records of the lines in bytes [start, end) of a file; lines and rows count from 1 within the span."""
    with _open(path) as handle:
        handle.seek(start)
        yield from _lines(_Source(handle, path, start, None, end=end), whole=False)


def hash_file(path: Path) -> str:
    """SHA-256 of the bytes, in hex. Raises NotFound."""
    with _open(path) as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _open(path: Path) -> BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise NotFound(
            f"The data file {path} cannot be opened: {error.strerror}.", hint="Check the path.", param="data"
        ) from error


class _Source:
    """The open file, how far it has been read, and whom to tell."""

    def __init__(
        self,
        handle: BufferedReader,
        path: Path,
        start: int,
        on_bytes: OnBytes | None,
        keep_raw: bool = False,
        end: int | None = None,
    ) -> None:
        self.handle = handle
        self.name = path.name
        self.total = path.stat().st_size
        self.end = self.total if end is None else end
        self.offset = start
        self.on_bytes = on_bytes
        self.keep_raw = keep_raw
        self._told = 0

    def line(self) -> tuple[bytes, int]:
        """The next line, ended by b"\\n" and no other line break, and its size; (b"", 0) at the end.

        Of a line longer than MAX_RECORD only the size comes back: it is read over and never held whole.
        """
        raw = self._count(self.handle.readline(_CHUNK)) if self.offset < self.end else b""
        size = len(raw)
        if size < _CHUNK or raw.endswith(b"\n"):
            return raw, size
        pieces = [raw]
        while raw and not raw.endswith(b"\n"):
            raw = self._count(self.handle.readline(_CHUNK))
            size += len(raw)
            pieces.append(raw)
            if size > MAX_RECORD + 1:
                pieces.clear()
        whole = size - raw.endswith(b"\n") <= MAX_RECORD
        return b"".join(pieces) if whole else b"", size

    def block(self, size: int) -> bytes:
        return self._count(self.handle.read(size))

    def _count(self, raw: bytes) -> bytes:
        self.offset += len(raw)
        if self.offset - self._told >= _CHUNK:
            self.report(self.offset)
        return raw

    def report(self, done: int) -> None:
        self._told = done
        if self.on_bytes is not None:
            self.on_bytes(done, self.total)

    def problem(self, line: int, found: str, wanted: str, hint: str = "", row: int = 0, field: str = "") -> Problem:
        return Problem(line, field, found, wanted, hint, row, "error", self.name)

    def not_utf8(self, line: int, row: int, offset: int, byte: int) -> Problem:
        found = f"byte 0x{byte:02X} at offset {offset}, which is not UTF-8"
        return self.problem(line, found, "UTF-8 text", f"The encoding is another one. {_SAVE_AS_UTF8}", row)

    def no_records(self) -> Problem:
        found = "no bytes at all" if self.total == 0 else "nothing but blank lines"
        return self.problem(0, found, "at least one record", "Check that the export has finished.")


def _refuse_by_head(path: Path, head: bytes) -> Problem | None:
    """A Problem for the whole file when its first bytes show that it is not UTF-8 text."""
    for mark, kind in _BINARIES:
        if head.startswith(mark):
            found, wanted = f"a {kind} file", "JSON Lines, a JSON array, or .txt plain text"
            return Problem(0, "", found, wanted, "Unpack or convert it first.", 0, "error", path.name)
    encoding = next((name for mark, name in _BOMS if head.startswith(mark)), None) or _by_zeros(head[:4096])
    if encoding is None:
        return None
    return Problem(1, "", f"{encoding} text", "UTF-8 text", _SAVE_AS_UTF8, 0, "error", path.name)


def _by_zeros(head: bytes) -> str | None:
    """UTF-16 or UTF-32 without a mark: mostly-ASCII text has its zero bytes at regular places."""
    if len(head) < 4:
        return None
    share = [head[place::4].count(0) / len(head[place::4]) for place in range(4)]
    if sum(1 for zeros in share if zeros > 0.9) == 3:
        return "UTF-32"
    if min(share[0], share[2]) > 0.4 and max(share[1], share[3]) < 0.1:
        return "UTF-16"
    if min(share[1], share[3]) > 0.4 and max(share[0], share[2]) < 0.1:
        return "UTF-16"
    return None


def _pretty(first: bytes) -> bool:
    """Whether a file that begins with "{" goes on over several lines, not with one object a line.

    Its first line then ends inside the object, and the next one does not begin with "{" in the first column as the
    rows after a row that was cut off would.
    """
    lines = [line for line in first.split(b"\n") if line.strip(_BLANK)]
    if len(lines) < 2 or lines[1].startswith(b"{"):
        return False
    opening = lines[0].strip(_BLANK).decode("utf-8", "replace")
    try:
        scan_value(opening, 0)
    except JsonFault as fault:
        return fault.position == len(opening)
    return False


def _lines(source: _Source, whole: bool = True) -> Iterator[Record | Problem]:
    number = row = 0
    while True:
        start = source.offset
        raw, size = source.line()
        if not size:
            break
        number += 1
        if not raw:
            row += 1
            yield source.problem(
                number,
                f"a line of {size:,} bytes",
                f"at most {MAX_RECORD:,} bytes a line",
                "Split the record, or save plain text as a .txt file.",
                row,
            )
        elif raw.strip(_BLANK):
            row += 1
            yield _record(source, raw, number, row, start)
    if row == 0 and whole:
        yield source.no_records()


def _record(source: _Source, raw: bytes, number: int, row: int, start: int) -> Record | Problem:
    try:
        value = parse_json(raw.rstrip(_BLANK).decode("utf-8"))
        return Record(number, row, value, raw.removesuffix(b"\n") if source.keep_raw else b"")
    except UnicodeDecodeError as error:
        return source.not_utf8(number, row, start + error.start, raw[error.start])
    except JsonFault as fault:
        at = "" if fault.position is None else f" at column {fault.position + 1}"
        return source.problem(number, fault.found + at, fault.wanted, fault.hint, row, fault.field)


class _Decoded:
    """UTF-8 text of a source in pieces; after a wrong byte it ends early and `fault` is its (offset, value)."""

    def __init__(self, source: _Source) -> None:
        self._source = source
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.ended = False
        self.fault: tuple[int, int] | None = None

    def more(self, size: int) -> str:
        """The next text, "" only at the end."""
        while not self.ended:
            raw = self._source.block(size)
            self.ended = not raw
            try:
                text = self._decoder.decode(raw, final=self.ended)
            except UnicodeDecodeError as error:
                self.ended = True
                self.fault = (self._source.offset - len(error.object) + error.start, error.object[error.start])
                text = error.object[: error.start].decode("utf-8")
            if text:
                return text
        return ""


class _Values:
    """JSON values of one array, or one after another, taken from a buffer that grows until the next one is whole."""

    def __init__(self, source: _Source, array: bool) -> None:
        self.source = source
        self.decoded = _Decoded(source)
        self.array = array
        self.buffer = ""
        self.at = 0  # next character of the buffer
        self.mark = 0  # a position at or before `at`, and its physical line and column, both from 1
        self.line = 1
        self.column = 1
        self.row = 0
        self.raw = b""

    def records(self) -> Iterator[Record | Problem]:
        if self.array:
            self._next_character()
            self.at += 1
        while self._next_character() not in ("", "]"):
            self.row += 1
            self._mark()
            line = self.line
            try:
                value = self._value()
            except JsonFault as fault:
                yield self._problem(fault)
                if fault.end is None:
                    return
                self.at = fault.end
            else:
                yield Record(line, self.row, value, self.raw)
            if self.array and (wrong := self._step_over_comma()):
                yield wrong
                return
        yield from self._ending()

    def _step_over_comma(self) -> Problem | None:
        here = self._next_character()
        if here == ",":
            self.at += 1
            return self._wrong("no comma after the last element") if self._next_character() == "]" else None
        return None if here == "]" else self._wrong("a comma, or ] at the end of the array")

    def _ending(self) -> Iterator[Problem]:
        if self.array and self._next_character() == "]":
            self.at += 1
            if self._next_character() or self.decoded.fault:
                yield self._wrong("nothing after the end of the array")
        elif self.array or self.decoded.fault or self._next_character():
            yield self._wrong("a JSON value, or ] at the end of the array" if self.array else "a JSON value")
        if self.row == 0:
            yield self.source.problem(0, "an empty array", "at least one record", "Check that the export has finished.")

    def _next_character(self) -> str:
        """The next one that is not space, left where it is; "" at the end."""
        while True:
            self.at = skip_space(self.buffer, self.at)
            if self.at < len(self.buffer):
                return self.buffer[self.at]
            if not self._grow():
                return ""

    def _grow(self) -> bool:
        """Drop what is done with and read about as much again as is kept, so that long values cost linear time."""
        self._mark()
        kept = self.buffer[self.at :]
        more = self.decoded.more(max(_CHUNK, len(kept)))
        self.buffer, self.at, self.mark = kept + more, 0, 0
        return bool(more)

    def _value(self) -> Any:
        while True:
            found = scan_partial(self.buffer, self.at, final=self.decoded.ended and not self.decoded.fault)
            if found is not None:
                value, end = found
                if self.source.keep_raw:
                    self.raw = self.buffer[self.at : end].encode()
                self.at = end
                return value
            if len(self.buffer) - self.at > MAX_RECORD:
                raise JsonFault(
                    f"a record of more than {MAX_RECORD:,} characters",
                    f"at most {MAX_RECORD:,}",
                    "Split the record, or check that a string is closed.",
                    position=self.at,
                )
            if not self._grow() and self.decoded.fault:
                raise JsonFault("", "", position=len(self.buffer))

    def _mark(self) -> None:
        """Count line breaks up to here once and for all."""
        self.line, self.column = self._place(self.at)
        self.mark = self.at

    def _place(self, position: int) -> tuple[int, int]:
        """Physical line and column of a position at or after the mark."""
        breaks = self.buffer.count("\n", self.mark, position)
        if not breaks:
            return self.line, self.column + position - self.mark
        return self.line + breaks, position - self.buffer.rfind("\n", self.mark, position)

    def _problem(self, fault: JsonFault) -> Problem:
        if self.decoded.fault and fault.end is None and fault.position == len(self.buffer):
            return self.source.not_utf8(self._place(len(self.buffer))[0], self.row, *self.decoded.fault)
        line, column = self._place(self.at if fault.position is None else fault.position)
        at = "" if fault.position is None else f" at column {column}"
        return self.source.problem(line, fault.found + at, fault.wanted, fault.hint, self.row, fault.field)

    def _wrong(self, wanted: str) -> Problem:
        """A Problem for what stands at the current position, which ends the reading."""
        line, column = self._place(self.at)
        if self.decoded.fault and self.at == len(self.buffer):
            return self.source.not_utf8(line, self.row, *self.decoded.fault)
        here = self.buffer[self.at : self.at + 24]
        found = f"{here!r} at column {column}" if here else "the end of the file"
        return self.source.problem(line, found, wanted, "The rest of the file was not read.", self.row)


def _text_blocks(source: _Source) -> Iterator[Record | Problem]:
    """One document in blocks whose concatenation is the file's text: cut after a line break wherever there is one."""
    decoded = _Decoded(source)
    buffer, line, row, blank = "", 1, 0, True
    while more := decoded.more(_CHUNK):
        buffer += more
        at = 0
        while len(buffer) - at > TEXT_BLOCK:
            end = buffer.rfind("\n", at, at + TEXT_BLOCK) + 1 or at + TEXT_BLOCK
            row += 1
            block = buffer[at:end]
            yield Record(line, row, block)
            blank = blank and not block.strip()
            line += block.count("\n")
            at = end
        buffer = buffer[at:]
    if buffer and not decoded.fault:
        row += 1
        yield Record(line, row, buffer)
        blank = blank and not buffer.strip()
    if decoded.fault:
        yield source.not_utf8(line + buffer.count("\n"), row + 1, *decoded.fault)
    elif blank:
        yield source.no_records()
