"""Models: the bases on offer, what was tuned from them, and the checkpoints that a job published.

Any key may delete a tuned model, as any key may make one; a base is not deleted over the network.
Does not know: how a model answers (chat.py); where a base's weights come from.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from fastapi.responses import JSONResponse

from luthier.api.errors import ApiError
from luthier.api.services import Services, services
from luthier.spec.errors import NotFound, UserError
from luthier.store.models import Model

router = APIRouter(tags=["models"])

Serve = Annotated[Services, Depends(services)]


def no_such_model(name: str) -> ApiError:
    shown = ascii(name if len(name) <= 200 else name[:197] + "...")[1:-1]
    return ApiError(
        404,
        f"The model `{shown}` does not exist or you do not have access to it.",
        param="model",
        code="model_not_found",
    )


@router.get("/models", summary="List models")
def list_models(serve: Serve) -> JSONResponse:
    bases = [_base_object(serve, name, name) for name in sorted(serve.bases.sources)]
    known = {model.name: model for model in serve.models.list()}
    tuned = [_tuned_object(serve, model) for model in known.values()]
    moves = [move for move in serve.aliases.list() if move.model in known]
    aliases = [{**_tuned_object(serve, known[move.model]), "id": move.alias} for move in moves]
    return JSONResponse({"object": "list", "data": bases + tuned + aliases})


@router.get("/models/{model:path}", summary="Retrieve a model")
def retrieve_model(model: str, serve: Serve) -> JSONResponse:
    """By its name or an alias, under which it is then shown."""
    try:
        return JSONResponse({**_tuned_object(serve, serve.aliases.resolve(model)), "id": model})
    except NotFound:
        pass
    try:
        return JSONResponse(_base_object(serve, model, serve.bases.resolve(model)))
    except NotFound:
        raise no_such_model(model) from None


@router.delete("/models/{model:path}", summary="Delete a tuned model")
def delete_model(model: str, serve: Serve) -> JSONResponse:
    try:
        gone = serve.models.delete(model)
    except NotFound:
        pass
    except UserError as error:
        raise ApiError(400, error.message, param="model", code="model_in_use") from error
    else:
        _remove_folder(serve, gone.folder)
        return JSONResponse({"id": model, "object": "model", "deleted": True})
    try:
        serve.bases.resolve(model)
    except NotFound:
        raise no_such_model(model) from None
    raise ApiError(
        403,
        "You have insufficient permissions for this operation: only tuned models can be deleted.",
        param="model",
        code="model_not_deletable",
    )


def _remove_folder(serve: Services, folder: Path) -> None:
    """Free its disk space, unless another model lies in it, around it, or is it."""
    for other in serve.models.list():
        if other.folder.is_relative_to(folder) or folder.is_relative_to(other.folder):
            return
    serve.database.inside(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _base_object(serve: Services, shown: str, base: str) -> dict[str, Any]:
    folder = serve.folders.get(base)
    created = int(folder.stat().st_mtime) if folder is not None and folder.exists() else 0
    return {"id": shown, "object": "model", "created": created, "owned_by": "system", "shutdown_date": None}


def _tuned_object(serve: Services, model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_at,
        "owned_by": serve.settings.organization,
        "shutdown_date": None,
    }
