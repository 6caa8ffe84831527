"""/chat/completions as a store: what was answered with `store: true`, found again, labelled and removed.

Does not know: how an answer is made (chat.py).
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from luthier.api.asking import At, Cursor, Limit, cursor, listed, metadata_filter, shown
from luthier.api.errors import ApiError
from luthier.api.jobs_wire import Metadata, Strict
from luthier.spec.errors import NotFound
from luthier.store.completions import StoredCompletion
from luthier.store.db import Order

router = APIRouter(tags=["chat"])
ONE = "/chat/completions/{completion_id}"
# What a listed completion repeats of its request.
ECHOED = (
    "tool_choice",
    "tools",
    "seed",
    "top_p",
    "temperature",
    "presence_penalty",
    "frequency_penalty",
    "response_format",
    "service_tier",
)


class MetadataRequest(Strict):
    metadata: Metadata | None


@router.get("/chat/completions", response_model=None, summary="List stored chat completions")
def list_stored(
    request: Request,
    at: At,
    model: Annotated[str | None, Query(max_length=256)] = None,
    after: Cursor = None,
    starting_after: Cursor = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> dict[str, Any]:
    """Oldest first unless `order` is desc. `metadata[KEY]=VALUE` keeps those that have the pair."""
    page = at.completions.list(
        model=model,
        metadata=metadata_filter(request),
        after=cursor(after, starting_after),
        limit=limit,
        order=order,
    )
    return listed([_object(one) for one in page.data], page.has_more)


@router.get(ONE, response_model=None, summary="A stored chat completion")
def get(completion_id: str, at: At) -> dict[str, Any]:
    return _object(_find(at, completion_id))


@router.post(ONE, response_model=None, summary="Replace a stored chat completion's metadata")
def label(completion_id: str, asked: MetadataRequest, at: At) -> dict[str, Any]:
    _find(at, completion_id)
    return _object(at.completions.set_metadata(completion_id, asked.metadata))


@router.delete(ONE, response_model=None, summary="Delete a stored chat completion")
def delete(completion_id: str, at: At) -> dict[str, Any]:
    _find(at, completion_id)
    at.completions.delete(completion_id)
    return {"object": "chat.completion.deleted", "id": completion_id, "deleted": True}


@router.get(ONE + "/messages", response_model=None, summary="The messages that a stored completion answered")
def messages(
    completion_id: str, at: At, after: Cursor = None, limit: Limit = 20, order: Order = "asc"
) -> dict[str, Any]:
    found = [_message(completion_id, i, one) for i, one in enumerate(_find(at, completion_id).request["messages"])]
    if order == "desc":
        found.reverse()
    start = 0
    if after:
        places = [place for place, one in enumerate(found, 1) if one["id"] == after]
        if not places:
            raise ApiError(404, f"No message has the id {shown(after)} here.", param="after")
        start = places[0]
    return listed(found[start : start + limit], len(found) > start + limit)


def _message(completion_id: str, index: int, message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content")
    parts = content if isinstance(content, list) else None
    text = "".join(part.get("text", "") for part in parts) if parts is not None else content
    return {**message, "id": f"{completion_id}-{index}", "content": text, "content_parts": parts}


def _object(stored: StoredCompletion) -> dict[str, Any]:
    echoed = {name: stored.request.get(name) for name in ECHOED}
    return {
        **stored.completion,
        **echoed,
        "metadata": stored.metadata or {},
        "request_id": stored.request.get("request_id"),
        "input_user": stored.request.get("user"),
    }


def _find(at: At, completion_id: str) -> StoredCompletion:
    try:
        return at.completions.get(completion_id)
    except NotFound as error:
        message = f"Chat completion {shown(completion_id)} not found: it was not stored here."
        raise ApiError(404, message, param="completion_id") from error
