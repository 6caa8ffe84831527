"""`luthier files`: the files of a server.

Does not know: what a training file must hold (the server says), HTTP.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from luthier.cli.client import Server, connect, segment
from luthier.cli.keys import when
from luthier.cli.output import print_json, short, size, visible

app = typer.Typer(help="Files of a server: send, list, read and delete them.", no_args_is_help=True)

AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON.")]
Id = Annotated[str, typer.Argument(metavar="ID", help="The file's id (file-...).")]


@app.callback()
def files() -> None:
    """Files of a server: send, list, read and delete them."""


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(help="A file of this machine.")],
    purpose: Annotated[str, typer.Option("--purpose", help="What it is for.")] = "fine-tune",
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Send a file to the server and print its id."""
    made = connect(server).upload(file, purpose)
    if as_json:
        print_json(made)
    else:
        print(made["id"])


@app.command("list")
def list_files(
    purpose: Annotated[str | None, typer.Option("--purpose", help="Only files for this.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="At most so many, the newest.")] = None,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Show the server's files, the newest first."""
    for file in connect(server).pages("/files", limit, purpose=purpose):
        if as_json:
            print_json(file)
        else:
            print(line(file))


@app.command()
def get(file_id: Id, server: Server = None, as_json: AsJson = False) -> None:
    """Show what the server knows of a file."""
    file = connect(server).get(f"/files/{segment(file_id)}")
    if as_json:
        print_json(file)
    else:
        print(line(file))


@app.command()
def delete(file_id: Id, server: Server = None, as_json: AsJson = False) -> None:
    """Delete a file from the server."""
    gone = connect(server).delete(f"/files/{segment(file_id)}")
    if as_json:
        print_json(gone)
    else:
        print(f"Deleted {visible(str(gone['id']))}.")


@app.command()
def content(
    file_id: Id,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write it there instead of to stdout.")] = None,
    server: Server = None,
) -> None:
    """Print what a file holds, byte for byte; result files as CSV, also when the server sends them as base64."""
    client = connect(server)
    path = f"/files/{segment(file_id)}"
    pieces = client.content(f"{path}/content")
    if client.get(path)["purpose"] == "fine-tune-results":
        pieces = iter([_plain(b"".join(pieces))])
    if out is None:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
        return
    with whole_or_not_at_all(out) as handle:
        for piece in pieces:
            handle.write(piece)
    print(f"{short(out)} holds it.", file=sys.stderr)


def _plain(content: bytes) -> bytes:
    """A result table out of base64. A table has commas, which base64 has not, so the two cannot be confused."""
    try:
        return base64.b64decode(content, validate=True)
    except ValueError:
        return content


@contextlib.contextmanager
def whole_or_not_at_all(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path` when the block ends without an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.absolute().parent)
    try:
        with open(handle, "wb") as file:
            yield file
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)
        shutil.move(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def line(file: dict[str, Any]) -> str:
    """A file in a line."""
    facts = (file["id"], when(file["created_at"]), f"{size(file['bytes']):>8}", file["purpose"], file["filename"])
    return visible("  ".join(map(str, facts)))
