"""metrics.csv of a run: a line an optimizer step, for people and their tables.

Does not know: what the numbers mean.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from typing import Any

from luthier.spec.run import RunFolder, append_line, write_whole

METRICS = (
    "step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "supervised_tokens", "seconds",
    "validation_loss", "validation_token_accuracy",
)  # fmt: skip


def start(run: RunFolder) -> None:
    write_whole(run.metrics, _csv(METRICS) + "\n")


def add(run: RunFolder, measured: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """The line of one step; `scores` of its validation, empty without one."""
    own = (measured[name] for name in METRICS[:8])
    append_line(run.metrics, _csv([*own, scores.get("loss"), scores.get("token_accuracy")]))


def cut(run: RunFolder, step: int) -> None:
    """Keep the lines up to `step`. A damaged line is left out: a record for people must not keep a run from going
    on."""
    text = run.metrics.read_text(encoding="utf-8", errors="replace") if run.metrics.is_file() else ""
    kept = [line for line in text.splitlines() if line.count(",") == len(METRICS) - 1 and _step_of(line) <= step]
    write_whole(run.metrics, "\n".join([_csv(METRICS), *kept]) + "\n")


def _step_of(line: str) -> float:
    """The step of a line; infinite when it has none."""
    number = line.partition(",")[0]
    return int(number) if number.isdecimal() else math.inf


def _csv(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["" if value is None else value for value in values])
    return line.getvalue()
