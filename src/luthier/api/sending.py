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
    status, when it comes within the time of a keep-alive; a later one is the last event.

    One task takes the events and sends them, as a task for each would cost more than the event; its client's going
    cancels it, and a second one sends the signs of life.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[dict[str, Any], None]) -> None:
        super().__init__()
        self.events = events
        self._begun = False
        self._said = 0.0  # when the last line was sent, by the loop's clock
        self._one_at_a_time = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        telling = asyncio.current_task()
        assert telling is not None
        over = False  # from then on its going is no news
        left = False

        def leave(_: asyncio.Future[None]) -> None:
            nonlocal left
            if not over:
                left = True
                telling.cancel()

        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(leave)
        alive = asyncio.ensure_future(self._keep_alive(send))
        try:
            await self._tell(scope, receive, send)
        except asyncio.CancelledError:
            if not left:
                raise
            telling.uncancel()
        finally:
            over = True
            gone.cancel()
            alive.cancel()
            await asyncio.gather(gone, alive, return_exceptions=True)
            await self.events.aclose()

    async def _tell(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async for event in self.events:
                await self._say(send, b"data: " + dumped(event) + b"\n\n")
            await self._say(send, DONE, more=False)
        except (ApiError, LuthierError) as error:
            found = error if isinstance(error, ApiError) else translate(error)
            if self._begun:
                await self._say(send, b"data: " + dumped(found.body()) + b"\n\n", more=False)
            else:
                await respond(found)(scope, receive, send)

    async def _say(self, send: Send, line: bytes, more: bool = True) -> None:
        async with self._one_at_a_time:
            if not self._begun:
                self._begun = True
                await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            await send({"type": "http.response.body", "body": line, "more_body": more})
            self._said = asyncio.get_running_loop().time()

    async def _keep_alive(self, send: Send) -> None:
        """A comment whenever nothing was said for KEEP_ALIVE_SECONDS. Cancelled."""
        now = asyncio.get_running_loop().time
        self._said = now()
        while True:
            await asyncio.sleep(self._said + KEEP_ALIVE_SECONDS - now())
            if now() >= self._said + KEEP_ALIVE_SECONDS:
                await self._say(send, KEEP_ALIVE)


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
