"""The oldest names: models as /engines, and inference under an engine's path instead of a `model` in the body.

Does not know: how an answer is made (completions.py, chat.py).
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from luthier.api.asking import At
from luthier.api.models import no_such_model
from luthier.spec.errors import NotFound

router = APIRouter(tags=["engines"])


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


def engine_object(name: str, owner: str) -> dict[str, Any]:
    """`ready`: every model that is listed answers; one that is not in memory is fetched when it is asked."""
    return {"id": name, "object": "engine", "owner": owner, "ready": True, "created": None, "permissions": None}
