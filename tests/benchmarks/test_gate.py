"""The gate lets through what trains alike, and names what does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from benchmarks.training import gate

GOOD: dict[str, Any] = {
    "losses": [4.0, 3.9],
    "gradients": {"a": np.array([1.0, 2.0]), "b": np.array([[3.0]])},
    "held_out": 3.6,
    "reference_losses": [4.0, 3.9],
    "reference_gradients": {"a": np.array([1.0, 2.0]), "b": np.array([[3.0]])},
    "reference_held_out": 3.6,
    "start_held_out": 4.0,
}


def test_the_reference_passes_its_own_gate() -> None:
    verdict = gate.judge(**GOOD)
    assert verdict.passed
    assert verdict.cosine == pytest.approx(1.0)
    assert (verdict.loss_distance, verdict.held_out_distance) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"losses": [4.005, 3.9]}, "loss of the first step: found 4.00500, wanted 4.00000"),
        ({"losses": []}, "loss of the first step: found none"),
        ({"losses": [float("nan")]}, "loss of the first step: found nan"),
        ({"gradients": {"a": np.array([2.0, 1.0]), "b": np.array([[3.0]])}}, "gradients: cosine 0.92857"),
        ({"gradients": {"a": np.zeros(2), "b": np.array([[3.0]])}}, "gradients: 1 of 2 are zero, a first"),
        ({"gradients": {"a": np.array([1.0, 2.0])}}, "gradients: 1 gradients have no counterpart, b first"),
        ({"held_out": 3.63}, "held-out loss: found 3.6300, wanted 3.6000 within 0.0200"),
        ({"held_out": float("nan")}, "held-out loss: found nan"),
        ({"held_out": 4.0}, "held-out loss: found 4.0000"),
    ],
)
def test_each_fault_is_named(changed: dict[str, Any], words: str) -> None:
    verdict = gate.judge(**{**GOOD, **changed})
    assert not verdict.passed
    assert any(failure.startswith(words) for failure in verdict.failures), verdict.failures


def test_clipping_does_not_matter_to_the_cosine() -> None:
    """Trainers hand out gradients before or after clipping, which scales all of them alike."""
    clipped = {name: value / 7 for name, value in GOOD["gradients"].items()}
    assert gate.judge(**{**GOOD, "gradients": clipped}).passed


def test_cosine_of_known_vectors() -> None:
    whole, worst, name = gate.cosine(
        {"x": np.array([1.0, 0.0]), "y": np.array([1.0])}, {"x": np.array([0.0, 1.0]), "y": np.array([1.0])}
    )
    assert whole == pytest.approx(0.5)
    assert (worst, name) == (0.0, "x")
