"""What a model learnt against what it forgot, over scales: which points are worth having, and which one is chosen.

Scaling an adapter down, or interpolating a model with its base (Wortsman et al., "Robust fine-tuning of zero-shot
models", 2022: WiSE-FT), costs no training and often keeps most of what was learnt at a part of the loss.
Does not know: models, how anything is measured.
"""

from __future__ import annotations

from collections.abc import Sequence

from luthier.spec.keeping import Keeping, Point

SLACK = 1e-9  # rounding is no difference


def front(points: Sequence[Point], gains: Sequence[float]) -> list[bool]:
    """Of each point, whether no other gains as much and forgets as little with one of them better (Pareto)."""
    pairs = [(gain, -(point.forgetting or 0.0)) for point, gain in zip(points, gains, strict=True)]
    return [
        not any(a >= gain and b >= kept and (a > gain or b > kept) for a, b in pairs)  # a point is no rival of itself
        for gain, kept in pairs
    ]


def gains(found: Keeping) -> list[float]:
    """How much better at the task than the base each point is."""
    base = found.task(found.points[0])
    sign = 1 if found.upward else -1
    tasks = [found.task(point) for point in found.points]
    return [0.0 if base is None or task is None else sign * (task - base) for task in tasks]


def decide(found: Keeping, share: float, most: float | None) -> None:
    """Fill in `front`, `chosen`, `rule` and `sentence`.

    With a threshold `most` on forgetting: the best at the task of the scales that keep to it; when none does, the one
    that forgets least. Without: the scale that forgets least of those that keep `share` of the best gain. Of equals the
    better at the task, then the larger scale. Where nothing gains on the base, nothing is changed.
    """
    gained = gains(found)
    for point, is_front in zip(found.points, front(found.points, gained), strict=True):
        point.front = is_front
    tuned = [(gain, point) for gain, point in zip(gained, found.points, strict=True) if point.scale > 0]
    best = max(gain for gain, _ in tuned)
    if most is not None:
        found.rule = f"The best at the task of the scales that lose at most {most:.1%} of general ability."
        able = [(gain, point) for gain, point in tuned if (point.forgetting or 0.0) <= most + SLACK]
        if able:
            _, chosen = max(able, key=lambda pair: (round(pair[0], 9), -(pair[1].forgetting or 0.0), pair[1].scale))
        else:
            found.rule += " None does, so the one that loses least."
            _, chosen = min(tuned, key=_least)
    elif best <= SLACK:
        found.rule = "Nothing gains on the base on the rows that choose, so the scale stays 1."
        chosen = found.at(1.0)
    else:
        found.rule = f"The scale that forgets least, of those that keep {share:.0%} of the best gain on the base."
        _, chosen = min(((gain, point) for gain, point in tuned if gain >= share * best - SLACK), key=_least)
    found.chosen = chosen.scale
    found.sentence = _sentence(found, chosen, found.at(1.0))


def _least(pair: tuple[float, Point]) -> tuple[float, float, float]:
    gain, point = pair
    return (round(point.forgetting or 0.0, 9), -round(gain, 9), -point.scale)


def _sentence(found: Keeping, chosen: Point, whole: Point) -> str:
    if chosen.scale == 1.0:
        return "The model stays as it was trained: no other scale is chosen by the rule."
    name = found.metric.replace("_", " ") if found.by == "metric" else "loss"
    return (
        f"At scale {chosen.scale:g} instead of 1: {name} {_task(found, whole)} -> {_task(found, chosen)}, general "
        f"ability lost {_share(whole.forgetting)} -> {_share(chosen.forgetting)}, on the rows and items that chose."
    )


def _task(found: Keeping, point: Point) -> str:
    value = found.task(point)
    if value is None:
        return "-"
    return f"{value:.1%}" if found.upward else f"{value:.4f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1%}"
