"""What both kinds of jobs check before they enter the store, and how they are found in it again.

Does not know: the words of either API.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Query, Request

from luthier.api.auth import caller
from luthier.api.errors import ApiError
from luthier.api.services import Services, services
from luthier.spec.errors import NotFound
from luthier.store.files import File
from luthier.store.history import Kind
from luthier.store.jobs import Job
from luthier.store.keys import Key

At = Annotated[Services, Depends(services)]
Caller = Annotated[Key, Depends(caller)]
Limit = Annotated[int, Query(ge=1, le=1000)]
Cursor = Annotated[str | None, Query(max_length=64)]

# A client that repeats a create within this time gets the job that its first try made (no client sends an
# Idempotency-Key; the official ones count their tries in a header).
RETRY_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Start:
    """What a job starts from. `parent` is the tuned model to go on from, None for a base; `base` a public name."""

    base: str
    parent: str | None
    note: str | None

    @property
    def model(self) -> str:
        return self.parent or self.base


def start_from(at: Services, asked: str) -> Start:
    """Raises ApiError 404 when no model has that name and no base is meant by it."""
    try:
        model = at.aliases.resolve(asked)
        note = (
            None if model.name == asked else f"The model {asked} means {model.name} now; the job goes on from that one."
        )
        return Start(model.base, model.name, note)
    except NotFound:
        pass
    try:
        base = at.bases.resolve(asked)
    except NotFound as error:
        raise ApiError(404, error.message, param="model", code="model_not_found") from error
    note = None if base == asked else f"The model {asked} is {base} on this server; the job trains that one."
    return Start(base, None, note)


def check_file(at: Services, file_id: str, param: str) -> File:
    """The file, when a job can be made from it. Raises ApiError 400."""
    try:
        file = at.files.get(file_id)
    except NotFound as error:
        raise ApiError(400, f"invalid {param}: {shown(file_id)} is no file here.", param=param) from error
    if file.purpose != "fine-tune":
        message = f"invalid {param}: {file.id} has the purpose {file.purpose}, wanted fine-tune."
        raise ApiError(400, message, param=param)
    if file.status == "error":
        raise ApiError(400, f"invalid {param}: {file.id} cannot be used.", param=param)
    return file


def retry_within(request: Request) -> float | None:
    """The seconds within which the same request is the same job: only for a client that says it tries again."""
    tries = request.headers.get("x-stainless-retry-count", "0")
    return RETRY_SECONDS if re.fullmatch("[0-9]{1,4}", tries) and int(tries) >= 1 else None


def find(at: Services, job_id: str, kind: Kind) -> Job:
    """The job of that kind. Raises ApiError 404."""
    try:
        job = at.jobs.get(job_id)
    except NotFound as error:
        raise not_found(job_id) from error
    if job.kind != kind:
        raise not_found(job_id)
    return job


def not_found(job_id: str) -> ApiError:
    message = f"Could not find fine tune: {shown(job_id)}"
    return ApiError(404, message, param="fine_tune_id", code="fine_tune_not_found")


def metadata_filter(request: Request) -> dict[str, str]:
    """metadata[KEY]=VALUE of the query. Raises ApiError 400."""
    pairs: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        found = re.fullmatch(r"metadata\[(.*)\]", name, re.DOTALL)
        if found is None:
            continue
        key = found[1]
        if "\0" in key + value or len(key) > 64 or len(value) > 512 or pairs.get(key, value) != value:
            raise ApiError(400, "metadata: wanted metadata[KEY]=VALUE, each key once.", param="metadata")
        pairs[key] = value
    if len(pairs) > 16:
        raise ApiError(400, f"metadata: found {len(pairs)} pairs, wanted at most 16.", param="metadata")
    return pairs


def cursor(after: str | None, starting_after: str | None) -> str | None:
    """The oldest client says `starting_after`. An empty one is none."""
    return after or starting_after or None


def listed(data: list[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """A list with the ids of its ends."""
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"object": "list", "data": data, "first_id": first, "last_id": last, "has_more": has_more}


def shown(text: str) -> str:
    """A name as a client wrote it, for a sentence: cut, and without what cannot be printed."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")[1:-1]
