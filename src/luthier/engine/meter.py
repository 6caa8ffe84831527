"""The forgetting meter at the end of a run: both models asked the items that the forecast found worth their time, the
gate judged.

The model was published before. What fails here is told and costs the run nothing but the number.
Does not know: the loop; how an item is scored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from luthier.data.render import Renderer
from luthier.engine import forget, models, prove
from luthier.engine.setup import Ready
from luthier.proof import probe
from luthier.proof.forgetting import compare
from luthier.proof.probe import Item
from luthier.spec.errors import LuthierError
from luthier.spec.forgetting import Forgetting
from luthier.spec.gate import Gate, judge
from luthier.spec.job import TrainRequest
from luthier.spec.keeping import ITEMS
from luthier.spec.report import Report
from luthier.spec.run import RunFolder

Emit = Callable[..., None]


@dataclass(frozen=True)
class Meter:
    """What the meter needs of a run that is over; its weights are not among it."""

    request: TrainRequest
    renderer: Renderer
    precision: models.Precision
    halved: bool = False  # half of the probe chose a scale (keep.py), the other half measures

    @classmethod
    def of(cls, ready: Ready) -> Meter:
        return cls(ready.request, ready.renderer, ready.settings.precision, ready.request.keep_general)

    def conclude(self, run: RunFolder, report: Report, emit: Emit, heed: Callable[[], None]) -> None:
        """Fill in the report's `forgetting` and `gate`. `heed` may raise, to stop."""
        request = self.request
        worth = report.forecast.probe_items if report.forecast else 0  # a repeated end asks the same
        if count := max(worth, ITEMS) if self.halved else worth:
            emit("phase", name="forgetting", message=f"Asking {count} general items: what was forgotten")
            try:
                report.forgetting = self._measure(run, count, emit, heed)
            except (LuthierError, OSError, RuntimeError, ValueError, MemoryError) as error:
                reason = str(error) or type(error).__name__
                again = f"Measure it with `luthier forgetting {run.path}`."
                emit("warning", message=f"What was forgotten could not be measured: {reason}", hint=again)
        report.gate = judge(request.must_improve, request.max_forgetting, report.proof, report.forgetting)
        if report.gate is not None and not report.gate.passed:
            emit("warning", message=refusal(report.gate), hint="The model is kept.")

    def _measure(self, run: RunFolder, count: int, emit: Emit, heed: Callable[[], None]) -> Forgetting:
        items = probe.sample(probe.half(probe.general(), 1) if self.halved else probe.general(), count)
        return self.of_folder(run.path, items, emit, heed)

    def of_folder(self, folder: Path, items: Sequence[Item], emit: Emit, heed: Callable[[], None]) -> Forgetting:
        """What the run or model in `folder` lost of `items` beside its base. Raises LuthierError without a base."""
        loaded = models.load_for_use(str(folder), self.precision)
        model: Any = loaded.model
        notes: list[str] = []
        base = prove.untuned(loaded, None, notes.append)
        if base is None:
            raise LuthierError(" ".join(notes))

        def progress(what: str, done: int, total: int) -> None:
            del what
            heed()
            emit("progress", name="forgetting", done=done, total=total)

        with base.open() as untuned:
            before = forget.remembered(
                forget.key_of(base.hash, self.renderer, untuned),
                items,
                lambda: forget.measure(untuned, self.renderer, items, name="before", progress=progress),
            )
        after = forget.measure(model, self.renderer, items, name="after", progress=progress)
        return compare(items, before, after, self.request.base_name)


def refusal(gate: Gate) -> str:
    """The sentence for a model that missed its thresholds."""
    return f"Not to be promoted: {' '.join(gate.reasons)}"
