"""`make bench`: fine-tuning beside other trainers, on the same rows, in one run on the same machine.

    python -m benchmarks.training [--case "S1 S3"] [--peers "flat trl-tuned"] [--rounds 5]

First the gate for everybody, then each one's micro-batch, times in turn, and docs/benchmarks.md with its plot. Every
run is a process of its own whose result is a file, so what was cut off goes on where it was. Without --stage the long
stages, target and ladder, are walked on a few cases only (LONG); with it, on every case asked for.
Does not know: how any of that is done.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from benchmarks.training import ladder, report, runs, stages
from benchmarks.training.systems import SYSTEMS
from benchmarks.training.workloads import CASES
from luthier.engine import models

STAGES = ("gate", "sweep", "time", "target", "ladder", "profile", "report")
LONG = {"target": ("S3",), "ladder": ("S1", "S3", "C1")}


def words(text: str) -> list[str]:
    return text.replace(",", " ").split()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", type=words, default=list(CASES), help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--peers", type=words, default=list(SYSTEMS), help=f"of {', '.join(SYSTEMS)}; default: all")
    parser.add_argument("--stage", type=words, default=None, help=f"of {', '.join(STAGES)}; default: all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60, help="of a timed run; it finishes the step it is in")
    parser.add_argument("--most", type=int, default=1000, help="steps of a timed run, of those that the case has")
    parser.add_argument("--steps", type=int, default=12, help="of the stage target")
    parser.add_argument("--without", type=words, default=list(ladder.RUNGS), help="rungs of the stage ladder")
    parser.add_argument("--series", default="", help="name of the times taken; default: after the engine's sources")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall", help="of the report; cpu on a busy machine")
    parser.add_argument("--folder", type=Path, default=runs.ROOT / ".bench", help="where runs are kept")
    parser.add_argument("--precision", choices=["bfloat16", "float32"], help="of the tuned; default: the quicker one")
    parser.add_argument("--launcher", default="", help="a command to start every run through, such as taskset -c 0,1")
    options = parser.parse_args()
    for name, given, known in (
        ("--case", options.case, CASES),
        ("--peers", options.peers, SYSTEMS),
        ("--stage", options.stage or [], STAGES),
        ("--without", options.without, ladder.RUNGS),
    ):
        strange = sorted(set(given) - set(known))
        if strange:
            parser.error(f"{name}: found {', '.join(strange)}; wanted some of {', '.join(known)}")
    return options


def main() -> None:
    options = parse()
    place = runs.Place(options.folder.absolute(), options.launcher, options.precision or models.quicker())
    series = options.series or runs.engine_code()
    peers = [name for name in SYSTEMS if name in {"luthier", *options.peers}]
    stages.say(f"series {series}, {place.precision}, load before: {os.getloadavg()[0]:.1f}")
    for name in options.case:
        case = CASES[name]
        systems = [system for system in map(SYSTEMS.__getitem__, peers) if system.fits(case)]
        walked = options.stage or [stage for stage in STAGES if name in LONG.get(stage, CASES)]
        if "gate" in walked:
            for system in systems:
                stages.prove(place, case, system)
        if "sweep" in walked:
            for system in systems:
                stages.tune(place, case, system)
        if "time" in walked:
            stages.take_turns(place, case, systems, series, options.rounds, options.seconds, options.most)
        if "target" in walked:
            stages.to_target(place, case, systems, options.steps)
        if "ladder" in walked:
            stages.climb(place, case, series, options.without, options.seconds)
        if "profile" in walked:
            stages.dissect(place, case, series)
    if not options.stage or "report" in options.stage:
        report.write(place, series, runs.ROOT / "docs", options.clock)


if __name__ == "__main__":
    main()
