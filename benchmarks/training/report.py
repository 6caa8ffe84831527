"""docs/benchmarks.md, its JSON and its plot, from the figures of a series. Nothing in them is written by hand.

Does not know: how figures come about (figures.py), what is worth claiming.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from benchmarks.training import environments, figures, gate, goals, ladder, ratios
from benchmarks.training.figures import Found
from benchmarks.training.runs import ROOT, Place
from benchmarks.training.systems import HERE, SYSTEMS
from benchmarks.training.workloads import CASES

METHOD = f"""\
Equal work is defined by rows and labels: every trainer gets the same token ids and the same mask, in the same order,
the same LoRA (r 16, alpha 32, every linear layer but the head, no dropout) starting from the same numbers, AdamW at a
constant rate, gradients clipped at 1. Each runs in its own environment, with the versions in
`benchmarks/training/requirements/`.

**Tuned.** What each trainer lets one set for the better is under "What was tuned"; its micro-batch is the best of a
sweep for that trainer and case: one optimizer step with each candidate, in a process of its own.

**The gate.** Before a time is shown, a trainer takes a few steps of the case, several micro-batches each, beside a
float32 reference that computes one row at a time. The first loss must be within {gate.LOSS:.0e} of the reference's,
its gradients as one vector must have a cosine above {gate.COSINE}, none may be zero, and the held-out loss afterwards,
measured for everybody by one float32 model, must be within {gate.HELD_OUT:.0%} of the way that the reference's has
fallen. Who fails is listed without a time.

**Times.** A process of its own for each run, in turning order (A B C, C B A, ...), with the machine's matrix ceiling
measured in every round. A step's time includes taking rows, planning, collating and the optimizer; loading and
tokenising are not in it. Memory is the most that the process itself has held. Ratios are medians over rounds of the two
times of a round, with a bootstrapped 95 % interval.
MFU counts what a step cannot do without: physical with shared prefixes once, effective with each row alone; both
against the ceiling of the same rounds, the highest of torch's products in bfloat16 and float32 and ours of float16. A
trainer whose step does not end within a run is timed by its finished micro-batches after the first, scaled by tokens;
the update, which is small beside them, is then not in it.

**Time to a loss.** The held-out loss by step comes from a run of its own, measured by one float32 model for everybody;
steps become seconds by the pace of the rounds. All learn at the same rate from the same start, rows in the same order.
"""
SHARED = """\
**Others used the machine during these rounds.** So every second below is one of CPU time (all threads of the process
together) and not of the clock on the wall: waiting for a core does not count, but cold caches and a busy memory do.
On idle cores the ratios may differ. Cold starts are by the clock on the wall and tell little here.
"""
HEAD = (
    "",
    "slower than Luthier",
    "s a step",
    "tokens/s",
    "learnt/s",
    "MFU physical",
    "MFU effective",
    "tree",
    "GB",
    "cold s",
)


def write(place: Place, series: str, docs: Path, clock: str = "wall") -> None:
    """Write benchmarks.md, benchmarks.json and benchmarks.svg into `docs`. Raises SystemExit when nothing was timed."""
    found = figures.of_series(place, series, clock)
    if not found["cases"]:
        raise SystemExit(f"The series {series} has no times yet.")
    note = docs / "benchmarks.json"
    note.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (docs / "benchmarks.md").write_text(page(found), encoding="utf-8")
    python = environments.python_of(HERE / "requirements" / "plot.txt", place.folder / "peers")
    drawing = [str(python), "-m", "benchmarks.training.drivers.plot", str(note), str(docs / "benchmarks.svg")]
    subprocess.run(drawing, cwd=ROOT, check=True)


def page(found: Found) -> str:
    """The whole of benchmarks.md."""
    parts = [
        "# Training beside other trainers\n",
        f"Made by `make bench` on {found['date']} (UTC); do not edit. Series `{found['series']}`.\n",
        *_machine(found["cases"]),
        *([SHARED] if found["clock"] == "cpu" else []),
        "![Logical tokens a second](benchmarks.svg)\n",
        *(_case(case) for case in found["cases"]),
        *_not_run(found["cases"]),
        "## Goals\n",
        *_goals(found["cases"]),
        "## Method\n",
        METHOD,
        "## What was tuned\n",
        _tuning(found),
    ]
    return "\n".join(parts)


def _machine(cases: list[Found]) -> list[str]:
    """What the rounds were taken on, once for each machine."""
    said = []
    for one in (case["machine"] for case in cases if case["machine"]):
        line = (
            f"Machine: {one['processor']} ({one['capability']}), {one['cores']} cores, "
            f"{one['memory_bytes'] / 1e9:.0f} GB, no GPU used; torch {one['torch']}, threads: {one['threads']}.\n"
        )
        said += [line] if line not in said else []
    return said


def _case(case: Found) -> str:
    ceiling = case["ceiling"]
    machine = (
        f"Ceiling in these rounds: {ceiling['bfloat16']:.0f} GFLOP/s bfloat16, {ceiling['float32']:.0f} float32, "
        f"{ceiling['float16']:.0f} float16 (ours), "
        f"{ceiling['gigabytes']:.0f} GB/s. Load before each round: {', '.join(map(str, case['load']))}."
        if ceiling
        else "The ceiling was not measured."
    )
    work = (
        f"{case['model']}, {'all weights' if case['full'] else 'LoRA'}, {case['rows_per_step']} rows a step: "
        f"{case['logical_tokens']:,} tokens, {case['supervised_tokens']:,} learnt, {case['physical_tokens']:,} with "
        "shared prefixes once."
    )
    lines = [
        f"## {case['case']}: {case['title']}\n",
        f"{work} {machine}\n",
        "| " + " | ".join(HEAD) + " |",
        "|---" * len(HEAD) + "|",
        *(_row(line) for line in case["systems"]),
        "",
        *_gates(case["systems"]),
        *_target(case["target"]),
        *_ladder(case["ladder"]),
        *_shares(case["shares"]),
    ]
    return "\n".join(lines)


def _row(line: Found) -> str:
    if not line["gate"]["passed"]:
        return f"| {line['title']} | failed the gate |" + " |" * 8
    if "seconds_per_step" not in line:
        return f"| {line['title']} | not timed |" + " |" * 8
    ratio = line["ratio"]
    shown = "" if line["system"] == "luthier" or ratio is None else str(ratios.Ratio(**ratio))
    cells = [
        line["title"],
        shown,
        f"{line['seconds_per_step']:.2f}",
        f"{line['tokens_per_second']:.0f}",
        f"{line['supervised_per_second']:.0f}",
        _share(line["mfu_physical"]),
        _share(line["mfu_effective"]),
        f"{line['tree_ratio']:.2f}",
        f"{line['peak_bytes'] / 1e9:.1f}",
        f"{line['cold_start']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _gates(lines: list[Found]) -> list[str]:
    """What everybody showed at the gate, and where a time is not a median of whole steps."""
    said = ["| gate | first loss off by | cosine | worst tensor | held-out loss off by |", "|---|---|---|---|---|"]
    notes = []
    for line in lines:
        verdict = line["gate"]
        if "cosine" in verdict:
            said.append(
                f"| {line['title']} | {verdict['loss_distance']:.1e} | {verdict['cosine']:.5f} | "
                f"{verdict['worst_cosine']:.4f} | {verdict['held_out_distance']:.4f} |"
            )
        notes += [f"* {line['title']} failed the gate: {failure}." for failure in verdict["failures"]]
        if "how" in line and not line["how"].startswith("median"):
            notes.append(f"* {line['title']}: timed by {line['how']}.")
    return [*said, "", *notes, ""]


def _target(lines: list[Found]) -> list[str]:
    """Seconds to the held-out loss that everybody reached, loading included nowhere."""
    if not lines:
        return []
    target = max(min(line["losses"]) for line in lines)
    said = [
        f"Time to a held-out loss of {target:.3f} (from {lines[0]['losses'][0]:.3f}):\n",
        "| | seconds |",
        "|---|---|",
    ]
    for line in lines:
        seconds = figures.to_reach(line, target)
        said.append(f"| {SYSTEMS[line['system']].title} | {'never' if seconds is None else f'{seconds:.0f}'} |")
    return [*said, ""]


def _ladder(lines: list[Found]) -> list[str]:
    if not lines:
        return []
    return [
        "What each part gives: the engine without it, the rest as it is.\n",
        "| turned off | instead | takes | peak GB |",
        "|---|---|---|---|",
        *(
            f"| {line['without']} | {ladder.instead(line['without'])} | {ratios.Ratio(**line['ratio'])} | "
            f"{line['peak_bytes'] / 1e9:.1f} |"
            for line in lines
        ),
        "",
    ]


def _shares(shares: dict[str, float] | None) -> list[str]:
    if not shares:
        return []
    return ["Where a step of Luthier's goes: " + ", ".join(f"{what} {share:.0%}" for what, share in shares.items()), ""]


def _not_run(cases: list[Found]) -> list[str]:
    """Who has no time on which case, other than those that the gate turned away: nothing is left out in silence."""
    shown = {case["case"]: {line["system"] for line in case["systems"] if _decided(line)} for case in cases}
    said = []
    for case in CASES.values():
        missing = [
            system.title
            for name, system in SYSTEMS.items()
            if system.fits(case) and name not in shown.get(case.name, ())
        ]
        if missing:
            said.append(f"* {case.name}: {'nobody was run' if case.name not in shown else '; '.join(missing)}.")
        unfit = [system.title for system in SYSTEMS.values() if not system.fits(case)]
        if unfit:
            said.append(f"* {case.name} is nothing that the benchmark's driver of {' and '.join(unfit)} can train.")
    return ["## Not run\n", *said, ""] if said else []


def _decided(line: Found) -> bool:
    return "seconds_per_step" in line or not line["gate"]["passed"]


def _goals(cases: list[Found]) -> list[str]:
    """What was wanted, what was found, and where it was missed what the machine would have let through."""
    said = ["| case | goal | wanted | found | | at the ceiling |", "|---|---|---|---|---|---|"]
    for case in cases:
        for goal in goals.of_case(case):
            word = {None: "not measured", True: "reached", False: "missed"}[goal.reached]
            found = "" if goal.found is None else f"{goal.found:.2f}"
            most = "" if goal.most is None else f"{goal.most:.1f}"
            wanted = f"{'at least' if goal.least else 'at most'} {goal.wanted:g}"
            said.append(f"| {case['case']} | {goal.what} | {wanted} | {found} | {word} | {most} |")
    said += ["", "At the ceiling: the ratio of a trainer that does nothing but what a step of these rows cannot do"]
    return [*said, "without (shared prefixes once), as fast as this machine multiplies matrices.", ""]


def _tuning(found: Found) -> str:
    """What tuned means for each, and what the sweeps found."""
    lines = []
    for name, system in SYSTEMS.items():
        mine = [(case["case"], line) for case in found["cases"] for line in case["systems"] if line["system"] == name]
        if mine:
            lines.append(f"* **{system.title}**: {system.tuning}.")
        for case, line in mine:
            if "sweep" in line:
                tried = ", ".join(
                    f"{micro} rows {'failed' if taken is None else f'{taken:.2f}'}"
                    for micro, taken in line["sweep"]["seconds"].items()
                )
                lines.append(
                    f"  * {case}: CPU seconds a row with a micro-batch of {tried}; taken {line['sweep']['best']} "
                    f"(threads: {line['sweep']['threads']})."
                )
    return "\n".join(lines) + "\n"
