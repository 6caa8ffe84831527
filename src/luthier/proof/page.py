"""A report as one HTML page: no script, nothing loaded from anywhere, every text escaped, charts as inline SVG.

Does not know: how anything was measured; what the page looks like (page.html.jinja).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jinja2

from luthier.proof import pareto
from luthier.proof.judge import p_words
from luthier.spec.forgetting import Forgetting
from luthier.spec.learning import Learning
from luthier.spec.proof import Comparison, Proof, ProofRow, WayName
from luthier.spec.report import Report

WIDTH, HEIGHT, LEFT, FOOT = 460, 180, 56, 26  # of a chart's plot, and its margins, in pixels
MOST_POINTS = 400
MOST_FLIPS = 40  # of each kind
MOST_SAMPLES = 12
TITLES: dict[WayName, str] = {"base": "base", "examples": "base + examples", "tuned": "tuned"}

Point = tuple[float, float]


@dataclass(frozen=True)
class Curves:
    """(step, value) of a run's training loss, validation loss and accuracy; `kept`: steps with a checkpoint."""

    train: list[Point] = field(default_factory=list)
    loss: list[Point] = field(default_factory=list)
    accuracy: list[Point] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)


def curves(events: Iterable[dict[str, Any]]) -> Curves:
    """From a run's events; of steps that were taken again the last time counts."""
    found: dict[str, dict[int, float | None]] = {"train": {}, "loss": {}, "accuracy": {}}
    kept: set[int] = set()
    for event in events:
        if event["type"] == "step":
            found["train"][event["step"]] = event["loss"]
        elif event["type"] == "validation":
            found["loss"][event["step"]] = event["loss"]
            found["accuracy"][event["step"]] = event["token_accuracy"]
        elif event["type"] == "checkpoint":
            kept.add(event["step"])
    series = {
        name: [(float(step), value) for step, value in sorted(values.items()) if value is not None]
        for name, values in found.items()
    }
    return Curves(**series, kept=sorted(kept))


def page(report: Report, found: Curves | None = None) -> str:
    """The whole page."""
    found = found or Curves()
    source = files("luthier.proof").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"visible": visible, "figure": figure, "p_words": p_words}
    proof = report.proof
    return environment.from_string(source).render(
        report=report,
        proof=proof,
        titles=TITLES,
        intervals=_intervals(proof) if proof and proof.ways else None,
        charts=[*_curve_charts(report, found), *([_calibration(proof)] if proof and proof.calibration else [])],
        turned=_turned(proof) if proof else [],
        samples=_samples(proof) if proof else [],
        details=_details(proof) if proof else [],
        saved=_saved(proof) if proof else None,
        kept=pareto.section(report.keeping),
        forgotten=_forgotten(report.forgetting) if report.forgetting else None,
    )


def visible(text: str) -> str:
    """Without characters that cannot be seen."""
    return "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in text)


def figure(value: float | None, form: str = ".3f") -> str:
    if value is None:
        return "–"
    said = format(value, form)
    return said[1:] if said[:1] in "+-" and not said.strip("+-0.%") else said  # no signed zeros


# -- charts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """From values to pixels."""

    low: Point
    high: Point

    def at(self, x: float, y: float) -> Point:
        across = (x - self.low[0]) / ((self.high[0] - self.low[0]) or 1)
        up = (y - self.low[1]) / ((self.high[1] - self.low[1]) or 1)
        return round(LEFT + across * WIDTH, 1), round(8 + (1 - up) * HEIGHT, 1)

    def ticks(self, whole: bool) -> dict[str, list[dict[str, Any]]]:
        """A few values along both axes."""
        places = [n / 4 for n in range(5)]
        xs = [self.low[0] + share * (self.high[0] - self.low[0]) for share in places]
        ys = [self.low[1] + share * (self.high[1] - self.low[1]) for share in places]
        return {
            "x": [{"at": self.at(x, 0)[0], "said": f"{x:,.0f}" if whole else f"{x:.2g}"} for x in xs],
            "y": [{"at": self.at(0, y)[1], "said": f"{y:.3g}"} for y in ys],
        }


def _frame(series: Sequence[Sequence[Point]]) -> _Frame:
    xs, ys = ([point[n] for points in series for point in points] for n in (0, 1))
    margin = (max(ys) - min(ys)) * 0.08 or 0.05
    low = min(ys) - margin
    return _Frame((min(0.0, *xs), max(0.0, low) if min(ys) >= 0 else low), (max(xs), max(ys) + margin))


def _curve_charts(report: Report, found: Curves) -> list[dict[str, Any]]:
    charts = []
    if len(found.train) > 1:
        points = _thinned(found.train)
        frame = _frame([points, found.loss])
        lines = [{"name": "training loss", "kind": "tuned", "points": [frame.at(*point) for point in points]}]
        charts.append(_chart("Training loss by step", frame, lines))
    if len(found.loss) > 1:
        frame = _frame([found.loss])
        dots = [
            {"at": frame.at(*point), "kind": "tuned", "said": f"step {point[0]:,.0f}: {point[1]:.4f}"}
            for point in found.loss
        ]
        lines = [{"name": "validation loss", "kind": "tuned", "points": [frame.at(*point) for point in found.loss]}]
        best = report.best_step
        note = f"Best: step {best:,}, loss {figure(report.validation_loss_best, '.4f')}." if best else ""
        if best and found.loss[-1][0] > best:
            note += " The result is the last step; the best checkpoint is kept beside it."
        charts.append(_chart("Validation loss by checkpoint", frame, lines, dots, note))
    if report.learning is not None:
        charts.append(_learning(report.learning))
    return charts


def _learning(found: Learning) -> dict[str, Any]:
    points = [(float(point.step), point.score) for point in found.points]
    ends = [(float(point.step), end) for point in found.points for end in (point.interval.low, point.interval.high)]
    frame = _frame([points, ends])
    lines = [{"name": found.metric, "kind": "tuned", "points": [frame.at(*point) for point in points]}]
    dots = []
    for point in found.points:
        low, high = point.interval.low, point.interval.high
        lines.append(
            {"name": "95% interval", "kind": "base", "points": [frame.at(point.step, low), frame.at(point.step, high)]}
        )
        best = ", the best" if point.step == found.best else ""
        said = f"step {point.step:,}: {point.score:.4f} ({low:.4f} to {high:.4f}){best}"
        dots.append({"at": frame.at(point.step, point.score), "kind": "examples" if best else "tuned", "said": said})
    return _chart(f"{found.metric.replace('_', ' ').capitalize()} by checkpoint", frame, lines, dots, found.sentence)


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Means of equal stretches."""
    size = -(-len(points) // MOST_POINTS)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def _calibration(proof: Proof) -> dict[str, Any]:
    frame = _Frame((0.0, 0.0), (1.0, 1.0))
    lines = [{"name": "", "kind": "soft", "points": [frame.at(0, 0), frame.at(1, 1)]}]
    dots = []
    for way, bins in proof.calibration.items():
        points = [(each.confidence, each.right / each.rows) for each in bins]
        lines.append({"name": TITLES[way], "kind": way, "points": [frame.at(*point) for point in points]})
        dots += [
            {
                "at": frame.at(*point),
                "kind": way,
                "said": f"{TITLES[way]}: {each.rows} rows, confidence {point[0]:.2f}, right {point[1]:.2f}",
            }
            for point, each in zip(points, bins, strict=True)
        ]
    note = "How often an answer is right (up) that was given with some confidence (across); the diagonal is honest."
    return _chart("Calibration", frame, lines, dots, note, whole=False)


def _chart(
    title: str,
    frame: _Frame,
    lines: list[dict[str, Any]],
    dots: Sequence[dict[str, Any]] = (),
    note: str = "",
    whole: bool = True,
) -> dict[str, Any]:
    size = (LEFT + WIDTH + 12, 8 + HEIGHT + FOOT)
    ground = {"left": LEFT, "right": LEFT + WIDTH, "foot": 8 + HEIGHT}
    return {
        "title": title,
        "ticks": frame.ticks(whole),
        "lines": lines,
        "dots": dots,
        "note": note,
        "size": size,
        **ground,
    }


def _intervals(proof: Proof) -> dict[str, Any]:
    """A bar of each way's interval with its score, on one scale."""
    known = [way for way in proof.ways if way.score is not None and way.interval is not None]
    ends = [end for way in known for end in (way.interval.low, way.interval.high) if way.interval is not None]  # type: ignore[union-attr]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    low, high = (0.0, 1.0) if proof.in_shares else (low - 0.05 * (high - low), high + 0.05 * (high - low))

    def at(value: float) -> float:
        return round(150 + (value - low) / ((high - low) or 1) * WIDTH, 1)

    rows = [
        {
            "name": TITLES[way.name],
            "kind": way.name,
            "y": 20 + 34 * n,
            "low": at(way.interval.low),
            "high": at(way.interval.high),
            "score": at(way.score or 0.0),
            "said": _said(proof, way.score),
            "range": f"{_said(proof, way.interval.low)} to {_said(proof, way.interval.high)}",
        }
        for n, way in enumerate(known)
        if way.interval is not None
    ]
    ticks = [{"at": at(low + n / 4 * (high - low)), "said": _said(proof, low + n / 4 * (high - low))} for n in range(5)]
    return {"rows": rows, "ticks": ticks, "height": 20 + 34 * len(rows), "width": 150 + WIDTH + 130}


def _forgotten(found: Forgetting) -> dict[str, Any]:
    """A bar of each part's loss with its interval, the number last; right of the zero line is what was lost."""
    lines = [(part.name, part.loss, part.low, part.high, part.counted) for part in found.parts]
    if found.loss is not None and found.low is not None and found.high is not None:
        lines.append(("all counted parts", found.loss, found.low, found.high, True))
    reach = max([0.01, *(abs(end) for _, _, low, high, _ in lines for end in (low, high))])

    def at(value: float) -> float:
        return round(150 + (value + reach) / (2 * reach) * WIDTH, 1)

    rows = [
        {
            "name": name,
            "kind": "tuned" if counted else "base",
            "y": 20 + 26 * n,
            "low": at(low),
            "high": at(high),
            "loss": at(loss),
            "said": figure(loss, "+.1%"),
            "range": f"{figure(low, '+.1%')} to {figure(high, '+.1%')}",
        }
        for n, (name, loss, low, high, counted) in enumerate(lines)
    ]
    ticks = [{"at": at(share * reach), "said": figure(share * reach, "+.0%")} for share in (-1, -0.5, 0, 0.5, 1)]
    return {"rows": rows, "ticks": ticks, "height": 20 + 26 * len(rows), "width": 150 + WIDTH + 100}


def _said(proof: Proof, value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.1%}" if proof.in_shares else f"{value:.4f}"


# -- rows --------------------------------------------------------------------------------------------------------------


def _turned(proof: Proof) -> list[dict[str, Any]]:
    """For each rival the rows that tuning lost, then those that it gained."""
    rows = {row.row: row for row in proof.rows}
    return [
        {
            "title": f"{title} beside {TITLES[comparison.against]}",
            "count": len(numbers),
            "rows": [rows[number] for number in numbers[:MOST_FLIPS]],
            "against": comparison.against,
        }
        for comparison in proof.comparisons
        for title, numbers in _both(comparison)
        if numbers
    ]


def _both(comparison: Comparison) -> list[tuple[str, list[int]]]:
    return [("Turned wrong", comparison.lost), ("Turned right", comparison.gained)]


def _samples(proof: Proof) -> list[ProofRow]:
    """The first rows, worst tuned answers first."""
    answered = [row for row in proof.rows if row.answers]
    sign = 1 if proof.higher_is_better else -1
    return sorted(answered, key=lambda row: sign * row.scores.get("tuned", 0.0))[:MOST_SAMPLES]


def _details(proof: Proof) -> list[dict[str, Any]]:
    names = list(dict.fromkeys(name for way in proof.ways for name in way.details))
    return [
        {"name": name.replace("_", " "), "cells": [figure(way.details.get(name)) for way in proof.ways]}
        for name in names
    ]


def _saved(proof: Proof) -> str | None:
    """What tuning spares beside showing examples, in words."""
    ways = {way.name: way.cost for way in proof.ways}
    shown, tuned = ways.get("examples"), ways.get("tuned")
    if shown is None or tuned is None or not proof.rows or shown.prompt_tokens <= tuned.prompt_tokens:
        return None
    spared = (shown.prompt_tokens - tuned.prompt_tokens) / len(proof.rows)
    share = 1 - tuned.prompt_tokens / shown.prompt_tokens
    return f"Beside examples in the prompt, tuning spares {spared:,.0f} prompt tokens a request ({share:.0%})."
