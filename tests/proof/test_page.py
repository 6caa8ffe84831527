"""The page of a report: what was forgotten and the gate are on it, their figures those of the report; honest axes."""

from __future__ import annotations

import re
from typing import Any

import pytest

from luthier.proof.forgetting import compare
from luthier.proof.page import WIDTH, Curves, page
from luthier.proof.probe import Item
from luthier.spec.gate import Gate
from luthier.spec.report import Part, Report

CHOICES = [Item(f"c{n}", "knowledge", "en", pairs=(("a", " b"), ("a", " c"))) for n in range(40)]
TEXTS = [Item(f"t{n}", "text", "en", pairs=(("", "words"),)) for n in range(8)]
BEFORE = {**{item.id: 1.0 for item in CHOICES}, **{item.id: 1.0 for item in TEXTS}}
AFTER = {**{item.id: float(n % 4 != 0) for n, item in enumerate(CHOICES)}, **{item.id: 1.1 for item in TEXTS}}


def cells(html: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    row = re.search(rf"<tr[^>]*><td>{re.escape(first)}</td>(.*?)</tr>", html, re.S)
    assert row, first
    return re.findall(r"<td[^>]*>(.*?)</td>", row[1])


def test_parts_interval_and_number_are_those_of_the_answers() -> None:
    """Ten of forty choices were lost; of each word's likelihood exp(-0.1) is left."""
    forgetting = compare([*CHOICES, *TEXTS], BEFORE, AFTER, "base-x")
    html = page(Report(forgetting=forgetting))
    knowledge = cells(html, "knowledge (en)")
    assert knowledge[:4] == ["40", "100.0%", "75.0%", "+25.0%"]
    part = forgetting.parts[0]
    assert knowledge[4] == f"{part.low:+.1%} to {part.high:+.1%}" and part.low < 0.25 < part.high
    assert cells(html, "text (en)")[:4] == ["8", "2.72", "3.00", "+9.5%"]
    assert forgetting.loss == pytest.approx((0.25 + 0.0952) / 2, abs=1e-4)
    assert forgetting.verdict in html and "+17.3%" in html
    assert "base-x" in html


def test_the_bars_stand_where_their_figures_are() -> None:
    forgetting = compare([*CHOICES, *TEXTS], BEFORE, AFTER, "base-x")
    html = page(Report(forgetting=forgetting))
    section = html[html.index("What was forgotten") :]
    reach = max(abs(end) for part in forgetting.parts for end in (part.low, part.high))
    centres = [float(x) for x in re.findall(r'<circle[^>]*cx="([\d.]+)"', section)]
    said = [(x - 150) / WIDTH * 2 * reach - reach for x in centres]
    assert said == pytest.approx([*(part.loss for part in forgetting.parts), forgetting.loss], abs=1e-3)


def test_parts_at_chance_are_said_not_to_count() -> None:
    guessed = {item.id: float(n % 2) for n, item in enumerate(CHOICES)}
    html = page(Report(forgetting=compare(CHOICES, guessed, guessed, "base-x")))
    assert cells(html, "knowledge (en)")[-1] == "at chance before: not counted"


@pytest.mark.parametrize("passed", [True, False])
def test_the_gate_and_its_reasons(passed: bool) -> None:
    reasons = [] if passed else ["It lost 25.0% of general ability, more than 3.0%.", "No <proof>."]
    html = page(Report(gate=Gate(passed=passed, must_improve=0.05, max_forgetting=0.03, reasons=reasons)))
    assert ("The gate: passed" in html) is passed
    assert ("an improvement of at least 0.05 and a loss of general ability of at most 3.0%" in html) is passed
    assert (reasons != []) is ("It lost 25.0% of general ability" in html and "No &lt;proof&gt;." in html)
    assert "The gate" not in page(Report())


def test_the_shares_of_the_time() -> None:
    parts = [
        Part(name="training", foretold=100.0, seconds=120.0, share=1.0),
        Part(name="proof", foretold=None, seconds=30.0, share=0.25),
    ]
    html = page(Report(parts=parts))
    assert cells(html, "training") == ["100.0", "120.0", "100%"]
    assert cells(html, "proof") == ["–", "30.0", "25%"]


@pytest.mark.parametrize(("losses", "below"), [([3.0, 0.01], False), ([2.5, 2.4], False), ([0.5, -0.5], True)])
def test_an_axis_goes_below_zero_only_where_values_do(losses: list[float], below: bool) -> None:
    points: Any = list(enumerate(losses, 1))
    html = page(Report(), Curves(train=points, loss=points))
    ticks = [float(text) for text in re.findall(r'text-anchor="end">(-?[\d.e-]+)<', html)]
    assert len(ticks) == 10
    assert (min(ticks) < 0) is below
    assert min(ticks) <= min(losses) and max(ticks) >= max(losses)
