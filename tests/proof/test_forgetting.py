"""The meter's number is what its sentence says: recomputed by hand, and with answers known beforehand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.proof import made, probe
from luthier.proof.checks import passes
from luthier.proof.forgetting import compare, wilson_low
from luthier.proof.probe import Item
from luthier.spec.errors import BadData, BadSetting, NotFound


def choice(number: int, kind: str = "knowledge") -> Item:
    return Item(f"{kind}-{number}", kind, "en", pairs=(("q", " a"), ("q", " b")))


def text(number: int) -> Item:
    return Item(f"text-{number}", "text", "en", pairs=(("", "words"),))


ITEMS = [choice(n) for n in range(40)] + [choice(n, "logic") for n in range(20)] + [text(n) for n in range(8)]


def scores(knowledge: int, logic: int, nats: float) -> dict[str, float]:
    """The first so many of each kind right."""
    found = {f"knowledge-{n}": float(n < knowledge) for n in range(40)}
    found |= {f"logic-{n}": float(n < logic) for n in range(20)}
    return found | {f"text-{n}": nats + n / 10 for n in range(8)}


def test_the_number_is_the_mean_of_the_parts_losses() -> None:
    found = compare(ITEMS, scores(36, 18, 1.0), scores(28, 17, 1.5), "base")
    knowledge, logic, words = found.parts
    assert knowledge.loss == pytest.approx(8 / 40)
    assert logic.loss == pytest.approx(1 / 20)
    assert words.before == pytest.approx(math.exp(1.35)) and words.after == pytest.approx(math.exp(1.85))
    assert words.loss == pytest.approx(1 - words.before / words.after)
    assert found.loss == pytest.approx((0.2 + 0.05 + words.loss) / 3)
    assert found.low is not None and found.high is not None
    assert found.low < found.loss < found.high
    assert "lost general ability" in found.verdict


def test_the_same_scores_are_no_loss() -> None:
    found = compare(ITEMS, scores(36, 18, 1.0), scores(36, 18, 1.0), "base")
    assert (found.loss, found.low, found.high) == (0.0, 0.0, 0.0)
    assert "No loss is shown" in found.verdict


def test_a_part_at_chance_does_not_count() -> None:
    found = compare(ITEMS, scores(36, 10, 1.0), scores(36, 0, 1.0), "base")
    assert [part.counted for part in found.parts] == [True, False, True]
    assert found.parts[1].loss == pytest.approx(0.5)
    assert found.loss == 0.0
    nothing = compare(ITEMS[:40], scores(20, 10, 1.0), scores(0, 0, 1.0), "base")
    assert nothing.loss is None
    assert "Nothing can be said" in nothing.verdict


def test_the_interval_is_the_bootstraps_by_the_slow_way() -> None:
    """One part: draw items one by one, average, take the quantiles of the sorted means."""
    items = ITEMS[:40]
    before, after = scores(36, 0, 0), scores(28, 0, 0)
    found = compare(items, before, after, "base")
    gaps = [before[item.id] - after[item.id] for item in items]
    picks = np.random.default_rng(0).integers(0, 40, (2000, 40))
    means = sorted(sum(gaps[pick] for pick in draw) / 40 for draw in picks.tolist())
    assert found.low == pytest.approx(means[50], abs=0.026) and found.high == pytest.approx(means[1949], abs=0.026)


def test_items_without_a_score_are_left_out_and_counted() -> None:
    before = scores(36, 18, 1.0)
    after = {id: score for id, score in before.items() if not id.startswith("text")}
    found = compare(ITEMS, before, after, "base")
    assert (found.items, found.left_out) == (60, 8)


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilsons_lower_end_lies_below_the_share_and_not_below_nothing(count: int, share: float) -> None:
    assert -1e-9 <= wilson_low(share, count) <= share + 1e-9


def test_wilsons_lower_end_as_published() -> None:
    """7 of 10: 0.3968, as in Brown, Cai and DasGupta (2001) by their formula."""
    middle, z = 0.7, 1.959964
    spread = z * math.sqrt(0.7 * 0.3 / 10 + z * z / 400)
    assert wilson_low(0.7, 10) == pytest.approx((middle + z * z / 20 - spread) / (1 + z * z / 10))
    assert wilson_low(0.7, 10) == pytest.approx(0.3968, abs=1e-4)


# -- the probe ---------------------------------------------------------------------------------------------------------


def test_the_generated_files_are_what_their_maker_makes(tmp_path: Path) -> None:
    made.write(tmp_path)
    folder = Path(probe.__file__).parent / "probe"
    for name in ("arithmetic.jsonl", "format.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()


def test_our_probe_is_several_hundred_different_items_in_two_languages() -> None:
    items = probe.general()
    assert len(items) >= 400
    assert len({item.id for item in items}) == len(items)
    assert len({(item.pairs, item.prompt) for item in items}) == len(items)
    kinds = {"knowledge", "arithmetic", "instruction", "format", "text"}
    assert {item.part for item in items} == {(kind, language) for kind in kinds for language in ("en", "zh")}
    golds = [item.gold for item in items if item.form == "choice"]
    assert all(golds.count(place) > len(golds) / 6 for place in range(4))


def test_sums_of_the_probe_are_right() -> None:
    signs = {"+": "+", "加": "+", "-": "-", "减": "-", "*": "*"}
    for item in probe.general():
        if item.kind == "arithmetic":
            question = item.pairs[item.gold][0].splitlines()[-1].split("。")[-1].replace("等于", "").replace("=", "")
            sign = next(sign for sign in signs if sign in question)
            left, right = map(int, question.split(sign))
            value = {"+": left + right, "-": left - right, "*": left * right}[signs[sign]]
            assert int(item.pairs[item.gold][1]) == value, item
            lengths = {len(answer) for _, answer in item.pairs}
            assert len(lengths) == 1, item


def test_every_task_can_be_done() -> None:
    for item in probe.general():
        if item.form == "task" and item.longest is not None and len(item.check) == 1:
            right = item.longest
            assert item.passes(right), item


def test_a_sample_is_the_same_every_time_and_lies_within_a_larger_one() -> None:
    items = probe.general()
    small, large = probe.sample(items, 100), probe.sample(items, 200)
    assert {item.id for item in small} < {item.id for item in large} < {item.id for item in items}
    assert {item.part for item in small} == {item.part for item in items}
    assert 90 <= len(small) <= 140
    assert probe.sample(items, None) == probe.sample(items, 10_000) == items
    with pytest.raises(BadSetting, match="--sample: found 0"):
        probe.sample(items, 0)
    assert probe.digest(small) != probe.digest(large)


# -- checks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "check", "right"),
    [
        ("Yes.", {"one_of": ["yes"]}, True),
        ("Yes, it is", {"one_of": ["yes"]}, False),
        ("1. a\n2. b", {"numbered": 2}, True),
        ("1. a\n3. b", {"numbered": 2}, False),
        ("- Tea\n* milk", {"lines": ["tea", "milk"]}, True),
        ("tea, milk", {"lines": ["tea", "milk"]}, False),
        ('```json\n{"a": 1}\n```', {"json": {"a": 1}}, True),
        ('Here: {"a": 1}', {"json": {"a": 1}}, False),
        ('Here: {"a": 1} so', {"json_within": {"a": 1}}, True),
        ('{"a": 2} {"a": 1}', {"json_within": {"a": 1}}, False),
        ("GOOD.", {"equals_case": "GOOD"}, True),
        ("Good", {"equals_case": "GOOD"}, False),
        ("Dear all, hello", {"starts": "Dear"}, True),
        ("我很好 ok", {"chinese": True}, True),
        ("ok fine", {"chinese": True}, False),
        ("a b c", {"at_most_words": 2}, False),
        ("a b c", {"at_least_words": 3, "at_most_lines": 1}, True),
        ("   ", {"at_most_words": 2}, False),
    ],
)
def test_checks(answer: str, check: dict[str, object], right: bool) -> None:
    assert passes(answer, check) is right


# -- suites of others --------------------------------------------------------------------------------------------------


def test_the_four_forms_of_suites(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        '{"query": "Question: Which?", "choices": ["this", "that"], "gold": 1}\n'
        '{"context_options": ["so he", "so she"], "continuation": "won.", "gold": 0}\n'
        '{"context": "17+4=", "continuation": "21"}\n'
        '{"question": "Which?", "options": "A. this\\nB. that", "answer": "B. that"}\n'
    )
    first, second, third, fourth = probe.suite(tmp_path)
    assert first.pairs == (("Question: Which?\nAnswer:", " this"), ("Question: Which?\nAnswer:", " that"))
    assert (first.gold, first.chance, first.part) == (1, 0.5, ("mine", ""))
    assert second.pairs == (("so he", " won."), ("so she", " won."))
    assert (third.pairs, third.form, third.chance) == ((("17+4=", "21"),), "exact", 0.0)
    assert [pair[1] for pair in fourth.pairs] == [" A", " B"] and fourth.gold == 1


def test_a_record_that_is_no_item_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text('{"query": "a", "choices": ["b", "c"], "gold": 2}\n{"x": 1}\n')
    with pytest.raises(BadData) as refused:
        probe.suite(path)
    assert [(problem.file, problem.line) for problem in refused.value.problems] == [(str(path), 1), (str(path), 2)]
    with pytest.raises(NotFound, match="no"):
        probe.suite(tmp_path / "nowhere")
