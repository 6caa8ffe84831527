"""`luthier data split`: a file to rows to train on and rows to measure on.

Does not know: how they are chosen (data/split.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from luthier.cli.output import console, plural, print_json, short, typed, visible, waiting

if TYPE_CHECKING:
    from luthier.data.split import SplitDone

SHOWN_CLASSES = 20


def split(
    file: Annotated[Path, typer.Argument(help="A data file.")],
    share: Annotated[float, typer.Option("--share", help="Share of the rows to hold out, between 0 and 1.")] = 0.1,
    seed: Annotated[int, typer.Option("--seed", help="Another seed holds out other rows.")] = 0,
    stratify: Annotated[
        Literal["auto", "label", "none"],
        typer.Option(
            "--stratify",
            help="Keep each answer's share: when answers look like classes (auto), always (label), or never (none).",
        ),
    ] = "auto",
    train: Annotated[
        Path | None, typer.Option("--train", help="File for the training rows. Default: NAME.train beside the file.")
    ] = None,
    validation: Annotated[
        Path | None,
        typer.Option("--validation", help="File for the rows held out. Default: NAME.validation beside the file."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there already.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Split a file into rows to train on and rows to measure on, without a prompt in both.

    Rows keep their bytes and their order. The same file, share and seed give the same split.
    """
    from luthier.data.split import split_file

    with waiting() as tell:
        done = split_file(
            file,
            train or _beside(file, "train"),
            validation or _beside(file, "validation"),
            share=share,
            seed=seed,
            stratify=stratify,
            force=force,
            on_bytes=lambda read, total: tell(f"Reading {file.name}", read, total),
        )
    if as_json:
        print_json(dataclasses.asdict(done))
    else:
        _say(done)


def _beside(file: Path, part: str) -> Path:
    return file.with_name(f"{file.stem}.{part}{file.suffix or '.jsonl'}")


def _say(done: SplitDone) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    out = console()
    rows = done.train.rows + done.validation.rows
    for part in (done.train, done.validation):
        words = (
            f"{short(part.file)}: {plural(part.rows, 'row')} ({part.rows / rows:.1%}), {plural(part.prompts, 'prompt')}"
        )
        out.print(visible(words), markup=False, soft_wrap=True)
    if done.stratified:
        table = Table(box=SIMPLE_HEAD, pad_edge=False)
        table.add_column("class", overflow="fold")
        for title in ("training", "validation"):
            table.add_column(title, justify="right")
        for label, (learnt, held) in list(done.classes.items())[:SHOWN_CLASSES]:
            table.add_row(Text(visible(label)), f"{learnt:,}", f"{held:,}")
        out.print(table)
        if len(done.classes) > SHOWN_CLASSES:
            out.print(f"and {len(done.classes) - SHOWN_CLASSES} more classes.", soft_wrap=True)
    command = typed(
        "luthier", "train", "--data", short(done.train.file), "--validation", short(done.validation.file), "--model"
    )
    out.print(visible(f"Train with: {command} MODEL"), markup=False, soft_wrap=True)
