"""Every error leaves by this door in OpenAI's shape: {"error": {message, type, param, code}}.

Validation failures are 400, never 422; an answer that a repeat cannot change says `x-should-retry: false`.
Does not know: routes.
"""

from __future__ import annotations

from typing import Any

from luthier.spec.errors import Broken, LuthierError, NotFound, NotNow, UserError


class ApiError(Exception):
    """An answer with an error status, raised anywhere in a route."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


def translate(error: LuthierError, *, param: str | None = None, code: str | None = None) -> ApiError:
    """The HTTP answer for one of ours; `param` and `code` override what the error carries."""
    named: dict[str, Any] = {"param": param or error.param, "code": code}
    if isinstance(error, NotFound):
        return ApiError(404, str(error), **named)
    if isinstance(error, UserError):
        return ApiError(400, str(error), **named)
    if isinstance(error, NotNow):
        return ApiError(503, str(error), type="server_error", **named)
    assert isinstance(error, Broken | LuthierError)
    return ApiError(500, str(error), type="server_error", headers={"x-should-retry": "false"}, **named)
