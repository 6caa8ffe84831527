"""`luthier data fix`: a new file with the mends that were chosen, and a log of every change.

Does not know: how anything is found or mended (the data room).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.output import console, plural, print_json, resolve_model, short, typed, visible, waiting
from luthier.spec.errors import BadSetting, NotFound

if TYPE_CHECKING:
    from luthier.data.fix import Fixed, Fixes


def fix(
    file: Annotated[Path, typer.Argument(help="A data file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write; OUT.changes.jsonl is the log.")],
    dedupe: Annotated[
        Literal["exact", "near"] | None,
        typer.Option("--dedupe", help="Leave out rows that repeat an earlier one: exactly, or almost as well."),
    ] = None,
    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", metavar="KIND", help="Leave out rows with this kind of finding (see docs/data.md)."),
    ] = None,
    redact: Annotated[
        bool, typer.Option("--redact", help="Put what it is in place of likely secrets and personal data.")
    ] = False,
    normalise_roles: Annotated[
        bool,
        typer.Option(
            "--normalise-roles",
            help="Usual names for roles, one turn for two of one speaker, nothing after the last answer.",
        ),
    ] = False,
    add_separators: Annotated[
        bool, typer.Option("--add-separators", help="End each prompt with the file's separator, or one it lacks.")
    ] = False,
    add_end_markers: Annotated[
        bool, typer.Option("--add-end-markers", help="End each completion with the file's end marker, or one it lacks.")
    ] = False,
    apart_from: Annotated[
        list[Path] | None,
        typer.Option(
            "--apart-from",
            metavar="TRAINING",
            help="Leave out rows whose prompt is in this training file, and rows that are almost in it. Repeatable.",
        ),
    ] = None,
    split: Annotated[
        Path | None,
        typer.Option("--split", help="Hold rows out into this validation file, as `luthier data split` does."),
    ] = None,
    share: Annotated[
        float | None, typer.Option("--share", help="Share of the rows to hold out. Needs --split. Default: 0.1.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", help="Another seed holds out other rows. Needs --split. Default: 0.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", help="For kinds that need tokens: unrenderable, nothing_supervised, too_long."),
    ] = None,
    template: Annotated[str | None, typer.Option("--template", help="Chat template. Needs --model.")] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="Longest row in tokens. Needs --model.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Mend a data file as you choose, into a new file; without a choice it says what there is to mend.

    Rows that nothing changes keep their bytes. The log has one JSON object a change, and nothing private in it.
    """
    from luthier.data.fix import Fixes
    from luthier.data.fix import fix as fixed
    from luthier.data.render import Renderer
    from luthier.spec.job import auto_max_length

    _check(model, template, max_length, split, share, seed, drop or [])
    fixes = Fixes(
        dedupe,
        frozenset(drop or ()),
        redact,
        normalise_roles,
        add_separators,
        add_end_markers,
        split,
        0.1 if share is None else share,
        seed or 0,
        tuple(apart_from or ()),
    )
    if not fixes:
        raise _proposals(file)
    renderer = Renderer.load(resolve_model(model), template) if model is not None else None
    longest = max_length if renderer is None else max_length or auto_max_length(renderer.tokenizer.context)
    with waiting() as tell:
        done = fixed(
            file,
            out,
            fixes,
            renderer,
            longest,
            force=force,
            tell=lambda doing: lambda read, total: tell(f"{doing} {file.name}", read, total),
        )
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        _say(done, fixes)


def _check(
    model: str | None,
    template: str | None,
    max_length: int | None,
    split: Path | None,
    share: float | None,
    seed: int | None,
    drop: list[str],
) -> None:
    """Raises BadSetting for options that would be of no use."""
    for option, value, needed, there in (
        ("template", template, "--model", model),
        ("max-length", max_length, "--model", model),
        ("share", share, "--split", split),
        ("seed", seed, "--split", split),
    ):
        if value is not None and there is None:
            raise BadSetting(f"--{option} needs {needed}.", param=option)
    kinds = {"unrenderable", "nothing_supervised", "too_long", "special_tokens"}
    if model is not None and not kinds & set(drop):
        wanted = ", ".join(f"--drop {kind}" for kind in sorted(kinds))
        raise BadSetting("--model would be of no use here.", hint=f"It serves {wanted}.", param="model")


def _proposals(file: Path) -> BadSetting:
    """The refusal of a command without a choice: what the report would mend."""
    from luthier.data.doctor import check

    if not file.is_file():
        raise NotFound(f"No data file {file}.", hint="Check the path.", param="file")
    with waiting() as tell:
        report = check([file], progress=lambda done, total: tell("Checking", done, total))
    proposed = [finding for finding in report.findings if finding.fix]
    if not proposed:
        asked = typed("luthier", "data", "check", file)
        return BadSetting("No fix was chosen, and nothing was found to mend.", hint=f"See: {asked}", param="fixes")
    lines = "\n".join(f"  {finding.message}\n    {finding.fix}" for finding in proposed)
    return BadSetting(f"No fix was chosen. `luthier data check` proposes:\n{lines}", param="fixes")


def _say(done: Fixed, fixes: Fixes) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("fix", overflow="fold")
    table.add_column("rows", justify="right")
    asked = ["duplicate", "near_duplicate"][: {None: 0, "exact": 1, "near": 2}[fixes.dedupe]]
    apart = ["overlap", "near_overlap"] if fixes.apart_from else []
    for kind in [*asked, *apart, *sorted(fixes.drop)]:
        table.add_row(f"dropped: {kind}", f"{done.dropped.get(kind, 0):,}")
    for change, rows in done.changed.items():
        table.add_row(f"changed: {change}", f"{rows:,}")
    table.add_row("unchanged", f"{done.unchanged:,}")
    out.print(table)

    def line(words: str) -> None:
        out.print(Text(visible(words)), soft_wrap=True)

    for key, ending in done.endings.items():
        line(f"Added where it was missing, {key}: {ending!r}.")
    if done.invalid:
        line(f"{plural(done.invalid, 'row')} against the rules of the format stay: --drop invalid leaves them out.")
    parts = [done.split.train, done.split.validation] if done.split else []
    for part in parts:
        line(f"{short(part.file)}: {plural(part.rows, 'row')}, {plural(part.prompts, 'prompt')}")
    if not parts:
        line(f"{short(done.out)}: {plural(done.rows, 'row')} of {plural(done.records, 'record')}")
    line(f"{short(done.log)}: every change")
