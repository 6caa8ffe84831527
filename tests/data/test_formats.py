"""Records -> Examples: six formats, mixed files, unknown keys, and that no record is dropped in silence."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.formats import FORMATS, detect, read_examples
from luthier.data.pairs import read_pairs
from luthier.spec.data import Chat, Completion, Message, Preference, Problem, Text, ToolCall
from tests.data.record_files import (
    ANSWER,
    CHAT,
    TOOL,
    USER,
    call,
    chat,
    fault,
    good,
    problems,
    read_rows,
    turns,
    warned,
)

# --- what each format means --------------------------------------------------------------------------------------


def test_chat(tmp_path: Path) -> None:
    row = chat(
        {"role": "system", "content": "S"},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}], "name": "bob"},
        {"role": "assistant", "content": "A"},
    )
    assert good(tmp_path, CHAT, row) == [
        Chat((Message("user", "U1"), Message("assistant", "A1")), line=1, row=1),
        Chat(
            (
                Message("system", "S"),
                Message("developer", "D"),
                Message("user", "a b", name="bob"),
                Message("assistant", "A"),
            ),
            line=2,
            row=2,
        ),
    ]


def test_completion(tmp_path: Path) -> None:
    rows = [{"prompt": "color 3 ->", "completion": " red"}, {"prompt": "", "completion": "\nx"}]
    assert good(tmp_path, *rows) == [Completion("color 3 ->", " red", 1, 1), Completion("", "\nx", 2, 2)]
    assert fault(tmp_path, {"prompt": "a", "completion": ""}) == ("completion", "empty text")
    assert fault(tmp_path, {"prompt": None, "completion": "b"}) == ("prompt", "null")
    assert fault(tmp_path, {"prompt": "a", "completion": 4}) == ("completion", "4")
    field, found, example = warned(tmp_path, {"prompt": "a", "completion": " \n"})
    assert (field, found, example) == ("completion", "nothing but white space", Completion("a", " \n", 1, 1))


def test_conversational(tmp_path: Path) -> None:
    row = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER], "tools": [TOOL]}
    (example,) = good(tmp_path, row)
    assert [(turn.role, turn.weight) for turn in example.messages] == [
        ("user", 1),
        ("assistant", 0),
        ("user", 1),
        ("assistant", 1),
    ]
    assert example.tools == (TOOL,)
    assert fault(tmp_path, {"prompt": [USER], "completion": [USER]}) == ("completion", "no assistant message")
    assert fault(tmp_path, {"prompt": "2+2?", "completion": [ANSWER]}) == ("prompt", "'2+2?'")
    assert fault(tmp_path, {"prompt": [USER], "completion": []}) == ("completion", "an empty list")
    assert fault(tmp_path, {"prompt": [USER], "completion": [ANSWER | {"content": 1}]})[0] == "completion[0].content"


def test_alpaca(tmp_path: Path) -> None:
    rows = [
        {"instruction": "I", "input": "", "output": "O"},
        {"instruction": "I", "input": "X", "output": "O", "system": "S", "history": [["q", "a"]]},
        {"instruction": "", "input": "X", "output": "O", "system": None, "history": None},
        {"instruction": "I", "output": "O"},
    ]
    one = (Message("user", "I"), Message("assistant", "O"))
    assert [example.messages for example in good(tmp_path, *rows)] == [
        one,
        (
            Message("system", "S"),
            Message("user", "q"),
            Message("assistant", "a"),
            Message("user", "I\nX"),
            Message("assistant", "O"),
        ),
        (Message("user", "X"), Message("assistant", "O")),
        one,
    ]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"output": ""}, ("output", "empty text")),
        ({"output": None}, ("output", "null")),
        ({"instruction": 3}, ("instruction", "3")),
        ({"instruction": ""}, ("instruction", "empty text, and no input")),
        ({"input": ["x"]}, ("input", "a list")),
        ({"system": 1}, ("system", "1")),
        ({"history": "x"}, ("history", "'x'")),
        ({"history": [["q"]]}, ("history[0]", "a list")),
        ({"history": [["q", "a"], ["q", None]]}, ("history[1]", "a list")),
    ],
)
def test_alpaca_refuses(tmp_path: Path, change: dict[str, Any], expected: tuple[str, str]) -> None:
    assert fault(tmp_path, {"instruction": "I", "output": "O"} | change) == expected


def test_alpaca_blank_answers_are_warned_of(tmp_path: Path) -> None:
    row = {"instruction": "I", "output": " ", "history": [["q", ""]]}
    found = read_rows(tmp_path, [row])
    assert [item.field for item in found if isinstance(item, Problem)] == ["output", "history[0][1]"]
    assert isinstance(found[2], Chat)


@pytest.mark.parametrize("user", ["human", "user"])
@pytest.mark.parametrize("assistant", ["gpt", "assistant", "model", "chatgpt", "bot"])
def test_sharegpt_speakers(tmp_path: Path, user: str, assistant: str) -> None:
    (example,) = good(tmp_path, turns(("system", "S"), (user, "U"), (assistant, "A")))
    assert example.messages == (Message("system", "S"), Message("user", "U"), Message("assistant", "A"))


def test_sharegpt_system_weight_and_message_turns(tmp_path: Path) -> None:
    weighted = turns(("human", "U"), ("gpt", "A"), ("gpt", "B"), system="S")
    weighted["conversations"][1]["weight"] = 0
    first, second = good(tmp_path, weighted, {"conversations": [USER, ANSWER], "system": ""})
    assert first.messages == (
        Message("system", "S"),
        Message("user", "U"),
        Message("assistant", "A", weight=0),
        Message("assistant", "B"),
    )
    assert second.messages == (Message("user", "U1"), Message("assistant", "A1"))


@pytest.mark.parametrize("calling", ["function_call", "tool_call"])
@pytest.mark.parametrize("result", ["observation", "tool", "function_response", "tool_response"])
def test_sharegpt_tools(tmp_path: Path, calling: str, result: str) -> None:
    function = {"name": "say", "description": "d", "parameters": {"a": None}}
    row = turns(
        ("human", "U"),
        (calling, '{"name": "say", "arguments": {"b": 1, "a": null}}'),
        (result, "R1"),
        ("gpt", "A"),
        ("human", "V"),
        (calling, '[{"name": "x", "arguments": "{}"}, {"name": "y", "arguments": {}}]'),
        (result, "R2"),
        (result, "R3"),
        (result, "R4"),
        ("gpt", "B"),
        tools=json.dumps([function]),
    )
    (example,) = good(tmp_path, row)
    assert example.tools == ({"type": "function", "function": function},)
    assert example.messages == (
        Message("user", "U"),
        Message("assistant", "", tool_calls=(ToolCall("say", {"b": 1, "a": None}, "call_0"),)),
        Message("tool", "R1", tool_call_id="call_0"),
        Message("assistant", "A"),
        Message("user", "V"),
        Message("assistant", "", tool_calls=(ToolCall("x", {}, "call_1"), ToolCall("y", {}, "call_2"))),
        Message("tool", "R2", tool_call_id="call_1"),
        Message("tool", "R3", tool_call_id="call_2"),
        Message("tool", "R4", tool_call_id="call_0"),
        Message("assistant", "B"),
    )


@pytest.mark.parametrize(("tools", "expected"), [("", ()), ("[]", ()), (None, ()), ([TOOL], (TOOL,))])
def test_sharegpt_tools_as_text_or_list(tmp_path: Path, tools: Any, expected: Any) -> None:
    (example,) = good(tmp_path, turns(("human", "U"), ("gpt", "A"), tools=tools))
    assert example.tools == expected


GPT = ("gpt", "A")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (turns(("narrator", "x"), GPT), ("conversations[0].from", "'narrator'")),
        (turns((None, "x"), GPT), ("conversations[0].from", "null")),
        (turns(("human", None), GPT), ("conversations[0].value", "null")),
        (turns(("human", "x")), ("conversations", "no assistant message")),
        ({"conversations": []}, ("conversations", "an empty list")),
        ({"conversations": {}}, ("conversations", "an empty object")),
        ({"conversations": ["x"]}, ("conversations[0]", "'x'")),
        (turns(("system", "S"), GPT, system="T"), ("system", "a system text beside a system turn")),
        (turns(GPT, system=3), ("system", "3")),
        (turns(GPT, tools="{}"), ("tools", "an empty object")),
        (turns(GPT, tools=[1]), ("tools[0]", "1")),
        (turns(GPT, tools=[{"name": ""}]), ("tools[0].name", "''")),
        (turns(("function_call", '{"name": "x"}'), GPT), ("conversations[0].value.arguments", "nothing (no such key)")),
        (turns(("function_call", "[]"), GPT), ("conversations[0].value", "an empty list")),
        (
            turns(("function_call", "say()"), GPT),
            ("conversations[0].value", "'say()', which has 'say()' at character 1"),
        ),
        (
            {"conversations": [{"from": "human", "value": "x", "weight": 1}, {"from": "gpt", "value": "y"}]},
            ("conversations[0].weight", "a weight on another's turn"),
        ),
        (
            {"conversations": [{"from": "gpt", "value": "x", "weight": True}]},
            ("conversations[0].weight", "true"),
        ),
        (
            {"conversations": [{"from": "gpt", "value": "x", "loss": 1}]},
            ("conversations[0].loss", "the unknown key 'loss'"),
        ),
    ],
)
def test_sharegpt_refuses(tmp_path: Path, row: Any, expected: tuple[str, str]) -> None:
    assert fault(tmp_path, row) == expected


def test_text(tmp_path: Path) -> None:
    assert good(tmp_path, {"text": " a\n"}, {"text": "b"}) == [Text(" a\n", True, 1, 1), Text("b", True, 2, 2)]
    assert fault(tmp_path, {"text": ""}) == ("text", "empty text")
    assert fault(tmp_path, {"text": None}) == ("text", "null")
    assert warned(tmp_path, {"text": " "})[:2] == ("text", "nothing but white space")


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("x" * 70_000, encoding="utf-8")
    assert list(read_examples(path)) == [Text("x" * 65_536, False, 1, 1), Text("x" * (70_000 - 65_536), True, 1, 2)]
    path.write_bytes(b"a" * 70_000 + b"\xff")
    first, problem = read_examples(path)
    assert first == Text("a" * 65_536, True, 1, 1)
    assert isinstance(problem, Problem) and problem.severity == "error"


def test_json_lines_in_a_txt_file_are_warned_of(tmp_path: Path) -> None:
    problem, example = read_rows(tmp_path, [CHAT], "rows.txt")
    assert isinstance(problem, Problem) and isinstance(example, Text)
    assert (problem.severity, problem.found) == ("warning", "JSON in a .txt file")
    assert [type(item) for item in read_rows(tmp_path, ["[1] is a footnote"], "note.txt")] == [Text]


# --- which format ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (CHAT, "chat"),
        ({"messages": {}}, "chat"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"prompt": [], "completion": []}, "conversational"),
        ({"instruction": "a", "output": "b"}, "alpaca"),
        ({"conversations": []}, "sharegpt"),
        ({"text": "a"}, "text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
        ({"conversations": [], "chosen": {}, "rejected": {}}, "preference"),
        ({"input": {}, "preferred_output": [], "non_preferred_output": []}, "preference"),
        ({"input": {}, "preferred_completion": [], "non_preferred_completion": []}, "preference"),
        (CHAT | {"label": True}, "preference"),
        (CHAT | {"kto_tag": True}, "preference"),
        ({"text": "a", "label": 3}, "text"),
        ({"question": "a", "answer": "b"}, None),
        ({"prompt": "a"}, None),
        ({}, None),
        ([], None),
        ("text", None),
        (None, None),
    ],
)
def test_detect(value: Any, name: str | None) -> None:
    assert detect(value) == name
    assert name in (None, "preference") or name in FORMATS


def test_preference_data_says_what_it_needs(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "chosen": "a", "rejected": "b"}, CHAT]
    problem, example = read_rows(tmp_path, rows)
    assert isinstance(problem, Problem) and isinstance(example, Chat)
    assert problem.found == "a preference record (the keys prompt, chosen, rejected)"
    assert "needs a preference method" in problem.wanted


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"question": "q", "answer": "a"}, "the keys question, answer"),
        ({}, "an empty object"),
        ([CHAT], "a list"),
        ("text", "'text'"),
        (5, "5"),
        (None, "null"),
    ],
)
def test_unknown_shapes_say_what_was_found(tmp_path: Path, value: Any, found: str) -> None:
    """The rows after an unknown one are still read."""
    problem, example = read_rows(tmp_path, [{"text": "a"}, value])[::-1]
    assert isinstance(problem, Problem) and isinstance(example, Text)
    assert (problem.line, problem.found, problem.severity) == (2, found, "error")


def test_mixed_files_are_refused_by_line(tmp_path: Path) -> None:
    rows = [CHAT, {"prompt": "a", "completion": "b"}, {"text": "x"}, CHAT, {"question": "q"}]
    found = read_rows(tmp_path, rows)
    assert [(item.line, isinstance(item, Problem)) for item in found] == [
        (1, False),
        (2, True),
        (3, True),
        (4, False),
        (5, True),
    ]
    assert [(item.found, item.wanted) for item in found if isinstance(item, Problem)] == [
        ("a completion record", "a chat record, as in line 1"),
        ("a text record", "a chat record, as in line 1"),
        ("the keys question", "a chat record, as in line 1"),
    ]


def test_first_rows_decide_nothing_about_types(tmp_path: Path) -> None:
    quiet = chat(USER | {"name": None}, ANSWER)
    named = chat(USER | {"name": "bob", "content": [{"type": "text", "text": "U1"}]}, ANSWER)
    examples = good(tmp_path, *[quiet] * 3000, named)
    assert len(examples) == 3001
    assert {example.messages[0].name for example in examples[:3000]} == {None}
    assert examples[3000].messages[0] == Message("user", "U1", name="bob")


def test_unknown_top_level_keys_are_counted_once_a_file(tmp_path: Path) -> None:
    rows = [CHAT, CHAT | {"id": 1}, CHAT | {"id": 2, "source": "x"}, chat(USER, id=3)]
    found = read_rows(tmp_path, rows)
    assert [type(item) for item in found] == [Chat, Chat, Chat, Problem, Problem, Problem]
    assert [(item.line, item.field, item.found, item.severity) for item in found if isinstance(item, Problem)] == [
        (4, "messages", "no assistant message", "error"),
        (2, "id", "the key 'id' in 3 records", "warning"),
        (3, "source", "the key 'source' in 1 record", "warning"),
    ]


def test_unknown_keys_take_bounded_memory(tmp_path: Path) -> None:
    found = problems(tmp_path, *[{"text": "a", f"key{number}": 1} for number in range(500)])
    assert len(found) == 101
    assert (found[-1].field, found[-1].found) == ("(other keys)", "the key '(other keys)' in 400 records")


# --- nothing is dropped in silence -------------------------------------------------------------------------------

SEEDS: list[Any] = [
    chat(
        {"role": "system", "content": "S"},
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call({"a": [1]}), call()]},
        {"role": "tool", "content": "R", "tool_call_id": "x"},
        ANSWER | {"weight": 1},
        tools=[TOOL],
    ),
    {"prompt": "p", "completion": "c"},
    {"prompt": [USER], "completion": [ANSWER]},
    {"instruction": "i", "input": "x", "output": "o", "history": [["q", "a"]], "system": "s"},
    turns(("human", "U"), ("function_call", '{"name": "x", "arguments": {}}'), ("observation", "R"), GPT, tools="[]"),
    {"text": "t"},
]
LEAVES = st.sampled_from(
    [None, True, 0, 1, -1, 0.5, "", " ", "x", "{bad", "\ud83d", [], {}, [None], {"a": 1}, "user"]
).map(copy.deepcopy)


@st.composite
def broken_rows(draw: st.DrawFn) -> Any:
    """A good record with a few places replaced, removed or added to; or any JSON value."""
    row = copy.deepcopy(draw(st.sampled_from(SEEDS) | LEAVES))
    for _ in range(draw(st.integers(0, 3))):
        holder: Any = row
        while isinstance(holder, dict | list) and holder:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = draw(st.sampled_from(keys))
            if not isinstance(holder[key], dict | list) or draw(st.booleans()):
                action = draw(st.sampled_from(["replace", "remove", "add"]))
                if action == "replace":
                    holder[key] = draw(LEAVES)
                elif action == "remove":
                    del holder[key]
                elif isinstance(holder, dict):
                    holder[draw(st.sampled_from(["weight", "name", "text", "label", "zzz"]))] = draw(LEAVES)
                else:
                    holder.append(draw(LEAVES))
                break
            holder = holder[key]
    return row


@given(st.lists(broken_rows(), min_size=1, max_size=6), st.booleans())
@settings(deadline=None, max_examples=400)
def test_every_record_is_an_example_or_has_an_error(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], array: bool
) -> None:
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_text(json.dumps(rows) if array else "".join(json.dumps(row) + "\n" for row in rows))
    if not array and not path.read_text().startswith("{"):
        path = path.rename(path.with_suffix(".jsonl"))
        if path.read_text().startswith("["):
            return  # such a file is an array, and its second line an error
    found = list(read_examples(path))
    kept = [item.row for item in found if not isinstance(item, Problem)]
    failed = {item.row for item in found if isinstance(item, Problem) and item.severity == "error"}
    assert sorted(kept + list(failed)) == list(range(1, len(rows) + 1))
    for item in found:
        if isinstance(item, Problem):
            assert item.file == path.name and item.line and item.row and item.found and item.wanted
            str(item).encode()
        elif isinstance(item, Chat):
            assert all(isinstance(turn.content, str) for turn in item.messages)
            assert any(turn.role == "assistant" and turn.weight == 1 for turn in item.messages)
            json.dumps([item.tools, [[c.arguments for c in turn.tool_calls] for turn in item.messages]]).encode()


def test_every_example_in_the_documentation_is_read_as_its_heading_says(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "data-formats.md").read_text(encoding="utf-8")
    shown: dict[str, int] = {}
    for section in page.split("\n### ")[1:]:
        for block in section.split("```json\n")[1:]:
            row = json.loads(block.partition("```")[0])
            name = section.partition("\n")[0].removesuffix(" data").lower()
            shown[name] = shown.get(name, 0) + 1
            assert detect(row) == name
            if name == "preference":
                path = tmp_path / "pairs.jsonl"
                path.write_text(json.dumps(row))
                [pair] = read_pairs(path)
                assert isinstance(pair, Preference)
            else:
                assert len(good(tmp_path, row)) == 1
    assert shown == dict.fromkeys(FORMATS, 1) | {"chat": 2, "preference": 1}
