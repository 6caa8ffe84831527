"""The general rows of our own: chats that can be trained on, right sums, and nothing of what the probe measures."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from luthier.data import general
from luthier.data.formats import read_examples
from luthier.proof import probe
from luthier.spec.data import Chat

ROWS = general.rows()


def plain(text: str) -> str:
    """Letters, digits and signs of sums in small letters; spaces and punctuation aside."""
    return re.sub(r"[^\w+*/-]", "", text.casefold())


def test_the_packaged_file_is_what_is_made_and_can_be_read() -> None:
    path = Path(str(general.PLACE))
    assert path.read_text(encoding="utf-8") == general.text()
    read = list(read_examples(path))
    assert all(isinstance(one, Chat) for one in read)
    assert len(read) == len(ROWS) > 300
    assert len({asked for asked, _ in ROWS}) == len(ROWS)
    chinese = sum(bool(re.search("[\u4e00-\u9fff]", asked)) for asked, _ in ROWS)
    assert 100 < chinese < len(ROWS) - 150


def test_no_row_shares_a_prompt_an_answer_or_a_fact_with_the_probe() -> None:
    items = probe.general()
    asked = {plain(text) for text, _ in ROWS}
    answered = {plain(text) for _, text in ROWS}
    prompts = {plain(item.prompt) for item in items if item.form == "task"}
    prompts |= {plain(context) for item in items for context, _ in item.pairs if context}
    answers = {plain(continuation) for item in items for _, continuation in item.pairs}
    answers |= {plain(text) for item in items for value in item.check.values() for text in texts(value)}
    assert asked & prompts == set()
    assert answered & answers == set()
    assert asked & answers == set() and answered & prompts == set()
    whole = [plain(question + answer) for question, answer in ROWS]
    facts = {plain(context) for item in items if item.kind == "knowledge" for context, _ in item.pairs}
    assert [fact for fact in facts if any(fact in row for row in whole)] == []


def texts(value: Any) -> list[str]:
    """What an answer that passes a check may be."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [*(str(one) for one in value), "\n".join(map(str, value)), ", ".join(map(str, value)), json.dumps(value)]
    return [json.dumps(value, ensure_ascii=False)] if isinstance(value, dict) else []


def test_sums_are_right() -> None:
    signs = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b, "/": lambda a, b: a // b}
    signs |= {"加": signs["+"], "乘": signs["x"]}
    seen = 0
    for _, answer in ROWS:
        for one, sign, other, result in re.findall(r"(\d+) ?([-+x/加乘]) ?(\d+) ?(?:=|等于) ?(\d+)", answer):
            assert signs[sign](int(one), int(other)) == int(result), answer
            assert answer.count(result) >= 2, "the sentence says it again"
            seen += 1
    assert seen == 100


def test_formats_are_what_was_asked() -> None:
    objects = [json.loads(answer) for asked, answer in ROWS if "JSON" in asked]
    assert len(objects) == 40 and all(len(one) == 4 for one in objects)
    for asked, answer in ROWS:
        if asked.startswith("Sort these words"):
            words = asked.split(": ")[1].rstrip(".").split(", ")
            assert answer.split(", ") == sorted(words)
        if asked.startswith("How many words are these"):
            assert answer == f"These are {len(asked.split(': ')[1].split(', '))} words."
