"""How much of what was learnt is kept, against what it cost: a model measured at several scales, and which was chosen.

A scale multiplies what tuning added: 0 is the base, 1 the model as it was trained. Part of RUN/report.json.
Does not know: how anything is measured; how the choice is made (proof/tradeoff.py).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

SCALES = (0.25, 0.5, 0.75, 1.0)
KEPT_SHARE = 0.95  # of the best gain that a scale must keep to be chosen
ROWS = 200  # held out, asked at each scale, at most
ITEMS = 100  # of the probe, asked at each scale
By = Literal["metric", "loss"]


class Point(BaseModel):
    """The model at one scale, on the rows and items that choose."""

    model_config = ConfigDict(extra="forbid")

    scale: float
    score: float | None = Field(description="Mean score of the answers, by the metric; null for plain texts.")
    loss: float | None = Field(description="Nats per learnt token.")
    forgetting: float | None = Field(description="The meter's number beside the base; 0 at scale 0.")
    low: float | None = Field(default=None, description="Ends of its 95% interval.")
    high: float | None = None
    front: bool = Field(default=False, description="No other scale is as good at both and better at one.")


class Keeping(BaseModel):
    """The search. `points` begin with the base, at scale 0."""

    model_config = ConfigDict(extra="forbid")

    method: Literal["scaled adapter", "interpolated weights"]
    by: By
    metric: str
    higher_is_better: bool = True
    rows: int = Field(description="Held-out rows that chose; the proof is measured on others.")
    items: int = Field(description="Items of the probe that chose; the report's number is of others.")
    points: list[Point]
    chosen: float = Field(description="The scale of the model that was published.")
    rule: str
    sentence: str
    old: str | None = Field(default=None, description="Where the model at scale 1 is kept; null when it was chosen.")
    seconds: float = 0.0

    def task(self, point: Point) -> float | None:
        """What decides of the task."""
        return point.score if self.by == "metric" else point.loss

    @property
    def upward(self) -> bool:
        """Whether more of the task's figure is better."""
        return self.by == "metric" and self.higher_is_better

    def known(self) -> list[tuple[Point, float, float]]:
        """(point, task, forgotten) of the points of which both are known."""
        found = [(point, self.task(point), point.forgetting) for point in self.points]
        return [(point, task, lost) for point, task, lost in found if task is not None and lost is not None]

    def at(self, scale: float) -> Point:
        return next(point for point in self.points if point.scale == scale)
