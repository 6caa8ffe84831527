"""Preference pairs as training rows: both answers behind one prompt, in every spelling; both or neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.data.dataset import Rows, prepare, split
from luthier.data.pairs import holds_pairs, read_meanings, read_pairs
from luthier.data.render import Renderer
from luthier.spec.data import Chat, Message, Preference, Problem
from luthier.spec.errors import BadData
from luthier.spec.job import Overlong
from tests import tiny as tiny_models


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    return Renderer.load(tiny_models.make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def write(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pair(asked: str, good: str, bad: str) -> dict[str, Any]:
    return {
        "input": {"messages": [{"role": "user", "content": asked}]},
        "preferred_output": said(good),
        "non_preferred_output": said(bad),
    }


def fitted(renderer: Renderer, path: Path, length: int = 512, overlong: Overlong = "error") -> Any:
    return prepare([path], renderer, max_length=length, overlong=overlong, pairs=True)


SPELLINGS: list[dict[str, Any]] = [
    pair("Why?", "Because.", "No."),
    {
        "input": {"messages": [{"role": "user", "content": "Why?"}]},
        "preferred_completion": said("Because."),
        "non_preferred_completion": said("No."),
    },
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    {"instruction": "Why?", "chosen": "Because.", "rejected": "No."},
    {
        "conversations": [{"from": "human", "value": "Why?"}],
        "chosen": {"from": "gpt", "value": "Because."},
        "rejected": {"from": "gpt", "value": "No."},
    },
]


@pytest.mark.parametrize("record", SPELLINGS, ids=lambda record: "-".join(record))
def test_every_spelling_gives_the_same_two_rows(renderer: Renderer, tmp_path: Path, record: dict[str, Any]) -> None:
    """The rows are those that chats with either answer would give: trained as it is served."""
    found = fitted(renderer, write(tmp_path / "a.jsonl", record))
    assert found.records == found.rows.examples == 1 and len(found.rows) == 2
    for row, answer in zip(found.rows, ("Because.", "No."), strict=True):
        [alone] = renderer.rows(Chat((Message("user", "Why?"), Message("assistant", answer))))
        assert row[0].tolist() == alone.ids and row[1].tolist() == alone.weights
    (good, learnt), (bad, _) = found.rows
    first = int(np.argmax(learnt))
    assert good[:first].tolist() == bad[:first].tolist() == renderer.prompt([Message("user", "Why?")])


def test_earlier_answers_are_context(renderer: Renderer, tmp_path: Path) -> None:
    record = pair("x", "good", "bad")
    record["input"]["messages"] = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello to you"},
        {"role": "user", "content": "And now?"},
    ]
    found = fitted(renderer, write(tmp_path / "a.jsonl", record))
    for (ids, weights), answer in zip(found.rows, ("good", "bad"), strict=True):
        learnt = ids[weights >= 1].tolist()
        assert renderer.answer(learnt) == answer


def test_tools_and_calls_in_answers(tmp_path: Path) -> None:
    """What the template says of tools stands in both rows; an answer may be a call."""
    folder = tiny_models.make_tokenizer(tmp_path / "tokenizer")
    renderer = Renderer.load(folder, "chatml")
    tool = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "a", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    record = pair("Where?", "", "I do not know.")
    record["input"]["tools"] = [tool]
    record["preferred_output"] = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    found = fitted(renderer, write(tmp_path / "a.jsonl", record))
    (good, learnt), _ = found.rows
    assert "look" in renderer.tokenizer.decode(good[learnt >= 1].tolist())


def test_other_records_are_refused_by_line(renderer: Renderer, tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}, *said("b")]}
    path = write(tmp_path / "a.jsonl", pair("a", "b", "c"), chat, {"what": 1}, {"prompt": "a", "chosen": "b"})
    with pytest.raises(BadData) as error:
        fitted(renderer, path)
    places = [(problem.line, problem.found) for problem in error.value.problems]
    assert places[0] == (2, "a chat record") and places[1] == (3, "a record without two answers")
    assert places[2][0] == 4 and len(places) == 3
    assert "found a chat record, wanted a preference record" in str(error.value)


def test_unknown_keys_are_told(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {**pair("a", "b", "c"), "score": 3}, pair("d", "e", "f"))
    *pairs, warning = read_pairs(path)
    assert all(isinstance(each, Preference) for each in pairs) and len(pairs) == 2
    assert isinstance(warning, Problem) and warning.severity == "warning" and "'score' in 1 record" in warning.found


def test_files_are_told_apart(tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.jsonl", pair("a", "b", "c"))
    chats = write(tmp_path / "c.jsonl", {"messages": [{"role": "user", "content": "a"}, *said("b")]})
    text = tmp_path / "t.txt"
    text.write_text("words")
    assert [holds_pairs(path) for path in (pairs, chats, text)] == [True, False, False]
    for path in (pairs, chats, text):
        assert not any(isinstance(item, Problem) for item in read_meanings(path, holds_pairs(path)))


# -- lengths (B36) -----------------------------------------------------------------------------------------------------

LONG = " ".join(["word"] * 80)


def test_one_long_answer_is_named_dropped_or_cut(renderer: Renderer, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", pair("a", LONG, "no no no"), pair("b", "yes", "no"))
    with pytest.raises(BadData, match="would lose the end of its answer"):
        fitted(renderer, path, 32)
    dropped = fitted(renderer, path, 32, "drop")
    assert dropped.rows.examples == 1 and dropped.dropped == 1
    whole = fitted(renderer, path)
    assert dropped.lost_tokens == whole.rows.tokens - dropped.rows.tokens
    assert dropped.lost_supervised == whole.rows.supervised - dropped.rows.supervised
    cut = fitted(renderer, path, 32, "truncate")
    assert cut.rows.examples == 2 and cut.truncated == 1 and cut.dropped == 0
    assert len(cut.rows[0][0]) == 32 and cut.rows[1][0].tolist() == whole.rows[1][0].tolist()
    assert cut.lost_tokens == whole.rows.tokens - cut.rows.tokens
    assert cut.lost_supervised == whole.rows.supervised - cut.rows.supervised


def test_a_cut_that_empties_an_answer_or_makes_both_alike_drops_the_pair(renderer: Renderer, tmp_path: Path) -> None:
    """A prompt longer than the limit, and answers that part behind it."""
    path = write(
        tmp_path / "a.jsonl", pair(LONG, "a", "b"), pair("q", LONG + " yes", LONG + " no"), pair("b", "y", "n")
    )
    found = fitted(renderer, path, 32, "truncate")
    assert found.rows.examples == 1 and found.dropped == 2 and found.truncated == 0
    whole = fitted(renderer, path)
    assert found.lost_supervised == whole.rows.supervised - found.rows.supervised


def test_the_same_answer_twice_is_warned_of(renderer: Renderer, tmp_path: Path) -> None:
    found = fitted(renderer, write(tmp_path / "a.jsonl", pair("a", "b", "b"), pair("c", "d", "e")))
    assert found.rows.examples == 2 and found.warning_count == 1
    assert "two answers that are the same" in str(found.warnings[0])


# -- rows of pairs -----------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.floats(0.05, 0.6), st.integers(0, 99))
def test_a_split_keeps_pairs_whole(count: int, share: float, seed: int) -> None:
    rows = Rows(2)
    for n in range(count):
        for side in (0, 1):
            rows.add([1, 2, n, side], [0, 0, 0, 1], n, bytes([n]))
    parts = split(rows, share, seed)
    assert sum(part.examples for part in parts) == count
    for part in parts:
        assert part.sides == 2
        for example in range(part.examples):
            (good, _), (bad, _) = part.of([example])
            assert good[2] == bad[2] and (good[3], bad[3]) == (0, 1)
