"""The learning curve: every published checkpoint answers the same few validation rows, as many as there is time for.

The rows are the first of the order in which a proof asks, so the last point repeats answers that are remembered.
Does not know: how answers are judged; the loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from luthier.engine import checkpoint
from luthier.engine.prove import FIRST
from luthier.proof.significance import interval_of
from luthier.spec.learning import Learning, LearningPoint
from luthier.spec.proof import Proof
from luthier.spec.run import RunFolder

SHARE = 1 / 12  # of the training time that the curve may take
MOST_ROWS = 64

Score = Callable[[int, int], Proof]  # (step of a published checkpoint, rows) -> what it answers


def rows_worth(points: int, train_seconds: float, load: float, per_row: float, held_out: int) -> int:
    """How many rows each of `points` checkpoints is asked; 0 when there is no time for FIRST of them (or all)."""
    room = train_seconds * SHARE / max(1, points) - load
    rows = min(MOST_ROWS, held_out, int(room / per_row) if per_row > 0 else MOST_ROWS)
    return rows if room > 0 and rows >= min(FIRST, held_out) else 0


def measure(run: RunFolder, rows: int, losses: Mapping[int, float | None], seed: int, score: Score) -> Learning | None:
    """None for fewer than two checkpoints, or metrics without answers. Raises what `score` raises."""
    steps = checkpoint.steps(run.published)
    if len(steps) < 2 or not rows:
        return None
    proofs = {step: score(step, rows) for step in sorted(steps)}
    first = next(iter(proofs.values()))
    if first.metric in ("perplexity", "preference"):
        return None  # every validation has measured that
    points = []
    for step, proof in proofs.items():
        scores = [row.scores["tuned"] for row in proof.rows]
        interval = interval_of(scores, [1.0] * len(scores), seed)
        mean = sum(scores) / len(scores)
        point = LearningPoint(step=step, score=mean, interval=interval, scores=scores, validation_loss=losses.get(step))
        points.append(point)
    sample = [row.row for row in first.rows]
    chosen = f"Measured on {len(sample)} of {first.held_out} validation rows, the same ones at each checkpoint."
    return Learning(metric=first.metric, rows=sample, chosen=chosen, points=points, best=_best(points))


def _best(points: list[LearningPoint]) -> int:
    def rank(point: LearningPoint) -> tuple[float, float, int]:
        loss = point.validation_loss
        return point.score, -loss if loss is not None else float("-inf"), -point.step

    return max(points, key=rank).step
