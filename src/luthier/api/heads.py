"""HTTP connections whose heads are bounded: a request line with its headers is small, and comes soon.

uvicorn's parser in C is quick and bounds neither: a header without an end would fill the memory, and one that trickles
would hold its connection for ever. What cannot be read as HTTP is refused in OpenAI's shape, as everything else is.
Does not know: routes, keys, bodies (limits.py).
"""

from __future__ import annotations

import asyncio
import json
from asyncio import TimerHandle
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from luthier.api.errors import ApiError

HEAD_BYTES = 64 * 1024  # of a head that is not whole yet
HEAD_SECONDS = 30.0


class BoundedHeads(HttpToolsProtocol):
    """One connection. Give the class to uvicorn as `http`."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._head_bytes = 0
        self._in_head = True
        self._clock: TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES:
                self._refuse(ApiError(431, f"The headers are longer than {HEAD_BYTES // 1024} KiB."))

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._start_clock()

    def on_headers_complete(self) -> None:
        self._in_head, self._head_bytes = False, 0
        self._stop_clock()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, msg))

    def _start_clock(self) -> None:
        if self._clock is None:
            self._clock = self.loop.call_later(HEAD_SECONDS, self._late)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self._refuse(ApiError(408, f"The headers did not come within {HEAD_SECONDS:g} s."))

    def _refuse(self, error: ApiError) -> None:
        """Answer at once and close: nothing of what comes after can be trusted to be a request."""
        body = json.dumps(error.body()).encode()
        head = b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body)
        self.transport.write(STATUS_LINE[error.status] + head + body)
        self.transport.close()
