"""Requests, the rules of "auto", recipes."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.spec.errors import BadSetting
from luthier.spec.job import (
    METHODS,
    RECIPES,
    TrainRequest,
    apply_recipe,
    auto_batch_size,
    auto_epochs,
    auto_learning_rate,
    make_request,
    validation_share,
)

ASKED = {"model": "m", "data": ["d.jsonl"]}


@pytest.mark.parametrize(
    ("rows", "epochs"),
    [(1, 25), (3, 25), (5, 20), (12, 8), (33, 3), (34, 3), (720, 3), (8333, 3), (8334, 2), (20_000, 1), (10**6, 1)],
)
def test_auto_epochs(rows: int, epochs: int) -> None:
    assert auto_epochs(rows) == epochs


def test_auto_epochs_of_text() -> None:
    assert [auto_epochs(rows, text=True) for rows in (1, 299, 300, 10**6)] == [3, 3, 1, 1]


@pytest.mark.parametrize(
    ("rows", "size"), [(1, 1), (3, 3), (5, 4), (300, 4), (720, 8), (1300, 16), (3000, 32), (10**6, 32)]
)
def test_auto_batch_size(rows: int, size: int) -> None:
    assert auto_batch_size(rows) == size


def test_auto_learning_rate() -> None:
    """The published fit, two digits: 5e-5 x (2000 / width) ^ 0.78, ten times that with an adapter."""
    assert auto_learning_rate(2000, adapter=True, learnt=128) == 5e-4
    assert auto_learning_rate(2000, adapter=False, learnt=128) == 5e-5
    assert auto_learning_rate(576, adapter=True, learnt=5000) == 1.3e-3
    assert auto_learning_rate(4096, adapter=True, learnt=5000) == 2.9e-4


def test_where_a_step_learns_few_tokens_the_rate_follows_their_square_root() -> None:
    assert auto_learning_rate(2000, adapter=True, learnt=32) == 2.5e-4
    assert auto_learning_rate(576, adapter=True, learnt=8) == 3.3e-4
    assert auto_learning_rate(2000, adapter=True, learnt=0) == auto_learning_rate(2000, adapter=True, learnt=1) > 0


@given(st.integers(1, 10**7))
def test_rules_give_usable_numbers(rows: int) -> None:
    assert 1 <= auto_epochs(rows) <= 25 and 1 <= auto_batch_size(rows) <= 32
    assert rows * auto_epochs(rows) <= max(25_000, 3 * 33, rows)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("epochs", 0, "--epochs: found 0"),
        ("epochs", "many", "--epochs: found 'many'"),
        ("batch_size", -1, "--batch-size: found -1"),
        ("learning_rate", 0, "--learning-rate: found 0"),
        ("learning_rate", "nan", "--learning-rate: found 'nan'"),
        ("method", "qlora", "--method: found 'qlora'; wanted one of lora"),
        ("method", "freeze:0", "--method: found 'freeze:0'"),
        ("validation", "1.5", "between 0 and 1"),
        ("seed", -1, "--seed: found -1"),
        ("overlong", "cut", "--overlong: found 'cut'"),
        ("dropout", 1.0, "--dropout: found 1.0"),
        ("data", [], "--data: found []"),
        ("lora_rank", 8, "--lora-rank: found 8"),
    ],
)
def test_wrong_options_are_named(option: str, value: object, words: str) -> None:
    with pytest.raises(BadSetting) as caught:
        make_request({**ASKED, option: value})
    assert words in caught.value.message and "problems in all" not in caught.value.message
    assert caught.value.exit_code == 2 and caught.value.param == option


def test_adapter_options_need_an_adapter() -> None:
    for method in ("full", "freeze:2"):
        with pytest.raises(BadSetting, match=f"rank means nothing with method {method}"):
            make_request({**ASKED, "method": method, "rank": 4})
        assert not make_request({**ASKED, "method": method}).uses_adapter
    assert all(make_request({**ASKED, "method": method}).uses_adapter for method in METHODS[:4])


def test_every_field_has_a_help_text() -> None:
    assert [name for name, field in TrainRequest.model_fields.items() if not field.description] == []


def test_recipes() -> None:
    for name in RECIPES:
        request = make_request(apply_recipe({**ASKED, "recipe": name}))
        assert request.recipe == name
    chapter = make_request(apply_recipe({**ASKED, "recipe": "self-llm"}))
    assert (chapter.rank, chapter.alpha, chapter.dropout, chapter.learning_rate) == (8, 32.0, 0.1, 1e-4)
    assert (chapter.epochs, chapter.batch_size, chapter.max_length, chapter.schedule) == (3, 16, 384, "linear")
    assert make_request(apply_recipe({**ASKED, "recipe": "self-llm", "epochs": 1})).epochs == 1
    with pytest.raises(BadSetting, match="found 'nope'; wanted one of self-llm"):
        apply_recipe({**ASKED, "recipe": "nope"})
    page = (Path(__file__).parents[2] / "docs/how-training-works.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in RECIPES)


def test_validation_is_a_share_or_a_file() -> None:
    assert validation_share("0.1") == 0.1 and validation_share("held.jsonl") is None and validation_share(None) is None
