"""What a run leaves for the client: the name of the model, the hash of its folder, the table of its steps.

A name follows from the job alone, so a worker that repeats the end of a job repeats the name.
Does not know: the store's tables; how a job ends.
"""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from luthier.spec.run import RunFolder
from luthier.store.db import ALPHABET
from luthier.store.jobs import Job

MODERN = (
    "step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy",
    "train_mean_token_accuracy", "full_valid_loss", "full_valid_mean_token_accuracy",
)  # fmt: skip
PREFERENCE = ("reward_accuracy", "reward_margin", "preference_accuracy")  # the engine's names, one pair a row
MODERN_DPO = (*MODERN, *(f"{part}_{name}" for part in ("train", "valid", "full_valid") for name in PREFERENCE))
LEGACY = (
    "step", "elapsed_tokens", "elapsed_examples",
    "training_loss", "training_sequence_accuracy", "training_token_accuracy",
)  # fmt: skip
LEGACY_VALIDATION = ("validation_loss", "validation_sequence_accuracy", "validation_token_accuracy")
REPORTS = ("report.json", "report.html")  # of a run with a proof or a meter; its table of steps comes first
FILENAMES = {"modern": "step_metrics.csv", "legacy": "compiled_results.csv"}

# -- names -------------------------------------------------------------------------------------------------------------


def clean(text: str | None, underscores: bool = True) -> str:
    """Lower case; each run of other characters than letters, digits (and _) becomes one dash, none at the ends."""
    kept = "a-z0-9_" if underscores else "a-z0-9"
    return re.sub(f"[^{kept}]+", "-", (text or "").lower()).strip("-")


def final_name(job: Job, organization: str, later: int = 0) -> str:
    """The tuned model's name. The older form has only seconds to tell two jobs apart: `later` seconds are added."""
    base, owner = job.request["base"], clean(organization) or "luthier"
    if job.kind == "legacy":
        begun = datetime.fromtimestamp((job.started_at or job.created_at) + later, UTC)
        suffix = clean(job.suffix, underscores=False)
        return f"{base}:ft-{owner}{':' if suffix else ''}{suffix}-{begun:%Y-%m-%d-%H-%M-%S}"
    number = int.from_bytes(hashlib.sha256(f"{job.id}{later or ''}".encode()).digest()[:16], "big")
    tail = ""
    for _ in range(8):
        number, place = divmod(number, len(ALPHABET))
        tail += ALPHABET[place]
    return f"ft:{base}:{owner}:{clean(job.suffix)}:{tail}"


def folder_hash(folder: Path) -> str:
    """SHA-256 over the names and contents of every file below `folder`. Raises OSError."""
    whole = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        whole.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return whole.hexdigest()


# -- numbers -----------------------------------------------------------------------------------------------------------


def metrics_of(step: dict[str, Any], validation: dict[str, Any] | None) -> dict[str, float]:
    """A step event, and the validation after that step, in OpenAI's words; the figures of pairs, for which it has none,
    in the engine's. Only what is a finite number."""
    values: dict[str, Any] = {"step": step["step"], **_measured("train", step)}
    if validation is not None:  # ours is always over the whole file
        values |= _measured("valid", validation) | _measured("full_valid", validation)
    return {name: value for name, value in values.items() if _is_number(value)}


def _measured(part: str, event: dict[str, Any]) -> dict[str, Any]:
    pairs = event.get("preference") or {}
    return {
        f"{part}_loss": event.get("loss"),
        f"{part}_mean_token_accuracy": event.get("token_accuracy"),
        **{f"{part}_{name}": pairs.get(name) for name in PREFERENCE},
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -- tables ------------------------------------------------------------------------------------------------------------


def steps_of(run: RunFolder) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Every step with the validation after it, once each: of a step that was taken again the last time counts."""
    steps: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for _, event in run.events():
        if event["type"] == "step":
            steps[event["step"]] = event
        elif event["type"] == "validation":
            validations[event["step"]] = event
    for step in sorted(steps):
        yield steps[step], validations.get(step)


def result_table(run: RunFolder, job: Job) -> bytes:
    """The job's result file: CSV, one row a step; each cell is a number or empty."""
    return (_legacy if job.kind == "legacy" else _modern)(run, job)


def _modern(run: RunFolder, job: Job) -> bytes:
    """`train_accuracy`, which OpenAI's table has for every method, is that of tokens, or of pairs with method dpo."""
    pairs = job.method == "dpo"
    columns: Sequence[str] = MODERN_DPO if pairs else MODERN
    accuracy = "train_reward_accuracy" if pairs else "train_mean_token_accuracy"
    rows = []
    for step, validation in steps_of(run):
        found = metrics_of(step, validation)
        rows.append([found.get(accuracy if name == "train_accuracy" else name) for name in columns])
    return _csv(columns, rows)


def _legacy(run: RunFolder, job: Job) -> bytes:
    steps = list(steps_of(run))
    more = list(dict.fromkeys(name for _, found in steps for name in ((found or {}).get("classification") or {})))
    rows = []
    tokens = 0
    for step, validation in steps:
        tokens += step.get("tokens") or 0
        row = [step["step"], tokens, step.get("examples"), step.get("loss"), step.get("sequence_accuracy")]
        row.append(step.get("token_accuracy"))
        seen = validation or {}
        if job.validation_file is not None:
            row += [seen.get("loss"), seen.get("sequence_accuracy"), seen.get("token_accuracy")]
        rows.append(row + [(seen.get("classification") or {}).get(name) for name in more])
    held_out = LEGACY_VALIDATION if job.validation_file is not None else ()
    return _csv([*LEGACY, *held_out, *more], rows)


def _csv(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue().encode()


def _cell(value: Any) -> str:
    if not _is_number(value):
        return ""
    return str(value) if isinstance(value, int) else f"{value:.5f}"
