"""The gate before /v1: a verified key, a rate, and a body of a bounded size in strict JSON.

Bodies are read here, whole, before a route sees them, except those of file uploads, which are streams.
Does not know: routes, except which two of them take files.
"""

from __future__ import annotations

import re
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import anyio
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.api.auth import Doorkeeper, bearer, refused
from luthier.api.errors import ApiError, translate
from luthier.api.faults import no_such_url, respond
from luthier.data.strict_json import JsonFault, parse_json
from luthier.settings import Settings
from luthier.spec.errors import LuthierError
from luthier.store.keys import Key

STREAMED = re.compile("/v1/files|/v1/uploads/[^/]+/parts")
LARGE = 256 * 1024  # a JSON text from this size on is checked off the event loop
BODY_SECONDS = 120  # how long a JSON body may take to come
IN_FLIGHT = 512  # requests that one key may have open at once
KEYS_METERED = 10_000


class Meter:
    """A token bucket for every key: `per_minute` at once when full, refilled evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, key_id: str) -> tuple[float, dict[str, str]]:
        """(seconds to wait, 0 when the request may pass; the headers that say where the key stands)."""
        now, rate = self._clock(), self.per_minute / 60
        left, since = self._buckets.get(key_id, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - since) * rate)
        wait = 0.0 if left >= 1 else (1 - left) / rate
        left = left if wait else left - 1
        self._buckets[key_id] = (left, now)
        self._buckets.move_to_end(key_id)
        while len(self._buckets) > KEYS_METERED:
            self._buckets.popitem(last=False)
        headers = {
            "x-ratelimit-limit-requests": str(self.per_minute),
            "x-ratelimit-remaining-requests": str(int(left)),
            "x-ratelimit-reset-requests": f"{(self.per_minute - left) / rate:.3f}s",
        }
        return wait, headers


class Gate:
    """ASGI middleware. What it lets through has `state.key`, and a body that is whole, small and strict JSON."""

    def __init__(self, app: ASGIApp, settings: Settings, doorkeeper: Doorkeeper) -> None:
        self.app = app
        self.settings = settings
        self.doorkeeper = doorkeeper
        self.meter = Meter(settings.requests_per_minute)
        self.in_flight: dict[str, int] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] != "http" or not (path == "/v1" or path.startswith("/v1/")):
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["headers"] = {}
        try:
            state["key"] = key = await self._key(headers)
            wait, state["headers"] = self.meter.take(key.id)
            self._check_rate(key, wait)
            if "\n" in path:  # which the routes' patterns would drop at the end: /v1/files/ID%0A is not /v1/files/ID
                raise no_such_url(scope["method"], path)
        except (ApiError, LuthierError) as error:
            await _say(error, scope, receive, send)
            return
        self.in_flight[key.id] = self.in_flight.get(key.id, 0) + 1
        try:
            await self._let_in(headers, scope, receive, send)
        finally:
            self.in_flight[key.id] -= 1
            if not self.in_flight[key.id]:
                del self.in_flight[key.id]

    async def _let_in(self, headers: Headers, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] in ("POST", "PUT", "PATCH") and not STREAMED.fullmatch(scope["path"]):
            try:
                with anyio.fail_after(BODY_SECONDS):
                    body = await self._body(headers, receive)
            except TimeoutError:
                late = ApiError(408, f"The body did not come within {BODY_SECONDS} s.")
                await _say(late, scope, receive, send)
                return
            except ApiError as error:
                await _say(error, scope, receive, send)
                return
            receive = replay(body, receive)
        await self.app(scope, receive, send)

    async def _key(self, headers: Headers) -> Key:
        token = bearer(headers.get("authorization"))
        known, key = self.doorkeeper.remembered(token)
        if not known:
            key = await anyio.to_thread.run_sync(self.doorkeeper.verify, token)
        if key is None:
            raise refused(token)
        return key

    def _check_rate(self, key: Key, wait: float) -> None:
        if wait:
            raise ApiError(
                429,
                f"Rate limit reached: {self.meter.per_minute} requests a minute. Try again in {wait:.3f} s.",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": str(int(wait) + 1), "retry-after-ms": str(int(wait * 1000) + 1)},
            )
        if self.in_flight.get(key.id, 0) >= IN_FLIGHT:
            raise ApiError(
                429,
                f"This key has {IN_FLIGHT} requests open already. Wait for some of them.",
                type="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"retry-after": "1"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        limit = self.settings.max_body_bytes
        check_length(headers, limit)
        pieces, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ApiError(400, "The connection ended inside the body.")
            pieces.append(message.get("body", b""))
            size += len(pieces[-1])
            if size > limit:
                raise too_large(limit)
            if not message.get("more_body", False):
                break
        body = b"".join(pieces)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if body and (kind == "application/json" or kind.endswith("+json")):
            if len(body) < LARGE:
                check_json(body)
            else:
                await anyio.to_thread.run_sync(check_json, body)
        return body


def too_large(limit: int) -> ApiError:
    return ApiError(413, f"The request is larger than the allowed {limit} bytes.", code="request_too_large")


def check_length(headers: Headers, limit: int) -> None:
    """Raise ApiError 413 when the declared length says already that the body is too large."""
    declared = headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit:
        raise too_large(limit)


def check_json(body: bytes) -> None:
    """Raise ApiError 400 unless `body` is strict JSON of whole characters without NUL."""
    try:
        value = parse_json(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_json(f"byte {error.start} is not UTF-8") from None
    except JsonFault as fault:
        where = fault.field or (f"character {fault.position}" if fault.position is not None else "")
        found = f"{fault.found}, wanted {fault.wanted}{f' ({where})' if where else ''}"
        raise _not_json(ascii(found)[1:-1]) from None
    if b"\\u0000" in body and _has_nul(value):
        raise _not_json("a string holds the character U+0000, which no text needs")


def _not_json(found: str) -> ApiError:
    return ApiError(400, f"We could not parse the JSON body of your request: {found}.")


def _has_nul(value: Any) -> bool:
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, str):
            if "\0" in item:
                return True
        elif isinstance(item, dict):
            left.extend(item)
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)
    return False


async def _say(error: ApiError | LuthierError, scope: Scope, receive: Receive, send: Send) -> None:
    answer = error if isinstance(error, ApiError) else translate(error)
    await respond(answer)(scope, receive, send)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives `body` first, whole, and then goes on with `receive`."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
