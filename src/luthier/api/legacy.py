"""The older API at /fine-tunes, for clients before openai 1.0: its jobs, their event streams and their results.

Does not know: workers; how a step is made.
"""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from luthier.api import follow
from luthier.api.asking import At, Caller, Cursor, check_file, cursor, find, retry_within, start_from
from luthier.api.errors import ApiError
from luthier.api.files import file_object
from luthier.api.legacy_wire import (
    DEFAULT_MODEL,
    FineTuneRequest,
    event_object,
    fine_tune_object,
    gone_object,
    resolved,
    trouble,
)
from luthier.api.services import Services
from luthier.spec.errors import NotFound
from luthier.store.history import Event
from luthier.store.jobs import Job

router = APIRouter(tags=["fine-tunes"])
MOST_LISTED = 10_000


@router.post("/fine-tunes", response_model=None, summary="Create a fine-tune")
def create(asked: FineTuneRequest, request: Request, at: At, key: Caller) -> dict[str, Any]:
    """A new fine-tune, its defaults resolved from the file and the model's name."""
    wrong = trouble(asked)
    if wrong is not None:
        raise ApiError(400, wrong[1], param=wrong[0])
    model = asked.model or DEFAULT_MODEL
    start = start_from(at, model)
    check_file(at, asked.training_file, "training_file")
    if asked.validation_file is not None:
        check_file(at, asked.validation_file, "validation_file")
    job, _ = at.jobs.submit(
        kind="legacy",
        request={
            "model": model,
            "base": start.base,
            "parent": start.parent,
            "training_file": asked.training_file,
            "validation_file": asked.validation_file,
            "suffix": asked.suffix,
            "seed": None,
            "metadata": None,
            "method": {"type": "supervised"},
            "hyperparameters": resolved(asked, model, lambda: _rows(at, asked.training_file)),
            "integrations": [],
        },
        model=start.model,
        training_file=asked.training_file,
        validation_file=asked.validation_file,
        suffix=asked.suffix,
        owner=key.id,
        notes=[start.note] if start.note else [],
        retry_within=retry_within(request),
    )
    return _whole(at, job)


@router.get("/fine-tunes", response_model=None, summary="List fine-tunes")
def list_fine_tunes(
    at: At,
    after: Cursor = None,
    starting_after: Cursor = None,
    limit: Annotated[int, Query(ge=1, le=MOST_LISTED)] = MOST_LISTED,
) -> dict[str, Any]:
    """Oldest first, all of them unless a limit is given, without their events."""
    page = at.jobs.list(kind="legacy", after=cursor(after, starting_after), limit=limit, order="asc")
    files = _Files(at)
    shown = [fine_tune_object(job, at.settings.organization, files) for job in page.data]
    return {"object": "list", "data": shown, "has_more": page.has_more}


@router.get("/fine-tunes/{job_id}", response_model=None, summary="Retrieve a fine-tune")
def retrieve(job_id: str, at: At) -> dict[str, Any]:
    return _whole(at, find(at, job_id, "legacy"))


@router.post("/fine-tunes/{job_id}/cancel", response_model=None, summary="Cancel a fine-tune")
def cancel(job_id: str, at: At) -> dict[str, Any]:
    find(at, job_id, "legacy")
    return _whole(at, at.jobs.request_cancel(job_id))


@router.delete("/fine-tunes/{job_id}", response_model=None, summary="Delete a fine-tune that is over")
def delete(job_id: str, at: At) -> dict[str, Any]:
    """Forget a fine-tune that is over; its model and files stay."""
    find(at, job_id, "legacy")
    at.jobs.delete(job_id)
    return {"id": job_id, "object": "fine-tune", "deleted": True}


@router.get(
    "/fine-tunes/{job_id}/events",
    response_model=None,
    responses=follow.ANSWERS,
    summary="List or follow the events of a fine-tune",
)
def events(job_id: str, request: Request, at: At, stream: bool = False) -> dict[str, Any] | Response:
    """All of them, oldest first; with `stream=true` as server-sent events, which go on until the job is over."""
    find(at, job_id, "legacy")
    if stream:
        return follow.stream(request.app, job_id, event_object)
    told = [shown for event in _events(at, job_id) if (shown := event_object(event)) is not None]
    return {"object": "list", "data": told, "has_more": False}


def _whole(at: Services, job: Job) -> dict[str, Any]:
    return fine_tune_object(job, at.settings.organization, _Files(at), _events(at, job.id))


def _events(at: Services, job_id: str) -> list[Event]:
    told: list[Event] = []
    more = True
    while more:
        page = at.history.events(job_id, after=told[-1].id if told else None, limit=1000, order="asc")
        told.extend(page.data)
        more = page.has_more
    return told


class _Files:
    """Objects of files by id, each looked up once."""

    def __init__(self, at: Services) -> None:
        self._at = at
        self._known: dict[str, dict[str, Any]] = {}

    def __call__(self, file_id: str) -> dict[str, Any]:
        if file_id not in self._known:
            try:
                self._known[file_id] = file_object(self._at.files.get(file_id))
            except NotFound:  # deleted since: clients still read its id
                self._known[file_id] = gone_object(file_id)
        return self._known[file_id]


def _rows(at: Services, file_id: str) -> int:
    with at.files.open(file_id) as content:
        return sum(1 for line in content if line.strip())
