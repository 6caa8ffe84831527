"""Records -> Examples: six formats, every rule of a message, and that no record is dropped in silence."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.formats import FORMATS, detect, read_examples
from luthier.spec.data import Chat, Completion, Example, Message, Problem, Text, ToolCall

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
    assert fault(tmp_path, {"prompt": "a", "completion": 4}) == ("completion", "'4'")
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
        ({"instruction": 3}, ("instruction", "'3'")),
        ({"instruction": ""}, ("instruction", "empty text, and no input")),
        ({"input": ["x"]}, ("input", "a list")),
        ({"system": 1}, ("system", "'1'")),
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


def turns(*pairs: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": text} for speaker, text in pairs]} | more


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
        (turns(GPT, system=3), ("system", "'3'")),
        (turns(GPT, tools="{}"), ("tools", "an empty object")),
        (turns(GPT, tools=[1]), ("tools[0]", "'1'")),
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
    assert "preference method, which this version does not have" in problem.wanted


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ({"question": "q", "answer": "a"}, "the keys question, answer"),
        ({}, "an empty object"),
        ([CHAT], "a list"),
        ("text", "'text'"),
        (5, "'5'"),
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


# --- the rules of a message --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ({}, ("messages", "an empty object")),
        ([], ("messages", "an empty list")),
        (None, ("messages", "null")),
        ("hi", ("messages", "'hi'")),
        ([ANSWER, "hi"], ("messages[1]", "'hi'")),
        ([ANSWER, None], ("messages[1]", "null")),
        ([USER], ("messages", "no assistant message")),
        ([ANSWER, {"content": "x"}], ("messages[1].role", "nothing (no such key)")),
        ([ANSWER, {"role": "narrator", "content": "x"}], ("messages[1].role", "'narrator'")),
        ([ANSWER, {"role": ["user"], "content": "x"}], ("messages[1].role", "a list")),
        ([ANSWER, {"role": "Assistant", "content": "x"}], ("messages[1].role", "'Assistant'")),
        ([ANSWER | {"loss": True}], ("messages[0].loss", "the unknown key 'loss'")),
        ([ANSWER, USER | {"content": None}], ("messages[1].content", "null")),
        ([ANSWER, {"role": "user"}], ("messages[1].content", "nothing (no such key)")),
        ([ANSWER, USER | {"content": 5}], ("messages[1].content", "'5'")),
        ([ANSWER, USER | {"content": {"type": "text"}}], ("messages[1].content", "an object with the keys type")),
        ([ANSWER, USER | {"content": []}], ("messages[1].content", "an empty list")),
        ([ANSWER, USER | {"content": ["x"]}], ("messages[1].content[0]", "'x'")),
        (
            [ANSWER, USER | {"content": [{"type": "text", "text": "x"}, {"type": "image_url", "image_url": {}}]}],
            ("messages[1].content[1].type", "'image_url'"),
        ),
        ([ANSWER, USER | {"content": [{"text": "x"}]}], ("messages[1].content[0].type", "nothing (no such key)")),
        ([ANSWER, USER | {"content": [{"type": "text"}]}], ("messages[1].content[0].text", "nothing (no such key)")),
        (
            [ANSWER, USER | {"content": [{"type": "text", "text": "x", "cache": 1}]}],
            ("messages[1].content[0].cache", "the unknown key 'cache'"),
        ),
        ([ANSWER | {"content": None}], ("messages[0].content", "null")),
        ([{"role": "assistant"}], ("messages[0].content", "nothing (no such key)")),
        ([ANSWER | {"name": 3}], ("messages[0].name", "'3'")),
        ([ANSWER | {"name": ""}], ("messages[0].name", "''")),
        ([ANSWER | {"refusal": "no"}], ("messages[0].refusal", "a refusal beside content")),
        ([ANSWER, USER | {"refusal": "no"}], ("messages[1].refusal", "'no'")),
        ([ANSWER | {"reasoning_content": "hm"}], ("messages[0].reasoning_content", "'hm'")),
        ([ANSWER | {"audio": {"id": "x"}}], ("messages[0].audio", "an object with the keys id")),
        ([ANSWER | {"annotations": [1]}], ("messages[0].annotations", "a list")),
        ([ANSWER, {"role": "tool", "content": "x"}], ("messages[1].tool_call_id", "nothing (no such key)")),
        ([ANSWER, {"role": "tool", "content": "x", "tool_call_id": ""}], ("messages[1].tool_call_id", "''")),
        ([ANSWER, {"role": "function", "content": "x"}], ("messages[1].name", "nothing (no such key)")),
        ([ANSWER, USER | {"tool_call_id": "x"}], ("messages[1].tool_call_id", "'x'")),
    ],
)
def test_message_rules(tmp_path: Path, messages: Any, expected: tuple[str, str]) -> None:
    assert fault(tmp_path, {"messages": messages}) == expected


@pytest.mark.parametrize(
    ("weight", "found"), [(0.5, "'0.5'"), ("1", "'1'"), (True, "true"), (-1, "'-1'"), (1.0, "'1.0'"), (2, "'2'")]
)
def test_weight_is_the_integer_0_or_1(tmp_path: Path, weight: Any, found: str) -> None:
    assert fault(tmp_path, chat(USER, ANSWER | {"weight": weight})) == ("messages[1].weight", found)


def test_weights(tmp_path: Path) -> None:
    a1, a2 = ANSWER | {"weight": 0}, {"role": "assistant", "content": "A2", "weight": 1}
    (example,) = good(tmp_path, chat(USER, a1, USER, a2))
    assert [turn.weight for turn in example.messages if turn.role == "assistant"] == [0, 1]
    assert fault(tmp_path, chat(USER, a1)) == ("messages", "weight 0 on every assistant message")
    assert fault(tmp_path, chat(USER | {"weight": 1}, ANSWER)) == ("messages[0].weight", "a weight on another's turn")


def test_null_is_absence_in_api_dumps(tmp_path: Path) -> None:
    nulls = dict.fromkeys(
        ["name", "weight", "tool_calls", "function_call", "refusal", "audio", "reasoning_content", "tool_call_id"]
    )
    (example,) = good(tmp_path, chat(USER, ANSWER | nulls | {"annotations": []}, tools=None, parallel_tool_calls=None))
    assert example.messages == (Message("user", "U1"), Message("assistant", "A1"))


def test_a_refusal_is_the_answer_when_content_is_null(tmp_path: Path) -> None:
    (example,) = good(tmp_path, chat(USER, {"role": "assistant", "content": None, "refusal": "I will not."}))
    assert example.messages[1] == Message("assistant", "I will not.")


def test_null_content_beside_calls_is_empty_and_never_the_word_none(tmp_path: Path) -> None:
    calls = [call()]
    contents: list[dict[str, Any]] = [
        {"content": None},
        {},
        {"content": ""},
        {"content": [{"type": "text", "text": "hi"}]},
    ]
    rows = [chat(USER, {"role": "assistant", "tool_calls": calls} | content) for content in contents]
    assert [example.messages[1].content for example in good(tmp_path, *rows)] == ["", "", "", "hi"]
    assert "None" not in "".join(example.messages[1].content for example in good(tmp_path, *rows))


@pytest.mark.parametrize("content", ["", " ", "\n\t", [{"type": "text", "text": ""}]])
def test_blank_answers_are_kept_and_warned_of(tmp_path: Path, content: Any) -> None:
    field, found, example = warned(tmp_path, chat(USER, ANSWER | {"content": content}))
    assert (field, found) == ("messages[1].content", "a blank answer")
    assert isinstance(example, Chat)
    good(tmp_path, chat(USER, ANSWER | {"content": content, "weight": 0}, ANSWER))


def test_a_last_message_that_is_not_the_assistants_is_warned_of(tmp_path: Path) -> None:
    field, found, example = warned(tmp_path, chat(USER, ANSWER, USER))
    assert (field, found) == ("messages[2].role", '"user" in the last message')
    assert len(example.messages) == 3


def test_all_problems_of_a_record_are_reported(tmp_path: Path) -> None:
    row = chat(USER | {"weight": 1, "content": None}, ANSWER | {"weight": 2, "x": 1}, 3, tools={})
    assert [problem.field for problem in problems(tmp_path, row)] == [
        "messages[0].content",
        "messages[0].weight",
        "messages[1].x",
        "messages[1].weight",
        "messages[2]",
        "tools",
    ]


# --- tools -------------------------------------------------------------------------------------------------------


def test_arguments_as_text_and_as_object_are_equal(tmp_path: Path) -> None:
    shapes: list[Any] = ['{"tz":"UTC","n":1}', {"tz": "UTC", "n": 1}]
    first, second = good(tmp_path, *[chat(USER, {"role": "assistant", "tool_calls": [call(s)]}) for s in shapes])
    assert first.messages == second.messages
    assert first.messages[1].tool_calls == (ToolCall("say", {"tz": "UTC", "n": 1}, "call_id"),)
    assert list(first.messages[1].tool_calls[0].arguments) == ["tz", "n"]


def test_a_whole_tool_exchange(tmp_path: Path) -> None:
    row = chat(
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call(), call('{"a": null}')]},
        {"role": "tool", "tool_call_id": "call_id", "content": "R", "name": "say"},
        ANSWER,
        tools=[TOOL],
        parallel_tool_calls=False,
    )
    (example,) = good(tmp_path, row)
    assert example.messages[1].tool_calls == (ToolCall("say", {}, "call_id"), ToolCall("say", {"a": None}, "call_id"))
    assert example.messages[2] == Message("tool", "R", name="say", tool_call_id="call_id")


def test_older_function_calls(tmp_path: Path) -> None:
    function = {"name": "say", "parameters": {"x": None}}
    row = chat(
        USER,
        {"role": "assistant", "content": None, "function_call": {"name": "say", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "say", "content": "R"},
        ANSWER,
        functions=[function],
    )
    (example,) = good(tmp_path, row)
    assert example.messages[1] == Message("assistant", "", tool_calls=(ToolCall("say", {"a": 1}),))
    assert example.messages[2] == Message("tool", "R", name="say")
    assert example.tools == ({"type": "function", "function": function},)


def test_tools_stay_exactly_as_given(tmp_path: Path) -> None:
    """No key of another row's tool appears, and a null that the user wrote survives."""
    move = {"type": "function", "function": {"name": "move", "parameters": {"x": {}, "y": {}}, "strict": None}}
    say = {"type": "function", "function": {"name": "say", "description": None}, "extra": {"deep": [None]}}
    rows = [
        chat(USER, {"role": "assistant", "tool_calls": [call('{"x": 1, "y": 2}', "move")]}, tools=[move]),
        chat(USER, {"role": "assistant", "tool_calls": [call('{"text": null}')]}, tools=[say]),
    ]
    first, second = good(tmp_path, *rows)
    assert json.dumps(first.tools) == json.dumps([move])
    assert json.dumps(second.tools) == json.dumps([say])
    assert first.messages[1].tool_calls[0].arguments == {"x": 1, "y": 2}
    assert second.messages[1].tool_calls[0].arguments == {"text": None}


def test_arguments_encoded_twice_are_kept_as_their_text(tmp_path: Path) -> None:
    twice = json.dumps(json.dumps({"a": 1}))
    field, found, example = warned(tmp_path, chat(USER, {"role": "assistant", "tool_calls": [call(twice)]}))
    assert field == "messages[1].tool_calls[0].function.arguments"
    assert found == "JSON text that holds the text '{\"a\": 1}'"
    assert example.messages[1].tool_calls[0].arguments == '{"a": 1}'
    field, found, example = warned(tmp_path, chat(USER, {"role": "assistant", "tool_calls": [call("[1]")]}))
    assert (found, example.messages[1].tool_calls[0].arguments) == ("JSON text that holds a list", [1])


ARGUMENTS = "messages[0].tool_calls[0].function.arguments"


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"tool_calls": []}, ("messages[0].tool_calls", "an empty list")),
        ({"tool_calls": {}}, ("messages[0].tool_calls", "an empty object")),
        ({"tool_calls": ["x"]}, ("messages[0].tool_calls[0]", "'x'")),
        ({"tool_calls": [call(type="tool")]}, ("messages[0].tool_calls[0].type", "'tool'")),
        ({"tool_calls": [call(id=7)]}, ("messages[0].tool_calls[0].id", "'7'")),
        ({"tool_calls": [call(index=0)]}, ("messages[0].tool_calls[0].index", "the unknown key 'index'")),
        ({"tool_calls": [call(function=None)]}, ("messages[0].tool_calls[0].function", "null")),
        ({"tool_calls": [call(name="")]}, ("messages[0].tool_calls[0].function.name", "''")),
        ({"tool_calls": [call(name=None)]}, ("messages[0].tool_calls[0].function.name", "null")),
        (
            {"tool_calls": [call("{bad")]},
            (ARGUMENTS, "'{bad', which has 'bad' at character 2"),
        ),
        ({"tool_calls": [call("")]}, (ARGUMENTS, "'', which has the end of the text at character 1")),
        ({"tool_calls": [call('{"a": 1, "a": 2}')]}, (ARGUMENTS,)),
        ({"tool_calls": [call('{"a": NaN}')]}, (ARGUMENTS,)),
        ({"tool_calls": [call('{"a": "\\ud83d"}')]}, (ARGUMENTS,)),
        ({"tool_calls": [call(None)]}, (ARGUMENTS, "null")),
        ({"tool_calls": [call([1])]}, (ARGUMENTS, "a list")),
        ({"function_call": "say"}, ("messages[0].function_call", "'say'")),
        ({"function_call": {"name": "say"}}, ("messages[0].function_call.arguments", "nothing (no such key)")),
        (
            {"function_call": {"name": "say", "arguments": "{}"}, "tool_calls": [call()]},
            ("messages[0].function_call", "function_call beside tool_calls"),
        ),
        (
            {"role": "user", "tool_calls": [call()]},
            ("messages[0].tool_calls", "a call in a user message"),
        ),
    ],
)
def test_calls_refused(tmp_path: Path, message: dict[str, Any], expected: tuple[str, ...]) -> None:
    field, found = fault(tmp_path, chat({"role": "assistant", "content": "x"} | message, ANSWER))
    assert (field, found)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"tools": {}}, ("tools", "an empty object")),
        ({"tools": ["x"]}, ("tools[0]", "'x'")),
        ({"tools": [{"name": "say"}]}, None),
        ({"tools": [TOOL | {"type": "web_search"}]}, ("tools[0].type", "'web_search'")),
        ({"tools": [{"type": "function"}]}, ("tools[0].function", "nothing (no such key)")),
        ({"tools": [{"type": "function", "function": {}}]}, ("tools[0].function.name", "nothing (no such key)")),
        (
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]},
            ("tools[0].function.parameters", "an empty list"),
        ),
        ({"tools": [TOOL], "functions": []}, ("functions", "functions beside tools")),
        ({"functions": {}}, ("functions", "an empty object")),
        ({"functions": [{}]}, ("functions[0].name", "nothing (no such key)")),
        ({"parallel_tool_calls": "yes"}, ("parallel_tool_calls", "'yes'")),
    ],
)
def test_tools_refused(tmp_path: Path, more: dict[str, Any], expected: tuple[str, str] | None) -> None:
    if expected is None:
        assert {problem.severity for problem in problems(tmp_path, CHAT | more)} == {"error"}
    else:
        assert fault(tmp_path, CHAT | more) == expected


def test_problems_read_as_sentences(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, chat(USER, ANSWER | {"weight": "1"}))
    assert str(problem) == (
        "rows.jsonl: line 1, messages[1].weight: found '1', wanted the integer 0 (context) or 1 (learnt)."
    )
    (problem,) = problems(tmp_path, chat(USER | {"content": [{"type": "image_url"}]}, ANSWER))
    assert str(problem) == (
        "rows.jsonl: line 1, messages[0].content[0].type: found 'image_url', wanted \"text\". "
        "This version trains on text parts only."
    )


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
            name = section.partition("\n")[0]
            shown[name] = shown.get(name, 0) + 1
            assert detect(row) == name
            assert len(good(tmp_path, row)) == 1
    assert shown == dict.fromkeys(FORMATS, 1) | {"chat": 2}
