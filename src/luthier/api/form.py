"""A multipart form with one large file in it, read as it comes: parts in any order, no length needed, bounded memory.

The reading goes on in a thread, which writes to disk; the event loop only hands it what the network brought.
Does not know: what the fields mean.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO, TypeVar
from urllib.parse import unquote

import anyio
from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from luthier.api.errors import ApiError
from luthier.api.limits import check_length, too_large
from luthier.store.blobs import Blobs, Incoming

AT_ONCE = 256 * 1024  # bytes that are gathered before the thread is woken
PATIENCE_SECONDS = 120  # how long they may take to come: a reader is not held by a trickle
FIELDS = 32
FIELD_BYTES = 16 * 1024
AROUND = 64 * 1024  # bytes of a form that may surround its file
READERS = 32  # forms that are read at once; the rest wait for their turn

T = TypeVar("T")
Event = tuple[str, bytes]


@dataclass(slots=True)
class Form:
    """`file` is on disk and goes away with the reading unless it is kept; None: the form has none."""

    fields: dict[str, str] = field(default_factory=dict)
    file: Incoming | None = None
    filename: str = ""


def opener(new: Incoming) -> Callable[[], BinaryIO]:
    return lambda: open(new.path, "rb")


async def with_form(
    request: Request, blobs: Blobs, *, file_field: str, limit: int, act: Callable[[Form], T]
) -> T:  # fmt: skip
    """What `act` makes of the whole form, in the thread that read it.

    Raises ApiError: 400 for what is no form, 408 when nothing comes any more, 413 for a file above `limit` bytes.
    """
    check_length(request.headers, limit + AROUND)
    boundary = _boundary(request.headers.get("content-type"))
    stream = request.stream()

    def read() -> T:
        with contextlib.ExitStack() as stack:
            events = _events(boundary, _pieces(stream))
            return act(_read(events, stack, blobs, file_field, limit))

    try:
        return await anyio.to_thread.run_sync(read, limiter=request.app.state.readers)
    except ClientDisconnect:
        raise ApiError(400, "The connection ended inside the form.") from None


def _boundary(content_type: str | None) -> bytes:
    kind, options = parse_options_header(content_type)
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise ApiError(400, "The request must be a form, sent with Content-Type: multipart/form-data; boundary=...")
    return options[b"boundary"]


def _pieces(stream: AsyncIterator[bytes]) -> Iterator[bytes]:
    while piece := anyio.from_thread.run(_next, stream):
        yield piece


async def _next(stream: AsyncIterator[bytes]) -> bytes:
    """About AT_ONCE bytes; empty at the end."""
    gathered, size = [], 0
    try:
        with anyio.fail_after(PATIENCE_SECONDS):
            while size < AT_ONCE:
                gathered.append(await anext(stream))
                size += len(gathered[-1])
    except StopAsyncIteration:
        pass
    except TimeoutError:
        raise ApiError(408, f"The form comes too slowly: less than {AT_ONCE} bytes in {PATIENCE_SECONDS} s.") from None
    return b"".join(gathered)


def _events(boundary: bytes, pieces: Iterator[bytes]) -> Iterator[Event]:
    """("header", name: value) for each header of a part, ("begin", ""), ("data", bytes)..., ("end", "")."""
    found: list[Event] = []
    header: list[bytes] = [b"", b""]
    ended = False

    def grow(place: int) -> Callable[[bytes, int, int], None]:
        def on_bytes(data: bytes, start: int, end: int) -> None:
            header[place] += data[start:end]

        return on_bytes

    def on_header_end() -> None:
        found.append(("header", header[0].lower() + b":" + header[1]))
        header[:] = [b"", b""]

    def on_end() -> None:
        nonlocal ended
        ended = True

    try:
        parser = MultipartParser(
            boundary,
            {
                "on_header_field": grow(0),
                "on_header_value": grow(1),
                "on_header_end": on_header_end,
                "on_headers_finished": lambda: found.append(("begin", b"")),
                "on_part_data": lambda data, start, end: found.append(("data", data[start:end])),
                "on_part_end": lambda: found.append(("end", b"")),
                "on_end": on_end,
            },
            max_header_size=FIELD_BYTES,
        )
        for piece in pieces:
            parser.write(piece)
            yield from found
            found.clear()
    except FormParserError as error:
        raise ApiError(400, f"The form cannot be read: {ascii(str(error))[1:-1][:200]}.") from None
    if not ended:
        raise ApiError(400, "The form ends before its closing boundary.")


def _read(
    events: Iterator[Event], stack: contextlib.ExitStack, blobs: Blobs, file_field: str, limit: int
) -> Form:  # fmt: skip
    form = Form()
    for number, (name, filename) in enumerate(_parts(events), 1):
        if number > FIELDS:
            raise ApiError(400, f"The form has more than {FIELDS} parts.")
        if name == file_field:
            if form.file is not None:
                raise ApiError(400, f"The form has {file_field!a} twice.", param=file_field)
            form.file = stack.enter_context(blobs.receive(_data(events, limit, too_large)))
            form.filename = filename or "file"
        else:
            if name in form.fields:
                raise ApiError(400, f"The form has {name[:80]!a} twice.", param=name[:80])
            content = b"".join(_data(events, FIELD_BYTES, partial(_field_too_long, name)))
            form.fields[name] = _text(name, content)
    return form


def _parts(events: Iterator[Event]) -> Iterator[tuple[str, str]]:
    """(name, filename) of each part; the taker reads its data from the same events."""
    name, filename = "", ""
    for kind, content in events:
        if kind == "header" and content.startswith(b"content-disposition:"):
            _, options = parse_options_header(content.partition(b":")[2])
            name = options.get(b"name", b"").decode("utf-8", "replace")
            filename = options.get(b"filename", b"").decode("utf-8", "replace") or _extended(content)
        elif kind == "begin":
            yield name, filename
            name, filename = "", ""


def _extended(header: bytes) -> str:
    """The name in `filename*=utf-8''...`, which older clients send for names outside ASCII."""
    _, found, rest = header.partition(b"filename*=")
    encoding, _, value = rest.partition(b"''")
    if not found or encoding.lower() != b"utf-8":
        return ""
    return unquote(value.partition(b";")[0].strip().decode("latin-1"), errors="replace")


def _data(events: Iterator[Event], limit: int, fault: Callable[[int], ApiError]) -> Iterator[bytes]:
    size = 0
    for kind, content in events:
        if kind == "end":
            return
        size += len(content)
        if size > limit:
            raise fault(limit)
        yield content


def _field_too_long(name: str, limit: int) -> ApiError:
    return ApiError(400, f"The field {name[:80]!a} is longer than {limit} bytes.", param=name[:80])


def _text(name: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ApiError(400, f"The field {name[:80]!a} is not UTF-8.", param=name[:80]) from None
