"""Tables and MOSS records as people have them: encodings, sheets, numbers, nulls, broken rows, real files."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from luthier.data.convert import Plan, convert
from luthier.data.fields import ColumnMap
from luthier.data.messages import Findings
from luthier.data.moss import read_moss
from luthier.data.rows import Row
from luthier.data.sources import Kind, Reading, read_any
from luthier.spec.data import Chat, Completion, Problem, Text
from luthier.spec.errors import BadData, BadSetting, NotFound
from tests.data.test_shared_data import shared

PAIR = {"prompt": "q", "completion": "a"}


def read(path: Path, kind: Kind = "auto", **more: Any) -> list[Any]:
    mapping = ColumnMap(more.pop("named", {}), more.pop("written", {}))
    rows = read_any(path, Reading(kind, columns=mapping, **more))
    return [row.meaning if isinstance(row, Row) and row.meaning else row for row in rows]


def told(path: Path, **more: Any) -> list[tuple[str, str]]:
    return [(item.prompt, item.completion) for item in read(path, **more)]


def book(path: Path, *sheets: list[list[Any]]) -> Path:
    made = openpyxl.Workbook()
    made.remove(made.active)
    for number, rows in enumerate(sheets, 1):
        page = made.create_sheet(f"S{number}")
        for row in rows:
            page.append(row)
    made.save(path)
    return path


# -- CSV and TSV -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_quotes_breaks_and_marks(tmp_path: Path, mark: bytes) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(mark + 'prompt,completion\r\n"a ""b"",\nc",1\r\n\r\né,\r\n短,2'.encode())
    first, second, third = read(path)
    assert (first.prompt, first.completion, first.line, first.row) == ('a "b",\nc', "1", 2, 1)
    assert isinstance(second, Row) and second.problems[0].field == "completion" and second.record.line == 5
    assert (third.prompt, third.line) == ("短", 6)


def test_another_encoding_is_named_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("prompt,completion\nok,1\ncafé,2\n".encode("cp1252"))
    with pytest.raises(BadData, match="line 3: found byte 0xE9, which is not UTF-8") as refusal:
        read(path)
    assert "--encoding" in (refusal.value.hint or "")
    assert told(path, encoding="cp1252") == [("ok", "1"), ("café", "2")]
    with pytest.raises(BadSetting, match="--encoding klingon is no known encoding"):
        read(path, encoding="klingon")
    wide = tmp_path / "w.tsv"
    wide.write_bytes("prompt\tcompletion\né\t1\n".encode("utf-16"))
    assert told(wide, encoding="utf-16") == [("é", "1")]


@pytest.mark.parametrize(
    ("text", "line", "found"),
    [("prompt,completion\na,b,c\n", 2, "3 cells"), ('prompt,completion\na,"b\n', 2, "unexpected end of data")],
)
def test_broken_rows(tmp_path: Path, text: str, line: int, found: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    (problem,) = read(tmp_path / "a.csv")
    assert isinstance(problem, Problem)
    assert (problem.line, problem.found, problem.file) == (line, found, "a.csv")
    assert "double quotes" in problem.hint


def test_columns_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("x,x\n1,2\n")
    with pytest.raises(BadData, match="column 'x' is there 2 times"):
        read(path)
    path.write_text("question,answer\n1,2\n")
    with pytest.raises(BadSetting, match="has the columns 'question', 'answer'") as refusal:
        read(path)
    assert "--map prompt=COLUMN" in (refusal.value.hint or "")
    with pytest.raises(BadSetting, match="no column 'nothing'"):
        read(path, named={"prompt": "nothing", "completion": "answer"})
    with pytest.raises(BadSetting, match="no field 'promt'"):
        read(path, named={"promt": "question"})
    with pytest.raises(BadSetting, match="in --map and in --set"):
        read(path, named={"prompt": "question"}, written={"prompt": "x"})
    assert told(path, named={"prompt": "question", "completion": "answer"}) == [("1", "2")]
    path.write_text("")
    with pytest.raises(BadData, match="no first line"):
        read(path)
    path.write_text("prompt,completion\n")
    assert [problem.found for problem in read(path)] == ["no rows"]
    with pytest.raises(NotFound):
        read(tmp_path / "none.csv")


def test_lists_stand_in_cells_as_json(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    good = json.dumps([{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}])
    path.write_text('messages\n"' + good.replace('"', '""') + '"\n[{]\n')
    chat, problem = read(path)
    assert isinstance(chat, Chat) and chat.messages[1].content == "a"
    assert (problem.line, problem.field) == (3, "messages") and problem.wanted == "JSON text for messages"


def test_a_row_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.neg"
    path.write_bytes(b"good \r\n\nbad\n")
    assert [(item.text, item.line) for item in read(path, "lines")] == [("good ", 1), ("bad", 3)]
    assert told(path, kind="lines", named={"prompt": "line"}, written={"completion": " no"}) == [
        ("good ", " no"),
        ("bad", " no"),
    ]


def test_options_without_a_use_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(PAIR))
    for more, param in (({"sheet": "x"}, "sheet"), ({"encoding": "cp1252"}, "encoding")):
        with pytest.raises(BadSetting) as refusal:
            read(path, **more)
        assert refusal.value.param == param
    (tmp_path / "a.txt").write_text("t")
    with pytest.raises(BadSetting, match="one text"):
        read(tmp_path / "a.txt", named={"prompt": "line"})


# -- workbooks ---------------------------------------------------------------------------------------------------------


def test_cells_of_a_workbook_are_texts(tmp_path: Path) -> None:
    rows = [["prompt", "completion", None], [1, True], [None, None], [2.5, datetime.date(2024, 5, 1)], [None, "x"]]
    assert told(book(tmp_path / "a.xlsx", rows)) == [("1", "true"), ("2.5", "2024-05-01T00:00:00"), ("", "x")]


def test_sheets_are_chosen_by_name(tmp_path: Path) -> None:
    rows = [["prompt", "completion"], ["a", "b"]]
    path = book(tmp_path / "a.xlsx", [["x"]], rows)
    with pytest.raises(BadSetting, match="2 sheets: S1, S2"):
        read(path)
    assert told(path, sheet="S2") == [("a", "b")]
    with pytest.raises(BadSetting, match="no sheet 'S3', only S1, S2"):
        read(path, sheet="S3")


def test_a_cell_beyond_the_names_is_refused(tmp_path: Path) -> None:
    path = book(tmp_path / "a.xlsx", [["prompt", "completion"], ["a", "b", "c"]])
    assert [(item.line, item.found) for item in read(path)] == [(2, "a cell in column 3, which has no name")]
    (tmp_path / "b.xlsx").write_text("not a workbook")
    with pytest.raises(BadData, match="no Excel workbook"):
        read(tmp_path / "b.xlsx")


def test_a_text_that_is_too_long_for_a_cell_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({**PAIR, "completion": "x" * 32_768}) + "\n" + json.dumps(PAIR) + "\n")
    with pytest.raises(BadData, match="completion: a text of 32,768 characters: a cell of Excel holds 32,767"):
        convert(Plan(source, tmp_path / "o.xlsx", "xlsx"))
    done = convert(Plan(source, tmp_path / "o.xlsx", "xlsx", lossy=True))
    assert (done.rows, [count.lines for count in done.left_out.values()]) == (1, [[1]])


def test_nothing_becomes_a_formula(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(json.dumps({**PAIR, "completion": "=1+1"}))
    convert(Plan(source, tmp_path / "o.xlsx", "xlsx"))
    cell = openpyxl.load_workbook(tmp_path / "o.xlsx")["data"]["B2"]
    assert (cell.value, cell.data_type) == ("=1+1", "s")


# -- Parquet -----------------------------------------------------------------------------------------------------------


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_structs_of_parquet_gain_no_keys(tmp_path: Path) -> None:
    """A column of lists of structs has every key in every element, null where a row had none."""
    said = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a", "weight": 1}]
    (chat,) = read(parquet(tmp_path / "a.parquet", [{"messages": said}]))
    assert [(turn.content, turn.weight) for turn in chat.messages] == [("u", 1), ("a", 1)]


def test_a_null_that_may_be_the_users_own_is_refused(tmp_path: Path) -> None:
    tools = [
        {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "x": x}}} for x in (None, 1)
    ]
    said = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
    first, second = read(parquet(tmp_path / "a.parquet", [{"messages": said, "tools": [tool]} for tool in tools]))
    assert (first.line, first.field, first.found) == (1, "tools", "null at tools[0].function.parameters.x")
    assert isinstance(second, Chat) and second.tools == (tools[1],)


def test_numbers_and_missing_cells_of_parquet(tmp_path: Path) -> None:
    rows = [{"prompt": None, "completion": 1}, {"prompt": "a", "completion": 2}]
    assert told(parquet(tmp_path / "a.parquet", rows)) == [("", "1"), ("a", "2")]
    (tmp_path / "b.parquet").write_text("no")
    with pytest.raises(BadData, match="no Parquet file"):
        read(tmp_path / "b.parquet")


# -- MOSS --------------------------------------------------------------------------------------------------------------


def moss(commands: str = "None", results: str = "None", thoughts: str = "None") -> dict[str, Any]:
    turn = {
        "Human": "<|Human|>: q<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thoughts}<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": f"<|Results|>:\n{results}\n<eor>\n",
        "MOSS": "<|MOSS|>: a<eom>\n",
    }
    told = "Web search: enabled. API: Search(query)\nCalculator: enabled. API: Calculate(expression)\n"
    return {"conversation_id": 1, "meta_instruction": told, "num_turns": 1, "chat": {"turn_1": turn}}


def test_calls_are_learnt_and_results_are_not() -> None:
    chat = read_moss(
        moss('Search("x, y"), Calculate("1+1")', 'Search("x, y") =>\n<|1|>: \'r\'\nCalculate("1+1") => 2', "think"),
        Findings("f", 1, 1),
    )
    assert chat
    assert [turn.role for turn in chat.messages] == ["system", "user", "assistant", "tool", "tool", "assistant"]
    assert chat.messages[2].content == "<think>\nthink\n</think>"
    calls = [(call.name, call.arguments, call.id) for call in chat.messages[2].tool_calls]
    assert calls == [("Search", {"query": "x, y"}, "call_0"), ("Calculate", {"expression": "1+1"}, "call_1")]
    assert [(turn.content, turn.tool_call_id) for turn in chat.messages[3:5]] == [
        ("<|1|>: 'r'", "call_0"),
        ("2", "call_1"),
    ]
    assert [tool["function"]["name"] for tool in chat.tools] == ["Search", "Calculate"]


def test_without_commands_there_is_one_answer() -> None:
    chat = read_moss(moss(thoughts="t"), Findings("f", 1, 1))
    assert chat and [turn.content for turn in chat.messages[1:]] == ["q", "<think>\nt\n</think>\n\na"]


@pytest.mark.parametrize(
    ("commands", "found"),
    [
        ("Draw(1)", "Draw, which the instruction does not name"),
        ('Search("a", "b")', "Search with 2 arguments, of which its API has 1"),
        ("Search(a)", "Search with 'a' at column 1"),
        ('Search("a"', "Search without a closing bracket"),
        ('Search("a") = 0', "' = 0' after a call"),
        ("1. Search", "'1. Search'"),
    ],
)
def test_commands_that_are_no_calls_are_refused(commands: str, found: str) -> None:
    findings = Findings("f", 1, 1)
    assert read_moss(moss(commands), findings) is None
    (problem,) = findings.problems
    assert problem.field == "chat.turn_1.Commands"
    assert problem.found == found or problem.found.startswith("Search with")


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("calculator", 49, [47]),
        ("equation_solver", 48, [19, 30]),
        ("mix", 47, [14, 32, 50]),
        ("text2img", 25, []),
        ("web_search", 24, [3]),
    ],
)
def test_real_moss_records(tmp_path: Path, name: str, good: int, bad: list[int]) -> None:
    source = shared(f"moss_plugins/{name}.jsonl")
    rows = [row for row in read_any(source, Reading()) if isinstance(row, Row)]
    assert [row.record.line for row in rows if row.meaning is None] == bad
    chats = [row.meaning for row in rows if isinstance(row.meaning, Chat)]
    assert len(chats) == good
    for chat in chats:
        ids = [call.id for turn in chat.messages for call in turn.tool_calls]
        assert ids == [turn.tool_call_id for turn in chat.messages if turn.role == "tool"]
        assert not any("<eo" in turn.content for turn in chat.messages)
    if not bad:
        assert convert(Plan(source, tmp_path / "o.jsonl", "chat")).rows == good


# -- real tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "named", "rows"),
    [
        ("waimai_10k/waimai_10k.csv", {"prompt": "review", "completion": "label"}, 3996),
        ("chnsenticorp_htl/ChnSentiCorp_htl_all.csv", {"prompt": "review", "completion": "label"}, 2589),
        ("openai/labelled_transactions.csv", {"prompt": "Description", "completion": "Classification"}, 101),
        ("sql_eval/instruct_advanced_sqlite.csv", {"instruction": "question", "output": "query"}, None),
    ],
)
def test_real_tables(name: str, named: dict[str, str], rows: int | None) -> None:
    found = read(shared(name), named=named)
    assert all(isinstance(item, Completion | Chat) for item in found)
    assert len(found) == (rows or len(found)) > 20


def test_real_lines(tmp_path: Path) -> None:
    for side, word in (("neg", "bad"), ("pos", "good")):
        found = read(
            shared(f"rt_polarity/rt-polarity.{side}"), "lines", encoding="cp1252", written={"text": word + " {line}"}
        )
        assert len(found) == 5331 and all(isinstance(item, Text) for item in found)
