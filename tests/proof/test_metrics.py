"""Each metric beside what can be counted by hand, or beside another way to compute it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.data.answer import answer_text
from luthier.proof import classes, fields, numeric, texts
from luthier.proof.calls import calls_of, canonical, tool_calls
from luthier.proof.metrics import Scored, exact_match
from luthier.spec.data import Completion, Example, Message, ToolCall

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text("ab", max_size=2),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("xy", max_size=2), inner, max_size=3),
    max_leaves=8,
)


def scored(metric: Any, pairs: Sequence[tuple[str, str]]) -> Scored:
    """Of (answer, wanted) pairs."""
    examples: list[Example] = [Completion("q", wanted) for _, wanted in pairs]
    found: Scored = metric([answer for answer, _ in pairs], [wanted for _, wanted in pairs], examples)
    return found


def test_exact_match_minds_everything_but_the_ends() -> None:
    pairs = [("a b", " a b\n"), ("a  b", "a b"), ("A b", "a b"), ("", "")]
    assert scored(exact_match, pairs).rows == [1.0, 0.0, 0.0, 1.0]


# -- numbers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = 7.\n#### 7", "7"),
        ("#### 1,234", "1234"),
        ("first #### 5 then #### 6 apples, or 7", "6"),
        ("#### none", None),
        ("It costs $1,234.50.", "1234.50"),
        ("between 3,4", "4"),
        ("10-5", "5"),
        ("minus: -5", "-5"),
        ("−5 degrees", "-5"),
        ("$-5", "-5"),
        ("x2 and y", None),
        ("about .5", ".5"),
        ("4.2e1", "42"),
        ("版本共42个", "42"),
        ("50%", "50"),
        ("no number", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_comes_to(text: str, number: str | None) -> None:
    assert numeric.number_of(text) == (None if number is None else Decimal(number))


def test_numbers_are_compared_as_numbers_and_no_looser() -> None:
    pairs = [("42.0", "#### 42"), ("142", "42"), ("420", "42"), ("4 2", "42"), ("1,042", "1042"), ("none", "42")]
    found = scored(numeric.numeric, pairs)
    assert found.rows == [1.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    assert found.details["answers_with_a_number"] == 5 / 6


@given(st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**9), max_value=10**9))
def test_a_number_written_with_thousands_is_read_back(value: Decimal) -> None:
    assert numeric.number_of(f"The answer is {value:,}") == value
    assert numeric.is_number(f"{value:,}")


# -- tool calls --------------------------------------------------------------------------------------------------------


def said(*calls: tuple[str, Any], content: str = "") -> str:
    return answer_text(Message("assistant", content, tool_calls=tuple(ToolCall(*call) for call in calls)))


def test_calls_match_as_values_in_any_order() -> None:
    wanted = said(("find", {"a": 1, "b": [1, 2]}), ("ring", {}))
    pairs = [
        (said(("ring", {}), ("find", {"b": [1.0, 2], "a": 1})), wanted),
        (said(("find", {"a": 1, "b": [2, 1]}), ("ring", {})), wanted),
        (said(("find", {"a": True, "b": [1, 2]}), ("ring", {})), wanted),
        (said(("find", {"a": "1", "b": [1, 2]}), ("ring", {})), wanted),
        (said(("ring", {})), wanted),
        ("I will find it.", wanted),
        ("Hello.", "Good day."),
        (said(("ring", {})), "Good day."),
        (f"Sure.\n{wanted}", wanted),
    ]
    found = scored(tool_calls, pairs)
    assert found.rows == [1, 0, 0, 0, 0, 0, 1, 0, 1]
    assert found.details["right_tools"] == 5 / 7
    assert found.details["no_call_where_none_is_wanted"] == 1 / 2


def test_the_same_call_twice_is_not_the_call_once() -> None:
    once = said(("ring", {"n": 1}))
    assert scored(tool_calls, [(f"{once}\n{once}", once)]).rows == [0]


@given(JSON)
def test_calls_come_back_from_an_answers_text(value: Any) -> None:
    assert calls_of(said(("f", value), content="I ring.")) == [ToolCall("f", value)]


@given(JSON, JSON)
def test_canonical_text_is_equal_for_equal_values_only(one: Any, other: Any) -> None:
    def same(a: Any, b: Any) -> bool:  # Python's == holds True for 1
        if isinstance(a, bool) or isinstance(b, bool):
            return a is b
        if isinstance(a, dict) and isinstance(b, dict):
            return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
        if isinstance(a, list) and isinstance(b, list):
            return len(a) == len(b) and all(map(same, a, b))
        return bool(a == b)

    assert (canonical(one) == canonical(other)) == same(one, other)


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_fields_are_counted_by_hand() -> None:
    wanted = '{"item": "mug", "size": null, "tags": ["a", "b"]}'  # 4 fields
    pairs = [
        (wanted, wanted),
        ('```json\n{"size": null, "tags": ["b", "a"], "item": "mug"}\n```', wanted),  # a bag of tags
        ('{"item": "cup", "size": null}', wanted),  # 1 right of 2 said
        ('{"item": "mug"', wanted),
        ("null", wanted),
    ]
    found = scored(fields.json_fields, pairs)
    assert found.rows == [1.0, 1.0, 2 * 1 / (2 + 4), 0.0, 0.0]
    assert found.details["valid_json"] == 4 / 5
    assert found.details["valid_by_schema"] == 2 / 5  # the third lacks tags, the last is no object
    assert found.details["equal_json"] == 1 / 5
    assert found.details["field_precision"] == 9 / (4 + 4 + 2 + 1)
    assert found.details["field_recall"] == 9 / 20
    assert found.details["field_f1_over_all"] == 2 * 9 / 31


def test_fields_of_different_objects_do_not_mix() -> None:
    wanted = json.dumps([{"name": "a", "age": 1}, {"name": "b", "age": 2}])
    crossed = json.dumps([{"name": "a", "age": 2}, {"name": "b", "age": 1}])
    assert scored(fields.json_fields, [(crossed, wanted)]).rows == [0.5]


@given(st.lists(JSON, min_size=1, max_size=5))
def test_every_reference_keeps_to_the_schema_of_all(values: list[Any]) -> None:
    found = scored(fields.json_fields, [(json.dumps(value), json.dumps(value)) for value in values])
    assert found.details["valid_by_schema"] == 1.0
    assert found.rows == [1.0] * len(values)


@given(JSON, JSON)
def test_f1_is_one_only_where_the_fields_are_the_same(one: Any, other: Any) -> None:
    [score] = scored(fields.json_fields, [(json.dumps(one), json.dumps(other))]).rows
    assert 0 <= score <= 1
    assert (score == 1) == (fields.fields_of(one) == fields.fields_of(other))


# -- classes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        ("positive", 1),
        (" Positive.\n", 1),
        ("The review is positive.", 1),
        ("positive or negative", None),
        ("negativepositive", None),
        ("It is neither.\npositive", None),
        ("", None),
        ("...", None),
    ],
)
def test_an_answer_gives_a_label_or_none(answer: str, label: int | None) -> None:
    assert classes.label_of(answer, ["negative", "positive"]) == label


def test_a_label_inside_another_label_is_not_named_by_it() -> None:
    assert classes.label_of("I think: not good", ["good", "not good"]) == 1
    assert classes.label_of("评价是正面的", ["正面", "负面"]) == 0


def test_classification_beside_counts_by_hand() -> None:
    pairs = [("a", "a"), ("a", "a"), ("b", "a"), ("b", "b"), ("what", "b"), ("c", "c")]
    found = scored(classes.classification, pairs)
    assert found.rows == [1, 1, 0, 1, 0, 1]
    f1 = [2 * 1.0 * (2 / 3) / (1 + 2 / 3), 0.5, 1.0]
    assert found.details["macro_f1"] == pytest.approx(sum(f1) / 3)
    assert found.details["weighted_f1"] == pytest.approx((3 * f1[0] + 2 * f1[1] + f1[2]) / 6)
    assert found.details["precision of b"] == 0.5
    assert found.details["recall of a"] == pytest.approx(2 / 3)
    assert found.details["answers_with_a_label"] == 5 / 6
    answers, wanted = ([pair[n] for pair in pairs] for n in (0, 1))
    assert classes.confusion(answers, wanted, ["a", "b", "c"]) == [[2, 1, 0, 0], [0, 1, 0, 1], [0, 0, 1, 0]]


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=2, max_size=30))
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[float, bool]]) -> None:
    chances = np.array([[1 - chance, chance] for chance, _ in rows])
    found = classes.ranking(chances, [int(truth) for _, truth in rows])
    right = [chance for chance, truth in rows if truth]
    wrong = [chance for chance, truth in rows if not truth]
    if not right or not wrong:
        assert found == {"auroc": None, "auprc": None}
        return
    pairs = [(one > other) + (one == other) / 2 for one in right for other in wrong]
    assert found["auroc"] == pytest.approx(sum(pairs) / len(pairs))


def test_calibration_by_hand() -> None:
    chances = np.array([[0.05, 0.95], [0.08, 0.92], [0.45, 0.55], [0.0, 1.0]])
    bins, error = classes.calibration(chances, [1, 0, 1, 1])
    assert [(each.rows, each.right) for each in bins] == [(1, 1), (3, 2)]
    assert bins[1].confidence == pytest.approx((0.95 + 0.92 + 1) / 3)
    assert error == pytest.approx((abs(0.55 - 1) + abs(0.95 + 0.92 + 1 - 2)) / 4)


# -- texts -------------------------------------------------------------------------------------------------------------


def test_texts_like_their_references_score_higher() -> None:
    pairs = [("the cat sat", "the cat sat"), ("the cat sits", "the cat sat"), ("a dog", "the cat sat"), ("", "x")]
    found = scored(texts.text, pairs)
    assert found.rows[0] == 1.0
    assert 1 > found.rows[1] > found.rows[2] > found.rows[3] == 0
    assert found.details["exact_match"] == 1 / 4
    assert found.details["rouge_1"] == pytest.approx((1 + 2 / 3 + 0 + 0) / 4)
    assert found.details["fuzzy"] == pytest.approx(
        (1 + ratio("the cat sits", "the cat sat") + ratio("a dog", "the cat sat")) / 4
    )


def ratio(one: str, other: str) -> float:
    """2 x longest common subsequence / both lengths."""
    rows = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, left in enumerate(one):
        for j, right in enumerate(other):
            rows[i + 1][j + 1] = rows[i][j] + 1 if left == right else max(rows[i][j + 1], rows[i + 1][j])
    return 2 * rows[-1][-1] / (len(one) + len(other))


def test_chinese_has_words_too() -> None:
    found = scored(texts.text, [("今天天气很好", "今天天气不错"), ("今天天气很好啊", "今天天气很好啊")])
    assert found.details["rouge_1"] == pytest.approx((4 / 6 + 1) / 2)
    assert found.details["bleu"] is not None
    assert found.details["bleu"] > 0.5
