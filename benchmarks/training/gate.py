"""The gate: what a system must show before a time of it is shown. Pure arithmetic.

A trainer can be fast by not training: a zero gradient, a loss averaged over the wrong tokens, rows that see each other.
So the loss of the first step, its gradients and the held-out loss after a few steps are compared with a float32
reference that computes one row at a time, from the same adapter, on the same rows.
Does not know: how the figures were had.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

LOSS = 1e-3  # largest distance of the first step's loss, as a share of the reference's
COSINE = 0.999  # least cosine between all gradients, taken as one vector, and the reference's
HELD_OUT = 0.05  # largest distance of the held-out loss, as a share of how far the reference's fell

Gradients = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Verdict:
    """What was found and what of it is not as wanted; `failures` is empty when the gate is passed."""

    loss: float
    loss_distance: float
    cosine: float
    worst_cosine: float
    worst_name: str
    held_out: float
    held_out_distance: float
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures


def cosine(first: Gradients, second: Gradients) -> tuple[float, float, str]:
    """(cosine of all tensors as one vector, least cosine of a tensor, its name); 0 where one of the two is zero.

    Raises ValueError when the names differ.
    """
    if set(first) != set(second):
        strange = sorted(set(first) ^ set(second))
        raise ValueError(f"{len(strange)} gradients have no counterpart, {strange[0]} first")
    product = one = other = 0.0
    worst, where = 2.0, ""
    for name in sorted(first):
        left, right = (tensors[name].astype(np.float64).ravel() for tensors in (first, second))
        parts = float(left @ right), float(left @ left), float(right @ right)
        product, one, other = product + parts[0], one + parts[1], other + parts[2]
        here = _ratio(*parts)
        if here < worst:
            worst, where = here, name
    return _ratio(product, one, other), worst, where


def _ratio(product: float, one: float, other: float) -> float:
    return product / math.sqrt(one * other) if one > 0 and other > 0 else 0.0


def judge(
    *,
    losses: list[float],
    gradients: Gradients,
    held_out: float,
    reference_losses: list[float],
    reference_gradients: Gradients,
    reference_held_out: float,
    start_held_out: float,
) -> Verdict:
    """Compare a system with the reference; `start_held_out` is the held-out loss before the first step."""
    failures = []
    distance = abs(losses[0] - reference_losses[0]) / abs(reference_losses[0]) if losses else math.inf
    if not distance <= LOSS:
        found = f"{losses[0]:.5f}" if losses else "none"
        failures.append(f"loss of the first step: found {found}, wanted {reference_losses[0]:.5f} within {LOSS:.0e}")
    try:
        whole, worst, where = cosine(gradients, reference_gradients)
    except ValueError as error:
        whole, worst, where = 0.0, 0.0, ""
        failures.append(f"gradients: {error}")
    else:
        zero = [name for name, value in gradients.items() if not np.any(value)]
        if zero:
            failures.append(f"gradients: {len(zero)} of {len(gradients)} are zero, {zero[0]} first")
        if not whole > COSINE:
            failures.append(f"gradients: cosine {whole:.5f}, wanted more than {COSINE}")
    apart = abs(held_out - reference_held_out)
    allowed = HELD_OUT * (start_held_out - reference_held_out)
    if not apart <= allowed:
        failures.append(f"held-out loss: found {held_out:.4f}, wanted {reference_held_out:.4f} within {allowed:.4f}")
    first = losses[0] if losses else math.nan
    return Verdict(first, distance, whole, worst, where, held_out, apart, failures)
