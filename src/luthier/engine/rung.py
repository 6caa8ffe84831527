"""A part of a run, for whoever compares runs before they end: a share of its steps, measured there, gone on later.

The run keeps the plan of all its steps: the warm-up and the decay of its learning rate, the order of its rows. It is
left at a checkpoint and resumed, so on a CPU the weights at its end are those of a run that was never left, bit for
bit, and two runs that are compared at the same share stand at the same place of their schedules. What it costs: at a
rung no learning rate has come down yet, so a high one looks worse there than it will be. Successive halving: Jamieson
and Talwalkar, "Non-stochastic Best Arm Identification and Hyperparameter Optimization" (2016); its budgets as shares
of a schedule, and how often it errs: Li et al., "Hyperband" (2018).
Does not know: the other runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from luthier.engine import checkpoint
from luthier.engine.ending import HeldOut, score
from luthier.engine.meter import Meter
from luthier.proof import probe
from luthier.proof.page import curves, page
from luthier.spec.keeping import ITEMS
from luthier.spec.report import Report
from luthier.spec.run import RunFolder, write_json, write_whole


@dataclass(frozen=True)
class Part:
    """How far to go: `share` of all steps. `score`: whether the checkpoint there answers the validation rows."""

    share: Fraction
    score: bool = False

    def steps(self, steps: int) -> int:
        """The whole steps of that share, at least one."""
        return max(1, math.ceil(steps * self.share))


def conclude(
    run: RunFolder,
    report: Report,
    steps: int,
    held: HeldOut | None,
    meter: Meter,
    part: Part,
    emit: Any,
    heed: Callable[[], None],
) -> None:
    """Tell what the run came to at this rung, of `steps` in all; a report without a proof, for the eye. Where general
    ability is to be kept, a score comes with what was forgotten, on the half of the probe that chooses."""
    found = report.tuned
    proof = lost = None
    if part.score and held is not None:
        emit("phase", name="prove", message="Validation rows answered by the checkpoint")
        folder = checkpoint.path_of(run.published, report.steps)
        proof = score(run, held, folder, emit, heed, beside=held.request.keep_general)
        if held.request.keep_general:
            emit("phase", name="forgetting", message="Asking the checkpoint general items")
            lost = meter.of_folder(folder, probe.sample(probe.half(probe.general(), 0), ITEMS), emit, heed)
    report.proof_note = f"It was left after step {report.steps} of {steps}, and is proven at its end."
    write_json(run.report, report.model_dump())
    write_whole(run.page, page(report, curves(event for _, event in run.events())))
    way, base = (proof.way("tuned"), proof.way("base")) if proof is not None else (None, None)
    emit(
        "rung",
        share=str(part.share),
        step=report.steps,
        steps=steps,
        loss=found.loss if found else None,
        metric=proof.metric if proof else None,
        higher_is_better=proof.higher_is_better if proof else None,
        score=way.score if way else None,
        base=base.score if base else None,
        forgetting=lost.loss if lost else None,
        rows=len(proof.rows) if proof else (found.rows if found else 0),
    )
