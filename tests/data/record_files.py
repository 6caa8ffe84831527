"""Small training files written and read back, for the tests of formats and messages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from luthier.data.formats import read_examples
from luthier.spec.data import Example, Problem

USER = {"role": "user", "content": "U1"}
ANSWER = {"role": "assistant", "content": "A1"}
CHAT = {"messages": [USER, ANSWER]}
TOOL = {"type": "function", "function": {"name": "say", "parameters": {"type": "object", "properties": {}}}}


def call(arguments: Any = "{}", name: Any = "say", **more: Any) -> dict[str, Any]:
    return {"id": "call_id", "type": "function", "function": {"name": name, "arguments": arguments}} | more


def read_rows(folder: Path, rows: Sequence[Any], name: str = "rows.jsonl") -> list[Example | Problem]:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return list(read_examples(path))


def good(folder: Path, *rows: Any) -> list[Any]:
    """The examples of rows that have nothing wrong with them."""
    found = read_rows(folder, rows)
    assert [item for item in found if isinstance(item, Problem)] == []
    return found


def problems(folder: Path, *rows: Any) -> list[Problem]:
    return [item for item in read_rows(folder, rows) if isinstance(item, Problem)]


def fault(folder: Path, row: Any) -> tuple[str, str]:
    """Field and finding of the one error that a row gives."""
    (problem,) = read_rows(folder, [row])
    assert isinstance(problem, Problem), problem
    assert (problem.severity, problem.line, problem.row, problem.file) == ("error", 1, 1, "rows.jsonl")
    assert problem.wanted
    return problem.field, problem.found


def warned(folder: Path, row: Any) -> tuple[str, str, Any]:
    """Field and finding of the one warning that a row gives, and its example, which comes after it."""
    problem, example = read_rows(folder, [row])
    assert isinstance(problem, Problem) and not isinstance(example, Problem)
    assert problem.severity == "warning"
    return problem.field, problem.found, example


def chat(*messages: Any, **more: Any) -> dict[str, Any]:
    return {"messages": list(messages), **more}


def turns(*pairs: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in pairs]} | more
