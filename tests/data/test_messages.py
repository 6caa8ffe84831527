"""The rules inside one chat: each breach by its path, both shapes of arguments equal, tools as given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.spec.data import Chat, Message, ToolCall
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
    warned,
)

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
        ([ANSWER, USER | {"content": 5}], ("messages[1].content", "5")),
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
        ([ANSWER | {"name": 3}], ("messages[0].name", "3")),
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
    ("weight", "found"), [(0.5, "0.5"), ("1", "'1'"), (True, "true"), (-1, "-1"), (1.0, "1.0"), (2, "2")]
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
        ({"tool_calls": [call(id=7)]}, ("messages[0].tool_calls[0].id", "7")),
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
