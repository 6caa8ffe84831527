"""A run that goes on must be the run that began: its spec.json beside what the same request comes to now.

Does not know: how either was made.
"""

from __future__ import annotations

from typing import Any

from luthier.spec.errors import UserError
from luthier.spec.job import TrainRequest


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
