"""Real public files, where the checkout has them beside it; none of them ships with the product."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.data.formats import read_examples
from luthier.data.read import Record, read_records
from luthier.spec.data import Chat, Problem, Text

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.is_file():
        pytest.skip(f"no ../shared/data/{name} here")
    return path


def read_file(name: str) -> tuple[list[Any], list[Problem]]:
    found = list(read_examples(shared(name)))
    good = [item for item in found if not isinstance(item, Problem)]
    return good, [item for item in found if isinstance(item, Problem)]


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("openai/toy_chat_fine_tuning.jsonl", Chat, 5),
        ("openai/drone_training.jsonl", Chat, 103),
        ("self_llm_huanhuan/huanhuan.json", Chat, 3729),
        ("llama_factory/alpaca_en_demo.json", Chat, 999),
        ("llama_factory/alpaca_zh_demo.json", Chat, 1000),
        ("llama_factory/identity.json", Chat, 91),
        ("llama_factory/glaive_toolcall_en_demo.json", Chat, None),
        ("llama_factory/glaive_toolcall_zh_demo.json", Chat, 150),
        ("llama_factory/c4_demo.jsonl", Text, 150),
        ("medicalgpt/medical_sft_1K_format.jsonl", Chat, 500),
        ("mlx_wikisql/train.jsonl", Text, 1000),
    ],
)
def test_every_row_is_read(name: str, kind: type, count: int | None) -> None:
    path = shared(name)
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]
    good, problems = read_file(name)
    assert len(good) == len(rows) == (count or len(rows))
    assert {type(example) for example in good} == {kind}
    # The one thing in these files that may be remarked on: arguments that were encoded twice.
    assert [problem for problem in problems if not problem.field.endswith("arguments")] == []


def test_arguments_of_the_drone_file() -> None:
    """Revisions of this file differ: one has a row whose arguments were encoded twice. Count, do not assume."""
    rows = [json.loads(line) for line in shared("openai/drone_training.jsonl").read_text("utf-8").splitlines()]
    texts = [c["function"]["arguments"] for row in rows for turn in row["messages"] for c in turn.get("tool_calls", ())]
    twice = [text for text in texts if isinstance(json.loads(text), str)]
    good, problems = read_file("openai/drone_training.jsonl")
    assert len(problems) == len(twice)
    assert {problem.severity for problem in problems} <= {"warning"}
    calls = [call for example in good for turn in example.messages for call in turn.tool_calls]
    assert [call.arguments for call in calls] == [json.loads(text) for text in texts]
    assert {call.id for call in calls} == {"call_id"}
    assert [list(example.tools) for example in good] == [row["tools"] for row in rows]


def test_the_toy_chat_file() -> None:
    good, problems = read_file("openai/toy_chat_fine_tuning.jsonl")
    assert problems == []
    assert [len(example.messages) for example in good] == [3, 9, 2, 2, 3]
    assert max(len(turn.content) for example in good for turn in example.messages) > 20_000


def test_sharegpt_calls_get_their_results() -> None:
    name = "llama_factory/glaive_toolcall_en_demo.json"
    rows = json.loads(shared(name).read_text("utf-8"))
    good, problems = read_file(name)
    assert problems == []
    speakers = [turn["from"] for row in rows for turn in row["conversations"]]
    turns = [turn for example in good for turn in example.messages]
    assert len(turns) == len(speakers)
    assert sum(1 for turn in turns if turn.tool_calls) == speakers.count("function_call") > 0
    assert sum(1 for turn in turns if turn.role == "tool") == speakers.count("observation") > 0
    for example in good:
        ids = [call.id for turn in example.messages for call in turn.tool_calls]
        assert [turn.tool_call_id for turn in example.messages if turn.role == "tool"] == ids
        assert len(set(ids)) == len(ids)


def test_records_of_an_array_stand_on_their_lines() -> None:
    path = shared("llama_factory/identity.json")
    lines = path.read_text("utf-8").splitlines()
    records = [item for item in read_records(path) if isinstance(item, Record)]
    assert len(records) == 91
    assert all(lines[record.line - 1].strip() == "{" for record in records)
    assert [record.value for record in records] == json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize(
    "name", ["tinyshakespeare/input.txt", "llama_factory/wiki_demo.txt", "classic_chinese/classic_zh.txt"]
)
def test_plain_text_is_whole(name: str) -> None:
    good, problems = read_file(name)
    assert problems == []
    assert "".join(example.text for example in good) == shared(name).read_bytes().decode("utf-8-sig")
    assert [example.ends for example in good] == [False] * (len(good) - 1) + [True]
    assert len(good) > 1


@pytest.mark.parametrize("name", ["dpo_en_demo.json", "dpo_zh_demo.json", "kto_en_demo.json"])
def test_preference_files_are_refused_row_by_row(name: str) -> None:
    good, problems = read_file(f"llama_factory/{name}")
    assert good == []
    assert [problem.row for problem in problems] == list(range(1, len(problems) + 1))
    assert all("preference" in problem.wanted for problem in problems)
    assert len(problems) == len(json.loads(shared(f"llama_factory/{name}").read_text("utf-8")))
