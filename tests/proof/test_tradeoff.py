"""Which scale is chosen: laws over any figures, and each rule's own case."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.proof import tradeoff
from luthier.spec.keeping import Keeping, Point


def keeping(*rows: tuple[float, float, float], by: str = "metric", higher: bool = True) -> Keeping:
    """From (scale, task, forgetting)."""
    points = [
        Point(scale=scale, score=task if by == "metric" else None, loss=task, forgetting=lost)
        for scale, task, lost in rows
    ]
    return Keeping(
        method="scaled adapter", by=by, metric="classification", higher_is_better=higher, rows=9, items=9,  # type: ignore[arg-type]
        points=points, chosen=1.0, rule="", sentence="",
    )  # fmt: skip


NUMBERS = st.floats(-1, 1).map(lambda value: round(value, 3))


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=5, max_size=5), st.sampled_from([None, 0.0, 0.1]))
def test_the_chosen_one_is_the_slow_twins(rows: list[tuple[float, float]], most: float | None) -> None:
    scales = (0.0, 0.25, 0.5, 0.75, 1.0)
    found = keeping(*((scale, *row) for scale, row in zip(scales, rows, strict=True)))
    tradeoff.decide(found, 0.95, most)
    base = rows[0][0]
    gained = {scale: row[0] - base for scale, row in zip(scales, rows, strict=True)}
    lost = {scale: row[1] for scale, row in zip(scales, rows, strict=True)}
    able = list(scales[1:])
    if most is not None and any(lost[scale] <= most for scale in able):
        able = [scale for scale in able if lost[scale] <= most]
        assert gained[found.chosen] == pytest.approx(max(gained[scale] for scale in able))
        assert lost[found.chosen] <= most
    elif most is not None:
        assert lost[found.chosen] == min(lost[scale] for scale in able)
    elif max(gained[scale] for scale in able) <= 1e-9:
        assert found.chosen == 1.0 and "Nothing gains" in found.rule
    else:
        best = max(gained[scale] for scale in able)
        able = [scale for scale in able if gained[scale] >= 0.95 * best - 1e-9]
        assert found.chosen in able and lost[found.chosen] == min(lost[scale] for scale in able)
    for point in found.points:
        beaten = any(
            gained[other] >= gained[point.scale]
            and lost[other] <= lost[point.scale]
            and (gained[other], lost[other]) != (gained[point.scale], lost[point.scale])
            for other in scales
        )
        assert point.front is not beaten


def test_equals_go_to_the_larger_scale() -> None:
    found = keeping((0.0, 0.5, 0.0), (0.5, 0.9, 0.1), (1.0, 0.9, 0.1))
    tradeoff.decide(found, 0.95, None)
    assert found.chosen == 1.0 and found.sentence.startswith("The model stays")


def test_a_loss_is_better_when_it_is_less() -> None:
    found = keeping((0.0, 3.0, 0.0), (0.5, 1.02, 0.01), (1.0, 1.0, 0.2), by="loss")
    tradeoff.decide(found, 0.95, None)
    assert found.chosen == 0.5
    assert "loss 1.0000 -> 1.0200, general ability lost +20.0% -> +1.0%" in found.sentence
