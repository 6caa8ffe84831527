"""The demo's data set: deterministic, no leak from training into the exam, answers that a machine can check."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "orders" / "make_data.py"


def load(path: Path) -> ModuleType:
    """The script as a module; examples/ is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_data = load(SCRIPT)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("orders")
    subprocess.run([sys.executable, str(SCRIPT), "--out", str(folder)], check=True, capture_output=True)
    return folder


def rows(path: Path) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def train(written: Path) -> list[list[dict[str, str]]]:
    return rows(written / "train.jsonl")


@pytest.fixture(scope="module")
def held_out(written: Path) -> list[list[dict[str, str]]]:
    return rows(written / "held-out.jsonl")


def test_sizes_and_shape(train: list[list[dict[str, str]]], held_out: list[list[dict[str, str]]]) -> None:
    assert (len(train), len(held_out)) == (720, 60)
    for row in train + held_out:
        assert [turn["role"] for turn in row] == ["system", "user", "assistant"]
        assert row[0]["content"] == make_data.SYSTEM
        assert all(set(turn) == {"role", "content"} for turn in row)


def test_no_message_and_no_record_twice(
    train: list[list[dict[str, str]]], held_out: list[list[dict[str, str]]]
) -> None:
    for turn in (1, 2):
        said = [row[turn]["content"] for row in train + held_out]
        assert len(set(said)) == 780
    # nor do two messages differ in capitals only
    assert len({row[1]["content"].lower() for row in train + held_out}) == 780


def test_answers_are_one_line_of_json_in_one_form(
    train: list[list[dict[str, str]]], held_out: list[list[dict[str, str]]]
) -> None:
    items = {singular for singular, _ in make_data.ITEMS}
    for row in train + held_out:
        answer = row[2]["content"]
        record = json.loads(answer)
        assert answer == json.dumps(record, separators=(",", ":"))
        assert list(record) == ["item", "quantity", "size", "deliver"]
        assert record["item"] in items
        assert record["quantity"] is None or record["quantity"] in make_data.QUANTITIES
        assert record["size"] is None or record["size"] in make_data.SIZES
        assert record["deliver"] is None or record["deliver"] in make_data.DAYS


def test_the_training_rows_show_every_value_and_every_gap(train: list[list[dict[str, str]]]) -> None:
    records = [json.loads(row[2]["content"]) for row in train]
    assert {record["item"] for record in records} == {singular for singular, _ in make_data.ITEMS}
    assert {record["quantity"] for record in records} == {*make_data.QUANTITIES, None}
    assert {record["size"] for record in records} == {*make_data.SIZES, None}
    assert {record["deliver"] for record in records} == {*make_data.DAYS, None}


def test_an_undated_order_names_no_day(train: list[list[dict[str, str]]]) -> None:
    days = re.compile("|".join(make_data.DAYS), re.IGNORECASE)
    for row in train:
        if json.loads(row[2]["content"])["deliver"] is None:
            assert not days.search(row[1]["content"]), row[1]["content"]


def test_words_around_an_order_hold_no_part_of_an_answer() -> None:
    """A greeting, reason or farewell that named a day, a size, a number or an item would make the record ambiguous."""
    around = " ".join(make_data.GREETINGS + make_data.REASONS + make_data.ENDINGS).lower()
    words = set(re.findall(r"[a-z]+", around))
    told = {*make_data.DAYS, *make_data.WORDS, *make_data.SIZES, "big", "little", "dozen", "couple"}
    assert words & told == set()
    assert [item for pair in make_data.ITEMS for item in pair if item in around] == []


def test_same_seed_same_bytes_and_another_seed_other_rows() -> None:
    assert make_data.make_data(30, 10, 7) == make_data.make_data(30, 10, 7)
    first, second = (make_data.make_data(30, 10, seed) for seed in (7, 8))
    assert first[0] != second[0]
    assert first[1] != second[1]


def test_the_exam_does_not_change_with_the_training_size() -> None:
    assert make_data.make_data(10, 20, 7)[1] == make_data.make_data(200, 20, 7)[1]


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        ({"item": "scarf", "quantity": None, "size": None, "deliver": None}, r"(some|some more|a few) scarves"),
        ({"item": "apron", "quantity": 1, "size": None, "deliver": None}, r"(an apron|(one|1) apron|apron x1)"),
        ({"item": "rye loaf", "quantity": 7, "size": "large", "deliver": None}, r".*\b(seven|7|x7)\b.*"),
    ],
)
def test_the_thing_wanted_is_said_whole(record: dict[str, Any], wanted: str) -> None:
    for seed in range(200):
        assert re.fullmatch(wanted, make_data.say_thing(make_data.random.Random(seed), record)), seed


def test_more_rows_than_there_are_orders_is_refused(tmp_path: Path) -> None:
    asked = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "orders"), "--train", "30000"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 2
    assert "found 30000 + 60 rows, wanted at most 5400 in all" in done.stderr
    assert not (tmp_path / "orders").exists()
