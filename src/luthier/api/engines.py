"""The oldest names: models as /engines, and inference under an engine's path instead of a `model` in the body.

Such a request goes on, with `model` in its body, to the route of today; so whatever that can do, an engine can.
Does not know: how an answer is made (completions.py, chat.py).
"""

from __future__ import annotations

import json
from typing import Any

import anyio
from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from luthier.api.asking import At
from luthier.api.errors import ApiError
from luthier.api.limits import check_json, replay
from luthier.api.models import no_such_model
from luthier.spec.errors import NotFound

router = APIRouter(tags=["engines"])
BODY: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {"type": "object"}}}}
}


@router.get("/engines", response_model=None, summary="List models as engines")
def list_engines(at: At) -> dict[str, Any]:
    """The same as GET /models: bases, tuned models and checkpoints."""
    bases = [engine_object(name, "system") for name in sorted(at.bases.sources)]
    tuned = [engine_object(model.name, at.settings.organization) for model in at.models.list()]
    return {"object": "list", "data": bases + tuned}


@router.get("/engines/{engine:path}", response_model=None, summary="Retrieve a model as an engine")
def retrieve_engine(engine: str, at: At) -> dict[str, Any]:
    try:
        return engine_object(at.models.get(engine.replace("\0", "/")).name, at.settings.organization)
    except NotFound:
        pass
    try:
        at.bases.resolve(engine)
    except NotFound as error:
        raise no_such_model(engine) from error
    return engine_object(engine, "system")


@router.post(
    "/engines/{engine:path}/chat/completions", response_model=None, summary="Chat with an engine", openapi_extra=BODY
)
async def chat(engine: str, request: Request) -> Response:
    return Onward("chat/completions", await _with_model(request, engine))


@router.post(
    "/engines/{engine:path}/completions", response_model=None, summary="Complete with an engine", openapi_extra=BODY
)
async def complete(engine: str, request: Request) -> Response:
    return Onward("completions", await _with_model(request, engine))


def engine_object(name: str, owner: str) -> dict[str, Any]:
    """`ready`: every model that is listed answers; one that is not in memory is fetched when it is asked."""
    return {"id": name, "object": "engine", "owner": owner, "ready": True, "created": None, "permissions": None}


async def _with_model(request: Request, engine: str) -> bytes:
    """The body with the engine as its `model`. Raises ApiError 400."""
    sent = await request.body()
    await anyio.to_thread.run_sync(check_json, sent)  # the gate has done so only where the header says JSON
    body = json.loads(sent)
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object, sent with Content-Type: application/json.")
    if body.get("model") not in (None, engine):
        raise ApiError(400, "model: found another model than the engine of the path.", param="model")
    return json.dumps({**body, "model": engine}).encode()


class Onward(Response):
    """Answers with what the route at /v1/`place` of the same app answers to `body`."""

    def __init__(self, place: str, body: bytes) -> None:
        super().__init__()
        self.place = f"/v1/{place}"
        self.whole = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        kept = {"type", "asgi", "http_version", "method", "scheme", "query_string", "root_path", "client", "server"}
        kept |= {"extensions", "state", "app"}
        headers = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"content-type")]
        headers += [(b"content-length", str(len(self.whole)).encode()), (b"content-type", b"application/json")]
        onward = {name: value for name, value in scope.items() if name in kept}
        onward |= {"path": self.place, "raw_path": self.place.encode(), "headers": headers}
        for name in ("starlette.exception_handlers", "fastapi_inner_astack", "fastapi_middleware_astack"):
            if name in scope:
                onward[name] = scope[name]
        await scope["app"].router(onward, replay(self.whole, receive), send)
