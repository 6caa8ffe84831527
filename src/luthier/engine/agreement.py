"""A run that goes on must be the run that began: its spec.json beside what the same request comes to now.

Does not know: how either was made.
"""

from __future__ import annotations

import json
from typing import Any

from luthier.spec.errors import Broken, UserError
from luthier.spec.job import Settings, TrainRequest
from luthier.spec.run import RunFolder

SPEC_KEYS = {"request", "settings", "base", "template", "data", "validation"}


def request_of(run: RunFolder) -> TrainRequest:
    """What the run was asked. Raises UserError when its request.json is damaged."""
    try:
        return TrainRequest.model_validate_json(run.request.read_text(encoding="utf-8"))
    except ValueError as error:  # pydantic's own is one
        reason = " ".join(str(error).split())
        raise UserError(f"{run.request} is damaged: {reason}", hint="Start a new run.", param="resume") from error


def spec_of(run: RunFolder) -> dict[str, Any]:
    """What it came to when it began. Raises Broken when its spec.json is damaged."""
    try:
        spec: Any = json.loads(run.spec.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Broken(
            f"{run.spec} cannot be read, so the run cannot go on: {error}.", hint="Start a new run."
        ) from error
    if not isinstance(spec, dict) or not spec.keys() >= SPEC_KEYS:
        raise Broken(f"{run.spec} is damaged, so the run cannot go on.", hint="Start a new run.")
    return dict(spec)


def require(before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError unless `now` says the same run as `before`: base, data, template and settings, by content."""
    before, now = ({"parent": None, **spec, "options": _options(spec["request"])} for spec in (before, now))
    for key, words in (
        ("base", "the base model"),
        ("parent", "the model to continue from"),
        ("template", "the chat template"),
        ("data", "the training data"),
        ("validation", "the validation data"),
        ("settings", "the settings"),
        ("options", "the settings"),
    ):
        left, right = before[key], now[key]
        if key == "base":
            left, right = left["hash"], right["hash"]
        if key == "template":
            left, right = left["source"], right["source"]
        if key == "data":
            left, right = left["rows"], right["rows"]
        if key == "settings":  # those that were not known when they were written have their defaults
            left, right = Settings.model_validate(left), Settings.model_validate(right)
        if left != right:
            raise UserError(
                f"The run cannot go on: {words} changed since it was started.",
                hint="Put it back as it was, or start a new run.",
                param=key,
            )


def _options(request: dict[str, Any]) -> dict[str, Any]:
    """The options of a recorded request; those that were not known when it was written have their defaults."""
    files = {"data", "replay_data", "validation", "proof_data"}
    by_content = files | {"model", "template", "continue_from"}  # wherever they lie now
    return TrainRequest.model_validate(request).model_dump(exclude=by_content)
