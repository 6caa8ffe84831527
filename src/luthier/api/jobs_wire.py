"""The words of /fine_tuning/jobs: what a client may ask, field by field, and the objects that answer.

Does not know: routes; the store beyond the rows it shows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    StringConstraints,
    WithJsonSchema,
)

from luthier.store.history import Checkpoint, Event
from luthier.store.jobs import TERMINAL, Job

Auto = Literal["auto"]
MOST_EPOCHS = 50
LARGEST_BATCH = 256
LARGEST_BETA = 2
MOST_PROOF_ROWS = 10_000
LARGEST_SEED = 2**31 - 1


def clean(text: str) -> str:
    """PostgreSQL cannot hold the character NUL, and no name needs it."""
    if "\0" in text:
        raise ValueError("contains the character NUL")
    return text


def whole(low: int, high: int | None, auto: bool = True) -> Callable[[Any], Any]:
    """A check of a JSON integer within [low, high], or "auto"."""
    wanted = (f"an integer from {low} to {high}" if high else f"an integer of at least {low}") + (
        ' or "auto"' if auto else ""
    )

    def check(value: Any) -> Any:
        if auto and value == "auto":
            return value
        number = isinstance(value, int) and not isinstance(value, bool)
        if isinstance(value, float) and value.is_integer():  # 3.0 is JSON's 3 to many a client
            number = True
        if number and low <= value and (not high or value <= high):
            return int(value)
        raise ValueError(f"found {_shown(value)}, wanted {wanted}")

    return check


def above_zero(high: float | None = None) -> Callable[[Any], Any]:
    """A check of a JSON number above 0 and, when that is given, not above `high`, or "auto"."""
    wanted = "a number above 0" + (f" and at most {high}" if high else "") + ' or "auto"'

    def check(value: Any) -> Any:
        if value == "auto":
            return value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and 0 < value < 1e30 and (high is None or value <= high):
            return float(value)
        raise ValueError(f"found {_shown(value)}, wanted {wanted}")

    return check


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _or_auto(**schema: Any) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [{"const": "auto"}, schema]})


Epochs = Annotated[
    int | Auto, PlainValidator(whole(1, MOST_EPOCHS)), _or_auto(type="integer", minimum=1, maximum=MOST_EPOCHS)
]
BatchSize = Annotated[
    int | Auto, PlainValidator(whole(1, LARGEST_BATCH)), _or_auto(type="integer", minimum=1, maximum=LARGEST_BATCH)
]
Multiplier = Annotated[
    float | Auto, PlainValidator(above_zero()), _or_auto(type="number", exclusiveMinimum=0, exclusiveMaximum=1e30)
]
Beta = Annotated[
    float | Auto,
    PlainValidator(above_zero(LARGEST_BETA)),
    _or_auto(type="number", exclusiveMinimum=0, maximum=LARGEST_BETA),
]
Seed = Annotated[
    int,
    PlainValidator(whole(0, LARGEST_SEED, auto=False)),
    WithJsonSchema({"type": "integer", "minimum": 0, "maximum": LARGEST_SEED}),
]
Metric = Literal[
    "auto", "exact_match", "classification", "json", "tool_calls", "numeric", "text", "perplexity"
]  # never a grader of the user's own: that is code
ProofRows = Annotated[
    int | Auto, PlainValidator(whole(0, MOST_PROOF_ROWS)), _or_auto(type="integer", minimum=0, maximum=MOST_PROOF_ROWS)
]
Forgetting = Annotated[
    int | Literal["auto", "off"],
    PlainValidator(lambda value: value if value == "off" else whole(1, MOST_PROOF_ROWS)(value)),
    WithJsonSchema(
        {"anyOf": [{"enum": ["auto", "off"]}, {"type": "integer", "minimum": 1, "maximum": MOST_PROOF_ROWS}]}
    ),
]
Replay = Annotated[float, Field(ge=0, le=10, strict=True)]
Threshold = Annotated[float, Field(ge=0, le=1e30, allow_inf_nan=False, strict=True)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Text = Annotated[str, StringConstraints(min_length=1, max_length=256), AfterValidator(clean)]
Suffix = Annotated[str, StringConstraints(min_length=1, max_length=64), AfterValidator(clean)]


def _metadata(value: Any) -> Any:
    """One sentence for the whole object, so that the parameter named is `metadata`."""
    if not isinstance(value, dict):
        raise ValueError(f"found {_shown(value)}, wanted an object of strings")
    if len(value) > 16:
        raise ValueError(f"found {len(value)} pairs, wanted at most 16")
    for key, text in value.items():
        if not 1 <= len(key) <= 64:
            raise ValueError(f"found the key {_shown(key)} of {len(key)} characters, wanted 1 to 64")
        if not isinstance(text, str):
            raise ValueError(f"found {_shown(text)} under {_shown(key)}, wanted a string")
        if len(text) > 512:
            raise ValueError(f"found {len(text)} characters under {_shown(key)}, wanted at most 512")
        clean(key)
        clean(text)
    return value


Metadata = Annotated[dict[str, str], BeforeValidator(_metadata)]


class Strict(BaseModel):
    """Unknown keys are refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Common(Strict):
    """What every method has."""

    n_epochs: Epochs | None = None
    batch_size: BatchSize | None = None
    learning_rate_multiplier: Multiplier | None = None


class Hyperparameters(Common):
    """Those of the supervised method, and of the older place beside `method`."""

    replay: Replay | None = None  # an extension: shown only where it was asked for


class DpoHyperparameters(Common):
    beta: Beta | None = None


NUMBERS: dict[str, type[Common]] = {"supervised": Hyperparameters, "dpo": DpoHyperparameters}  # of each method


class Supervised(Strict):
    hyperparameters: Hyperparameters | None = None


class Dpo(Strict):
    hyperparameters: DpoHyperparameters | None = None


class Method(Strict):
    """`reinforcement` is a known word: the route refuses it with a sentence of its own."""

    type: Literal["supervised", "dpo", "reinforcement"]
    supervised: Supervised | None = None
    dpo: Dpo | None = None
    reinforcement: Any = None


class Wandb(Strict):
    project: Text
    name: Text | None = None
    entity: Text | None = None
    tags: Annotated[list[Text], Field(max_length=32)] | None = None


class Integration(Strict):
    type: Literal["wandb"]
    wandb: Wandb


class JobRequest(Strict):
    """The body of POST /fine_tuning/jobs. null is the same as absent."""

    model: Text
    training_file: Text
    validation_file: Text | None = None
    suffix: Suffix | None = None
    seed: Seed | None = None
    metadata: Metadata | None = None
    integrations: Annotated[list[Integration], Field(max_length=5)] | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters | None = None
    metric: Metric | None = None
    proof_rows: ProofRows | None = None
    forgetting: Forgetting | None = None
    keep_general: bool | None = None
    must_improve: Threshold | None = None
    max_forgetting: Share | None = None


def shown_status(job: Job) -> str:
    """A job that is wanted cancelled can end in no other state: it is shown so at once."""
    return "cancelled" if job.wanted == "cancel" and job.status not in TERMINAL else job.status


def job_object(job: Job, organization: str) -> dict[str, Any]:
    """A fine_tuning.job, with its `proof`, `forgetting` and `gate` as extensions. `error` is an object of nulls as long
    as nothing failed, as OpenAI's service answers; `hyperparameters` at the top are those of supervised jobs alone."""
    numbers, method = hyperparameters(job), job.method
    status = shown_status(job)
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": job.estimated_finish if status == "running" else None,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": organization,
        "status": status,
        "training_file": job.training_file,
        "validation_file": job.validation_file,
        "result_files": job.result_files,
        "trained_tokens": job.trained_tokens if status == "succeeded" else None,
        "hyperparameters": numbers if method == "supervised" else None,
        "method": {"type": method, method: {"hyperparameters": numbers}},
        "seed": job.seed,
        "integrations": [_integration(one, job) for one in job.request.get("integrations") or []],
        "metadata": job.metadata,
        "error": job.error or {"code": None, "message": None, "param": None},
        "user_provided_suffix": job.suffix,
        "usage_metrics": None,
        "shared_with_openai": False,
        "proof": job.proof,
        "forgetting": job.forgetting,
        "gate": job.gate,
    }


def hyperparameters(job: Job) -> dict[str, Any]:
    """What they came to once the job was set up; before that what was asked, `auto` included."""
    known = {**job.request.get("hyperparameters", {}), **(job.hyperparameters or {})}
    shown = [name for name in NUMBERS[job.method].model_fields if name != "replay" or name in known]
    return {name: known.get(name, "auto") for name in shown}


def _integration(one: dict[str, Any], job: Job) -> dict[str, Any]:
    """With the defaults that the tracker is given (work/trackers.py)."""
    wandb = one["wandb"]
    base = job.request.get("base", job.model)
    return {
        "type": "wandb",
        "wandb": {
            "project": wandb["project"],
            "name": wandb.get("name") or job.id,
            "entity": wandb.get("entity"),
            "tags": wandb.get("tags") or ["openai/finetune", f"openai/{base}", f"openai/{job.id}"],
        },
    }


def event_object(event: Event) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.event",
        "id": event.id,
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data or {},
    }


def checkpoint_object(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "object": "fine_tuning.job.checkpoint",
        "id": checkpoint.id,
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.model,
        "fine_tuning_job_id": checkpoint.job_id,
        "step_number": checkpoint.step,
        "metrics": {"step": checkpoint.step, **checkpoint.metrics},
    }
