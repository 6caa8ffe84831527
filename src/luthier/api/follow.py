"""Followers of jobs: a job's whole history as server-sent events, then what happens next, until the job is over.

However many follow a job, one poll looks twice a second whether it has news; a follower reads the store only then, and
holds neither a connection nor a thread while it waits. A client that comes back gets the whole history again.
Does not know: how an event is written for its API (the caller's `show`).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import anyio.to_thread
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from luthier.api.services import Services
from luthier.spec.errors import Broken, LuthierError, NotFound, NotNow
from luthier.store.history import Event
from luthier.store.jobs import TERMINAL

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 15.0
PAGE = 500
Show = Callable[[Event], dict[str, Any] | None]
ANSWERS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}  # beside JSON without `stream`


class Watch:
    """One job as its followers share it: the number of its last event, and whether it is over."""

    def __init__(self) -> None:
        self.followers = 0
        self.last = 0
        self.over = False
        self.fault: LuthierError | None = None
        self.news = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def tell(self, last: int, over: bool, fault: LuthierError | None = None) -> None:
        """A fault stays: who follows is sent away, and a new follower begins a new watch."""
        fault = self.fault or fault
        if (last, over, fault) != (self.last, self.over, self.fault):
            self.last, self.over, self.fault = last, over, fault
            self.news.set()
            self.news = asyncio.Event()


class Followers:
    """The watches of one server, by job and event loop."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._watches: dict[tuple[asyncio.AbstractEventLoop, str], Watch] = {}
        self._limiter = anyio.CapacityLimiter(4)  # of their own: followers never keep threads from other routes

    async def events(self, job_id: str) -> AsyncGenerator[Event | None]:
        """Every event, oldest first; None where nothing happened for KEEP_ALIVE_SECONDS; ends when the job is over.

        Raises LuthierError when the store does not answer or the server stops.
        """
        key = (asyncio.get_running_loop(), job_id)
        watch = self._watches.setdefault(key, Watch())
        watch.followers += 1
        if watch.task is None:
            watch.task = asyncio.create_task(self._poll(job_id, watch))
        try:
            async with contextlib.aclosing(self._told(job_id, watch)) as told:
                async for event in told:
                    yield event
        finally:
            watch.followers -= 1
            if watch.followers == 0:
                self._watches.pop(key, None)
                watch.task.cancel()

    def close(self) -> None:
        """Every follower is told that the server stops, and comes back later. Call it on the followers' event loop."""
        for watch in self._watches.values():
            watch.tell(watch.last, watch.over, NotNow("The server is stopping.", hint="Follow the job again later."))

    async def _told(self, job_id: str, watch: Watch) -> AsyncGenerator[Event | None]:
        sequence, after = 0, None
        while True:
            news, over, last = watch.news, watch.over, watch.last
            while sequence < last:
                read = functools.partial(self._services.history.events, job_id, after=after, limit=PAGE, order="asc")
                try:
                    page = await anyio.to_thread.run_sync(read, limiter=self._limiter)
                except NotFound:  # deleted meanwhile
                    return
                for event in page.data:
                    sequence, after = event.sequence, event.id
                    yield event
            if watch.fault is not None:
                raise watch.fault
            if over:
                return
            try:
                await asyncio.wait_for(news.wait(), KEEP_ALIVE_SECONDS)
            except TimeoutError:
                yield None

    async def _poll(self, job_id: str, watch: Watch) -> None:
        try:
            while not watch.over and watch.fault is None:
                try:
                    watch.tell(*await anyio.to_thread.run_sync(self._look, job_id, limiter=self._limiter))
                except NotFound:
                    watch.tell(watch.last, True)
                except LuthierError as error:
                    watch.tell(watch.last, watch.over, error)
                await asyncio.sleep(POLL_SECONDS)
        finally:  # whatever ended the poll, nobody waits for it
            if not watch.over:
                watch.tell(watch.last, False, Broken("The events of the job cannot be read."))

    def _look(self, job_id: str) -> tuple[int, bool]:
        """The state first: the event that tells of an end is written in the same transaction as the end."""
        over = self._services.jobs.get(job_id).status in TERMINAL
        newest = self._services.history.events(job_id, limit=1).data
        return (newest[0].sequence if newest else 0), over


def stream(app: FastAPI, job_id: str, show: Show) -> StreamingResponse:
    """The answer to a follower: `show` gives the object of an event, None for one that this API does not tell."""
    return StreamingResponse(
        _lines(app.state.followers, job_id, show),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


def end_all(app: FastAPI) -> None:
    """End every stream of events, so that a server that stops need not wait for its jobs."""
    app.state.followers.close()


async def _lines(followers: Followers, job_id: str, show: Show) -> AsyncGenerator[str]:
    yield ": events of " + job_id + "\n\n"  # the headers leave with it, whatever the store is doing
    try:
        async with contextlib.aclosing(followers.events(job_id)) as told:
            async for event in told:
                shown = None if event is None else show(event)
                if shown is not None:
                    yield "data: " + json.dumps(shown) + "\n\n"
                elif event is None:
                    yield ": the job goes on\n\n"
    except LuthierError as error:
        said = {"message": str(error), "type": "server_error", "param": None, "code": None}
        yield "data: " + json.dumps({"error": said}) + "\n\n"
        return
    yield "data: [DONE]\n\n"
