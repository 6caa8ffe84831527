"""Permissions on checkpoints of fine-tuning jobs: which projects may use one.

The registry keeps and lists them; this server has one project, so nothing is refused for lack of one.
Does not know: jobs' states.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import Field

from luthier.api.asking import At, Cursor, Limit, cursor, listed, shown
from luthier.api.errors import ApiError
from luthier.api.jobs_wire import Strict
from luthier.spec.errors import NotFound
from luthier.store.db import Order
from luthier.store.models import Permission

router = APIRouter(tags=["fine-tuning"])
ORDERS: dict[str, Order] = {"ascending": "asc", "descending": "desc", "asc": "asc", "desc": "desc"}
PATH = "/fine_tuning/checkpoints/{checkpoint:path}/permissions"
ProjectId = Annotated[str, Field(pattern="^[A-Za-z0-9_-]{1,64}$")]


class PermissionRequest(Strict):
    project_ids: Annotated[list[ProjectId], Field(min_length=1, max_length=100)]


@router.post(PATH, response_model=None, summary="Let projects use a checkpoint")
def create(checkpoint: str, asked: PermissionRequest, at: At) -> dict[str, Any]:
    """A permission for each project; one that is there already is answered as it is."""
    made = at.models.permit(_model(at, checkpoint), asked.project_ids)
    return listed([_object(one) for one in made], has_more=False)


@router.get(PATH, response_model=None, summary="List the projects that may use a checkpoint")
def list_permissions(
    checkpoint: str,
    at: At,
    project_id: Annotated[ProjectId | None, Query()] = None,
    after: Cursor = None,
    starting_after: Cursor = None,
    limit: Limit = 10,
    order: Literal["ascending", "descending", "asc", "desc"] = "descending",
) -> dict[str, Any]:
    page = at.models.permissions(
        _model(at, checkpoint),
        project_id=project_id,
        after=cursor(after, starting_after),
        limit=limit,
        order=ORDERS[order],
    )
    return listed([_object(one) for one in page.data], page.has_more)


@router.delete(PATH + "/{permission_id}", response_model=None, summary="Take a permission back")
def delete(checkpoint: str, permission_id: str, at: At) -> dict[str, Any]:
    try:
        at.models.forbid(_model(at, checkpoint), permission_id)
    except NotFound as error:
        raise ApiError(404, error.message, param="permission_id") from error
    return {"id": permission_id, "object": "checkpoint.permission", "deleted": True}


def _model(at: At, name: str) -> str:
    """`name` when it is a tuned model's or a checkpoint's. Raises ApiError 404."""
    try:
        return at.models.get(name.replace("\0", "/")).name  # NUL is in no name, and PostgreSQL cannot be asked for it
    except NotFound as error:
        message = f"Could not find the checkpoint {shown(name)}."
        raise ApiError(404, message, param="fine_tuned_model_checkpoint", code="model_not_found") from error


def _object(permission: Permission) -> dict[str, Any]:
    return {
        "id": permission.id,
        "object": "checkpoint.permission",
        "created_at": permission.created_at,
        "project_id": permission.project_id,
    }


CREATE_FIELDS: dict[str, tuple[str, str]] = {
    "project_ids": ("supported", "1 to 100. Kept and listed; this server has one project, so they open nothing more."),
}
