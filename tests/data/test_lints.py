"""What one example shows by itself: every mark is made by the row that has it, and by no clean one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from luthier.data.characters import LANGUAGES, broken, language
from luthier.data.findings import KINDS
from luthier.data.lints import look
from luthier.spec.data import Completion, Message, Text
from tests.data.record_files import ANSWER, USER, call, chat, read_rows

MOVE = {
    "type": "function",
    "function": {
        "name": "move",
        "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]},
    },
}


def system(text: str = "S") -> dict[str, Any]:
    return {"role": "system", "content": text}


def result(told: str = "call_id") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": told, "content": "done"}


def moves(arguments: Any, name: str = "move", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, "tool_calls": [call(arguments, name, **more)]}


def marks(folder: Path, row: dict[str, Any]) -> list[tuple[str, str]]:
    example = read_rows(folder, [row])[-1]
    found = list(look(example))  # type: ignore[arg-type]
    assert {mark.kind for mark in found} <= KINDS.keys()
    return [(mark.kind, mark.detail) for mark in found]


CLEAN = [
    chat(USER, ANSWER),
    chat(system(), USER, ANSWER, USER, ANSWER),
    chat(USER, moves('{"x": 1}'), tools=[MOVE]),
    chat(USER, moves('{"x": 1}'), result(), ANSWER, tools=[MOVE]),
    chat(USER, moves('{"x": 1}'), result(), moves('{"x": 2}'), result(), ANSWER, USER, ANSWER, tools=[MOVE]),
    {"prompt": "p ->", "completion": " c"},
    {"instruction": "i", "output": "o", "history": [["a", "b"]]},
]


@pytest.mark.parametrize("row", CLEAN)
def test_a_clean_row_has_no_mark(row: dict[str, Any], tmp_path: Path) -> None:
    assert marks(tmp_path, row) == []


ODD = [
    (chat(USER, system(), ANSWER), "system message after user"),
    (chat(USER, USER, ANSWER), "two user messages in a row"),
    (chat(USER, ANSWER, ANSWER), "two assistant messages in a row"),
    (chat(ANSWER, USER, ANSWER), "an assistant message before anybody asked"),
    (chat(USER, ANSWER, USER), "user in the last message"),
    (chat(USER, result(), ANSWER), "a tool's answer that no call asked for"),
    (chat(USER, moves('{"x": 1}'), USER, ANSWER, tools=[MOVE]), "user message while a call waits for its answer"),
    (
        chat(USER, moves('{"x": 1}'), result("other"), ANSWER, tools=[MOVE]),
        "a tool's answer to 'other', and the open calls are call_id",
    ),
]


@pytest.mark.parametrize(("row", "detail"), ODD, ids=[detail for _, detail in ODD])
def test_odd_roles(row: dict[str, Any], detail: str, tmp_path: Path) -> None:
    assert marks(tmp_path, row) == [("odd_roles", detail)]


def test_no_user(tmp_path: Path) -> None:
    assert marks(tmp_path, chat(system(), ANSWER)) == [("missing_user", "only system and assistant")]


def test_blank_answers(tmp_path: Path) -> None:
    blank = {"role": "assistant", "content": " \n"}
    assert marks(tmp_path, chat(USER, blank)) == [("blank_answer", "nothing but white space")]
    assert marks(tmp_path, chat(USER, blank | {"weight": 0}, USER, ANSWER)) == []
    assert marks(tmp_path, {"prompt": "p", "completion": " "}) == [("blank_answer", "nothing but white space")]


CALLS = [
    (chat(USER, moves("{}", "fly"), tools=[MOVE]), "undeclared_tool", "calls 'fly', and the row declares move"),
    (chat(USER, moves('{"x": 1}')), "undeclared_tool", "calls 'move', and the row declares no tools"),
    (chat(USER, moves("{}"), tools=[MOVE]), "tool_arguments", "'move': \"x\" is a required property"),
    (chat(USER, moves('{"x": "1"}'), tools=[MOVE]), "tool_arguments", '\'move\': x: "1" is not of type "integer"'),
    (chat(USER, moves('"{}"'), tools=[MOVE]), "double_encoded", "JSON text that holds the text '{}'"),
]


@pytest.mark.parametrize(("row", "kind", "detail"), CALLS, ids=[kind for _, kind, _ in CALLS])
def test_calls(row: dict[str, Any], kind: str, detail: str, tmp_path: Path) -> None:
    assert marks(tmp_path, row) == [(kind, detail)]


@pytest.mark.parametrize(
    ("parameters", "said"),
    [({"type": "dict"}, "is not valid"), ({"$ref": "http://127.0.0.1:9/x"}, "leads out of the file")],
)
def test_a_schema_that_is_none(parameters: dict[str, Any], said: str, tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "move", "parameters": parameters}}
    ((kind, detail),) = marks(tmp_path, chat(USER, moves('{"x": 1}'), tools=[tool]))
    assert kind == "tool_schema" and said in detail


def test_a_pattern_made_to_hang_does_not(tmp_path: Path) -> None:
    text = {"type": "string", "pattern": "^(a+)+$"}
    tool = {"type": "function", "function": {"name": "move", "parameters": {"properties": {"x": text}}}}
    ((kind, _),) = marks(tmp_path, chat(USER, moves('{"x": "' + "a" * 5000 + 'b"}'), tools=[tool]))
    assert kind == "tool_arguments"


def test_control_tokens(tmp_path: Path) -> None:
    for token in ("<|im_end|>", "<|endoftext|>", "</s>", "[/INST]", "<end_of_turn>", "<eos>", "<｜User｜>"):
        row = chat(USER, {"role": "assistant", "content": f"hello {token} there"})
        assert marks(tmp_path, row) == [("special_tokens", repr(token))]
    example = Completion("a", "<|im_end|> and <stop>")
    assert [mark.detail for mark in look(example, re.compile("<stop>"))] == ["'<stop>'"]
    assert list(look(example, None)) == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("caf\ufffd", "U+FFFD, which stands for bytes that could not be read"),
        ("a\ufeffb", "a byte-order mark inside the text"),
        ("nul \x00", "the control character U+0000"),
        ("你\x07", "the control character U+0007"),
        ("café".encode().decode("cp1252"), "'Ã©', UTF-8 that was read as another encoding"),
        ("it’s".encode().decode("cp1252"), "'â€™', UTF-8 that was read as another encoding"),
        ("你好".encode().decode("latin-1"), "'ä½\\xa0', UTF-8 that was read as another encoding"),
        ("привет".encode().decode("latin-1"), None),
    ],
)
def test_broken_characters(text: str, found: str | None) -> None:
    assert broken(text) == found if found else broken(text)


@pytest.mark.parametrize(
    "text",
    [
        "tab\tand\nline\r\n",
        "naïve café «ça va»",
        "NÃO, AÇÃO",
        "你好，世界",
        "👩‍👩‍👧 e\u0301",
        "Ærø Åse 5 €",
        "привет «мир»",
        "",
    ],
)
def test_sound_characters(text: str) -> None:
    assert broken(text) is None


def test_text_records_are_looked_at() -> None:
    assert [mark.kind for mark in look(Text("ask bob@firm.org"))] == ["personal_data"]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("The cat sat on the mat and it was warm.", "English"),
        ("Le chat est dans la maison et il dort sur le lit.", "French"),
        ("Der Hund ist nicht in dem Haus, sondern auf der Straße.", "German"),
        ("El perro está en la casa y no quiere salir por la noche.", "Spanish"),
        ("今天天气很好，我们去公园吧。", "Chinese"),
        ("今日は天気がいいから散歩しましょう。", "Japanese"),
        ("오늘은 날씨가 아주 좋습니다.", "Korean"),
        ("Сегодня хорошая погода.", "Cyrillic"),
        ("42", ""),
        ("def f(x): return x", ""),
    ],
)
def test_language(text: str, name: str) -> None:
    assert LANGUAGES[language(text)] == name


def test_messages_are_named_by_their_place(tmp_path: Path) -> None:
    example = read_rows(tmp_path, [chat(system(), USER, {"role": "assistant", "content": "x@y.org"})])[-1]
    assert [mark.field for mark in look(example)] == ["messages[2].content"]  # type: ignore[arg-type]
    assert isinstance(example.messages[2], Message)  # type: ignore[union-attr]
