"""Every way in which a request can fail, turned into OpenAI's error object.

Does not know: what the routes do.
"""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

from luthier.api.errors import ApiError, translate
from luthier.spec.errors import LuthierError


def respond(error: ApiError) -> Response:
    return Response(
        json.dumps(error.body(), ensure_ascii=True),
        status_code=error.status,
        media_type="application/json",
        headers=error.headers,
    )


def install(app: FastAPI) -> None:
    """Register the handlers."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(LuthierError, _our_error)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(HTTPException, _http_error)


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return respond(error)


async def _our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, LuthierError)
    return respond(translate(error))


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own: an unknown path, a method that a path does not have, a body that is no form."""
    assert isinstance(error, HTTPException)
    path = shown_path(request.url.path)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return respond(no_such_url(request.method, request.url.path))
    if error.status_code == 405:
        message = f"Not allowed to {request.method} on {path}."
        return respond(ApiError(405, message, code="method_not_supported", headers=headers))
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return respond(ApiError(error.status_code, str(error.detail), type=kind, headers=headers))


def no_such_url(method: str, path: str) -> ApiError:
    return ApiError(404, f"Invalid URL ({method} {shown_path(path)})")


def shown_path(path: str) -> str:
    return ascii(path[:200])[1:-1]


async def _not_valid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return respond(not_valid(error.errors()))


def not_valid(errors: Any) -> ApiError:
    """400 for the first of pydantic's findings; `param` is the field's path without the place it came from."""
    first = errors[0]
    place = [part for part in first["loc"] if part not in ("body", "query", "path", "form")]
    param = dotted(place)
    if first["type"] == "json_invalid":
        return ApiError(400, "We could not parse the JSON body of your request.")
    if first["type"] == "missing":
        if not param:
            return ApiError(400, "The request needs a JSON body, sent with Content-Type: application/json.")
        return ApiError(400, f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")
    if first["type"] in ("model_attributes_type", "dict_type") and not param:
        return ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    message = str(first["msg"]).removeprefix("Value error, ")
    shown = ascii(first.get("input"))
    if first["type"].endswith("_type") or first["type"].endswith("_parsing"):
        message = f"{message}; found {shown if len(shown) <= 80 else shown[:77] + '...'}"
    return ApiError(400, f"Invalid '{param}': {message}." if param else f"{message}.", param=param or None)


def dotted(place: list[Any]) -> str:
    """["messages", 0, "role"] -> messages[0].role"""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return ascii(text)[1:-1][:200]
