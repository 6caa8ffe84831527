"""`luthier keep-general`: a run that is over, at the scale that best keeps what the model could before.

Does not know: how anything is measured (engine/keep.py), how a scale is chosen (proof/tradeoff.py).
"""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer

from luthier.cli.output import console, number, print_error, print_json, short, typed, visible
from luthier.spec.errors import BadSetting
from luthier.spec.keeping import ITEMS, KEPT_SHARE, ROWS, SCALES, By, Keeping
from luthier.spec.run import RunFolder

WIDTH, HEIGHT = 56, 9  # of the picture, in characters


def keep_general(
    run: Annotated[str, typer.Argument(help="A run that is over, with held-out rows.", show_default=False)],
    scales: Annotated[
        str | None,
        typer.Option(
            "--scales",
            help=f"What tuning is multiplied by, separated by commas. Default: {','.join(map(str, SCALES))}.",
            show_default=False,
        ),
    ] = None,
    by: Annotated[By, typer.Option("--by", help="What counts as the task: the proof's metric or the loss.")] = "metric",
    share: Annotated[
        float, typer.Option("--keep", min=0.0, max=1.0, help="Share of the best gain that must be kept.")
    ] = KEPT_SHARE,
    items: Annotated[int, typer.Option("--items", min=1, help="Items of the probe asked at each scale.")] = ITEMS,
    rows: Annotated[int, typer.Option("--rows", min=1, help="Held-out rows asked at each scale, at most.")] = ROWS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the search as one JSON object.")] = False,
) -> None:
    """Keep general ability: publish a run's model at a smaller scale, if that costs the task little. No training.

    An adapter's contribution is multiplied; a full model is interpolated with its base. The model as it was trained
    stays beside it, and the command may be given again. Rows and items that choose are not those of the report.
    """
    from luthier.cli.follow import engine_command, follow

    folder = RunFolder.open(run)
    asked = {"scales": _scales(scales), "by": by, "share": share, "items": items, "rows": rows}
    with folder.owned():
        folder.stop_note.unlink(missing_ok=True)
    outcome = follow(folder, engine_command(folder, part=("--keep", json.dumps(asked))), _View())
    if outcome.status != "succeeded":
        print_error(str(outcome.event.get("message") or "Stopped."), outcome.event.get("hint"))
        raise typer.Exit(outcome.exit_code)
    from luthier.cli.report import read_report

    found = read_report(folder).keeping
    assert found is not None
    if as_json:
        print_json({"run": str(folder.path), **found.model_dump()})
        return
    show_keeping(found)
    console().print(f"The whole of it: {typed('luthier', 'report', short(folder.path))}", markup=False, soft_wrap=True)


def _scales(text: str | None) -> list[float]:
    try:
        found = [float(part) for part in text.split(",") if part.strip()] if text is not None else list(SCALES)
    except ValueError:
        found = []
    if not found or not all(0 < scale <= 2 for scale in found):
        raise BadSetting(
            f"--scales: found {text!r}; wanted numbers over 0 and at most 2, separated by commas.", param="scales"
        )
    return found


class _View:
    """Phases as lines on standard error."""

    def see(self, event: dict[str, Any]) -> None:
        if event["type"] == "phase":
            console(stderr=True).print(f"{event['message']} ...", style="dim", markup=False)
        elif event["type"] == "warning":
            console(stderr=True).print(visible(f"Warning: {event['message']}"), markup=False, soft_wrap=True)

    def say(self, message: str) -> None:
        print(message, file=sys.stderr)

    def tick(self) -> None:
        pass


# -- the picture -------------------------------------------------------------------------------------------------------


def show_keeping(found: Keeping) -> None:
    """The scales as a table, the picture, the rule and what was chosen."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    metric = found.metric.replace("_", " ")
    for title in ("scale", *([metric] if found.by == "metric" else []), "loss", "forgotten", "95% interval", ""):
        table.add_column(title, justify="right")
    for point in found.points:
        words = [*(["chosen"] if point.scale == found.chosen else []), *([] if point.front else ["beaten"])]
        interval = f"{number(point.low, '+.1%')} to {number(point.high, '+.1%')}" if point.scale else ""
        cells = ["base" if point.scale == 0 else f"{point.scale:g}"]
        cells += [number(point.score, ".3f")] if found.by == "metric" else []
        cells += [number(point.loss, ".4f"), number(point.forgetting, "+.1%"), interval, ", ".join(words)]
        table.add_row(*cells, style="bold green" if point.scale == found.chosen else None)
    out.print(table)
    for line in picture(found):
        out.print(line, markup=False, highlight=False)
    out.print(Text(visible(found.sentence), "bold"), soft_wrap=not out.is_terminal)
    said = f"Rule: {found.rule} Chosen on {found.rows:,} held-out rows and {found.items:,} items of the probe; the "
    out.print(
        f"{said}report's proof and number are of others.", style="dim", markup=False, soft_wrap=not out.is_terminal
    )
    if found.old is not None:
        out.print(f"As it was trained: {short(found.old)}", markup=False, soft_wrap=True)


def picture(found: Keeping) -> list[str]:
    """The task (the higher line is the better) against what was forgotten (left is better): a mark a scale, * before
    the chosen one."""
    points = found.known()
    if len(points) < 2:
        return []
    tasks, losses = [task for _, task, _ in points], [lost for _, _, lost in points]
    best, worst = (max(tasks), min(tasks)) if found.upward else (min(tasks), max(tasks))
    grid = [[" "] * WIDTH for _ in range(HEIGHT)]
    for point, task, lost in points:
        across = round((lost - min(losses)) / ((max(losses) - min(losses)) or 1) * (WIDTH - 6))
        down = round((best - task) / ((best - worst) or 1) * (HEIGHT - 1))
        mark = "base" if point.scale == 0 else f"{'*' if point.scale == found.chosen else ''}{point.scale:g}"
        grid[down][across : across + len(mark)] = list(mark)
    labels = {0: f"{best:.3f}", HEIGHT - 1: f"{worst:.3f}"}
    lines = [f"{labels.get(n, ''):>8} | {''.join(row).rstrip()}" for n, row in enumerate(grid)]
    left, right = f"{min(losses):+.1%}", f"{max(losses):+.1%} forgotten"
    return [*lines, " " * 9 + "+" + "-" * WIDTH, " " * 11 + left + right.rjust(WIDTH - len(left) - 1)]
