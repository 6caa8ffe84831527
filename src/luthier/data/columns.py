"""What is remembered of a scanned file: numbers in columns, counts by kind, a few example rows; nothing that was said.

About 310 bytes a row, of which the sketch takes 256; so a million rows are 310 MB. Everything else is bounded.
Does not know: how a row is looked at (scan.py), what the numbers mean together (doctor.py).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from luthier.data.conversions import Conversion
from luthier.data.duplicates import BINS
from luthier.data.endings import Endings
from luthier.data.findings import SHOWN_ROWS
from luthier.spec.data import Problem

KEPT_PROBLEMS = 1_000
KEPT_ANSWERS = 500  # distinct answers; more are no classes
LONGEST_LABEL = 64  # characters

# name -> type of the columns that hold one number a row
NUMBERS: dict[str, type[np.generic]] = {
    "row": np.int32,  # number of the record in its file, from 1
    "prompt": np.uint64,  # keys: see duplicates.Identity
    "answer": np.uint64,
    "prompt_characters": np.int32,
    "answer_characters": np.int32,  # of everything that is learnt
    "turns": np.int32,
    "language": np.uint8,  # of the answer: an index into characters.LANGUAGES
    "prompt_language": np.uint8,
    "distinct": np.float32,  # distinct runs of characters as a share of all
    "signs": np.float32,  # characters that are neither letters, digits nor space, as a share of all
    "tokens": np.int32,  # 0 without a model
    "learnt": np.int32,
}
Column = npt.NDArray[np.generic]


@dataclass
class Tally:
    """How many rows have a finding of one kind, and the first of them with what was found."""

    count: int = 0
    rows: list[tuple[int, str]] = field(default_factory=list)

    def add(self, row: int, detail: str, count: int = 1) -> None:
        self.count += count
        if len(self.rows) < SHOWN_ROWS:
            self.rows.append((row, detail))


@dataclass
class Columns:
    """A scanned file, or a span of one. `records`: rows that were read or should have been; `lines`: line breaks."""

    format: str | None = None
    records: int = 0
    lines: int = 0
    examples: int = 0
    numbers: dict[str, Column] = field(default_factory=dict)
    sketches: npt.NDArray[np.uint16] = field(default_factory=lambda: np.zeros((0, BINS), np.uint16))
    tallies: dict[str, Tally] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unknown: dict[str, list[int]] = field(default_factory=dict)
    answers: Counter[str] | None = field(default_factory=Counter)
    prompt_endings: Endings = field(default_factory=Endings)
    completion_endings: Endings = field(default_factory=Endings)
    unspaced: Tally = field(default_factory=Tally)  # completions that begin without a space
    without_system: Tally = field(default_factory=Tally)  # conversations
    roles: Counter[str] = field(default_factory=Counter)
    cookbook: Counter[str] = field(default_factory=Counter)
    lost_tokens: int = 0
    lost_learnt: int = 0
    cut_short: bool = False  # nothing after its last problem could be read
    conversion: Conversion | None = None  # for a file that training does not read as it is

    def tally(self, kind: str, row: int, detail: str, count: int = 1) -> None:
        self.tallies.setdefault(kind, Tally()).add(row, detail, count)

    def note_answer(self, answer: str, count: int = 1) -> None:
        """Count an answer as a possible class, until there are too many of them or they are too long."""
        if self.answers is None:
            return
        self.answers[answer] += count
        if len(answer) > LONGEST_LABEL or len(self.answers) > KEPT_ANSWERS:
            self.answers = None

    def number(self, name: str) -> npt.NDArray[np.int64]:
        return self.numbers[name].astype(np.int64) if name in self.numbers else np.zeros(0, np.int64)

    def share(self, name: str) -> npt.NDArray[np.float64]:
        return self.numbers[name].astype(np.float64) if name in self.numbers else np.zeros(0)


def joined(parts: list[Columns]) -> Columns:
    """The columns of a file from those of its spans, in order. Rows and lines of each go on after the one before it."""
    whole = Columns(format=next((part.format for part in parts if part.format), None))
    whole.cut_short = parts[-1].cut_short if parts else False
    for part in parts:
        _append(whole, part)
        if "row" in part.numbers:
            part.numbers["row"] = (part.number("row") + (whole.records - part.records)).astype(np.int32)
    for name in NUMBERS:
        pieces = [part.numbers.pop(name) for part in parts if name in part.numbers]
        if pieces:
            whole.numbers[name] = np.concatenate(pieces)
    whole.sketches = np.zeros((whole.examples, BINS), np.uint16)
    start = 0
    for part in parts:  # one after another, so that they are never in memory twice
        whole.sketches[start : start + part.examples] = part.sketches
        start += part.examples
        part.sketches = np.zeros((0, BINS), np.uint16)  # a slice of it would keep all of it
    return whole


def _append(whole: Columns, part: Columns) -> None:
    rows, lines = whole.records, whole.lines
    for kind, tally in part.tallies.items():
        _extend(whole.tallies.setdefault(kind, Tally()), tally, rows)
    _extend(whole.unspaced, part.unspaced, rows)
    _extend(whole.without_system, part.without_system, rows)
    for problem in part.problems[: KEPT_PROBLEMS - len(whole.problems)]:
        row = problem.row + rows if problem.row else 0
        whole.problems.append(replace(problem, line=problem.line + lines if problem.line else 0, row=row))
    for key, (line, row, count) in part.unknown.items():
        whole.unknown.setdefault(key, [line + lines, row + rows, 0])[2] += count
    if part.answers is None:
        whole.answers = None
    elif whole.answers is not None:
        for answer, count in part.answers.items():
            whole.note_answer(answer, count)
    whole.prompt_endings.merge(part.prompt_endings, rows)
    whole.completion_endings.merge(part.completion_endings, rows)
    whole.roles += part.roles
    whole.cookbook += part.cookbook
    whole.lost_tokens += part.lost_tokens
    whole.lost_learnt += part.lost_learnt
    whole.examples += part.examples
    whole.records += part.records
    whole.lines += part.lines


def _extend(whole: Tally, part: Tally, offset: int) -> None:
    for row, detail in part.rows:
        whole.add(row + offset, detail, 0)
    whole.count += part.count
