"""Uploads: /uploads, for files that come in parts.

Does not know: how parts are joined (store/uploads.py).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from luthier.api.errors import ApiError
from luthier.api.files import LONGEST_NAME, check_expiry, check_upload_purpose, file_object
from luthier.api.form import Form, opener, with_form
from luthier.api.jsonl import check_jsonl
from luthier.api.services import Services, services
from luthier.spec.errors import NotFound
from luthier.store.blobs import pieces_of
from luthier.store.uploads import Part, Upload

router = APIRouter(tags=["uploads"])

PART_BYTES = 64 * 2**20
UPLOAD_BYTES = 8 * 2**30

Serve = Annotated[Services, Depends(services)]


class ExpiresAfter(BaseModel):
    model_config = ConfigDict(extra="forbid")

    anchor: Literal["created_at"]
    seconds: int


class NewUpload(BaseModel):
    model_config = ConfigDict(extra="forbid")

    filename: str = Field(min_length=1, max_length=LONGEST_NAME)
    purpose: str
    bytes: int = Field(ge=1, le=UPLOAD_BYTES, strict=True)
    mime_type: str = Field(max_length=256)
    expires_after: ExpiresAfter | None = None


class Completion(BaseModel):
    model_config = ConfigDict(extra="forbid")

    part_ids: list[str]
    md5: str | None = None


@router.post("/uploads", summary="Announce a file that comes in parts")
def create_upload(body: NewUpload, serve: Serve) -> JSONResponse:
    after = body.expires_after
    upload = serve.uploads.create(
        filename=body.filename,
        purpose=check_upload_purpose(body.purpose),
        bytes=body.bytes,
        mime_type=body.mime_type,
        file_expires_after=None if after is None else check_expiry(after.anchor, after.seconds),
    )
    return JSONResponse(_upload_object(serve, upload))


PART_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("/uploads/{upload_id}/parts", openapi_extra=PART_FORM, summary="Add a part")
async def add_part(upload_id: str, request: Request, serve: Serve) -> JSONResponse:
    await anyio.to_thread.run_sync(_check_open, serve, upload_id)

    def keep(form: Form) -> Part:
        new = form.file
        if new is None:
            raise ApiError(400, "Missing required parameter: 'data'.", param="data", code="missing_required_parameter")
        return serve.uploads.add_part(upload_id, pieces_of([opener(new)]))

    part = await with_form(request, serve.files.blobs, file_field="data", limit=PART_BYTES, act=keep)
    return JSONResponse(
        {"id": part.id, "object": "upload.part", "created_at": part.created_at, "upload_id": part.upload_id}
    )


@router.post("/uploads/{upload_id}/complete", summary="Join the parts into a file")
async def complete_upload(upload_id: str, body: Completion, request: Request, serve: Serve) -> JSONResponse:
    def join() -> dict[str, Any]:
        try:
            _check_lines(serve, upload_id, body.part_ids)
            return _upload_object(serve, serve.uploads.complete(upload_id, body.part_ids, md5=body.md5))
        except NotFound:
            raise _no_such_upload(upload_id) from None

    return JSONResponse(await anyio.to_thread.run_sync(join, limiter=request.app.state.readers))


@router.post("/uploads/{upload_id}/cancel", summary="Give an upload up")
def cancel_upload(upload_id: str, serve: Serve) -> JSONResponse:
    try:
        return JSONResponse(_upload_object(serve, serve.uploads.cancel(upload_id)))
    except NotFound:
        raise _no_such_upload(upload_id) from None


def _no_such_upload(upload_id: str) -> ApiError:
    return ApiError(404, f"No such Upload object: {ascii(upload_id[:200])[1:-1]}", param="upload_id")


def _check_open(serve: Services, upload_id: str) -> None:
    """Say no before the part is read: to an upload that is not there or closed, or that has had far too much."""
    try:
        upload = serve.uploads.get(upload_id)
        held = sum(part.bytes for part in serve.uploads.parts(upload_id))
    except NotFound:
        raise _no_such_upload(upload_id) from None
    if upload.status != "pending":
        raise ApiError(400, f"The upload {upload.id} is {upload.status}: it takes no more parts.", param="upload_id")
    if held > 2 * upload.bytes + PART_BYTES:  # room for parts that were sent again
        raise ApiError(400, f"The parts of {upload.id} are far larger than was declared.", param="upload_id")


def _check_lines(serve: Services, upload_id: str, part_ids: list[str]) -> None:
    """A training file that comes in parts is held to the same form as one that comes whole."""
    upload = serve.uploads.get(upload_id)
    if upload.purpose != "fine-tune" or upload.status != "pending":
        return
    parts = {part.id: part for part in serve.uploads.parts(upload_id)}
    if not set(part_ids) <= parts.keys() or sum(parts[name].bytes for name in part_ids) != upload.bytes:
        return  # complete() says what is wrong
    try:
        check_jsonl(pieces_of(serve.files.opener(parts[name].sha256) for name in part_ids))
    except FileNotFoundError:
        return  # closed meanwhile: complete() says how


def _upload_object(serve: Services, upload: Upload) -> dict[str, Any]:
    made: dict[str, Any] | None = None
    if upload.file_id is not None:
        try:
            made = file_object(serve.files.get(upload.file_id))
        except NotFound:  # deleted since, or expired
            made = None
    return {
        "id": upload.id,
        "object": "upload",
        "bytes": upload.bytes,
        "created_at": upload.created_at,
        "expires_at": upload.expires_at,
        "filename": upload.filename,
        "purpose": upload.purpose,
        "mime_type": upload.mime_type,
        "status": upload.status,
        "file": made,
    }
