"""`luthier keys`: who may use the server. Works on the store itself, with or without a running server.

Does not know: HTTP, hashes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from luthier.cli.output import console, print_json, visible
from luthier.cli.serve import configured, open_store
from luthier.spec.errors import UserError

if TYPE_CHECKING:
    from luthier.store.keys import Key, Keys

app = typer.Typer(help="API keys of the server: make, list and revoke them.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.callback()
def keys() -> None:
    """API keys of the server: make, list and revoke them."""


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Whose key it is, or what for.")] = "",
    role: Annotated[
        Literal["admin", "user"], typer.Option("--role", help="admin: also /metrics from other machines.")
    ] = "user",
    as_json: AsJson = False,
) -> None:
    """Make a key and show it: once, only its hash is kept."""
    key, token = _keys().create(name or role, role)
    if as_json:
        print_json({**_shown(key), "key": token})
        return
    console(stderr=True).print(f"{key.id}, role {key.role}. Shown this once:", soft_wrap=True)
    print(token)


@app.command("list")
def list_keys(as_json: AsJson = False) -> None:
    """Show all keys, oldest first; never the keys themselves, only how they begin."""
    found = _keys().list()
    if as_json:
        for key in found:
            print_json(_shown(key))
        return
    from rich.text import Text

    out = console()
    for key in found:
        state = Text("revoked", "dim") if key.revoked_at else Text("opens", "green")
        words = (key.id, key.role.ljust(5), f"{key.prefix}...", when(key.created_at), state, visible(key.name))
        out.print(Text("  ").join(word if isinstance(word, Text) else Text(word) for word in words), soft_wrap=True)


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="The id that `luthier keys list` shows.")],
    as_json: AsJson = False,
) -> None:
    """End a key: from now on it opens nothing."""
    keys = _keys()
    admins = [key.id for key in keys.list() if key.role == "admin" and key.revoked_at is None]
    if admins == [key_id]:
        raise UserError(
            f"{key_id} is the last admin key: without it nobody could administer the server.",
            hint="Make another first: luthier keys create --role admin",
            param="id",
        )
    key = keys.revoke(key_id)
    if as_json:
        print_json(_shown(key))
    else:
        print(f"Revoked {key.id} ({visible(key.name)}).")


def _keys() -> Keys:
    from luthier.store.keys import Keys

    store = open_store(configured())
    store.migrate()
    return Keys(store)


def _shown(key: Key) -> dict[str, Any]:
    names = ("id", "name", "role", "prefix", "created_at", "revoked_at")
    return {name: getattr(key, name) for name in names}


def when(seconds: int | None) -> str:
    """Unix seconds as local time, to the minute."""
    from datetime import datetime

    return "-" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
