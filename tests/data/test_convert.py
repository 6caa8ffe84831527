"""Converting: what is written reads back as an equal Example, and what a format cannot hold is said by line."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.convert import Converted, Plan, convert
from luthier.data.encode import Unfit, encode
from luthier.data.fields import ColumnMap
from luthier.data.formats import read_examples
from luthier.data.read import Record
from luthier.data.rows import Row, rows_of
from luthier.data.sources import Reading, read_any
from luthier.spec.data import Chat, Completion, Message, Preference, Problem, Text, ToolCall
from luthier.spec.errors import BadData, BadSetting, UserError
from tests.data.record_files import TOOL, call
from tests.data.test_shared_data import shared

TARGETS = ("chat", "preference", "preference-completion", "completion", "alpaca", "sharegpt", "text")
TABLES = ("csv", "tsv", "xlsx", "parquet")
CHARACTERS = st.characters(codec="utf-8")
TEXT = st.text(CHARACTERS, max_size=12) | st.sampled_from(
    ["", " ", "=1+1", '"', "a,b\n", "\r\n", "_x000D_", "\x00", "1"]
)
SOLID = TEXT.filter(bool)
JSON_VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
ARGUMENTS = st.dictionaries(TEXT, JSON_VALUE, max_size=2) | TEXT | st.lists(JSON_VALUE, max_size=2)
TOOLS = st.lists(st.just(TOOL), max_size=2).map(tuple)


@st.composite
def chats(draw: st.DrawFn) -> Chat:
    """Conversations as people write them: any optional part may be there."""
    turns: list[Message] = []
    if draw(st.booleans()):
        turns.append(Message(draw(st.sampled_from(["system", "developer"])), draw(TEXT)))
    numbered = 0
    for _ in range(draw(st.integers(1, 3))):
        turns.append(Message("user", draw(TEXT), draw(st.none() | SOLID)))
        if draw(st.integers(0, 3)) == 0:
            canonical = draw(st.booleans())
            ids = [
                f"call_{numbered + n}" if canonical else draw(st.none() | SOLID) for n in range(draw(st.integers(1, 2)))
            ]
            numbered += len(ids)
            calls = tuple(ToolCall(draw(SOLID), draw(ARGUMENTS), each) for each in ids)
            turns.append(Message("assistant", draw(st.just("") | TEXT), tool_calls=calls))
            turns += [Message("tool", draw(TEXT), tool_call_id=each or "x") for each in ids]
        turns.append(Message("assistant", draw(TEXT), weight=draw(st.sampled_from([1, 1, 0]))))
    turns[-1] = dataclasses.replace(turns[-1], weight=1)
    return Chat(tuple(turns), draw(TOOLS))


COMPLETIONS = st.builds(Completion, TEXT, SOLID)
TEXTS = st.builds(Text, SOLID)
ANSWERS = st.lists(st.builds(Message, st.just("assistant"), SOLID), min_size=1, max_size=2).map(tuple)
PREFERENCES = st.builds(
    Preference,
    st.lists(st.builds(Message, st.just("user"), TEXT), min_size=1, max_size=2).map(tuple),
    ANSWERS,
    ANSWERS,
    TOOLS,
)
MEANINGS = chats() | COMPLETIONS | TEXTS | PREFERENCES


def read_back(records: Sequence[Any]) -> list[Any]:
    found = list(rows_of([Record(0, 0, json.loads(json.dumps(record))) for record in records], "f"))
    assert [
        problem for row in found if isinstance(row, Row) for problem in row.problems if problem.severity == "error"
    ] == []
    return [row.meaning for row in found if isinstance(row, Row)]


def same(meaning: Any, other: Any) -> bool:
    """Equal, or the same words in another kind of record."""
    if type(meaning) is type(other):
        return bool(meaning == other)
    forms = {json.dumps(encode(each, "completion")[0]) for each in (meaning, other)}
    return len(forms) == 1


@settings(max_examples=400, deadline=None)
@given(meaning=MEANINGS, target=st.sampled_from(TARGETS))
def test_what_is_written_without_a_loss_reads_back_equal(meaning: Any, target: str) -> None:
    try:
        record, losses = encode(meaning, target)
    except Unfit:
        return
    (back,) = read_back([record])
    if not losses:
        assert same(meaning, back)
        again, more = encode(back, target)
        assert again == record and not more


@given(meaning=MEANINGS)
def test_its_own_format_holds_everything(meaning: Any) -> None:
    own = {Chat: "chat", Completion: "completion", Text: "text", Preference: "preference"}[type(meaning)]
    record, losses = encode(meaning, own)
    assert losses == [] and read_back([record]) == [meaning]


def write(path: Path, records: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def meanings(path: Path, **reading: Any) -> list[Any]:
    rows = list(read_any(path, Reading(**reading)))
    assert [row for row in rows if isinstance(row, Problem)] == []
    return [_unplaced(row.meaning) for row in rows if isinstance(row, Row)]


def _unplaced(meaning: Any) -> Any:
    return meaning and dataclasses.replace(meaning, line=0, row=0)


@pytest.mark.parametrize("table", TABLES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_tables_hold_everything(table: str, data: st.DataObject) -> None:
    """JSON -> table -> JSON, of each kind of record, any character, many rows."""
    kind = data.draw(st.sampled_from([chats(), COMPLETIONS, TEXTS, PREFERENCES]))
    given_meanings = data.draw(st.lists(kind, min_size=1, max_size=4))
    own = {Chat: "chat", Completion: "completion", Text: "text", Preference: "preference"}[type(given_meanings[0])]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write(folder / "a.jsonl", [encode(each, own)[0] for each in given_meanings])
        done = convert(Plan(source, folder / f"b.{table}", table))
        assert (done.rows, done.format, done.lost, done.left_out) == (len(given_meanings), own, {}, {})
        assert meanings(folder / f"b.{table}") == given_meanings
        convert(Plan(folder / f"b.{table}", folder / "c.jsonl", own))
        assert meanings(folder / "c.jsonl") == given_meanings


def converted(folder: Path, records: Sequence[Any], target: Any, name: str = "out.jsonl", **more: Any) -> Converted:
    return convert(Plan(write(folder / "in.jsonl", records), folder / name, target, force=True, **more))


U, A = {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [call('{"x": 1}')]}
RESULT = {"role": "tool", "tool_call_id": "call_id", "content": "r"}


@pytest.mark.parametrize(
    ("record", "target", "what"),
    [
        ({"messages": [U, A], "tools": [TOOL]}, "alpaca", "tools"),
        ({"messages": [{**U, "name": "bob"}, A]}, "alpaca", "names of speakers"),
        ({"messages": [U, {**A, "weight": 0}, U, A]}, "alpaca", "weight 0: every answer of Alpaca is learnt"),
        ({"messages": [{"role": "system", "content": "s"}, U, A]}, "completion", "system messages"),
        ({"messages": [U, CALLED, RESULT, A]}, "sharegpt", "ids of tool calls, which are numbered anew"),
        (
            {"messages": [U, {**CALLED, "content": "w", "tool_calls": [call() | {"id": "call_0"}]}]},
            "sharegpt",
            "words beside tool calls",
        ),
        ({"messages": [U, A], "parallel_tool_calls": True}, "sharegpt", "parallel_tool_calls"),
        (
            {"messages": [{**U, "role": "developer"}, U, A]},
            "sharegpt",
            "developer messages, written as system messages",
        ),
        ({"prompt": "p", "completion": "c"}, "text", "where the prompt ends and what is learnt begins"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "chat", "the answer that is not preferred"),
        ({"messages": [U, A], "conversations": 1}, "sharegpt", "the key conversations"),
    ],
)
def test_what_is_lost_is_refused_by_line_or_counted(tmp_path: Path, record: Any, target: str, what: str) -> None:
    with pytest.raises(BadData, match="1 problem, so nothing was written") as refusal:
        converted(tmp_path, [record], target)
    (problem,) = refusal.value.problems
    assert (problem.line, problem.row, problem.found, problem.file) == (1, 1, what, "in.jsonl")
    assert "--lossy" in problem.hint and not (tmp_path / "out.jsonl").exists()
    done = converted(tmp_path, [record], target, lossy=True)
    assert {each: (count.rows, count.lines) for each, count in done.lost.items()} == {what: (1, [1])}
    assert done.rows == 1 and len(meanings(tmp_path / "out.jsonl")) == 1


@pytest.mark.parametrize(
    ("record", "target", "why"),
    [
        ({"messages": [U, CALLED, RESULT, A]}, "alpaca", "tool calls or their results"),
        ({"messages": [U, U, A]}, "alpaca", "turns in the order user, user, assistant"),
        ({"messages": [U, A, U, A]}, "completion", "4 turns"),
        ({"messages": [U, A]}, "preference", "one answer"),
        ({"messages": [U, A]}, "text", "a conversation"),
        ({"text": "t"}, "chat", "plain text"),
        ({"prompt": "", "completion": "c"}, "alpaca", "an empty prompt"),
    ],
)
def test_what_fits_in_no_way_is_left_out(tmp_path: Path, record: Any, target: str, why: str) -> None:
    with pytest.raises(BadData) as refusal:
        converted(tmp_path, [record], target)
    assert refusal.value.problems[0].found.startswith(why)
    done = converted(tmp_path, [record], target, lossy=True)
    assert (done.records, done.rows) == (1, 0)
    assert [(reason.startswith(why), count.lines) for reason, count in done.left_out.items()] == [(True, [1])]
    assert (tmp_path / "out.jsonl").read_bytes() == b""


def test_other_keys_come_along_or_are_left_out(tmp_path: Path) -> None:
    record = {"messages": [U, A], "parallel_tool_calls": False, "id": 7, "source": "s"}
    done = converted(tmp_path, [record], "chat")
    assert json.loads((tmp_path / "out.jsonl").read_text()) == record
    assert {key: count.rows for key, count in done.carried.items()} == {"id": 1, "source": 1}
    done = converted(tmp_path, [record], "chat", drop_extra=True)
    assert list(json.loads((tmp_path / "out.jsonl").read_text())) == ["messages", "parallel_tool_calls"]
    assert (list(done.carried), list(done.dropped)) == ([], ["id", "source"])


def test_arrays_and_lines(tmp_path: Path) -> None:
    records = [{"prompt": "é", "completion": "1"}, {"prompt": "", "completion": "2"}]
    converted(tmp_path, records, "completion", "out.json")
    assert json.loads((tmp_path / "out.json").read_text("utf-8")) == records
    convert(Plan(tmp_path / "out.json", tmp_path / "out.jsonl", "completion"))
    assert [json.loads(line) for line in (tmp_path / "out.jsonl").read_text("utf-8").splitlines()] == records


def test_broken_rows_are_named_by_line(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"prompt": "a", "completion": "1"}\n{"prompt": "b"\n{"prompt": "c", "completion": 3}\n')
    with pytest.raises(BadData, match="2 problems") as refusal:
        convert(Plan(source, tmp_path / "b.jsonl", "chat", lossy=True))
    assert [problem.line for problem in refusal.value.problems] == [2, 3]


# -- plain text --------------------------------------------------------------------------------------------------------


def test_text_there_and_back(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwo\n\n é".encode())
    convert(Plan(tmp_path / "a.txt", tmp_path / "b.jsonl", "text"))
    assert [each.text for each in read_examples(tmp_path / "b.jsonl") if isinstance(each, Text)] == ["one\r\ntwo\n\n é"]
    convert(Plan(tmp_path / "b.jsonl", tmp_path / "c.txt", "text"))
    assert (tmp_path / "c.txt").read_bytes() == (tmp_path / "a.txt").read_bytes()


def test_several_texts_in_one_document_are_a_loss(tmp_path: Path) -> None:
    records = [{"text": "a"}, {"text": "b"}]
    with pytest.raises(BadData, match="where one document ends"):
        converted(tmp_path, records, "text", "out.txt")
    done = converted(tmp_path, records, "text", "out.txt", lossy=True)
    assert (tmp_path / "out.txt").read_text() == "a\n\nb" and done.rows == 2


def test_records_do_not_go_into_a_text_file(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match="would be plain text"):
        converted(tmp_path, [{"messages": [U, A]}], "chat", "out.txt")


# -- real files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "target", "rows"),
    [
        ("llama_factory/alpaca_en_demo.json", "chat", 999),
        ("llama_factory/alpaca_zh_demo.json", "sharegpt", 1000),
        ("llama_factory/glaive_toolcall_zh_demo.json", "chat", 150),
        ("llama_factory/dpo_en_demo.json", "preference", 99),
        ("llama_factory/dpo_zh_demo.json", "preference-completion", 150),
        ("medicalgpt/dpo_zh_500.jsonl", "preference", 166),
        ("medicalgpt/toolcall_dpo_zh_demo.jsonl", "preference", 11),
        ("medicalgpt/medical_sft_1K_format.jsonl", "alpaca", 500),
        ("self_llm_huanhuan/huanhuan.json", "chat", 3729),
        ("openai/toy_chat_fine_tuning.jsonl", "sharegpt", 5),
        ("mlx_wikisql/train.jsonl", "completion", 1000),
        ("fastchat/dummy_conversation.json", "chat", 500),
    ],
)
def test_real_files_keep_their_meaning(tmp_path: Path, name: str, target: Any, rows: int) -> None:
    source = shared(name)
    done = convert(Plan(source, tmp_path / "out.jsonl", target))
    assert (done.records, done.rows, done.lost, done.left_out) == (rows, rows, {}, {})
    before, after = meanings(source), meanings(tmp_path / "out.jsonl")
    assert len(after) == rows and all(map(same, before, after))


def test_drone_calls_lose_their_ids_in_sharegpt(tmp_path: Path) -> None:
    source = shared("openai/drone_training.jsonl")
    with pytest.raises(BadData, match="206 problems"):
        convert(Plan(source, tmp_path / "out.jsonl", "sharegpt"))
    done = convert(Plan(source, tmp_path / "out.jsonl", "sharegpt", lossy=True))
    assert {what: count.rows for what, count in done.lost.items()} == {
        "ids of tool calls, which are numbered anew": 103,
        "parallel_tool_calls": 103,
    }
    assert done.rows == 103


def test_ultrafeedback_rows_have_the_conversation_twice(tmp_path: Path) -> None:
    source = shared("firefly/dummy_dpo.jsonl")
    done = convert(Plan(source, tmp_path / "out.jsonl", "preference", drop_extra=True))
    assert done.rows == done.records == len(source.read_text("utf-8").splitlines())
    assert set(done.dropped) == {"prompt_id", "messages", "score_chosen", "score_rejected"}


def test_unpaired_answers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadData, match="150 problems"):
        convert(Plan(shared("llama_factory/kto_en_demo.json"), tmp_path / "o.jsonl", "chat", lossy=True))


def test_keys_of_json_can_be_mapped(tmp_path: Path) -> None:
    reading = Reading(columns=ColumnMap({"prompt": "question", "completion": "answer"}))
    done = convert(Plan(shared("gsm8k/test.jsonl"), tmp_path / "o.jsonl", "chat", reading=reading))
    assert done.rows == 1319
    source = write(tmp_path / "a.jsonl", [{"question": "q", "answer": 4}, {"question": "q"}])
    with pytest.raises(BadData, match="line 2, answer: found the keys question, wanted the key answer"):
        convert(Plan(source, tmp_path / "p.jsonl", "completion", reading=reading))
    write(source, [{"question": "q", "answer": 4, "more": {"x": 1}}])
    written = Reading(columns=ColumnMap({"completion": "answer"}, {"prompt": "{question}? {more}"}))
    convert(Plan(source, tmp_path / "p.jsonl", "completion", reading=written))
    assert json.loads((tmp_path / "p.jsonl").read_text()) == {"prompt": 'q? {"x": 1}', "completion": "4"}


def test_the_extra_is_named_when_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module, kind in (("openpyxl", "xlsx"), ("pyarrow", "parquet")):
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f"{module}.parquet", None)
        with pytest.raises(UserError, match=f"package {module}, which is not installed") as refusal:
            converted(tmp_path, [{"text": "t"}], kind, f"o.{kind}")
        assert "luthier[tables]" in (refusal.value.hint or "")
        assert not (tmp_path / f"o.{kind}").exists()
