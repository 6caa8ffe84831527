"""Answers on the wire: server-sent events with signs of life, and work that ends when its client has gone.

Never an `id:`, `event:` or `retry:` line: after one, official clients take a comment for an event.
Does not know: what an event says.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from luthier.api.errors import ApiError, translate
from luthier.api.faults import respond
from luthier.spec.errors import LuthierError

KEEP_ALIVE_SECONDS = 15.0
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
T = TypeVar("T")


def dumped(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode()


class Events(Response):
    """`data:` lines for the objects of `events`, then [DONE]. An error before the first is an ordinary answer with its
    status, when it comes within the time of a keep-alive; a later one is the last event."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__()
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        gone = asyncio.ensure_future(_disconnected(receive))
        coming = asyncio.ensure_future(anext(self.events))
        begun = False
        try:
            while True:
                await asyncio.wait({gone, coming}, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if gone.done():
                    return
                try:
                    line = b"data: " + dumped(coming.result()) + b"\n\n" if coming.done() else KEEP_ALIVE
                except StopAsyncIteration:
                    line = DONE
                except (ApiError, LuthierError) as error:
                    found = error if isinstance(error, ApiError) else translate(error)
                    if not begun:
                        await respond(found)(scope, receive, send)
                        return
                    line = b"data: " + dumped(found.body()) + b"\n\n"
                last = coming.done() and (coming.exception() is not None)
                if not begun:
                    begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
                await send({"type": "http.response.body", "body": line, "more_body": not last})
                if last:
                    return
                if coming.done():
                    coming = asyncio.ensure_future(anext(self.events))
        finally:
            gone.cancel()
            coming.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.gather(gone, coming, return_exceptions=True)
            await self.events.aclose()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` comes to. Raises ClientDisconnect, with `work` cancelled, when its client goes first."""
    gone = asyncio.ensure_future(_disconnected(request.receive))
    doing = asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, doing}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        gone.cancel()
        doing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(gone, doing, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
