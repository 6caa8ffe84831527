"""`luthier data check`: what the data doctor found, on the terminal, as JSON, and as one HTML page.

Does not know: how anything is found (the data room).
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.output import console, plural, print_json, resolve_model, speaks_unicode, visible, waiting
from luthier.spec.errors import BadSetting, NotFound

if TYPE_CHECKING:
    from rich.console import Console

    from luthier.data.findings import Finding, Report

BARS = 12
STYLES = {"error": "bold red", "warning": "bold yellow", "note": "bold cyan"}
SHOWN = 5  # example rows of a finding
SHOWN_PROBLEMS = 5
CHARTS = (
    ("tokens", "tokens a row"),
    ("learnt_tokens", "learnt tokens a row"),
    ("characters", "characters a row"),
    ("turns", "turns a row"),
)


def check(
    files: Annotated[list[Path], typer.Argument(help="Data files; together they are one data set.")],
    model: Annotated[
        str | None,
        typer.Option("--model", help="Count tokens as this model does: a catalogue name, a folder, or a Hub id."),
    ] = None,
    template: Annotated[
        str | None, typer.Option("--template", help="Chat template: a built-in name or a .jinja file. Needs --model.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option("--max-length", min=2, help="Longest row in tokens, as for `luthier train`. Needs --model."),
    ] = None,
    validation: Annotated[
        list[Path] | None, typer.Option("--validation", help="A validation file, compared with the others. Repeatable.")
    ] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML page, too.")] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Processes for large files. Default: one a core.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Look for what would spoil a training run: broken rows, repeats, contradictions, leaks, secrets, odd lengths.

    Nothing is changed; each finding names the command that mends it. Exit code 0: nothing, or notes alone;
    1: warnings; 2: errors, which no training run would accept.
    """
    from luthier.data.doctor import check as examine
    from luthier.data.render import Renderer

    held = validation or []
    for option, value in (("--template", template), ("--max-length", max_length)):
        if value is not None and model is None:
            raise BadSetting(f"{option} needs --model.", param=option[2:], hint="Name the model that will be trained.")
    for path in (*files, *held):
        if not path.is_file():
            raise NotFound(f"No data file {path}.", param="files", hint="Check the path.")
    if html is not None and not html.absolute().parent.is_dir():
        raise NotFound(f"No folder {html.absolute().parent}.", param="html", hint="Make it, or choose another path.")
    renderer = Renderer.load(resolve_model(model), template) if model is not None else None
    with waiting() as tell:
        report = examine(
            files,
            renderer,
            held,
            lambda done, total: tell("Checking", done, total),
            max_length=max_length,
            processes=processes,
            model=_model_words(model, template, max_length),
        )
    if html is not None:
        from luthier.cli.check_html import page

        html.write_text(page(report), encoding="utf-8")
    if as_json:
        print_json(report.json())
    else:
        show(report, console())
        if html is not None:
            console().print(f"Written to {visible(str(html))}.", markup=False, soft_wrap=True)
    if report.exit_code:
        raise typer.Exit(report.exit_code)


def _model_words(model: str | None, template: str | None, max_length: int | None) -> str:
    """The options that name the model again, for the commands that the report proposes."""
    given = (("--model", model), ("--template", template), ("--max-length", max_length))
    return " ".join(f"{name} {shlex.quote(str(value))}" for name, value in given if value is not None)


def show(report: Report, out: Console) -> None:
    """The report on a terminal: files, findings with the worst first, distributions, the count of findings."""
    from rich.text import Text

    for name, numbers in report.statistics["files"].items():
        form = numbers["format"] or "no known format"
        words = f"{visible(name)}: {form}, {plural(numbers['records'], 'record')}"
        out.print(Text(words, style="bold"), soft_wrap=not out.is_terminal)
        _distributions(numbers, out)
    for finding in report.findings:
        _finding(finding, out, len(report.statistics["files"]) > 1)
    for problem in [problem for problem in report.problems if problem.severity == "error"][:SHOWN_PROBLEMS]:
        out.print(Text(f"  {visible(str(problem))}", style="red"), soft_wrap=not out.is_terminal)
    for each in report.fixes:
        out.print(
            Text.assemble("all that can be mended at once: ", (visible(each["command"]), "green")), soft_wrap=True
        )
    counts = [sum(finding.severity == level for finding in report.findings) for level in STYLES]
    words = ", ".join(plural(count, level) for count, level in zip(counts, STYLES, strict=True) if count)
    out.print(Text(words or "Nothing to remark.", style="bold"), soft_wrap=not out.is_terminal)


def _finding(finding: Finding, out: Console, several: bool) -> None:
    from rich.text import Text

    place = f" [{visible(Path(finding.file).name)}]" if several else ""
    label = Text.assemble((f"{finding.severity}: ", STYLES[finding.severity]), (visible(finding.message), "bold"))
    out.print(label.append(f"{place} ({finding.kind})", "dim"), soft_wrap=not out.is_terminal)
    out.print(Text(f"  {finding.why}", style="italic"), soft_wrap=not out.is_terminal)
    for row, detail in zip(finding.rows[:SHOWN], finding.details, strict=False):
        out.print(Text(f"  row {row}: {visible(detail)}"), soft_wrap=not out.is_terminal)
    if not finding.rows:
        for detail in finding.details[:SHOWN]:
            out.print(Text(f"  {visible(detail)}"), soft_wrap=not out.is_terminal)
    elif finding.count > SHOWN and finding.rows[SHOWN:]:
        more = ", ".join(map(str, finding.rows[SHOWN:]))
        out.print(
            Text(f"  also {more}" + (", ..." if finding.count > len(finding.rows) else "")),
            soft_wrap=not out.is_terminal,
        )
    if finding.fix:
        out.print(Text.assemble("  mend: ", (visible(finding.fix), "green")), soft_wrap=True)


# -- distributions -----------------------------------------------------------------------------------------------------


def _distributions(numbers: dict[str, Any], out: Console) -> None:
    for key, title in CHARTS:
        if numbers.get(key) and (key != "characters" or "tokens" not in numbers):
            out.print(_quantiles(title, numbers[key]), soft_wrap=not out.is_terminal)
            if numbers[key]["min"] != numbers[key]["max"]:
                bars = [(f"{a:,}" if b - a == 1 else f"{a:,} to {b - 1:,}", n) for a, b, n in fewer(numbers[key])]
                _bars(bars, out)
    if numbers.get("classes"):
        out.print("  classes", soft_wrap=not out.is_terminal)
        _bars([(visible(label), count) for label, count in numbers["classes"][:BARS]], out)
    if len(numbers["languages"]) > 1:
        said = ", ".join(f"{name} {count:,}" for name, count in numbers["languages"].items())
        out.print(f"  languages: {said}", soft_wrap=not out.is_terminal)
    if numbers["longest"]:
        rows = ", ".join(f"{row['row']} ({row['characters']:,} characters)" for row in numbers["longest"][:SHOWN])
        out.print(f"  longest rows: {rows}", soft_wrap=not out.is_terminal)
    if numbers["oddest"]:
        rows = ", ".join(f"{row['row']} ({row['measure']})" for row in numbers["oddest"][:SHOWN])
        out.print(f"  oddest rows: {rows}", soft_wrap=not out.is_terminal)


def _quantiles(title: str, found: dict[str, Any]) -> str:
    shown = ", ".join(f"{name} {found[name]:,.0f}" for name in ("min", "median", "p95", "max"))
    return f"  {title}: {shown}, mean {found['mean']:,.1f}, {found['total']:,} in all"


def fewer(found: dict[str, Any]) -> list[tuple[int, int, int]]:
    """A histogram with neighbours put together until it has at most BARS bars."""
    bars = [tuple(bar) for bar in found["histogram"]]
    while len(bars) > BARS:
        pairs = [bars[n : n + 2] for n in range(0, len(bars), 2)]
        bars = [(pair[0][0], pair[-1][1], sum(count for _, _, count in pair)) for pair in pairs]
    return bars


def _bars(bars: list[tuple[str, int]], out: Console) -> None:
    from rich.text import Text

    wide, most = max(len(label) for label, _ in bars), max(count for _, count in bars)
    room = max(8, min(40, out.width - wide - 14))
    block = "█" if speaks_unicode() else "#"
    for label, count in bars:
        bar = block * (round(count / most * room) or int(count > 0))
        out.print(Text.assemble(f"    {label:>{wide}} ", (bar, "cyan"), f" {count:,}"), soft_wrap=not out.is_terminal)
