"""A goal against several is one against the fastest of them; the bound is what the ceiling would let through."""

from __future__ import annotations

from typing import Any

import pytest
from benchmarks.training import goals
from benchmarks.training.workloads import CASES


def line(system: str, seconds: float, peak: float = 4e9, mfu: float | None = 0.25) -> dict[str, Any]:
    ratio = {"median": seconds / 2.0, "low": 0.0, "high": 0.0, "rounds": 1}
    return {
        "system": system,
        "title": system.upper(),
        "seconds_per_step": seconds,
        "peak_bytes": peak,
        "mfu_physical": mfu,
        "ratio": ratio,
    }


def test_every_case_has_goals() -> None:
    assert set(goals.RATIOS) == set(CASES)


def test_the_fastest_of_a_group_counts() -> None:
    systems = [
        line("luthier", 2.0, peak=2e9),
        line("trl-tuned", 40.0, peak=5e9),
        line("llamafactory-tuned", 20.0),
        line("flat", 9.0),
        {"system": "torchtune-tuned", "gate": {"passed": False}},
    ]
    frameworks, flat, memory, use = goals.of_case({"case": "S1", "systems": systems})
    assert (frameworks.found, frameworks.reached, frameworks.most) == (10.0, False, 40.0)
    assert frameworks.what == "times as fast as LLAMAFACTORY-TUNED, the fastest timed of TRL and LLaMA-Factory, tuned"
    assert (flat.found, flat.reached, flat.most) == (4.5, False, 18.0)
    assert (memory.found, memory.reached) == (pytest.approx(0.4), True)
    assert (use.found, use.reached) == (0.25, False)


def test_what_was_not_measured_is_neither_reached_nor_missed() -> None:
    for found in goals.of_case({"case": "S2", "systems": [line("flat", 3.0)]}):
        assert (found.found, found.reached) == (None, None)


def test_without_a_ceiling_there_is_no_bound() -> None:
    found = goals.of_case({"case": "F3", "systems": [line("luthier", 2.0, mfu=None), line("flat", 3.0)]})
    assert [goal.most for goal in found] == [None, None, None]
    assert found[1].reached
