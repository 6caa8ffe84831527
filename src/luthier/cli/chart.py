"""A loss curve in characters: braille dots (two by four a cell) where the terminal has them, plain ASCII elsewhere.

Pure functions of points; does not know where they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.text import Text

Point = tuple[float, float]  # (step, loss)
LABEL = 7  # columns left of the plot: a number and the axis
# Bit of the dot at (row, column) of a braille cell, from U+2800 (Unicode, Braille Patterns).
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def loss_chart(curve: Sequence[Point], marks: Sequence[Point], width: int, height: int, ascii_only: bool) -> list[Text]:
    """`height` lines of at most `width` columns: the curve, the marks over it, and a last line that names the steps."""
    columns, rows = width - LABEL, height - 1
    if columns < 8 or rows < 2 or not (curve or marks):
        return []
    xs, ys = [x for x, _ in (*curve, *marks)], [y for _, y in (*curve, *marks)]
    low, high = _spread(min(ys), max(ys))
    left, right = min(xs), max(max(xs), min(xs) + 1)
    across, down = (1, 1) if ascii_only else (2, 4)

    def place(point: Point, wide: int, tall: int) -> tuple[int, int]:
        x, y = point
        return round((x - left) / (right - left) * (wide - 1)), round((high - y) / (high - low) * (tall - 1))

    path = [place(point, columns * across, rows * down) for point in curve]
    dots = _joined(_one_a_column(path))
    over = {place(point, columns, rows) for point in marks}
    lines = [_line(row, columns, dots, over, ascii_only) for row in range(rows)]
    for row, value in ((0, high), (rows - 1, low)):
        lines[row].plain = f"{value:>{LABEL - 2}.3g}"[: LABEL - 2] + lines[row].plain[LABEL - 2 :]
    return [*lines, _foot(left, right, columns, bool(marks), ascii_only)]


def _spread(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.03 or max(abs(high) * 0.05, 0.01)
    return low - room if low - room > 0 or low < 0 else 0.0, high + room


def _one_a_column(path: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The mean height of each column that has points."""
    heights: dict[int, list[int]] = {}
    for x, y in path:
        heights.setdefault(x, []).append(y)
    return [(x, round(sum(ys) / len(ys))) for x, ys in sorted(heights.items())]


def _joined(path: Sequence[tuple[int, int]]) -> set[tuple[int, int]]:
    """All dots of the line through the points."""
    dots = set(path)
    for (x0, y0), (x1, y1) in pairwise(path):
        length = max(x1 - x0, abs(y1 - y0))
        dots |= {(x0 + round((x1 - x0) * n / length), y0 + round((y1 - y0) * n / length)) for n in range(length)}
    return dots


def _line(row: int, columns: int, dots: set[tuple[int, int]], over: set[tuple[int, int]], ascii_only: bool) -> Text:
    line = Text(" " * (LABEL - 2) + ("| " if ascii_only else "│ "), style="dim", no_wrap=True)
    for column in range(columns):
        if (column, row) in over:
            line.append("o" if ascii_only else "●", "not dim bold yellow")
        elif ascii_only:
            line.append("*" if (column, row) in dots else " ", "not dim cyan")
        else:
            bits = sum(DOTS[dy][dx] for dy in range(4) for dx in range(2) if (column * 2 + dx, row * 4 + dy) in dots)
            line.append(chr(0x2800 + bits) if bits else " ", "not dim cyan")
    return line


def _foot(left: float, right: float, columns: int, marked: bool, ascii_only: bool) -> Text:
    first, last = f"step {left:.0f}", f"{right:.0f}"
    legend = [("* " if ascii_only else "⠒⠒ ", "cyan"), ("train  ", "dim")]
    legend += [("o " if ascii_only else "● ", "bold yellow"), ("validation", "dim")] if marked else []
    room = columns - len(first) - len(last)
    foot = Text(" " * LABEL, no_wrap=True).append(first, "dim")
    wide = sum(len(text) for text, _ in legend)
    if wide + 2 > room:
        foot.append(" " * max(1, room)).append(last, "dim")
        foot.truncate(LABEL + columns)
        return foot
    before = (room - wide) // 2
    return (
        foot.append(" " * before)
        .append_text(Text.assemble(*legend))
        .append(" " * (room - wide - before))
        .append(last, "dim")
    )
