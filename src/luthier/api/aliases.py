"""Aliases at /luthier/aliases, an extension: names that mean a tuned model, moved through the gate and back.

Does not know: what was measured of a model; how a model is asked.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from luthier.api.asking import At, Caller, shown
from luthier.api.errors import ApiError
from luthier.api.jobs_wire import Strict, Text
from luthier.spec.errors import NotFound, UserError
from luthier.store.aliases import GateClosed, Move, Moved

router = APIRouter(tags=["luthier"])
PATH = "/luthier/aliases/{alias}"
Version = Annotated[int | None, Field(ge=0, le=2**53)]


class PromoteRequest(Strict):
    model: Text
    if_version: Version = None


class RollbackRequest(Strict):
    if_version: Version = None


@router.get("/luthier/aliases", response_model=None, summary="List aliases")
def list_aliases(at: At) -> dict[str, Any]:
    """By name, each with the model that it means."""
    return {"object": "list", "data": [_object(move) for move in at.aliases.list()]}


@router.get(PATH, response_model=None, summary="Retrieve an alias with its history")
def retrieve(alias: str, at: At) -> dict[str, Any]:
    """The history is oldest first."""
    try:
        moves = at.aliases.history(_name(alias))
    except NotFound as error:
        raise _no_alias(alias) from error
    return {**_object(moves[-1]), "history": [_move(move) for move in moves]}


@router.post(PATH, response_model=None, summary="Let an alias mean a model")
def promote(alias: str, asked: PromoteRequest, at: At, key: Caller) -> dict[str, Any]:
    """400 with the reasons when the model missed the thresholds of its job, and when `if_version` is not the alias's
    version any more."""
    try:
        return _object(at.aliases.promote(alias, asked.model, by=key.id, if_version=asked.if_version))
    except (GateClosed, Moved) as error:
        raise ApiError(400, error.message, param=error.param, code=error.code) from error
    except NotFound as error:
        raise ApiError(404, error.message, param="model", code="model_not_found") from error


@router.post(PATH + "/rollback", response_model=None, summary="Let an alias mean what it meant before")
def rollback(alias: str, at: At, key: Caller, asked: RollbackRequest | None = None) -> dict[str, Any]:
    """Takes back the last move that was not taken back."""
    version = asked.if_version if asked is not None else None
    try:
        return _object(at.aliases.rollback(_name(alias), by=key.id, if_version=version))
    except NotFound as error:
        raise _no_alias(alias) from error
    except Moved as error:
        raise ApiError(400, error.message, param=error.param, code=error.code) from error
    except UserError as error:
        raise ApiError(400, error.message, param="alias", code="nothing_to_roll_back") from error


@router.delete(PATH, response_model=None, summary="Delete an alias with its history")
def delete(alias: str, at: At) -> dict[str, Any]:
    """The model stays."""
    try:
        at.aliases.remove(_name(alias))
    except NotFound as error:
        raise _no_alias(alias) from error
    return {"id": alias, "object": "luthier.alias", "deleted": True}


def _name(alias: str) -> str:
    return alias.replace("\0", "/")  # NUL is in no name, and PostgreSQL cannot be asked for it


def _no_alias(alias: str) -> ApiError:
    return ApiError(404, f"There is no alias {shown(alias)}.", param="alias", code="alias_not_found")


def _object(move: Move) -> dict[str, Any]:
    return {
        "id": move.alias,
        "object": "luthier.alias",
        "model": move.model,
        "version": move.version,
        "moved_at": move.created_at,
    }


def _move(move: Move) -> dict[str, Any]:
    return {
        "version": move.version,
        "kind": move.kind,
        "model": move.model,
        "created_at": move.created_at,
        "by": move.by,
    }


PROMOTE_FIELDS: dict[str, tuple[str, str]] = {
    "model": ("supported", "A tuned model, not a checkpoint. Refused when it missed the thresholds of its job."),
    "if_version": ("supported", "Only if the alias still has this version; 0: only if it is new."),
}
ROLLBACK_FIELDS: dict[str, tuple[str, str]] = {
    "if_version": ("supported", "Only if the alias still has this version."),
}
