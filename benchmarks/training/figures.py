"""From runs to figures: everything that docs/benchmarks.md shows, as plain data. No words, no files written.

Does not know: how it is shown.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.training import flops, ratios, runs, stages, sweep, workloads
from benchmarks.training.runs import Place
from benchmarks.training.systems import SYSTEMS, System
from benchmarks.training.workloads import CASES, Case

Found = dict[str, Any]
CEILINGS = ("bfloat16", "float32", "float16", "gigabytes")  # GFLOP/s three times, GB/s
MACHINE = ("processor", "capability", "cores", "memory_bytes", "torch", "threads")


def of_series(place: Place, series: str, clock: str = "wall") -> Found:
    """All cases of a series that have times, and what they were taken on."""
    cases = [of_case(place, series, case, clock) for case in CASES.values()]
    return {"series": series, "date": runs.now(), "clock": clock, "cases": [found for found in cases if found]}


def of_case(place: Place, series: str, case: Case, clock: str = "wall") -> Found | None:
    """Figures of a case; None when it has no round. A system that failed the gate has failures and no times."""
    folder = stages.series_folder(place, series, case)
    rounds = sorted(folder.glob("round-*"), key=lambda path: int(path.name.partition("-")[2]))
    if not rounds:
        return None
    work = _Work(place, case)
    ceilings = [found for path in rounds if (found := runs.load(path / "ceiling" / "result.json"))]
    peak = (
        max(statistics.median(found.get(kind, 0) for found in ceilings) for kind in CEILINGS[:3]) if ceilings else None
    )
    if peak and clock == "cpu":
        peak /= ceilings[0]["threads"]
    times = {name: _times(rounds, name, clock) for name in SYSTEMS}
    lines = [_line(place, case, system, times, work, peak) for system in SYSTEMS.values() if system.fits(case)]
    return {
        "case": case.name,
        "title": case.title,
        "model": case.model,
        "full": case.full,
        "rows_per_step": case.rows_per_step,
        "rows": workloads.HASHES[case.shape, case.model],
        "logical_tokens": work.flat.tokens,
        "physical_tokens": work.shared.tokens,
        "supervised_tokens": work.flat.predicting,
        "ceiling": {key: statistics.median(found.get(key, 0) for found in ceilings) for key in CEILINGS}
        if ceilings
        else None,
        "machine": {key: ceilings[0].get(key) for key in MACHINE} if ceilings else None,
        "load": [round(found["load"], 1) for found in ceilings if "load" in found],
        "systems": [line for line in lines if line],
        "target": [curve for line in lines if line if (curve := _target(place, case, line))],
        "ladder": _ladder(folder, clock),
        "shares": (runs.load(folder / "profile" / "result.json") or {}).get("shares"),
    }


class _Work:
    """What the first step of a case comes to."""

    def __init__(self, place: Place, case: Case) -> None:
        folder = place.model(case)
        rows = workloads.make(case, folder / "tokenizer.json").train[: case.rows_per_step]
        model = flops.shape(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        self.flat, self.shared = flops.flat(rows), flops.shared(rows)
        self.logical = flops.step(model, self.flat, case.full)
        self.physical = flops.step(model, self.shared, case.full)


def _times(rounds: Sequence[Path], name: str, clock: str) -> dict[int, tuple[float, str, Found]]:
    """By round: seconds of a step by the clock, where from, and the result."""
    found = {}
    for number, path in enumerate(rounds):
        result = runs.load(path / name / "result.json")
        if result is not None and (result["step_seconds"] or result["unfinished"]):
            step, how = ratios.step_time(*by_clock(result, clock))
            found[number] = step, how, result
    return found


def by_clock(result: Found, clock: str) -> tuple[list[float], list[float] | None]:
    """The times of a result by the clock on the wall, or (clock "cpu") CPU seconds of all threads together."""
    if clock == "wall":
        return result["step_seconds"], result["unfinished"]
    parts = result["unfinished"]
    return result["step_cpu_seconds"], [*parts[:2], parts[3]] if parts else None


def _line(
    place: Place,
    case: Case,
    system: System,
    times: dict[str, Any],
    work: _Work,
    peak: float | None,
) -> Found | None:
    verdict = runs.load(stages.gate_folder(place, case, system) / "verdict.json")
    if verdict is None and system.name == "luthier":  # the engine may have moved on since
        verdict = _verdict_of(place, case, times[system.name])
    if verdict is None:
        return None
    line: Found = {"system": system.name, "title": system.title, "gate": verdict}
    if system.swept and (tried := sweep.seen(place, case, system)).seconds:
        line["sweep"] = asdict(tried) | {"best": tried.best}
    mine, ours = times[system.name], times["luthier"]
    if not verdict["passed"] or not mine:
        return line
    step = statistics.median(seconds for seconds, _, _ in mine.values())
    last = list(mine.values())[-1]
    shares = sorted(set(mine) & set(ours))
    ratio = ratios.ratio([mine[n][0] for n in shares], [ours[n][0] for n in shares]) if shares else None
    rate = step * peak * 1e9 if peak else None
    needed = work.physical if system.name == "luthier" else work.logical
    return line | {
        "seconds_per_step": step,
        "how": last[1],
        "rounds": len(mine),
        "tokens_per_second": work.flat.tokens / step,
        "supervised_per_second": work.flat.predicting / step,
        "mfu_physical": needed / rate if rate else None,
        "mfu_effective": work.logical / rate if rate else None,
        "tree_ratio": work.flat.tokens / last[2].get("physical_tokens", work.flat.tokens),
        "peak_bytes": statistics.median(result["peak_bytes"] for _, _, result in mine.values()),
        "cold_start": statistics.median(result["seconds_to_first_step"] for _, _, result in mine.values()),
        "ratio": asdict(ratio) if ratio else None,
    }


def _verdict_of(place: Place, case: Case, times: dict[int, Any]) -> Found | None:
    """The newest verdict on an earlier engine, if it has times in this series."""
    found = sorted(stages.gate_folder(place, case, SYSTEMS["luthier"]).parent.glob("luthier-*/verdict.json"))
    newest = max(found, key=lambda path: path.stat().st_mtime, default=None)
    return runs.load(newest) if newest and times else None


def _target(place: Place, case: Case, line: Found) -> Found | None:
    """Held-out loss by step of a run of its own, and the seconds until then at the pace of the rounds."""
    if "seconds_per_step" not in line:
        return None
    folder = stages.target_folder(place, case, SYSTEMS[line["system"]], 0).parent
    losses: Found = {}
    for path in folder.glob("*-steps/judged.json"):
        losses = max(losses, runs.load(path) or {}, key=len)
    if not losses:
        return None
    seconds = [int(step) * line["seconds_per_step"] for step in losses]
    return {"system": line["system"], "losses": list(losses.values()), "seconds": seconds}


def to_reach(line: Found, target: float) -> float | None:
    """Seconds until the held-out loss was `target`, by a straight line between measurements; None if it never was."""
    points = list(zip(line["seconds"], line["losses"], strict=True))
    for (begun, before), (ended, after) in itertools.pairwise(points):
        if after <= target:
            return float(begun + (ended - begun) * (before - target) / (before - after)) if before > after else ended
    return None


def _ladder(folder: Path, clock: str) -> list[Found]:
    """For each rung the ratio of its time to that of the whole engine."""
    rounds = sorted((folder / "ladder").glob("round-*"))
    names = sorted({path.name for one in rounds for path in one.iterdir()} - {"all"})
    lines = []
    whole = _times(rounds, "all", clock)
    for name in names:
        times = _times(rounds, name, clock)
        both = sorted(set(times) & set(whole))
        if both:
            ratio = ratios.ratio([times[n][0] for n in both], [whole[n][0] for n in both])
            peak = max(times[n][2]["peak_bytes"] for n in both)
            lines.append({"without": name, "ratio": asdict(ratio), "peak_bytes": peak})
    return lines
