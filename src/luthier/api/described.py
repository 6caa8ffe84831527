"""The OpenAPI document at /openapi.json: what FastAPI knows of the routes, with our answers instead of its own.

Does not know: the routes.
"""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_MEANINGS = {
    400: "The request cannot be served as it is.",
    401: "No key, or one that opens nothing.",
    403: "The key may not do this.",
    404: "What is asked for is not there.",
    405: "The path does not have this method.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    429: "Too many requests.",
    500: "The server's own fault.",
    503: "Not now.",
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    status: {
        "description": meaning,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    for status, meaning in _MEANINGS.items()
}


def describe(app: FastAPI) -> None:
    """Make the app serve this document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    made = get_openapi(title=app.title, version=app.version, routes=app.routes)
    parts = made.setdefault("components", {})
    schemas = parts.setdefault("schemas", {})
    schemas.pop("HTTPValidationError", None)
    schemas.pop("ValidationError", None)
    schemas["Error"] = _ERROR
    parts["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, methods in made["paths"].items():
        for operation in methods.values():
            operation["responses"].pop("422", None)  # FastAPI's; validation failures are 400 here
            if path.startswith("/v1/"):
                operation["security"] = [{"key": []}]
    return made
