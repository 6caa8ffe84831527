"""The check that a training file passes before it is taken: JSON Lines of objects, and nothing more than that.

What the objects must hold is checked when a job starts, as OpenAI does. Streams, with one line in memory.
Does not know: HTTP forms, the store.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Iterator

from luthier.api.errors import ApiError
from luthier.data.read import MAX_RECORD
from luthier.data.strict_json import JsonFault, parse_json, quote

_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


def check_jsonl(pieces: Iterable[bytes], *, longest: int = MAX_RECORD) -> int:
    """How many objects the content has. Raises ApiError 400 (param file) that names the first line that is none."""
    found = 0
    for number, raw in enumerate(_lines(pieces, longest), 1):
        if number == 1:
            raw = _without_mark(raw)
        if raw.strip(b" \t\r\n"):
            _check_line(raw, number)
            found += 1
    if not found:
        raise _refused("It is empty.")
    return found


def _lines(pieces: Iterable[bytes], longest: int) -> Iterator[bytes]:
    """The lines without their ends; a line above `longest` bytes is refused before it is whole."""
    begun: list[bytes] = []
    size, done = 0, 0
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        for end in whole:
            line = b"".join((*begun, end))
            begun, size, done = [], 0, done + 1
            if len(line) > longest:
                raise _too_long(done, longest)
            yield line
        begun.append(rest)
        size += len(rest)
        if size > longest:
            raise _too_long(done + 1, longest)
    if size:
        yield b"".join(begun)


def _without_mark(line: bytes) -> bytes:
    for mark, name in _MARKS:
        if line.startswith(mark):
            raise _refused(f"Line 1 begins with the mark of {name}: save the file as UTF-8.")
    return line.removeprefix(codecs.BOM_UTF8)


def _check_line(raw: bytes, number: int) -> None:
    try:
        value = parse_json(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        byte = raw[error.start]
        raise _refused(f"Line {number} is not UTF-8: byte {error.start + 1} of it is 0x{byte:02x}.") from None
    except JsonFault as fault:
        where = f", {fault.field}" if fault.field else ""
        raise _refused(f"Line {number}{where}: found {fault.found}, wanted {fault.wanted}{_beginning(raw)}.") from None
    if not isinstance(value, dict):
        raise _refused(f"Line {number} is not an object{_beginning(raw)}.")


def _beginning(raw: bytes) -> str:
    return f" (the line begins with {quote(raw[:160].decode('utf-8', 'replace').strip(), 40)})"


def _too_long(number: int, longest: int) -> ApiError:
    return _refused(f"Line {number} is longer than {longest} bytes.")


def _refused(what: str) -> ApiError:
    message = f"Expected a file in JSON Lines form, where every line is a JSON object. {what}"
    return ApiError(400, message.encode("utf-8", "backslashreplace").decode(), param="file")
