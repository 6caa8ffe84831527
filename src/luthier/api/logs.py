"""One line of JSON for every request, and the headers that let a client name the request it asks about.

Outermost of what we put around the app: what escapes every handler becomes a 500 here, in OpenAI's shape, and its
traceback a line in the log. A line never holds a key, a body, or a path as the client wrote it: only the route's form.
Does not know: what the routes do.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import time
from datetime import UTC, datetime
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from luthier.api.errors import ApiError
from luthier.api.faults import respond
from luthier.api.metrics import Metrics

log = logging.getLogger("luthier.api")

API_VERSION = "2020-10-01"
_SECRET = re.compile(r"(?i)\b(sk-)[A-Za-z0-9_-]{6,}|\b(bearer\s+)[^\s\"'\\]+|(://[^\s:/@]+:)[^\s@/]+(?=@)")


def redacted(text: str) -> str:
    """`text` without keys, bearer tokens and passwords in URLs."""
    return _SECRET.sub(lambda found: f"{found[1] or found[2] or found[3]}****", text)


class JsonLines(logging.Formatter):
    """A record as one line of JSON; `extra={"fields": {...}}` adds to it."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return redacted(json.dumps(line, ensure_ascii=True, default=str))


class Trace:
    """ASGI middleware: the request's id, its headers, its line in the log, its place in the metrics."""

    def __init__(self, app: ASGIApp, metrics: Metrics, organization: str) -> None:
        self.app = app
        self.metrics = metrics
        self.organization = organization

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = f"req_{secrets.token_hex(16)}"
        status, streams = 0, False

        async def with_headers(message: Message) -> None:
            nonlocal status, streams
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = state["request_id"]
                headers["openai-processing-ms"] = str(round((time.perf_counter() - started) * 1000))
                headers["openai-organization"] = self.organization
                headers["openai-version"] = API_VERSION
                for name, value in state.get("headers", {}).items():
                    headers[name] = value
                if headers.get("content-type", "").startswith("text/event-stream"):
                    streams = True
                    self.metrics.streams.inc()
            await send(message)

        try:
            await self.app(scope, receive, with_headers)
        except ClientDisconnect:
            status = status or 499  # nobody is there to read it; the log and the counters tell it from a fault
        except Exception:
            log.exception("A request failed by our own fault.", extra={"fields": self._fields(scope, 500, started)})
            if status:
                raise  # the answer has begun: only closing the connection can tell the client
            await respond(_broken(state["request_id"]))(scope, receive, with_headers)
        finally:
            if streams:
                self.metrics.streams.dec()
            seconds = time.perf_counter() - started
            self.metrics.count(route_of(scope), scope["method"], status, seconds)
            log.info("request", extra={"fields": self._fields(scope, status, started)})

    def _fields(self, scope: Scope, status: int, started: float) -> dict[str, Any]:
        key = scope["state"].get("key")
        return {
            "request_id": scope["state"]["request_id"],
            "method": scope["method"][:16],
            "route": route_of(scope),
            "status": status,
            "ms": round((time.perf_counter() - started) * 1000, 1),
            "key": None if key is None else key.id,
        }


def route_of(scope: Scope) -> str:
    """The route's form, such as /v1/files/{file_id}; `none` where no route took the request."""
    path = getattr(scope.get("route"), "path", None)
    if path is None:
        return "none"
    inside = scope["path"].startswith("/v1/") and not path.startswith("/v1/")  # a router's path, without its prefix
    return f"/v1{path}" if inside else str(path)


def _broken(request_id: str) -> ApiError:
    return ApiError(
        500,
        f"The server had an error while processing your request. Its log has it under {request_id}.",
        type="server_error",
        headers={"x-should-retry": "false"},
    )
