"""`luthier models`: the catalogue, and what of it lies on this disk.

Does not know: where models come from (engine/catalogue.py).
"""

from __future__ import annotations

from typing import Annotated

import typer

from luthier.cli.aliases import aliases, promote, rollback
from luthier.cli.client import Server, connect, segment
from luthier.cli.keys import when
from luthier.cli.output import console, print_json, short, size, visible, waiting

app = typer.Typer(help="Base models: list them, get them, remove them. With --server: a server's models.")


@app.callback(invoke_without_command=True)
def models(context: typer.Context) -> None:
    """Base models: list them, get them, remove them. With --server: a server's models. Without a command: the list."""
    if context.invoked_subcommand is None:
        list_models()


@app.command("list")
def list_models(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    server: Annotated[
        str | None, typer.Option("--server", metavar="URL", help="The models of this server instead.")
    ] = None,
) -> None:
    """Show the catalogue and every other model that is installed, or what a server offers."""
    if server is not None:
        _list_served(server, as_json)
        return
    from luthier.engine import catalogue

    entries = catalogue.entries()
    if as_json:
        for entry in entries:
            print_json(
                {
                    "name": entry.name,
                    "title": entry.title,
                    "licence": entry.licence,
                    "size": entry.size or None,
                    "sources": list(entry.sources),
                    "installed": entry.installed,
                    "path": str(entry.path) if entry.installed else None,
                    "bytes_on_disk": entry.bytes_on_disk,
                }
            )
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for title in ("name", "size", "here", "what"):
        table.add_column(title, no_wrap=title != "what", overflow="fold")
    for entry in entries:
        here = Text(size(entry.bytes_on_disk), "green") if entry.installed else Text("-", "dim")
        what = Text(visible(f"{entry.title}\n")).append(visible(f"{entry.licence}; {entry.sources[0]}"), "dim")
        table.add_row(Text(visible(entry.name), "bold"), entry.size or "-", here, what)
    out = console()
    out.print(table)
    out.print(
        "Get one with `luthier models pull NAME`; any local folder or Hub id works as a name, too.", soft_wrap=True
    )


def _list_served(server: str, as_json: bool) -> None:
    for model in connect(server).get("/models")["data"]:
        if as_json:
            print_json(model)
        else:
            print(visible(f"{when(model['created'])}  {model['owned_by']}  {model['id']}"))


@app.command()
def delete(
    name: Annotated[str, typer.Argument(help="A tuned model's name (ft:...).")],
    server: Server = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the server's JSON.")] = False,
) -> None:
    """Delete a tuned model from a server."""
    gone = connect(server).delete(f"/models/{segment(name)}")
    if as_json:
        print_json(gone)
    else:
        print(f"Deleted {visible(str(gone['id']))}.")


@app.command()
def pull(name: Annotated[str, typer.Argument(help="A catalogue name or a Hub id (org/name).")]) -> None:
    """Download a model, check it and convert it once. Does nothing when it is here already."""
    from luthier.engine import catalogue

    with waiting() as progress:
        folder = catalogue.pull(name, progress)
    console().print(f"{name} is in {short(folder)}", markup=False, soft_wrap=True)


@app.command()
def remove(name: Annotated[str, typer.Argument(help="The name that `luthier models list` shows.")]) -> None:
    """Delete an installed model from this disk."""
    from luthier.engine import catalogue

    freed = catalogue.remove(name)
    console().print(f"Removed {name}: {size(freed)} are free again.", markup=False, soft_wrap=True)


app.command()(aliases)
app.command()(promote)
app.command()(rollback)
