"""Who asks: the bearer key of a request, looked up by its hash, remembered for a second.

Requests under /v1 are let in by the gate (limits.py) before a byte of their body is read; routes get the key from
`caller`. A second is how long a revoked key may go on opening; in return a busy client costs the database one look a
second. Does not know: how tokens are made or hashed in the store.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request

from luthier.api.errors import ApiError
from luthier.store.keys import Key, Keys

REMEMBERED_SECONDS = 1.0
REMEMBERED_KEYS = 1024
LONGEST_TOKEN = 512


class Doorkeeper:
    """Verifies tokens, and asks the store about one token once a second at most. Safe between threads."""

    def __init__(self, keys: Keys, clock: Callable[[], float] = time.monotonic) -> None:
        self._keys = keys
        self._clock = clock
        self._known: OrderedDict[bytes, tuple[float, Key | None]] = OrderedDict()
        self._lock = threading.Lock()

    def remembered(self, token: str) -> tuple[bool, Key | None]:
        """(whether the last answer still counts, that answer). Never asks the store."""
        with self._lock:
            until, key = self._known.get(_digest(token), (0.0, None))
        return (True, key) if until > self._clock() else (False, None)

    def verify(self, token: str) -> Key | None:
        """The key that opens with `token`, or None. May ask the store: call it off the event loop."""
        if not token.startswith("sk-") or len(token) > LONGEST_TOKEN:
            return None
        key = self._keys.verify(token)
        with self._lock:
            self._known[_digest(token)] = (self._clock() + REMEMBERED_SECONDS, key)
            self._known.move_to_end(_digest(token))
            while len(self._known) > REMEMBERED_KEYS:
                self._known.popitem(last=False)
        return key


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def bearer(header: str | None) -> str:
    """The token in an Authorization header. Raises ApiError 401 when there is none."""
    scheme, _, token = (header or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise ApiError(
            401,
            "You didn't provide an API key. Send it in the header Authorization: Bearer YOUR_KEY.",
            code="invalid_api_key",
        )
    return token.strip()


def refused(token: str) -> ApiError:
    """The answer to a key that opens nothing. It shows no more of it than its last four characters."""
    tail = ascii(token[-4:])[1:-1] if len(token) >= 16 else ""
    return ApiError(401, f"Incorrect API key provided: sk-****{tail}.", code="invalid_api_key")


async def caller(request: Request) -> Key:
    """The key of this request; the gate has verified it. A coroutine for the reason that `services` gives."""
    key: Key | None = getattr(request.state, "key", None)
    if key is None:
        raise bearer_missing()
    return key


def bearer_missing() -> ApiError:
    return ApiError(401, "This route needs an API key.", code="invalid_api_key")


async def require_admin(key: Annotated[Key, Depends(caller)]) -> Key:
    """The caller, when it is an admin. Raises ApiError 403."""
    return check_admin(key)


def check_admin(key: Key) -> Key:
    """`key`, when it is an admin's. Raises ApiError 403."""
    if key.role != "admin":
        raise ApiError(
            403, "You have insufficient permissions for this operation: it needs an admin key.", code="missing_scope"
        )
    return key
