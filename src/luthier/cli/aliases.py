"""`luthier models aliases`, `promote`, `rollback`: what a server's aliases mean, and moving them.

Does not know: what the gate asks for (the server refuses, with its reasons).
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from luthier.cli.client import Server, connect, segment
from luthier.cli.keys import when
from luthier.cli.output import print_json, visible

Json = Annotated[bool, typer.Option("--json", help="Print the server's JSON.")]
Alias = Annotated[str, typer.Argument(help="An alias: NAME@LABEL, such as my-model@production.")]
IfVersion = Annotated[
    int | None, typer.Option("--if-version", min=0, help="Only if the alias still has this version; 0: only a new one.")
]


def aliases(
    alias: Annotated[str | None, typer.Argument(help="Show the history of this one.")] = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Show a server's aliases and the models that they mean, or the history of one."""
    client = connect(server)
    if alias is not None:
        found = client.get(f"/luthier/aliases/{segment(alias)}")
        if as_json:
            print_json(found)
            return
        for move in found["history"]:
            print(visible(f"{move['version']:>3}  {when(move['created_at'])}  {move['kind']:8}  {move['model']}"))
        return
    listed = client.get("/luthier/aliases")["data"]
    for one in listed:
        if as_json:
            print_json(one)
        else:
            print(visible(f"{one['id']}  ->  {one['model']}  (version {one['version']}, {when(one['moved_at'])})"))
    if not listed and not as_json:
        print("No aliases. Make one with `luthier models promote NAME@LABEL MODEL`.")


def promote(
    alias: Alias,
    model: Annotated[str, typer.Argument(help="The tuned model that it shall mean (ft:...).")],
    if_version: IfVersion = None,
    server: Server = None,
    as_json: Json = False,
) -> None:
    """Let an alias mean a tuned model. Refused, with the reasons, for one that missed the thresholds of its job."""
    body = {"model": model} | ({} if if_version is None else {"if_version": if_version})
    _told(connect(server).post(f"/luthier/aliases/{segment(alias)}", body), as_json)


def rollback(alias: Alias, if_version: IfVersion = None, server: Server = None, as_json: Json = False) -> None:
    """Let an alias mean again what it meant before its last move."""
    body = {} if if_version is None else {"if_version": if_version}
    _told(connect(server).post(f"/luthier/aliases/{segment(alias)}/rollback", body), as_json)


def _told(moved: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print_json(moved)
    else:
        print(visible(f"{moved['id']} means {moved['model']} now (version {moved['version']})."))
