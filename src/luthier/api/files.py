"""Files: /files, their contents, and which purposes a client may name.

Result files of today's jobs are served as base64 text, as OpenAI serves them, except to clients that print what they
get (the 0.28 ones); those of legacy fine-tunes are always plain. LUTHIER_RESULTS decides otherwise.
Does not know: forms (form.py), what a training file must hold (jsonl.py), where bytes lie (store/files.py).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from luthier.api.errors import ApiError
from luthier.api.form import Form, opener, with_form
from luthier.api.jsonl import check_jsonl
from luthier.api.services import Services, services
from luthier.settings import Settings
from luthier.spec.errors import NotFound
from luthier.store.blobs import PIECE, pieces_of
from luthier.store.files import File

router = APIRouter(tags=["files"])

PURPOSES = ("assistants", "batch", "fine-tune", "vision", "user_data", "evals")
LONGEST_NAME = 4096  # characters: a path, or a URL that a client downloaded from
EXPIRES_FROM, EXPIRES_TO = 3600, 2_592_000  # seconds: an hour, 30 days
EXPIRY_FIELDS = ("expires_after[anchor]", "expires_after[seconds]")
BATCH_EXPIRES = EXPIRES_TO  # what a batch file gets that names nothing
PLAIN_RESULTS = ("compiled_results.csv", "report.json", "report.html")  # never as base64
LEGACY_CLIENT = re.compile(r"OpenAI/v1 PythonBindings/0\.")

Serve = Annotated[Services, Depends(services)]


def file_object(file: File) -> dict[str, Any]:
    """The File object of the API."""
    shown = {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "filename": file.filename.encode("utf-8", "replace").decode(),
        "purpose": file.purpose,
        "status": file.status,
        "status_details": None,
    }
    return shown if file.expires_at is None else {**shown, "expires_at": file.expires_at}


def no_such_file(file_id: str) -> ApiError:
    shown = file_id if len(file_id) <= 200 else file_id[:197] + "..."
    return ApiError(404, f"No such File object: {ascii(shown)[1:-1]}", param="id")


def check_upload_purpose(purpose: str | None) -> str:
    """`purpose` when a client may give it to a file. Raises ApiError 400."""
    if purpose is None:
        raise ApiError(
            400, "Missing required parameter: 'purpose'.", param="purpose", code="missing_required_parameter"
        )
    if purpose not in PURPOSES:
        wanted = ", ".join(PURPOSES)
        raise ApiError(400, f"Invalid 'purpose': found {purpose[:80]!a}, wanted one of {wanted}.", param="purpose")
    return purpose


def check_filename(name: str, param: str) -> str:
    """`name` when it can be kept as it is. Raises ApiError 400."""
    if len(name) > LONGEST_NAME:
        message = f"The name of the file has {len(name):,} characters, wanted at most {LONGEST_NAME:,}."
        raise ApiError(400, message, param=param)
    return name


def check_expiry(anchor: Any, seconds: Any) -> int | None:
    """The seconds after creation; None when neither is given. Raises ApiError 400."""
    if anchor is None and seconds is None:
        return None
    for name, value in (("anchor", anchor), ("seconds", seconds)):
        if value is None:
            param = f"expires_after.{name}"
            message = f"Missing required parameter: '{param}'."
            raise ApiError(400, message, param=param, code="missing_required_parameter")
    if anchor != "created_at":
        raise ApiError(
            400,
            f"Invalid 'expires_after.anchor': found {str(anchor)[:80]!a}, wanted created_at.",
            param="expires_after.anchor",
        )
    text = str(seconds)
    if not re.fullmatch("[0-9]{1,9}", text) or not EXPIRES_FROM <= int(text) <= EXPIRES_TO:
        raise ApiError(
            400,
            f"Invalid 'expires_after.seconds': found {text[:80]!a}, wanted {EXPIRES_FROM} to {EXPIRES_TO}.",
            param="expires_after.seconds",
        )
    return int(text)


UPLOAD_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": EXPIRES_FROM,
                            "maximum": EXPIRES_TO,
                        },
                    },
                }
            }
        },
    }
}


@router.post("/files", openapi_extra=UPLOAD_FORM, summary="Upload a file")
async def create_file(request: Request, serve: Serve) -> JSONResponse:
    def keep(form: Form) -> File:
        purpose = check_upload_purpose(form.fields.get("purpose"))
        expires = check_expiry(*_expiry(form))
        new = form.file
        if new is None:
            raise ApiError(400, "Missing required parameter: 'file'.", param="file", code="missing_required_parameter")
        check_filename(form.filename, "file")
        if purpose == "fine-tune":
            check_jsonl(pieces_of([opener(new)]))
        if purpose == "batch" and expires is None:
            expires = BATCH_EXPIRES
        with serve.database.transaction() as connection:
            return serve.files.insert(
                connection, new, filename=form.filename, purpose=purpose, expires_after=expires
            )  # fmt: skip

    limit = serve.settings.max_file_bytes
    return JSONResponse(
        file_object(await with_form(request, serve.files.blobs, file_field="file", limit=limit, act=keep))
    )


def _expiry(form: Form) -> tuple[str | None, str | None]:
    """(anchor, seconds). Raises ApiError 400 for `expires_after` written in another way: it must not go unheard."""
    for name in form.fields:
        if name.startswith("expires_after") and name not in EXPIRY_FIELDS:
            wanted = " and ".join(EXPIRY_FIELDS)
            message = f"The form has {name[:80]!a}; an expiry is said in the fields {wanted}."
            raise ApiError(400, message, param="expires_after")
    anchor, seconds = (form.fields.get(name) for name in EXPIRY_FIELDS)
    return anchor, seconds


@router.get("/files", summary="List files")
def list_files(
    serve: Serve,
    purpose: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    after: str | None = None,
    starting_after: Annotated[str | None, Query(description="An older name of after.")] = None,
) -> JSONResponse:
    page = serve.files.list(
        purpose=purpose or None, after=after or starting_after or None, limit=limit, order=order
    )  # fmt: skip
    data = [file_object(file) for file in page.data]
    return JSONResponse(
        {
            "object": "list",
            "data": data,
            "first_id": data[0]["id"] if data else None,
            "last_id": data[-1]["id"] if data else None,
            "has_more": page.has_more,
        }
    )


@router.get("/files/{file_id}/content", summary="A file's content")
def file_content(file_id: str, request: Request, serve: Serve) -> Response:
    if b"%2f" in bytes(request.scope.get("raw_path") or b"").lower():  # an id that ends so, not this path
        raise no_such_file(f"{file_id}/content")
    file, handle = _open(serve, file_id)
    headers = {"x-content-type-options": "nosniff"}
    if _as_base64(file, request.headers.get("user-agent", ""), serve.settings):
        headers["content-length"] = str(4 * ((file.bytes + 2) // 3))
        return StreamingResponse(_in_base64(handle), media_type="application/octet-stream", headers=headers)
    headers["content-length"] = str(file.bytes)
    return StreamingResponse(_plain(handle), media_type="application/octet-stream", headers=headers)


@router.get("/files/{file_id:path}", summary="Retrieve a file")
def retrieve_file(file_id: str, serve: Serve) -> JSONResponse:
    try:
        return JSONResponse(file_object(serve.files.get(file_id)))
    except NotFound:
        raise no_such_file(file_id) from None


@router.delete("/files/{file_id:path}", summary="Delete a file")
def delete_file(file_id: str, serve: Serve) -> JSONResponse:
    try:
        serve.files.delete(file_id)
    except NotFound:
        raise no_such_file(file_id) from None
    return JSONResponse({"id": file_id, "object": "file", "deleted": True})


def _open(serve: Services, file_id: str) -> tuple[File, BinaryIO]:
    try:
        return serve.files.get(file_id), serve.files.open(file_id)
    except NotFound:
        raise no_such_file(file_id) from None


def _as_base64(file: File, agent: str, settings: Settings) -> bool:
    if file.purpose != "fine-tune-results" or file.filename in PLAIN_RESULTS or settings.results == "raw":
        return False
    return settings.results == "base64" or not LEGACY_CLIENT.match(agent)


def _plain(handle: BinaryIO) -> Iterator[bytes]:
    with handle:
        while piece := handle.read(PIECE):
            yield piece


def _in_base64(handle: BinaryIO) -> Iterator[bytes]:
    with handle:
        while piece := handle.read(3 * (PIECE // 3)):  # whole groups of three: no padding inside
            yield base64.b64encode(piece)
