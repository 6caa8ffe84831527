"""Tool calls: right when the same tools are called with the same arguments, as JSON values.

The order of keys, and of calls that are made together, does not matter; 1 and 1.0 are the same number, true and 1 are
not the same value. Does not know: how a template writes calls (data/render.py has read them).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from luthier.data.answer import parse_answer
from luthier.proof.metrics import Scored, is_exact, mean
from luthier.spec.data import Example, ToolCall


def canonical(value: Any) -> str:
    """JSON text that is equal exactly for equal JSON values: keys in order, whole floats as integers."""
    return json.dumps(_plain(value), sort_keys=True, ensure_ascii=False)


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def calls_of(text: str) -> list[ToolCall]:
    """The calls in an answer's text: those that data/answer.py wrote, a line each, or `<tool_call>` blocks."""
    if calls := parse_answer(text).tool_calls:
        return list(calls)
    return [call for line in text.splitlines() if (call := _call(line))]


def _call(line: str) -> ToolCall | None:
    if not line.startswith('{"name": '):
        return None
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return ToolCall(str(value["name"]), value["arguments"]) if value.keys() == {"name", "arguments"} else None


def tool_calls(answers: Sequence[str], wanted: Sequence[str], examples: Sequence[Example]) -> Scored:
    """1 where exactly the wanted calls are made; where none is wanted, where none is made."""
    del examples
    rows: list[float] = []
    names: list[float] = []
    silent: list[float] = []
    for answer, reference in zip(answers, wanted, strict=True):
        made, right = calls_of(answer), calls_of(reference)
        rows.append(float(Counter(map(_key, made)) == Counter(map(_key, right))))
        if right:
            names.append(float(Counter(call.name for call in made) == Counter(call.name for call in right)))
        else:
            silent.append(float(not made))
    exact = [float(is_exact(*pair)) for pair in zip(answers, wanted, strict=True)]
    details = {"right_tools": mean(names), "no_call_where_none_is_wanted": mean(silent), "exact_match": mean(exact)}
    return Scored(rows, details)


def _key(call: ToolCall) -> tuple[str, str]:
    return call.name, canonical(call.arguments)
