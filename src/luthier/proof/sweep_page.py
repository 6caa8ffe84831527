"""What came of a sweep as one HTML page: no script, nothing loaded from anywhere, every text escaped.

Does not know: how trials were carried out; what the page looks like (sweep.html.jinja).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from fractions import Fraction
from importlib.resources import files
from typing import Any

import jinja2

from luthier.proof.page import figure, visible
from luthier.spec.sweep import Result, Rung, Trial

WIDTH, HEIGHT, LEFT, TOP = 760, 300, 60, 10  # of the plot, in pixels
Point = tuple[float, float]


def page(result: Result, curves: Mapping[int, Sequence[Point]]) -> str:
    """The whole page. `curves`: (share of its steps, loss of the deciding rows) by the trial's number."""
    source = files("luthier.proof").joinpath("sweep.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"visible": visible, "figure": figure}
    return environment.from_string(source).render(
        result=result,
        plot=_plot(result, curves),
        command=_in_lines(result.command or ""),
        rungs={trial.number: _cells(result, trial) for trial in result.trials},
    )


def _in_lines(command: str) -> str:
    """The same shell command with a line for each option, so that no browser breaks one of them at a hyphen."""
    lines: list[list[str]] = [[]]
    for word in shlex.split(command):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n  ".join(shlex.join(words) for words in lines)


def _cells(result: Result, trial: Trial) -> list[str]:
    """What the trial was measured at each rung."""
    found = [trial.at(Fraction(share)) for share in result.shares]
    return ["" if rung is None else _cell(rung) for rung in found]


def _cell(rung: Rung) -> str:
    lost = f" ({rung.forgetting:+.1%})" if rung.forgetting is not None else ""
    return figure(rung.score if rung.score is not None else rung.loss, ".4f") + lost


def _plot(result: Result, curves: Mapping[int, Sequence[Point]]) -> dict[str, Any] | None:
    """A line a trial: the loss of the deciding rows by the share of its steps; None while nothing was measured."""
    values = [value for points in curves.values() for _, value in points]
    if not values:
        return None
    low, high = min(values), max(values)
    room = (high - low) * 0.05 or 0.05
    low, high = low - room, high + room

    def at(point: Point) -> tuple[float, float]:
        return (
            round(LEFT + point[0] * WIDTH, 1),
            round(TOP + (high - point[1]) / (high - low) * HEIGHT, 1),
        )

    lines = [
        {
            "kind": trial.status,
            "points": [at(point) for point in curves.get(trial.number, ())],
            "said": f"trial {trial.number}: {trial.words}",
        }
        for trial in sorted(result.trials, key=lambda trial: trial.status == "won")
    ]
    return {
        "lines": lines,
        "x": [
            {"at": round(LEFT + float(Fraction(share)) * WIDTH, 1), "said": "end" if share == "1" else share}
            for share in result.shares
        ],
        "y": [{"at": round(TOP + n / 4 * HEIGHT, 1), "said": f"{high - n / 4 * (high - low):.3g}"} for n in range(5)],
        "size": (LEFT + WIDTH + 20, TOP + HEIGHT + 30),
        "left": LEFT,
        "right": LEFT + WIDTH,
        "foot": TOP + HEIGHT,
    }
