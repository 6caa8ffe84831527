"""`luthier data convert`: a data file in another format or layout.

Does not know: formats (data/encode.py), tables (data/sheets.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.output import console, plural, print_json, short, visible, waiting
from luthier.spec.errors import BadSetting

if TYPE_CHECKING:
    from luthier.data.convert import Converted, Count

Record = Literal["chat", "preference", "preference-completion", "completion", "alpaca", "sharegpt", "text"]
Target = Literal[Record, "csv", "tsv", "parquet", "xlsx"]


def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A data file: JSON, CSV, TSV, XLSX, Parquet or text.")],
    out: Annotated[Path, typer.Argument(help="The file to write; .json is an array, other names are JSON Lines.")],
    to: Annotated[
        Target | None,
        typer.Option(
            "--to", help="The records' format, or the kind of table. Default: the table that OUT's name says."
        ),
    ] = None,
    as_format: Annotated[
        Record | None, typer.Option("--as", help="Format of the records in a table. Default: the source's own.")
    ] = None,
    read_as: Annotated[
        Literal["auto", "json", "csv", "tsv", "xlsx", "parquet", "text", "lines"],
        typer.Option("--from", help="What IN is: as its name ends (auto), or a kind; lines: text with one row a line."),
    ] = "auto",
    named: Annotated[
        list[str] | None,
        typer.Option(
            "--map", metavar="FIELD=COLUMN", help="The column (of JSON: the key) that is a field of the records."
        ),
    ] = None,
    titles: Annotated[
        list[str] | None,
        typer.Option("--column", metavar="FIELD=COLUMN", help="Write this field of a table under another name."),
    ] = None,
    written: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=TEXT", help="A field's text in each row; {COLUMN} is that column's cell."),
    ] = None,
    encoding: Annotated[
        str | None, typer.Option("--encoding", help="Encoding of CSV, TSV or text, such as cp1252. Default: UTF-8.")
    ] = None,
    sheet: Annotated[str | None, typer.Option("--sheet", help="Sheet of a workbook that has several.")] = None,
    lossy: Annotated[
        bool, typer.Option("--lossy", help="Give up what the target cannot hold, and say how often.")
    ] = False,
    drop_extra: Annotated[
        bool, typer.Option("--drop-extra", help="Leave out keys that belong to no format, instead of carrying them.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a data file in another format: chat, preference, prompt and completion, Alpaca, ShareGPT, text, tables.

    What comes out says the same as what went in: rows that the target cannot hold are refused by line, unless --lossy
    is given. MOSS plug-in records are read as chats with tool calls; tool results are context and never learnt.
    """
    from luthier.data.convert import Plan
    from luthier.data.convert import convert as converted
    from luthier.data.fields import ColumnMap
    from luthier.data.sources import Reading

    mapping = ColumnMap(_pairs(named, "map"), _pairs(written, "set"))
    reading = Reading(read_as, encoding, sheet, mapping)
    plan = Plan(
        source, out, to or _by_name(out), as_format, reading, _pairs(titles, "column"), lossy, drop_extra, force
    )
    with waiting() as tell:
        done = converted(plan, lambda doing: lambda read, total: tell(f"{doing} {source.name}", read, total))
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        _say(done)


def _by_name(out: Path) -> Target:
    kinds: dict[str, Target] = {".csv": "csv", ".tsv": "tsv", ".parquet": "parquet", ".xlsx": "xlsx", ".txt": "text"}
    kind = kinds.get(out.suffix.lower())
    if kind is None:
        raise BadSetting(
            f"{out} says nothing of the records in it.", hint="Give their format, for instance --to chat.", param="to"
        )
    return kind


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            wanted = "'system=Be brief.'" if option == "set" else "prompt=Question"
            raise BadSetting(f"--{option} {text}: wanted a field, = and more, such as {wanted}.", param=option)
        if name in pairs:
            raise BadSetting(f"--{option} names the field {name} twice.", param=option)
        pairs[name] = value
    return pairs


def _say(done: Converted) -> None:
    out = console()

    def line(words: str) -> None:
        out.print(visible(words), markup=False, soft_wrap=True)

    line(f"{short(done.out)}: {plural(done.rows, 'row')} of {plural(done.records, 'record')}, as {done.format}.")
    for what, count in done.lost.items():
        line(f"Given up in {_rows(count)}: {what}.")
    for why, count in done.left_out.items():
        line(f"Left out {_rows(count)}: {why}.")
    if done.carried:
        line("Carried along: " + ", ".join(f"{key} ({plural(n.rows, 'row')})" for key, n in done.carried.items()) + ".")
    if done.dropped:
        line("Left out: " + ", ".join(f"{key} ({plural(n.rows, 'row')})" for key, n in done.dropped.items()) + ".")
    if done.columns_left_out:
        line("Columns not taken: " + ", ".join(map(repr, done.columns_left_out)) + ".")
    if done.warning_count:
        line(f"{plural(done.warning_count, 'warning')}; the first: {done.warnings[0]}")


def _rows(count: Count) -> str:
    lines = ", ".join(map(str, count.lines[:5])) + (", ..." if count.rows > 5 else "")
    return f"{plural(count.rows, 'row')} (line {lines})" if count.rows == 1 else f"{count.rows:,} rows (lines {lines})"
