"""The plot of docs/benchmarks.md: logical tokens a second of everybody, a panel a case. Reads its JSON, writes SVG."""

from __future__ import annotations

import json
import sys
from pathlib import Path

COLOURS = {"luthier": "#b5532a"}


def main() -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures give the same file
    from matplotlib import pyplot

    found = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    cases = found["cases"]
    heights = [len(case["systems"]) + 1.5 for case in cases]
    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(8, 0.34 * sum(heights)), squeeze=False, height_ratios=heights, layout="constrained"
    )
    for case, (panel,) in zip(cases, panels, strict=True):
        lines = list(reversed(case["systems"]))
        speeds = [line.get("tokens_per_second", 0.0) for line in lines]
        colours = [COLOURS.get(line["system"], "#8a8f98") for line in lines]
        bars = panel.barh([line["title"] for line in lines], speeds, color=colours)
        labels = [f"{speed:.0f}" if speed else _why(line) for speed, line in zip(speeds, lines, strict=True)]
        panel.bar_label(bars, labels, padding=3, fontsize=8)
        panel.set_title(f"{case['case']}: {case['title']} ({case['model']})", fontsize=9, loc="left")
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
        panel.margins(x=0.1)
    panels[-1][0].set_xlabel("logical tokens a second (more is better)", fontsize=8)
    figure.savefig(sys.argv[2], metadata={"Date": None})


def _why(line: dict[str, dict[str, bool]]) -> str:
    return "not timed" if line["gate"]["passed"] else "failed the gate"


if __name__ == "__main__":
    main()
