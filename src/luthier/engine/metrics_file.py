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
OF_PAIRS = (  # in place of the last
    "validation_preference_accuracy", "validation_reward_accuracy", "validation_reward_margin",
    "reward_accuracy", "reward_margin",
)  # fmt: skip


def start(run: RunFolder, pairs: bool = False) -> None:
    write_whole(run.metrics, _head(pairs) + "\n")


def add(run: RunFolder, measured: Mapping[str, Any], scores: Mapping[str, Any]) -> None:
    """The line of one step; `scores` of its validation, empty without one."""
    line = [*(measured[name] for name in METRICS[:8]), scores.get("loss")]
    if (now := measured["preference"]) is None:
        line.append(scores.get("token_accuracy"))
    else:
        then = scores.get("preference") or {}
        line += [then.get(name) for name in ("preference_accuracy", "reward_accuracy", "reward_margin")]
        line += [now[name] for name in ("reward_accuracy", "reward_margin")]
    append_line(run.metrics, _csv(line))


def cut(run: RunFolder, step: int, pairs: bool = False) -> None:
    """Keep the lines up to `step`. A damaged line is left out: a record for people must not keep a run from going
    on."""
    text = run.metrics.read_text(encoding="utf-8", errors="replace") if run.metrics.is_file() else ""
    head = _head(pairs)
    kept = [line for line in text.splitlines() if line.count(",") == head.count(",") and _step_of(line) <= step]
    write_whole(run.metrics, "\n".join([head, *kept]) + "\n")


def _head(pairs: bool) -> str:
    return _csv((*METRICS[:9], *OF_PAIRS) if pairs else METRICS)


def _step_of(line: str) -> float:
    """The step of a line; infinite when it has none."""
    number = line.partition(",")[0]
    return int(number) if number.isdecimal() else math.inf


def _csv(values: Iterable[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(["" if value is None else value for value in values])
    return line.getvalue()
