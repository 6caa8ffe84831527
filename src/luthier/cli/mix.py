"""`luthier data mix`: several files to one, each with its share.

Does not know: how rows are picked (data/mix.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.output import console, plural, print_json, resolve_model, short, visible, waiting
from luthier.spec.errors import BadSetting

if TYPE_CHECKING:
    from luthier.data.mix import Difficulty, Mixed, Source
    from luthier.spec.data import Example, Preference


def mix(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE", help="A data file and, after a colon, its weight: shop.jsonl:0.7. Default: 1."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, as JSON Lines.")],
    rows: Annotated[
        int | None,
        typer.Option(
            "--rows", min=1, help="Rows to write; repeats rows where needed. Default: the most without repeats."
        ),
    ] = None,
    order: Annotated[
        Literal["shuffle", "easy-to-hard"],
        typer.Option("--order", help="Shuffled, or short rows first (by characters, tokens or loss)."),
    ] = "shuffle",
    seed: Annotated[int, typer.Option("--seed", help="Another seed picks and shuffles otherwise.")] = 0,
    model: Annotated[
        str | None, typer.Option("--model", help="With easy-to-hard: measure rows in this model's tokens.")
    ] = None,
    loss: Annotated[
        Path | None,
        typer.Option(
            "--loss", help="With easy-to-hard: order by these losses, one JSON object {file, row, loss} a line."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Mix several files into one, each with its share of the rows.

    Files must be in one format (`luthier data convert` brings them there). Rows keep their bytes. The same files,
    weights and seed give the same mix.
    """
    from luthier.data.mix import mix as mixed
    from luthier.data.mix import parse_source

    named = [parse_source(text) for text in sources]
    difficulty = _difficulty(named, order, model, loss)
    with waiting() as tell:
        done = mixed(
            named,
            out,
            rows=rows,
            order=order,
            seed=seed,
            difficulty=difficulty,
            force=force,
            on_file=lambda path: lambda read, total: tell(f"Reading {path.name}", read, total),
        )
    if as_json:
        sources_done = [{**dataclasses.asdict(each), "repeated": each.repeated} for each in done.sources]
        print_json({**dataclasses.asdict(done), "sources": sources_done})
    else:
        _say(done)


def _difficulty(sources: list[Source], order: str, model: str | None, loss: Path | None) -> Difficulty | None:
    """What makes a row hard; None when nobody asks. Raises BadSetting for measures that would not be used."""
    from luthier.data.mix import read_losses
    from luthier.data.rows import said

    if order != "easy-to-hard":
        unused = "--model" if model is not None else "--loss" if loss is not None else None
        if unused:
            raise BadSetting(f"{unused} says how hard rows are, which --order shuffle does not ask.", param=unused[2:])
        return None
    if loss is not None:
        if model is not None:
            raise BadSetting("--model and --loss cannot be given together: one measure decides.", param="loss")
        return read_losses(loss, sources)
    if model is None:
        return lambda file, row, meaning: len(said(meaning))
    from luthier.data.tokenizer import Tokenizer

    tokenizer = Tokenizer(resolve_model(model))

    def tokens(file: Path, row: int, meaning: Example | Preference) -> int:
        return len(tokenizer.plain(said(meaning)))

    return tokens


def _say(done: Mixed) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("file", "rows", "taken", "share", "left out", "repeats"):
        table.add_column(title, justify="left" if title == "file" else "right", overflow="fold")
    for each in done.sources:
        figures = (each.rows, each.taken, f"{each.taken / done.rows:.1%}", each.rows - each.distinct, each.repeated)
        table.add_row(Text(visible(short(each.file))), *(f"{n:,}" if isinstance(n, int) else n for n in figures))
    out.print(table)
    how = "shuffled" if done.order == "shuffle" else "from easy to hard"
    out.print(visible(f"{short(done.out)}: {plural(done.rows, 'row')}, {how}."), markup=False, soft_wrap=True)
