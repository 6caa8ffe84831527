"""How a model learnt its task: the metric at each checkpoint that was published, on the same few held-out rows.

Does not know: how anything is measured (engine/learning.py).
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from luthier.spec.proof import Interval, MetricName


class LearningPoint(BaseModel):
    """One published checkpoint. `step` is the optimizer step that it was taken after."""

    model_config = ConfigDict(extra="forbid")

    step: int
    score: float = Field(description="The metric over the sample: the mean of `scores`.")
    interval: Interval
    scores: list[float] = Field(description="Of each row of the sample, in the order of `rows`.")
    validation_loss: float | None = Field(default=None, description="Over all validation rows at that step.")


class Learning(BaseModel):
    """The learning curve. The sample is the same for every point; which checkpoint is best is said of it alone."""

    model_config = ConfigDict(extra="forbid")

    metric: MetricName
    higher_is_better: bool = True
    rows: list[int] = Field(description="The sample: numbers of validation rows.")
    chosen: str = Field(description="How large the sample is, and why.")
    points: list[LearningPoint]
    best: int = Field(description="The step with the best score; of equals the one with the lower validation loss.")

    @property
    def sentence(self) -> str:
        """Which checkpoint is best, and how much that says."""
        best = next(point for point in self.points if point.step == self.best)
        last = self.points[-1]
        low, high = best.interval.low, best.interval.high
        words = (
            f"Best: step {best.step:,}, {self.metric} {best.score:.3f} (95%: {low:.3f} to {high:.3f}). {self.chosen}"
        )
        if best.step != last.step and low <= last.score <= high:
            words += f" The result, step {last.step:,} with {last.score:.3f}, lies within that interval."
        return words
