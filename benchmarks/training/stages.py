"""The stages of the benchmark: the gate, times in turn, time to a target, the ladder. Each is a walk over runs.

Everything is read from and written to the folder of runs.py, so a stage that is called again only does what is missing.
Does not know: the command line, how results are shown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.training import gate, ratios, runs, sweep
from benchmarks.training.runs import Ask, Place
from benchmarks.training.systems import REFERENCE, SYSTEMS, System
from benchmarks.training.workloads import Case

CEILING = System("ceiling", "matrix ceiling", "ceiling", "", "", "")
PROFILE = System("profile", "Luthier under the profiler", "luthier_profile", "tuned", "", "")
RUNG_ROUNDS = 2


def say(*words: object) -> None:
    print(*words, flush=True)


# -- the gate ----------------------------------------------------------------------------------------------------------


def gate_folder(place: Place, case: Case, system: System) -> Path:
    """Named by all that a verdict depends on."""
    rows = f"{runs.rows_name(case)}-{case.gate_rows}x{case.gate_steps}"
    return place.kept("gate") / rows / runs.label(system)


def prove(place: Place, case: Case, system: System) -> dict[str, Any]:
    """The verdict on a system: {"passed": bool, "failures": [...], figures}. Carried out unless it is there."""
    out = gate_folder(place, case, system)
    verdict = runs.load(out / "verdict.json")
    if verdict is None:
        verdict = _verdict(place, case, system, out)
        out.mkdir(parents=True, exist_ok=True)
        (out / "verdict.json").write_text(json.dumps(verdict, indent=1), encoding="utf-8")
    say(f"{case.name} {system.name}: " + ("passed" if verdict["passed"] else "; ".join(verdict["failures"])))
    return verdict


def _proof(place: Place, case: Case, system: System) -> tuple[dict[str, Any], dict[str, float]] | str:
    """(result, held-out losses) of the gate's run of a system; or why there is none."""
    out, micro = gate_folder(place, case, system), max(1, case.gate_rows // 4)  # several micro-batches in a step
    ask = Ask(case.gate_rows, case.gate_steps, 1 if system is REFERENCE else micro, 3600, True, case.gate_steps)
    result = runs.do(place, case, system, out, ask)
    if result is None:
        return f"its process failed: {runs.last_words(out)}"
    losses = runs.judged(place, out)
    return (result, losses) if losses else f"what it learnt cannot be used: {runs.last_words(out)}"


def _verdict(place: Place, case: Case, system: System, out: Path) -> dict[str, Any]:
    reference = _proof(place, case, REFERENCE)
    if isinstance(reference, str):
        raise SystemExit(f"{case.name}: the reference {reference}")
    found = _proof(place, case, system)
    if isinstance(found, str):
        return {"passed": False, "failures": [found]}
    from safetensors.numpy import load_file

    last = str(case.gate_steps)
    verdict = gate.judge(
        losses=found[0]["losses"],
        gradients=load_file(out / "gradients.safetensors"),
        held_out=found[1][last],
        reference_losses=reference[0]["losses"],
        reference_gradients=load_file(gate_folder(place, case, REFERENCE) / "gradients.safetensors"),
        reference_held_out=reference[1][last],
        start_held_out=reference[1]["0"],
    )
    (out / "gradients.safetensors").unlink()
    return {"passed": verdict.passed, **asdict(verdict)}


# -- micro-batches -----------------------------------------------------------------------------------------------------


def tune(place: Place, case: Case, system: System) -> None:
    """Find the micro-batch of a system that the gate let through, if it has one to choose."""
    if not system.swept or not passed(place, case, system):
        return
    tried = sweep.carry_out(place, case, system)
    shown = ", ".join(
        f"{micro}: {taken:.2f}" if taken else f"{micro}: failed" for micro, taken in tried.seconds.items()
    )
    say(f"{case.name} {system.name} micro-batch, seconds a row: {shown}; best {tried.best}")


def passed(place: Place, case: Case, system: System) -> bool:
    verdict = runs.load(gate_folder(place, case, system) / "verdict.json")
    return bool(verdict and verdict["passed"])


# -- times -------------------------------------------------------------------------------------------------------------


def series_folder(place: Place, series: str, case: Case) -> Path:
    return place.kept("times") / series / case.name


def take_turns(
    place: Place, case: Case, systems: Sequence[System], series: str, rounds: int, seconds: float, steps: int
) -> None:
    """Rounds of one process for each system that the gate let through, in turning order, and the ceiling in each.

    A process takes at most `steps` steps, of those that the case has.
    """
    able = _able(place, case, systems)
    for number in range(rounds):
        for name in ratios.order([CEILING.name, *(system.name for system in able)], number):
            system = CEILING if name == CEILING.name else SYSTEMS[name]
            out = series_folder(place, series, case) / f"round-{number + 1}" / name
            ask = Ask(case.rows_per_step, min(steps, case.steps), able.get(system, 0), seconds)
            result = runs.do(place, case, system, out, ask)
            say(f"{case.name} round {number + 1} {name}: {_in_words(result, out)}")


def _able(place: Place, case: Case, systems: Sequence[System]) -> dict[System, int]:
    """The systems that passed the gate, with their micro-batch; says of the others why they have no time."""
    able = {}
    for system in systems:
        micro = sweep.micro(place, case, system)
        if not passed(place, case, system):
            say(f"{case.name} {system.name}: no time, for it has not passed the gate")
        elif micro is None:
            say(f"{case.name} {system.name}: no time, for its micro-batch has not been swept: --stage sweep")
        else:
            able[system] = micro
    return able


def _in_words(result: dict[str, Any] | None, out: Path) -> str:
    if result is None:
        return f"failed: {runs.last_words(out)}"
    if "bfloat16" in result:
        return f"{result['bfloat16']:.0f} GFLOP/s bfloat16, {result['float32']:.0f} float32"
    if not (result["step_seconds"] or result["unfinished"]):
        return "finished not even a micro-batch"
    time, how = ratios.step_time(result["step_seconds"], result["unfinished"])
    return f"{time:.2f} s a step ({how}), {result['peak_bytes'] / 1e9:.1f} GB"


# -- time to a target --------------------------------------------------------------------------------------------------


def to_target(place: Place, case: Case, systems: Sequence[System], steps: int) -> None:
    """One longer run for each system, held-out loss after every other step. Its losses count and not its times, so the
    machine need not be idle: what a step takes is known from the rounds.
    """
    for system, micro in _able(place, case, systems).items():
        out = target_folder(place, case, system, steps)
        result = runs.do(place, case, system, out, Ask(case.rows_per_step, steps, micro, 36_000, keep_every=2))
        losses = runs.judged(place, out) if result else None
        say(f"{case.name} target {system.name}: {losses if losses else 'failed: ' + runs.last_words(out)}")


def target_folder(place: Place, case: Case, system: System, steps: int) -> Path:
    return place.kept("target") / runs.rows_name(case) / runs.label(system) / f"{steps}-steps"


# -- where our time goes -----------------------------------------------------------------------------------------------


def dissect(place: Place, case: Case, series: str) -> None:
    """Shares of one step of ours by kind of work, under the profiler."""
    out = series_folder(place, series, case) / "profile"
    result = runs.do(place, case, PROFILE, out, Ask(case.rows_per_step, 2, 0, 3600))
    shares = result["shares"] if result else {}
    shown = ", ".join(f"{what} {share:.0%}" for what, share in shares.items())
    say(f"{case.name} a step of Luthier: {shown or 'failed: ' + runs.last_words(out)}")


def climb(place: Place, case: Case, series: str, rungs: Sequence[str], seconds: float) -> None:
    """The engine as it is and with each part turned off, in turn."""
    ours = SYSTEMS["luthier"]
    for number in range(RUNG_ROUNDS):
        for name in ratios.order(["all", *rungs], number):
            out = series_folder(place, series, case) / "ladder" / f"round-{number + 1}" / name
            without = () if name == "all" else (name,)
            result = runs.do(place, case, ours, out, Ask(case.rows_per_step, case.steps, 0, seconds, without=without))
            say(f"{case.name} without {name}: {_in_words(result, out)}")
