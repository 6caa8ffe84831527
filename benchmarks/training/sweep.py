"""Which micro-batch suits a trainer: one optimizer step with each, the least CPU seconds win.

Every trainer that is tuned is swept on every case in its own right, for what it keeps in memory and how it pads decide.
A step of a sweep has the rows of a step where they vary in length, for sorting them is part of what is tried; where all
are alike, as many as the largest micro-batch. The first step of a process warms up, and does so for every candidate.
Does not know: what else is tuned, times that are compared with anybody else's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from benchmarks.training import runs
from benchmarks.training.runs import Ask, Place
from benchmarks.training.systems import System
from benchmarks.training.workloads import GEMMA, Case

CANDIDATES = {"shared": (1, 4), "turns": (2, 4), "short": (4, 16), "text": (1, 2)}
LARGE_VOCABULARY = (1, 2)  # Gemma's logits of more long rows do not fit beside those that others make of them


@dataclass(frozen=True)
class Tried:
    """CPU seconds of a row by micro-batch (those of the wall tell less on a busy machine); None where the process did
    not end well. `threads` that it ran on.
    """

    seconds: dict[int, float | None]
    threads: int | None

    @property
    def best(self) -> int | None:
        done = {micro: taken for micro, taken in self.seconds.items() if taken is not None}
        return min(done, key=lambda micro: done[micro]) if done else None


def candidates(case: Case) -> tuple[int, ...]:
    return LARGE_VOCABULARY if case.model == GEMMA and case.shape != "short" else CANDIDATES[case.shape]


def rows(case: Case) -> int:
    """Rows in a step of the sweep."""
    return case.rows_per_step if case.shape in ("short", "turns") else max(candidates(case))


def folder(place: Place, case: Case, system: System, micro: int) -> Path:
    return place.kept("sweep") / runs.rows_name(case) / runs.label(system) / f"micro-{micro}"


def carry_out(place: Place, case: Case, system: System) -> Tried:
    """Try what has not been tried yet."""
    for micro in candidates(case):
        runs.do(place, case, system, folder(place, case, system, micro), Ask(rows(case), 1, micro, 3600))
    return seen(place, case, system)


def seen(place: Place, case: Case, system: System) -> Tried:
    """What was tried so far."""
    seconds: dict[int, float | None] = {}
    threads = None
    for micro in candidates(case):
        out = folder(place, case, system, micro)
        if (result := runs.load(out / "result.json")) is not None:
            spent = result["step_cpu_seconds"]
            seconds[micro] = spent[0] / result["rows_per_step"] if spent else None
            threads = result["threads"]
        elif out.is_dir():
            seconds[micro] = None
    return Tried(seconds, threads)


def micro(place: Place, case: Case, system: System) -> int | None:
    """Rows in a micro-batch of a system: the best that was tried; 0, its own, if it is not swept; None if it should."""
    return seen(place, case, system).best if system.swept else 0
