"""The gate: whether a model that was measured kept to the thresholds that its job carried.

Pure functions of a report. A model that misses them is kept; it is only not promoted (store/aliases.py).
Does not know: how anything was measured.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from luthier.spec.forgetting import Forgetting
from luthier.spec.proof import Proof


class Gate(BaseModel):
    """What was asked and what came of it."""

    model_config = ConfigDict(extra="forbid")

    passed: bool
    must_improve: float | None = None
    max_forgetting: float | None = None
    reasons: list[str] = Field(default=[], description="One sentence for each threshold that was missed.")


def judge(
    must_improve: float | None, max_forgetting: float | None, proof: Proof | None, forgetting: Forgetting | None
) -> Gate | None:
    """None without thresholds. What was not measured is missed: nobody has shown it."""
    if must_improve is None and max_forgetting is None:
        return None
    reasons = []
    if must_improve is not None and (missed := _not_improved(must_improve, proof)):
        reasons.append(missed)
    if max_forgetting is not None and (missed := _forgot(max_forgetting, forgetting)):
        reasons.append(missed)
    return Gate(passed=not reasons, must_improve=must_improve, max_forgetting=max_forgetting, reasons=reasons)


def improvement(proof: Proof) -> tuple[float, float] | None:
    """(how much better than the base the model scored, the lower end of its interval); None without a comparison."""
    beside = next((one for one in proof.comparisons if one.against == "base"), None)
    if beside is None:
        return None
    if proof.higher_is_better:
        return beside.difference, beside.interval.low
    return -beside.difference, -beside.interval.high


def _not_improved(wanted: float, proof: Proof | None) -> str | None:
    found = improvement(proof) if proof is not None else None
    if proof is None or found is None:
        return f"There is no proof that it improved by {wanted:g}."
    better, low = found
    if low > 0 and low >= wanted:
        return None
    return (
        f"It is not shown to improve {proof.metric} by {wanted:g}: measured {better:+.4g}, but the 95% interval begins "
        f"at {low:+.4g}."
    )


def _forgot(most: float, forgetting: Forgetting | None) -> str | None:
    if forgetting is None:
        return f"Its forgetting was not measured, and may be at most {most:.1%}."
    if forgetting.loss is None or forgetting.loss <= most:
        return None  # null: the base could do nothing of the probe, so there was nothing to lose
    return f"It lost {forgetting.loss:.1%} of general ability, more than {most:.1%}."
