"""The gate says what the report shows, and holds back what nobody has shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.spec.errors import BadSetting
from luthier.spec.forgetting import Forgetting
from luthier.spec.gate import improvement, judge
from luthier.spec.job import make_request
from luthier.spec.proof import Comparison, Interval, Proof


def proof(difference: float, low: float, high: float, higher_is_better: bool = True) -> Proof:
    beside = Comparison(
        against="base",
        difference=difference,
        interval=Interval(low=low, high=high, method="x"),
        p_value=0.01,
        test="x",
        verdict="helped",
    )
    return Proof(
        metric="json", why="x", held_out=9, chosen="x", higher_is_better=higher_is_better, comparisons=[beside]
    )


def forgot(loss: float | None) -> Forgetting:
    return Forgetting(loss=loss, low=None, items=9, probe="x", before="base", parts=[])


def test_without_thresholds_there_is_no_gate() -> None:
    assert judge(None, None, proof(1, 1, 1), forgot(0)) is None


@pytest.mark.parametrize(
    ("must_improve", "low", "passed"),
    [(0.0, 0.01, True), (0.0, 0.0, False), (0.1, 0.1, True), (0.1, 0.09, False), (0.0, -0.1, False)],
)
def test_an_improvement_counts_by_the_lower_end_of_its_interval(must_improve: float, low: float, passed: bool) -> None:
    gate = judge(must_improve, None, proof(0.2, low, 0.4), None)
    assert gate is not None and gate.passed is passed
    assert bool(gate.reasons) is not passed


def test_of_a_perplexity_less_is_better() -> None:
    assert improvement(proof(-3.0, -5.0, -1.0, higher_is_better=False)) == (3.0, 1.0)
    gate = judge(1.0, None, proof(-3.0, -5.0, -1.0, higher_is_better=False), None)
    assert gate is not None and gate.passed


def test_forgetting_up_to_the_threshold_passes() -> None:
    for loss, passed in ((0.05, True), (0.051, False), (-0.1, True), (None, True)):
        gate = judge(None, 0.05, None, forgot(loss))
        assert gate is not None and gate.passed is passed
    gate = judge(None, 0.05, None, forgot(0.09))
    assert gate is not None and gate.reasons == ["It lost 9.0% of general ability, more than 5.0%."]


def test_what_was_not_measured_is_missed_and_every_miss_is_named() -> None:
    gate = judge(0.1, 0.05, None, None)
    assert gate is not None and not gate.passed
    assert gate.reasons == [
        "There is no proof that it improved by 0.1.",
        "Its forgetting was not measured, and may be at most 5.0%.",
    ]


@given(st.floats(0, 1), st.floats(-1, 1))
def test_a_stricter_threshold_never_lets_more_through(most: float, loss: float) -> None:
    wide, narrow = judge(None, most, None, forgot(loss)), judge(None, most / 2, None, forgot(loss))
    assert wide is not None and narrow is not None
    assert narrow.passed <= wide.passed


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"must_improve": 0.1}, "must_improve is measured on validation rows"),
        ({"must_improve": 0.1, "validation": "0.1", "proof_rows": 0}, "must_improve is measured on validation rows"),
        ({"max_forgetting": 0.1, "forgetting": "off"}, "max_forgetting needs the forgetting meter"),
        ({"max_forgetting": 2}, "--max-forgetting: found 2"),
        ({"forgetting": "some"}, "--forgetting: found 'some'"),
    ],
)
def test_thresholds_that_nothing_could_meet_are_refused(values: dict[str, object], words: str) -> None:
    with pytest.raises(BadSetting, match=words):
        make_request({"model": "tiny", "data": ["a"], **values})
