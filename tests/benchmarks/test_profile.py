"""Own time goes to the kind of its operator, and to attention whatever runs inside it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from benchmarks.training.drivers import luthier_profile


@dataclass
class Event:
    name: str
    self_cpu_time_total: float
    cpu_parent: Event | None = None


def test_kinds_share_the_whole() -> None:
    attention = Event(luthier_profile.ATTENTION, 1.0)
    events = [
        attention,
        Event("aten::bmm", 3.0, Event("aten::matmul", 0.0, attention)),
        Event("aten::mm", 4.0),
        Event("aten::copy_", 1.0),
        Event("aten::mul", 1.0),
    ]
    found = luthier_profile.shares(events)
    assert list(found) == ["attention", "matrix products", "copies", "pointwise and the rest"]
    assert found["attention"] == pytest.approx(0.4)
    assert sum(found.values()) == pytest.approx(1.0)
    assert luthier_profile.shares([]) == {}
