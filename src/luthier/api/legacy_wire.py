"""The words of /fine-tunes, the older API: its defaults, its fields and its objects, in which files lie whole.

Does not know: routes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field, PlainValidator, StringConstraints, WithJsonSchema

from luthier.api.jobs_wire import (
    LARGEST_BATCH,
    MOST_EPOCHS,
    Auto,
    BatchSize,
    Epochs,
    Multiplier,
    Strict,
    Text,
    clean,
    shown_status,
    whole,
)
from luthier.store.history import Event
from luthier.store.jobs import Job

DEFAULT_MODEL = "curie"
DEFAULT_EPOCHS = 4
DEFAULT_PROMPT_LOSS_WEIGHT = 0.01
STATUS = {"validating_files": "pending", "queued": "pending", "paused": "pending"}  # the others are its own words
CLASSIFICATION = (
    "compute_classification_metrics",
    "classification_n_classes",
    "classification_positive_class",
    "classification_betas",
)

Suffix = Annotated[str, StringConstraints(min_length=1, max_length=40), AfterValidator(clean)]
Classes = Annotated[
    int, PlainValidator(whole(2, 100_000, auto=False)), WithJsonSchema({"type": "integer", "minimum": 2})
]
# A class keeps its leading space, which is part of its token: " baseball".
ClassName = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(clean)]
Beta = Annotated[float, Field(gt=0, lt=1e6, allow_inf_nan=False, strict=True)]


class LaterHyperparameters(Strict):
    """Where the last months of this API moved n_epochs to."""

    n_epochs: Epochs | None = None


class FineTuneRequest(Strict):
    """The body of POST /fine-tunes. null is the same as absent."""

    training_file: Text
    validation_file: Text | None = None
    model: Text | None = None
    n_epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None
    prompt_loss_weight: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)] | None = None
    compute_classification_metrics: Annotated[bool, Field(strict=True)] | None = None
    classification_n_classes: Classes | None = None
    classification_positive_class: ClassName | None = None
    classification_betas: Annotated[list[Beta], Field(max_length=16)] | None = None
    suffix: Suffix | None = None
    hyperparameters: LaterHyperparameters | None = None


def default_batch_size(rows: int) -> int:
    """About 0.2 % of the rows, as the nearest power of two, 1 to 256."""
    size = 1
    while size < LARGEST_BATCH and size * 2 <= 0.002 * rows * 4 / 3:  # 4/3: half way from size to its double
        size *= 2
    return size


def default_multiplier(model: str, batch_size: int) -> float:
    """Larger with larger batches; smaller for the largest of the old models."""
    if model.removeprefix("text-").startswith("davinci"):
        return 0.05
    return 0.1 if batch_size <= 16 else 0.2


def resolved(asked: FineTuneRequest, model: str, rows: Callable[[], int]) -> dict[str, Any]:
    """Every hyperparameter as a number; `rows` counts the training examples, when the batch size depends on them."""
    later = asked.hyperparameters.n_epochs if asked.hyperparameters else None
    epochs = _given(asked.n_epochs) or _given(later) or DEFAULT_EPOCHS
    batch_size = _given(asked.batch_size) or default_batch_size(rows())
    weight = asked.prompt_loss_weight
    numbers = {
        "n_epochs": epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": _given(asked.learning_rate_multiplier) or default_multiplier(model, batch_size),
        "prompt_loss_weight": DEFAULT_PROMPT_LOSS_WEIGHT if weight is None else weight,
        "compute_classification_metrics": bool(asked.compute_classification_metrics),
    }
    optional = {name: getattr(asked, name) for name in CLASSIFICATION[1:]}
    return {**numbers, **{name: value for name, value in optional.items() if value is not None}}


def _given(value: Any | Auto) -> Any:
    return None if value == "auto" else value


def trouble(asked: FineTuneRequest) -> tuple[str, str] | None:
    """(parameter, sentence) when the fields do not go together."""
    later = asked.hyperparameters.n_epochs if asked.hyperparameters else None
    if None not in (asked.n_epochs, later) and asked.n_epochs != later:
        return "n_epochs", f"n_epochs is given twice: {asked.n_epochs}, and {later} in hyperparameters."
    several = asked.classification_n_classes is not None and asked.classification_n_classes > 2
    if several and asked.classification_positive_class is not None:
        return "classification_n_classes", "A positive class is one of two: leave out classification_n_classes."
    if asked.classification_betas and asked.classification_positive_class is None:
        return "classification_betas", "classification_betas need a classification_positive_class."
    if not asked.compute_classification_metrics:
        return None
    if asked.validation_file is None:
        return "compute_classification_metrics", "Classification metrics need a validation_file to be computed on."
    if asked.classification_n_classes is None and asked.classification_positive_class is None:
        return (
            "compute_classification_metrics",
            "Classification metrics need classification_n_classes, or classification_positive_class for two classes.",
        )
    return None


def fine_tune_object(
    job: Job, organization: str, file: Callable[[str], dict[str, Any]], events: list[Event] | None = None
) -> dict[str, Any]:
    """A fine-tune. `file` gives the whole object of a file; `events`, oldest first, are left out where None."""
    made = {
        "object": "fine-tune",
        "id": job.id,
        "created_at": job.created_at,
        "updated_at": job.updated_at,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": organization,
        "status": STATUS.get(shown_status(job), shown_status(job)),
        "hyperparams": hyperparams(job),
        "training_files": [file(job.training_file)],
        "validation_files": [file(job.validation_file)] if job.validation_file else [],
        "result_files": [file(file_id) for file_id in job.result_files],
    }
    if events is not None:
        made["events"] = [shown for event in events if (shown := event_object(event)) is not None]
    return made


def gone_object(file_id: str) -> dict[str, Any]:
    """A file that was deleted since the job named it: nothing but its id is known, and clients read that."""
    return {
        "object": "file",
        "id": file_id,
        "bytes": 0,
        "created_at": 0,
        "filename": "",
        "purpose": "fine-tune",
        "status": "deleted",
        "status_details": "This file has been deleted.",
    }


def hyperparams(job: Job) -> dict[str, Any]:
    """The numbers that were asked for or came from the defaults; those of classification only where it was asked."""
    asked = job.request.get("hyperparameters", {})
    plain = ("n_epochs", "batch_size", "prompt_loss_weight", "learning_rate_multiplier")
    metrics = CLASSIFICATION if asked.get("compute_classification_metrics") else ()
    return {name: asked.get(name) for name in (*plain, *metrics) if name in plain or name in asked}


def event_object(event: Event) -> dict[str, Any] | None:
    """None for measurements: the older API told only sentences."""
    if event.type != "message":
        return None
    return {
        "object": "fine-tune-event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
    }


# What docs/compatibility.md says of the body's fields: (supported | ignored | refused, reason).
CREATE_FIELDS: dict[str, tuple[str, str]] = {
    "training_file": ("supported", "Rows of prompt and completion."),
    "validation_file": ("supported", "The same."),
    "model": ("supported", f"`{DEFAULT_MODEL}` when absent; the old names mean bases of this server."),
    "n_epochs": ("supported", f"{DEFAULT_EPOCHS} when absent, at most {MOST_EPOCHS}."),
    "batch_size": ("supported", f"0.2 % of the rows when absent, as the nearest power of two, 1 to {LARGEST_BATCH}."),
    "learning_rate_multiplier": (
        "supported",
        "0.1 when absent, 0.2 above a batch of 16, 0.05 for davinci; 0.1 is the server's own rate.",
    ),
    "prompt_loss_weight": ("supported", f"{DEFAULT_PROMPT_LOSS_WEIGHT} when absent, 0 to 1."),
    "compute_classification_metrics": ("supported", "Needs a validation file, and one of the next two."),
    "classification_n_classes": ("supported", "2 or more."),
    "classification_positive_class": ("supported", "For two classes."),
    "classification_betas": ("supported", "For two classes; others are refused."),
    "suffix": ("supported", "1 to 40 characters or null."),
    "hyperparameters": ("supported", "`n_epochs` alone, where late versions of the API moved it."),
}
