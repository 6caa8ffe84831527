"""What we set out to reach, beside what was found: ratios, memory, and use of the machine. Pure arithmetic.

A ratio against several trainers is the one against the fastest of them. `most` is what a trainer could reach at best on
these rows: one that does nothing but the operations a step cannot do without, at the ceiling of matrix products.
Does not know: how figures come about.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FRAMEWORKS = ("trl-tuned", "llamafactory-tuned")
FLAT = ("torchtune-tuned", "flat")

RATIOS: dict[str, tuple[float, float]] = {  # by case: against FRAMEWORKS, against FLAT
    "S1": (12.0, 5.0),
    "S2": (3.0, 1.4),
    "S3": (3.0, 1.4),
    "C1": (2.5, 1.4),
    "F3": (2.0, 1.3),
    "G1": (10.0, 4.0),
}
MEMORY = 0.5  # of the peak of TRL, tuned
MFU = {"C1": 0.5, "S1": 0.5}  # on physical tokens


@dataclass(frozen=True)
class Goal:
    """One goal of a case. `found` None: not measured. `most`: the bound of ratios on this machine, if known."""

    what: str
    wanted: float
    found: float | None
    least: bool  # whether `wanted` is the least that is good, instead of the most
    most: float | None = None

    @property
    def reached(self) -> bool | None:
        if self.found is None:
            return None
        return self.found >= self.wanted if self.least else self.found <= self.wanted


def of_case(case: Mapping[str, Any]) -> list[Goal]:
    """The goals of a case of figures.of_case."""
    lines = {line["system"]: line for line in case["systems"] if "seconds_per_step" in line}
    ours = lines.get("luthier")
    found = []
    for names, who, wanted in (
        (FRAMEWORKS, "TRL and LLaMA-Factory, tuned", RATIOS[case["case"]][0]),
        (FLAT, "torchtune and the flat loop", RATIOS[case["case"]][1]),
    ):
        there = [lines[name] for name in names if name in lines and lines[name]["ratio"]]
        fastest = min(there, key=lambda line: float(line["ratio"]["median"]), default=None) if ours else None
        ratio, most = None, None
        if ours and fastest:
            ratio = fastest["ratio"]["median"]
            most = ratio / ours["mfu_physical"] if ours["mfu_physical"] else None
        title = f"{fastest['title']}, the fastest timed of {who}" if fastest else who
        found.append(Goal(f"times as fast as {title}", wanted, ratio, True, most))
    trl = lines.get("trl-tuned")
    share = ours["peak_bytes"] / trl["peak_bytes"] if ours and trl else None
    found.append(Goal("peak memory, as a share of TRL's, tuned", MEMORY, share, False))
    if case["case"] in MFU:
        use = ours["mfu_physical"] if ours else None
        found.append(Goal("MFU on physical tokens", MFU[case["case"]], use, True))
    return found
