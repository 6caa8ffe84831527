"""`luthier report`: what a run measured, as a table, as its page, or as JSON.

Does not know: how anything was measured (engine/ending.py, proof/).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli.forgetting import show_forgetting
from luthier.cli.keep import show_keeping
from luthier.cli.live import summary
from luthier.cli.output import console, print_json, short, typed, visible
from luthier.cli.proof import show_proof
from luthier.spec.errors import BadSetting, Broken, NotFound
from luthier.spec.learning import Learning
from luthier.spec.report import Report
from luthier.spec.run import RunFolder


def report(
    run: Annotated[str, typer.Argument(help="A run folder.", show_default=False)],
    as_html: Annotated[
        bool, typer.Option("--html", help="Write the page RUN/report.html anew, and print where it is.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the whole report, rows and all.")] = False,
) -> None:
    """Show what a run came to: did it help, how sure is that, and which rows turned."""
    if as_html and as_json:
        raise BadSetting("--html and --json: one of the two.", param="json", hint="Leave one out.")
    folder = RunFolder.open(run)
    found = read_report(folder)
    if as_json:
        print_json(found.model_dump())
    elif as_html:
        from luthier.proof.page import curves, page
        from luthier.spec.run import write_whole

        write_whole(folder.page, page(found, curves(event for _, event in folder.events())))
        print(folder.page)
    else:
        for label, value in summary(found.told(), str(folder.model)):
            print(f"{label + ':':17}{visible(value)}")
        if found.keeping is not None:
            show_keeping(found.keeping)
        if found.proof is not None:
            show_proof(found.proof)
        else:
            console().print(visible(found.proof_note or "There is no proof: no rows were held out."), soft_wrap=True)
        for line in _learnt(found.learning) if found.learning is not None else ():
            print(line)
        if found.forgetting is not None:
            show_forgetting(found.forgetting)


def _learnt(found: Learning) -> list[str]:
    """A line for each checkpoint."""
    lines = [""]
    for point in found.points:
        low, high = point.interval.low, point.interval.high
        loss = "" if point.validation_loss is None else f"  validation loss {point.validation_loss:.4f}"
        best = "  best" if point.step == found.best else ""
        lines.append(f"step {point.step:>6,}  {found.metric} {point.score:.3f} ({low:.3f} to {high:.3f}){loss}{best}")
    return lines


def read_report(run: RunFolder) -> Report:
    """RUN/report.json. Raises NotFound for a run that has none yet, Broken for one that cannot be read."""
    try:
        return Report.model_validate(json.loads(Path(run.report).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise NotFound(
            f"The run {short(run.path)} has no report yet.",
            hint=f"Go on with it: {typed('luthier', 'train', '--resume', short(run.path))}",
            param="run",
        ) from error
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise Broken(f"{run.report} cannot be read: {reason}", hint="Measure again with `luthier evaluate`.") from error
