"""`luthier data show` and `luthier tokenize`: what training sees of a file, and what a tokenizer makes of a text.

Does not know: formats, templates (the data room), torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.output import console, plural, print_json, resolve_model, speaks_unicode, visible
from luthier.spec.data import Preference, Problem, Rendered, Text
from luthier.spec.errors import BadSetting, NotFound, UserError
from luthier.spec.job import auto_max_length

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text as Styled

    from luthier.data.pairs import Meaning
    from luthier.data.render import Renderer
    from luthier.data.tokenizer import Tokenizer

app = typer.Typer(help="Look at data files as training sees them.", no_args_is_help=True)
CHUNK = 256  # records tokenised at a time
SHOWN = 3
SIDES = ("preferred", "rejected")

Model = Annotated[str, typer.Option("--model", help="A catalogue name, a local folder, or a Hub id.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def data() -> None:
    """Look at data files as training sees them."""


@dataclass
class Shown:
    """A record's rows and everything found about it. Row 0 stands for the file as a whole."""

    row: int
    line: int = 0
    rendered: list[Rendered] = field(default_factory=list)
    pair: bool = False  # `rendered` is a preferred answer and the other one
    problems: list[Problem] = field(default_factory=list)


@app.command("show")
def show(
    file: Annotated[Path, typer.Argument(help="A data file.")],
    model: Model,
    template: Annotated[
        str | None, typer.Option("--template", help="Chat template: a built-in name or a .jinja file.")
    ] = None,
    row: Annotated[int | None, typer.Option("--row", min=1, help="Only this record, counted from 1.")] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help=f"Records to show. Default: {SHOWN}; with --json all."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=1, help="Longest row in tokens, as for `luthier train`.")
    ] = None,
    prompt_loss_weight: Annotated[
        float, typer.Option("--prompt-loss-weight", min=0, max=1, help="Weight of prompts, as for `luthier train`.")
    ] = 0.0,
    ids: Annotated[bool, typer.Option("--ids", help="List each token with its id and loss weight.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a row.")] = False,
) -> None:
    """Show rows as training sees them: green is learnt, the rest is context.

    The whole file is checked, whatever is shown. Exit code 2 when a record cannot be trained on.
    """
    from luthier.data.render import Renderer

    if row is not None and limit is not None:
        raise BadSetting("--row and --limit cannot be given together.", param="row")
    if not file.is_file():
        raise NotFound(f"No data file {file}.", param="file", hint="Check the path.")
    renderer = Renderer.load(resolve_model(model), template, prompt_loss_weight)
    longest = max_length or auto_max_length(renderer.tokenizer.context)
    records = _records(file, renderer, longest)
    if row is not None:
        records = (record for record in records if record.row == row)
    failed = _as_json(records, renderer, limit, row) if as_json else _as_text(records, renderer, limit, row, ids)
    if failed:
        raise typer.Exit(UserError.exit_code)


def _records(file: Path, renderer: Renderer, max_length: int) -> Iterator[Shown]:
    """Every record of the file in order, a few hundred rendered at a time."""
    from luthier.data.pairs import holds_pairs, read_meanings, render_all

    groups = _by_record(read_meanings(file, holds_pairs(file)))
    while chunk := list(islice(groups, CHUNK)):
        meanings = [item for group in chunk for item in group if not isinstance(item, Problem)]
        rendered = render_all(renderer, meanings)
        for group in chunk:
            yield _record(group, rendered, max_length, str(file))


def _by_record(items: Iterable[Meaning | Problem]) -> Iterator[list[Meaning | Problem]]:
    """What belongs to one record: its problems, then its Example if it has one; what comes later is about the file."""
    group: list[Meaning | Problem] = []
    for item in items:
        if group and (item.row != group[-1].row or not isinstance(group[-1], Problem)):
            yield group
            group = []
        group.append(item)
    if group:
        yield group


def _record(
    group: Sequence[Meaning | Problem],
    rendered: Iterator[tuple[Meaning, list[Rendered] | Problem]],
    max_length: int,
    file: str,
) -> Shown:
    shown = Shown(group[0].row, group[0].line)
    for item in group:
        if isinstance(item, Problem):
            shown.problems.append(item)
            continue
        example, rows = next(rendered)
        if isinstance(rows, Problem):
            shown.problems.append(rows)
            continue
        shown.rendered += _windows(example, rows, max_length)
        shown.pair = isinstance(example, Preference) and len(rows) == 2
    for row in shown.rendered:
        shown.problems += _unusable(row, shown, max_length, file)
    if not shown.rendered and all(problem.severity == "warning" for problem in shown.problems):
        shown.row = 0  # said about the file, with a record as the example
    return shown


def _windows(example: Meaning, rows: list[Rendered], max_length: int) -> list[Rendered]:
    """Texts are cut as training cuts them."""
    from luthier.data.dataset import windows

    return [piece for row in rows for piece in windows(row, max_length)] if isinstance(example, Text) else rows


def _unusable(row: Rendered, shown: Shown, max_length: int, file: str) -> Iterator[Problem]:
    place: dict[str, Any] = {"row": shown.row, "file": file}
    if len(row.ids) > max_length:
        hint = "Raise --max-length, shorten the row, or train with --overlong drop or truncate."
        yield Problem(shown.line, "", f"a row of {len(row.ids)} tokens", f"at most {max_length}", hint, **place)
    elif not row.supervised:
        yield Problem(shown.line, "", "no token to learn", "an answer", **place)


# -- JSON --------------------------------------------------------------------------------------------------------------


def _as_json(records: Iterator[Shown], renderer: Renderer, limit: int | None, row: int | None) -> bool:
    failed = found = False
    for record in islice(records, limit):
        found = True
        problems = [problem.as_dict() for problem in record.problems]
        failed = failed or any(problem.severity == "error" for problem in record.problems)
        for side, rendered in enumerate(record.rendered or [Rendered([], [])]):
            learnt = [token for token, weight in zip(rendered.ids, rendered.weights, strict=True) if weight >= 1]
            print_json(
                {
                    "row": record.row,
                    **({"answer": SIDES[side]} if record.pair else {}),
                    "tokens": [
                        {"id": token, "text": renderer.tokenizer.token_text(token), "weight": weight}
                        for token, weight in zip(rendered.ids, rendered.weights, strict=True)
                    ],
                    "supervised_text": renderer.tokenizer.decode(learnt) if learnt else "",
                    "problems": problems,
                }
            )
    if row is not None and not found:
        raise _no_such_row(row)
    return failed


def _no_such_row(row: int) -> NotFound:
    return NotFound(f"--row: the file has no record {row}.", param="row")


# -- text --------------------------------------------------------------------------------------------------------------


def _as_text(records: Iterator[Shown], renderer: Renderer, limit: int | None, row: int | None, ids: bool) -> bool:
    out = console()
    painter = Painter(out, renderer.tokenizer)
    most = limit or SHOWN
    shown = rows = tokens = learnt = longest = errors = warnings = 0
    for record in records:
        if record.rendered and shown < most:
            if not shown:
                painter.legend()
            shown += 1
            for side, rendered in enumerate(record.rendered):
                painter.row(record, rendered, ids, SIDES[side] if record.pair else "")
        for problem in record.problems:
            errors += problem.severity == "error"
            warnings += problem.severity == "warning"
            painter.problem(problem)
        rows += len(record.rendered)
        tokens += sum(len(rendered.ids) for rendered in record.rendered)
        learnt += sum(rendered.supervised for rendered in record.rendered)
        longest = max([longest, *(len(rendered.ids) for rendered in record.rendered)])
    if row is not None and not (rows or errors or warnings):
        raise _no_such_row(row)
    words = f"{plural(rows, 'row')}, {plural(tokens, 'token')}, {learnt:,} learnt ({learnt / max(1, tokens):.1%}); "
    words += f"the longest row has {longest:,}. {plural(errors, 'problem')}, {plural(warnings, 'warning')}."
    out.print(words, soft_wrap=True)
    return errors > 0


class Painter:
    """Rows on a console: learnt text green, or between marks where there are no colours."""

    def __init__(self, out: Console, tokenizer: Tokenizer) -> None:
        self.out, self.tokenizer = out, tokenizer
        self.colours = out.is_terminal and not out.no_color
        fancy = out.encoding.startswith("utf")
        self.open, self.close = ("⟦", "⟧") if fancy else ("[[", "]]")
        self.newline = "⏎" if fancy else "\\n"
        self.control = set(tokenizer.control_ids.values())

    def legend(self) -> None:
        from rich.text import Text

        legend = Text.assemble(
            *[("learnt", "bold green"), "  ", ("context", "dim"), "  ", ("control token", "magenta")]
            if self.colours
            else [f"Learnt text stands between {self.open} and {self.close}."]
        )
        self.out.print(legend, soft_wrap=True)

    def row(self, record: Shown, rendered: Rendered, ids: bool, side: str) -> None:
        from rich.text import Text

        counts = f"{side + ', ' if side else ''}{plural(len(rendered.ids), 'token')}, {rendered.supervised:,} learnt"
        self.out.print(Text(f"-- row {record.row} (line {record.line}): {counts}", style="bold"), soft_wrap=True)
        self.out.print(self.tokens(rendered) if ids else self.text(rendered), soft_wrap=not ids)

    def text(self, rendered: Rendered) -> Styled:
        """The row as one text; ids are decoded in runs, so that a character made of several tokens is whole."""
        from rich.text import Text

        text = Text()
        weighed = zip(rendered.ids, rendered.weights, strict=True)
        for weight, run in groupby(weighed, key=lambda pair: pair[1]):
            learnt = weight >= 1
            text.append(self.open if learnt and not self.colours else "")
            for control, group in groupby([token for token, _ in run], key=self.control.__contains__):
                style = "bold green" if learnt else "dim"
                style = f"{style} magenta" if control and not learnt else f"{style} underline" if control else style
                text.append(self._spelt(self.tokenizer.decode(group)), style)
            text.append(self.close if learnt and not self.colours else "")
        return text

    def _spelt(self, text: str) -> str:
        return visible(text).replace("\n", f"{self.newline}\n")

    def tokens(self, rendered: Rendered) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        for title in ("id", "text", "weight"):
            table.add_column(title, justify="left" if title == "text" else "right", overflow="fold")
        for token, weight in zip(rendered.ids, rendered.weights, strict=True):
            style = "bold green" if weight else "magenta" if token in self.control else "dim"
            shown = visible(self.tokenizer.token_text(token)).replace("\n", self.newline)
            table.add_row(str(token), Text(shown, style), f"{weight:g}")
        return table

    def problem(self, problem: Problem) -> None:
        from rich.text import Text

        style = "red" if problem.severity == "error" else "yellow"
        label = "Problem: " if problem.severity == "error" else "Warning: "
        line = Text.assemble((label, f"bold {style}"), (visible(str(problem)), style))
        self.out.print(line, soft_wrap=not self.out.is_terminal)


# -- tokenize ----------------------------------------------------------------------------------------------------------


def tokenize(
    text: Annotated[str, typer.Argument(help="The text.")],
    model: Model,
    as_json: AsJson = False,
) -> None:
    """Show the tokens of a text: each with its piece, its id and its bytes.

    A token that is only a part of a character shows as U+FFFD; its bytes are exact.
    """
    from luthier.data.tokenizer import Tokenizer

    try:
        text.encode()
    except UnicodeEncodeError as error:  # how Python keeps bytes of the command line that are not UTF-8
        found = f"U+{ord(text[error.start]):04X}"
        raise UserError(
            f"The text is not valid UTF-8: found {found}.", param="text", hint="Give it as UTF-8."
        ) from error
    tokenizer = Tokenizer(resolve_model(model))
    tokens = [(token, tokenizer.token_text(token), tokenizer.token_bytes(token)) for token in tokenizer.plain(text)]
    if as_json:
        print_json({"tokens": [{"id": token, "text": piece, "bytes": list(raw)} for token, piece, raw in tokens]})
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text as Styled

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("piece", "id", "bytes"):
        table.add_column(title, justify="right" if title == "id" else "left", overflow="fold")
    space, newline = ("·", "⏎") if speaks_unicode() else ("_", "\\n")
    for token, piece, raw in tokens:
        shown = visible(piece).replace(" ", space).replace("\n", newline)
        table.add_row(Styled(shown, "bold"), str(token), raw.hex(" "))
    out = console()
    out.print(table)
    out.print(f"{plural(len(tokens), 'token')} for {plural(len(text), 'character')}.", soft_wrap=True)
