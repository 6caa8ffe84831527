"""Own time goes to the kind of its operator, to attention whatever runs inside it, to the loss all but its products."""

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
    attention, loss = Event(luthier_profile.ATTENTION, 1.0), Event(luthier_profile.LOSS, 0.0)
    events = [
        attention,
        Event("aten::bmm", 3.0, Event("aten::matmul", 0.0, attention)),
        Event("aten::mm", 2.5),
        Event("aten::mm", 0.5, loss),
        Event(luthier_profile.HALVES, 1.0, Event("_Outward", 0.0)),
        Event("aten::exp_", 0.5, loss),
        Event("aten::copy_", 1.0),
        Event("aten::mul", 1.0),
    ]
    found = luthier_profile.shares(events)
    assert list(found) == ["attention", "matrix products", "copies", "pointwise and the rest", "loss"]
    assert found["attention"] == found["matrix products"] == pytest.approx(4 / 10.5)
    assert sum(found.values()) == pytest.approx(1.0)
    assert luthier_profile.shares([]) == {}
