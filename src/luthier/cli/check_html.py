"""The data doctor's report as one HTML page: no script, nothing loaded from anywhere, every text escaped.

Does not know: how anything is found; what the page looks like (check.html.jinja).
"""

from __future__ import annotations

from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2

from luthier.cli.check import CHARTS
from luthier.cli.output import visible

if TYPE_CHECKING:
    from luthier.data.findings import Report

WIDTH, HEIGHT = 520, 130  # of a chart's plot, in pixels
FOOT = 22  # below it, for the numbers
MOST_CLASSES = 24


def page(report: Report) -> str:
    """The whole page."""
    from luthier.data.findings import LEVELS

    source = files("luthier.cli").joinpath("check.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["visible"] = visible
    sections = [_section(name, numbers) for name, numbers in report.statistics["files"].items()]
    counts = {level: sum(finding.severity == level for finding in report.findings) for level in LEVELS}
    return environment.from_string(source).render(report=report, sections=sections, counts=counts)


def _section(name: str, numbers: dict[str, Any]) -> dict[str, Any]:
    spread = [(key, title) for key, title in CHARTS if numbers.get(key) and numbers[key]["min"] != numbers[key]["max"]]
    charts = [_chart(title, numbers[key]) for key, title in spread]
    languages = list(numbers["languages"].items())
    classes = numbers.get("classes", [])[:MOST_CLASSES]
    return {
        "name": name,
        "numbers": numbers,
        "charts": charts,
        "classes": _shares(classes),
        "languages": _shares(languages) if len(languages) > 1 else [],
    }


def _shares(pairs: list[Any]) -> list[dict[str, Any]]:
    most = max((count for _, count in pairs), default=1)
    return [{"label": label, "count": count, "share": 100 * count / most} for label, count in pairs]


def _chart(title: str, found: dict[str, Any]) -> dict[str, Any]:
    """Bars of equal width, whatever their range is; the numbers below tell it."""
    bars = found["histogram"]
    step = WIDTH / len(bars)
    most = max(count for _, _, count in bars)
    drawn = [
        {
            "x": round(n * step + 0.5, 1),
            "y": round(HEIGHT - max(1.5 if count else 0, count / most * (HEIGHT - 8)), 1),
            "width": round(step - 1, 1),
            "height": round(max(1.5 if count else 0, count / most * (HEIGHT - 8)), 1),
            "said": f"{low:,}: {count:,} rows" if high - low == 1 else f"{low:,} to {high - 1:,}: {count:,} rows",
        }
        for n, (low, high, count) in enumerate(bars)
    ]
    every = max(1, round(len(bars) / 6))
    ticks = [{"x": round(n * step, 1), "said": f"{low:,}"} for n, (low, _, _) in enumerate(bars) if n % every == 0]
    return {"title": title, "bars": drawn, "ticks": ticks, "found": found, "size": (WIDTH, HEIGHT, HEIGHT + FOOT)}
