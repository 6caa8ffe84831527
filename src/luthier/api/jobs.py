"""Fine-tuning jobs at /fine_tuning/jobs: ask for one, find them, follow them, pause, resume and cancel.

Everything is said and checked here; what can only be known from the files' content becomes a failed job (work/).
Does not know: workers; how a step is made.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from luthier.api import follow
from luthier.api.asking import (
    At,
    Caller,
    Cursor,
    Limit,
    check_file,
    cursor,
    find,
    listed,
    metadata_filter,
    retry_within,
    start_from,
)
from luthier.api.errors import ApiError
from luthier.api.jobs_wire import (
    NUMBERS,
    Hyperparameters,
    JobRequest,
    Method,
    checkpoint_object,
    event_object,
    job_object,
)

router = APIRouter(tags=["fine-tuning"])


@router.post("/fine_tuning/jobs", response_model=None, summary="Create a fine-tuning job")
def create(asked: JobRequest, request: Request, at: At, key: Caller) -> dict[str, Any]:
    """A new job. A repeat of the same request by a client that tries again is answered with the job it made."""
    method = _method(asked.method)
    numbers = _numbers(method, asked.method, asked.hyperparameters)
    _extensions(method, asked)
    start = start_from(at, asked.model)
    check_file(at, asked.training_file, "training_file")
    if asked.validation_file is not None:
        check_file(at, asked.validation_file, "validation_file")
    job, _ = at.jobs.submit(
        request={
            "model": asked.model,
            "base": start.base,
            "parent": start.parent,
            "training_file": asked.training_file,
            "validation_file": asked.validation_file,
            "suffix": asked.suffix,
            "seed": asked.seed,
            "metadata": asked.metadata,
            "method": {"type": method},
            "hyperparameters": numbers,
            "metric": asked.metric,
            "proof_rows": asked.proof_rows,
            "forgetting": asked.forgetting,
            "keep_general": asked.keep_general,
            "must_improve": asked.must_improve,
            "max_forgetting": asked.max_forgetting,
            "integrations": [one.model_dump() for one in asked.integrations or []],
        },
        model=start.model,
        training_file=asked.training_file,
        validation_file=asked.validation_file,
        suffix=asked.suffix,
        seed=asked.seed,
        metadata=asked.metadata,
        owner=key.id,
        notes=[start.note] if start.note else [],
        retry_within=retry_within(request),
    )
    return job_object(job, at.settings.organization)


@router.get("/fine_tuning/jobs", response_model=None, summary="List fine-tuning jobs")
def list_jobs(
    request: Request,
    at: At,
    after: Cursor = None,
    starting_after: Cursor = None,
    limit: Limit = 20,
    metadata: Annotated[Literal["null"] | None, Query(description="`null`: jobs without metadata")] = None,
) -> dict[str, Any]:
    """Newest first. `metadata[KEY]=VALUE` keeps the jobs that have the pair."""
    page = at.jobs.list(
        kind="modern",
        metadata=metadata_filter(request),
        without_metadata=metadata is not None,
        after=cursor(after, starting_after),
        limit=limit,
    )
    return listed([job_object(job, at.settings.organization) for job in page.data], page.has_more)


@router.get("/fine_tuning/jobs/{job_id}", response_model=None, summary="Retrieve a fine-tuning job")
def retrieve(job_id: str, at: At) -> dict[str, Any]:
    return job_object(find(at, job_id, "modern"), at.settings.organization)


@router.post("/fine_tuning/jobs/{job_id}/cancel", response_model=None, summary="Cancel a fine-tuning job")
def cancel(job_id: str, at: At) -> dict[str, Any]:
    """At once, or as soon as the worker has heard of it; the job is shown as cancelled from now on."""
    find(at, job_id, "modern")
    return job_object(at.jobs.request_cancel(job_id), at.settings.organization)


@router.post("/fine_tuning/jobs/{job_id}/pause", response_model=None, summary="Pause a fine-tuning job")
def pause(job_id: str, at: At) -> dict[str, Any]:
    """A running job is paused when its worker has saved it."""
    find(at, job_id, "modern")
    return job_object(at.jobs.request_pause(job_id), at.settings.organization)


@router.post("/fine_tuning/jobs/{job_id}/resume", response_model=None, summary="Resume a fine-tuning job")
def resume(job_id: str, at: At) -> dict[str, Any]:
    find(at, job_id, "modern")
    return job_object(at.jobs.request_resume(job_id), at.settings.organization)


@router.get(
    "/fine_tuning/jobs/{job_id}/events",
    response_model=None,
    responses=follow.ANSWERS,
    summary="List or follow the events of a fine-tuning job",
)
def events(
    job_id: str,
    request: Request,
    at: At,
    after: Cursor = None,
    starting_after: Cursor = None,
    limit: Limit = 20,
    stream: bool = False,
) -> dict[str, Any] | Response:
    """Newest first. `stream=true` (an extension): all of them, oldest first, and then live, as server-sent events."""
    find(at, job_id, "modern")
    if stream:
        return follow.stream(request.app, job_id, event_object)
    page = at.history.events(job_id, after=cursor(after, starting_after), limit=limit)
    return listed([event_object(event) for event in page.data], page.has_more)


@router.get(
    "/fine_tuning/jobs/{job_id}/checkpoints", response_model=None, summary="List the checkpoints of a fine-tuning job"
)
def checkpoints(
    job_id: str, at: At, after: Cursor = None, starting_after: Cursor = None, limit: Limit = 10
) -> dict[str, Any]:
    """Newest first. Each can be asked for as a model."""
    find(at, job_id, "modern")
    page = at.history.checkpoints(job_id, after=cursor(after, starting_after), limit=limit)
    return listed([checkpoint_object(checkpoint) for checkpoint in page.data], page.has_more)


def _extensions(method: str, asked: JobRequest) -> None:
    """Raises ApiError 400 for a threshold that nothing could meet, or a choice that nothing could make."""
    if method == "dpo" and asked.metric not in (None, "auto"):
        message = "With method dpo the metric is which of two answers the model prefers; leave metric out."
        raise ApiError(400, message, param="metric")
    if method == "dpo" and asked.keep_general:
        message = "keep_general chooses a scale by answers, and method dpo has pairs of them; leave it out."
        raise ApiError(400, message, param="keep_general")
    if asked.must_improve is not None and (asked.validation_file is None or asked.proof_rows == 0):
        message = "must_improve is measured on a validation_file, and not with proof_rows 0."
        raise ApiError(400, message, param="must_improve")
    if asked.max_forgetting is not None and asked.forgetting == "off":
        raise ApiError(400, "max_forgetting needs the meter that `forgetting` turns off.", param="max_forgetting")
    if asked.keep_general and (asked.validation_file is None or asked.proof_rows == 0 or asked.forgetting == "off"):
        message = "keep_general chooses by a validation_file and the meter, so not with proof_rows 0 or forgetting off."
        raise ApiError(400, message, param="keep_general")


def _method(method: Method | None) -> str:
    """Which method it is. Raises ApiError 400 for one that is not offered, and for the fields of another."""
    chosen = "supervised" if method is None else method.type
    if chosen not in NUMBERS:
        raise ApiError(
            400,
            f"The method {chosen} is not offered by this version of the server, only {' and '.join(NUMBERS)}.",
            param="method",
            code="unsupported_value",
        )
    for other in ("supervised", "dpo", "reinforcement"):
        if other != chosen and getattr(method, other, None) is not None:
            raise ApiError(400, f"method.{other} is given, but method.type is {chosen}.", param=f"method.{other}")
    return chosen


def _numbers(chosen: str, method: Method | None, outer: Hyperparameters | None) -> dict[str, Any]:
    """The hyperparameters, from whichever of the two places they stand in. Raises ApiError 400."""
    inner = getattr(getattr(method, chosen, None), "hyperparameters", None)
    if outer is not None and outer.replay is not None and chosen != "supervised":
        raise ApiError(400, f"replay is for the method supervised, not {chosen}.", param="hyperparameters.replay")
    numbers: dict[str, Any] = {}
    for name in NUMBERS[chosen].model_fields:
        given = [value for value in (getattr(outer, name, None), getattr(inner, name, None)) if value is not None]
        if len(given) == 2 and given[0] != given[1]:
            message = f"{name} is given twice: {given[0]} in hyperparameters, {given[1]} in method."
            raise ApiError(400, message, param=f"hyperparameters.{name}")
        if given or name != "replay":
            numbers[name] = given[0] if given else "auto"
    return numbers


# What docs/compatibility.md says of the body's fields: (supported | ignored | refused, reason).
CREATE_FIELDS: dict[str, tuple[str, str]] = {
    "model": ("supported", "A base, another name for one, a tuned model or one of its checkpoints to go on from."),
    "training_file": ("supported", "Must be there, with purpose fine-tune; the job checks its rows."),
    "validation_file": ("supported", "The same."),
    "suffix": ("supported", "1 to 64 characters; cleaned for the model's name."),
    "seed": ("supported", "Chosen and reported when absent."),
    "metadata": ("supported", "16 pairs, keys of 64 and values of 512 characters."),
    "integrations": ("supported", "`wandb`, at most 5; other types are refused."),
    "method": ("supported", "`supervised` or `dpo`; the fields of another method and unknown keys are refused."),
    "method.dpo": ("supported", "The three common hyperparameters and `beta`, above 0 and at most 2; auto is 0.1."),
    "method.reinforcement": ("refused", "Not offered by this version."),
    "metric": ("supported", "An extension: how the validation file's answers are scored in the end. Not with `dpo`."),
    "proof_rows": ("supported", "An extension: how many of its rows base and result answer; `auto`, or 0 for none."),
    "forgetting": ("supported", "An extension: how many general items base and result are asked; `auto` or `off`."),
    "keep_general": (
        "supported",
        "An extension: publish at the scale that best keeps general ability. Not with `dpo`.",
    ),
    "must_improve": ("supported", "An extension, of the gate: the improvement over the base that must be shown."),
    "max_forgetting": ("supported", "An extension, of the gate: the most general ability that may be lost, 0 to 1."),
    "hyperparameters.replay": ("supported", "An extension, of method supervised: general rows to mix in, as a share."),
    "hyperparameters": ("supported", "The older place, for any method; a name with two different values is refused."),
}
