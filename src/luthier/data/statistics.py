"""The numbers of a report: lengths and turns as quantiles and histograms, classes, languages, the rows to look at.

Everything is plain JSON. Does not know: what is good or bad about a number (doctor.py), how it is drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from luthier.data import cookbook
from luthier.data.characters import LANGUAGES
from luthier.data.columns import Columns

QUANTILES = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1)
BARS = 24
SHOWN = 10  # longest and oddest rows
FEWEST_FOR_ODD = 5  # rows
ODD = 6.0  # robust standard deviations
FEWEST_FOR_CLASSES = 20  # rows
_LONG = 80  # characters from which the share of signs, or of repeated runs, is worth a look
_MOST_CLASSES = 100
_ROWS_PER_CLASS = 10
# The least spread that counts as one standard deviation, so that rows alike to the letter do not make all others odd.
_SPREADS = {"prompt length": 0.25, "answer length": 0.25, "number of turns": 0.34, "signs": 0.02, "repetition": 0.05}


def lengths(values: npt.NDArray[np.int64]) -> dict[str, Any]:
    """{min, p5, p25, median, p75, p95, p99, max, mean, total, histogram: [[from, to, rows], ...]} of counts."""
    if not len(values):
        return {}
    names = ("min", "p5", "p25", "median", "p75", "p95", "p99", "max")
    found: dict[str, Any] = dict(zip(names, np.quantile(values, QUANTILES).tolist(), strict=True))
    return found | {
        "mean": float(values.mean()),
        "total": int(values.sum()),
        "histogram": histogram(values),
    }


def histogram(values: npt.NDArray[np.int64]) -> list[list[int]]:
    """[[from, to, rows], ...] of whole numbers, `to` excluded; bars grow by a factor where the longest is far out."""
    low, high = int(values.min()), int(values.max())
    if high - low < BARS:
        edges = np.arange(low, high + 2)
    elif high > 20 * max(1.0, float(np.median(values))):
        edges = np.unique(np.geomspace(max(1, low), high + 1, BARS + 1).astype(np.int64))
        edges[0], edges[-1] = low, high + 1
    else:
        edges = np.unique(np.linspace(low, high + 1, BARS + 1).astype(np.int64))
    counts = np.histogram(values, edges)[0]
    counts[-1] += int(np.count_nonzero(values == edges[-1]))  # numpy's last bar includes its end, which is high + 1
    return [[int(a), int(b), int(n)] for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def classes(answers: Counter[str] | None, rows: int) -> list[tuple[str, int]] | None:
    """Each class with its rows, the most frequent first; None where the answers do not look like classes."""
    if answers is None or rows < FEWEST_FOR_CLASSES or "" in answers:
        return None
    if not 2 <= len(answers) <= min(_MOST_CLASSES, max(2, rows // _ROWS_PER_CLASS)):
        return None
    return answers.most_common()


def odd_from(distance: npt.NDArray[np.float64]) -> float:
    """The distance from which rows are unlike the others: where they are many, they are a kind of row and not odd."""
    most = max(3, len(distance) // 100)
    return max(ODD, float(np.sort(distance)[-most])) if len(distance) > most else ODD


def oddness(columns: Columns) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], tuple[str, ...]]:
    """(robust distance of each row from the middle, which measure says so, the measures' names)."""
    measures = {
        "prompt length": np.log1p(columns.share("prompt_characters")),
        "answer length": np.log1p(columns.share("answer_characters")),
        "number of turns": np.log1p(columns.share("turns")),
        "signs": _of_long(columns.share("signs"), columns),
        "repetition": _of_long(1 - columns.share("distinct"), columns),
    }
    distances = []
    for name, values in measures.items():
        away = np.abs(values - np.median(values)) if len(values) else values
        spread = 1.4826 * float(np.median(away)) if len(values) else 0.0
        distances.append(away / max(spread, _SPREADS[name]))
    table = np.stack(distances)
    return table.max(axis=0), table.argmax(axis=0), tuple(measures)


def _of_long(values: npt.NDArray[np.float64], columns: Columns) -> npt.NDArray[np.float64]:
    """Shares of characters, where there are enough of them for a share to tell anything; else the middle."""
    long = columns.number("prompt_characters") + columns.number("answer_characters") >= _LONG
    return np.where(long, values, np.median(values[long])) if long.any() else np.zeros(len(values))


def languages(indices: npt.NDArray[np.int64]) -> dict[str, int]:
    """{language: rows}, the most frequent first; rows too short to tell are "unknown"."""
    counts = np.bincount(indices, minlength=len(LANGUAGES))
    found = {LANGUAGES[n] or "unknown": int(count) for n, count in enumerate(counts) if count}
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def longest(columns: Columns) -> list[dict[str, int]]:
    """The longest rows: number, characters, tokens when there are any."""
    sizes = columns.number("prompt_characters") + columns.number("answer_characters")
    order = np.argsort(-sizes, kind="stable")[:SHOWN]
    tokens = columns.number("tokens")
    return [
        {"row": int(columns.numbers["row"][n]), "characters": int(sizes[n])}
        | ({"tokens": int(tokens[n])} if tokens[n] else {})
        for n in order
    ]


def of_file(columns: Columns, tokenised: bool) -> dict[str, Any]:
    """All numbers of one file."""
    whole = columns.number("prompt_characters") + columns.number("answer_characters")
    found: dict[str, Any] = {
        "format": columns.format,
        "records": columns.records,
        "characters": lengths(whole),
        "answer_characters": lengths(columns.number("answer_characters")),
        "turns": lengths(columns.number("turns")),
        "roles": dict(columns.roles.most_common()),
        "languages": languages(columns.number("language")),
        "longest": longest(columns),
        "oddest": oddest(columns),
    }
    if tokenised:
        there = columns.number("tokens") > 0  # not of rows that the template cannot express
        found["tokens"] = lengths(columns.number("tokens")[there])
        found["learnt_tokens"] = lengths(columns.number("learnt")[there])
        found["lost_tokens"], found["lost_learnt_tokens"] = columns.lost_tokens, columns.lost_learnt
    labels = classes(columns.answers, columns.examples)
    if labels is not None:
        found["classes"] = [[label, count] for label, count in labels]
    if columns.format == "chat":
        counters: Sequence[str] = (*cookbook.COUNTERS, "missing_system", "missing_user")
        found["cookbook"] = {name: columns.cookbook[name] for name in counters}
        found["cookbook"]["epochs"] = cookbook.epochs(columns.records)
    return found


def oddest(columns: Columns) -> list[dict[str, Any]]:
    """The rows furthest from the middle, with the measure that says so."""
    if columns.examples < FEWEST_FOR_ODD:
        return []
    distance, measure, names = oddness(columns)
    order = np.argsort(-distance, kind="stable")[:SHOWN]
    rows = columns.numbers["row"]
    return [
        {"row": int(rows[n]), "measure": names[measure[n]], "distance": round(float(distance[n]), 1)}
        for n in order
        if distance[n] > 0
    ]
