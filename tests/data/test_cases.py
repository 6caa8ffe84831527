"""Faults of data files that other programs had, and which tests hold that ours do not. The rest of them is here.

| case | fault | held by |
|---|---|---|
| B13 | BOM, UTF-16, the locale's codec | here; test_read.py (wide encodings, other bytes, the locale) |
| B15 | half of a character kills the tokenizer | test_read.py (by field), test_render.py (any text survives) |
| B16 | an over-long row loses all that it learns | here; test_doctor.py, engine/test_train.py (refused, cut, finite) |
| B18 | one schema for all rows invents keys | here; test_render.py (calls both ways), test_sheets.py (Parquet) |
| B19 | mixed shapes, the first row decides | here; test_formats.py (by line), test_read.py (arrays, strict JSON) |
| B20 | one huge line | here; test_read.py (bounded memory), api/test_files.py (by line) |
| B21 | weights of messages | test_messages.py (0 or 1), test_render.py (0 is context) |
| B23 | less data than a batch | engine/test_train.py (1, 3 and 10 rows) |
| B24 | a stale cache | test_dataset.py (content is identity), engine/test_train.py, api/test_checks.py |

Does not know: the code under test beyond data.doctor and data.formats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data import read
from luthier.data.doctor import check
from luthier.data.formats import read_examples
from luthier.data.render import Renderer
from luthier.spec.data import Chat
from tests.data.record_files import chat
from tests.data.test_doctor import found, row, write
from tests.data.test_doctor import renderer as renderer  # the fixture

ROWS = [row(n, f"é word{n}") for n in range(5)]
TEXT = "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in ROWS)


def shown(path: Path) -> dict[str, Any]:
    """A report without the names of files."""
    report = check([path]).json()
    return {**report, "statistics": list(report["statistics"]["files"].values())}


def test_b13_marks_and_line_ends_change_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    reports = []
    for content in (TEXT.encode(), TEXT.encode("utf-8-sig"), TEXT.replace("\n", "\r\n").encode()):
        path.write_bytes(content)
        reports.append(shown(path))
    assert reports[0]["records"] == 5 and reports[0]["findings"] == []
    assert reports[1] == reports[0] == reports[2]


@pytest.mark.parametrize(("codec", "word"), [("utf-16", "UTF-16"), ("cp1252", "0xE9")])
def test_b13_other_encodings_are_named(tmp_path: Path, codec: str, word: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(TEXT.encode(codec))
    report = check([path])
    assert report.exit_code == 2
    assert word in str(report.problems[0])


def test_b16_where_every_row_is_too_long(tmp_path: Path, renderer: Renderer) -> None:
    report = check([write(tmp_path / "a.jsonl", [row(n, "yes") for n in range(4)])], renderer, max_length=16)
    lost = found(report, "nothing_supervised")
    assert (lost.count, lost.rows, lost.severity, lost.fix) == (4, [1, 2, 3, 4], "error", None)


def test_b18_no_key_that_was_not_there(tmp_path: Path) -> None:
    def calling(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        properties = {key: {} for key in arguments}
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": properties}}}
        call = {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        return chat({"role": "user", "content": "go"}, {"role": "assistant", "tool_calls": [call]}) | {"tools": [tool]}

    path = write(tmp_path / "a.jsonl", [calling("move", {"x": 1, "y": None}), calling("say", {"text": "hi"})])
    made = [item for item in read_examples(path) if isinstance(item, Chat)]
    assert [turn.messages[1].tool_calls[0].arguments for turn in made] == [{"x": 1, "y": None}, {"text": "hi"}]
    assert check([path]).findings == []


def test_b19_each_row_by_itself(tmp_path: Path) -> None:
    user = {"role": "user", "content": "U"}
    named = [chat(user | {"name": None}, {"role": "assistant", "content": f"A{n}"}) for n in range(300)]
    late = chat(user | {"name": "bob"}, {"role": "assistant", "content": "last"})
    parts = chat({"role": "user", "content": [{"type": "text", "text": "part"}]}, {"role": "assistant", "content": "B"})
    broken = [
        {"prompt": "p", "completion": "c"},
        {"messages": {}},
        {"messages": []},
        "{'messages': []}",
        '{"messages": [],}',
        '{"messages": [], "messages": []}',
        '{"messages": NaN}',
    ]
    report = check([write(tmp_path / "a.jsonl", [*named, late, parts, *broken])])
    assert found(report, "invalid").rows == [303, 304, 305]
    assert found(report, "unreadable").rows == [306, 307, 308, 309]
    assert [problem.line for problem in report.problems] == list(range(303, 310))
    assert report.records == 309


def test_b20_a_huge_line_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read, "MAX_RECORD", 5_000)
    monkeypatch.setattr(read, "_CHUNK", 1_000)
    report = check([write(tmp_path / "a.jsonl", [row(0), row(1, "x" * 50_000), row(2)])])
    assert (report.records, found(report, "unreadable").rows) == (3, [2])
    assert report.problems[0].line == 2
