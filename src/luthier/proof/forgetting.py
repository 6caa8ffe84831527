"""One number for what was lost: scores of the same items before and after tuning, part by part, with intervals.

A part is one kind of items in one language. Its loss is the share of right answers before minus after; of text,
1 - perplexity before / perplexity after, the share of each token's likelihood that is gone (geometric mean). The number
is the mean of the parts' losses, each part weighing the same. A part on which the model was no better than chance
before (Wilson's 95% interval of its share reaches down to chance, or to FLOOR) has nothing to lose and does not count.

Intervals are percentile bootstrap (Efron and Tibshirani, 1993): items are drawn anew within their part, before and
after together, since the same items were asked twice. Does not know: models.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from luthier.proof.probe import Item, digest
from luthier.spec.forgetting import Forgetting, PartChange

DRAWS = 2000
SEED = 0
FLOOR = 0.02  # of tasks guessing gives nothing, and one lucky answer is not yet ability
Z = 1.959964  # of a 95% interval
Floats = npt.NDArray[np.float64]
Scores = Mapping[str, float]  # item id -> share right (0 to 1); of a text nats per token


def compare(items: Sequence[Item], before: Scores, after: Scores, name: str, *, draws: int = DRAWS) -> Forgetting:
    """What a model with the scores `after` lost beside one with `before`, whose name is `name`.

    Items that either has no score for are left out, and counted.
    """
    known = [item for item in items if item.id in before and item.id in after]
    parts: dict[tuple[str, str], list[Item]] = {}
    for item in known:
        parts.setdefault(item.part, []).append(item)
    rng = np.random.default_rng(SEED)
    changes, drawn = [], []
    for (kind, language), members in parts.items():
        old = np.array([before[item.id] for item in members])
        new = np.array([after[item.id] for item in members])
        is_text = members[0].form == "text"
        picks = rng.integers(0, len(members), (draws, len(members)))
        losses = _loss(old[picks], new[picks], is_text)
        low, high = np.quantile(losses, [0.025, 0.975])
        chance = None if is_text else float(np.mean([item.chance or 0.0 for item in members]))
        counted = is_text or wilson_low(float(old.mean()), len(old)) > max(chance or 0.0, FLOOR)
        changes.append(
            PartChange(
                kind=kind,
                language=language,
                items=len(members),
                before=_shown(old, is_text),
                after=_shown(new, is_text),
                chance=chance,
                loss=float(_loss(old, new, is_text)),
                low=float(low),
                high=float(high),
                counted=counted,
            )
        )
        if counted:
            drawn.append(losses)
    number = [change.loss for change in changes if change.counted]
    ends = np.quantile(np.mean(drawn, axis=0), [0.025, 0.975]) if drawn else (None, None)
    return Forgetting(
        loss=float(np.mean(number)) if number else None,
        low=None if ends[0] is None else float(ends[0]),
        high=None if ends[1] is None else float(ends[1]),
        items=len(known),
        left_out=len(items) - len(known),
        probe=digest(items),
        before=name,
        parts=changes,
    )


def _loss(old: Floats, new: Floats, is_text: bool) -> Floats:
    """Over the last axis, the items."""
    gap: Floats = np.asarray((old - new).mean(axis=-1))
    return -np.expm1(gap) if is_text else gap


def _shown(scores: Floats, is_text: bool) -> float:
    mean = float(scores.mean())
    return math.exp(min(mean, 700.0)) if is_text else mean


def wilson_low(share: float, count: int) -> float:
    """Lower end of Wilson's 95% score interval for a share of `count` trials (Wilson, 1927)."""
    middle = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    return (middle - spread) / (1 + Z * Z / count)
