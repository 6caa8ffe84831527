"""`luthier serve` and `luthier worker`: the server, and the processes that carry out its jobs.

Options become settings here, and the settings of this process the environment of its children.
Does not know: routes, jobs, and how the processes are kept (running.py).
"""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.output import console
from luthier.spec.errors import BadSetting

if TYPE_CHECKING:
    from luthier.settings import Settings
    from luthier.store.db import Database
    from luthier.store.keys import Keys

PULSE = 1.0  # seconds between two signs of life of a worker that a server started

DatabaseUrl = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="PostgreSQL database. Default: LUTHIER_DATABASE, else SQLite."),
]


def serve(
    host: Annotated[str, typer.Option("--host", help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port; 0 takes a free one.")] = 8080,
    workers: Annotated[int, typer.Option("--workers", min=0, max=64, help="Jobs that train at once.")] = 1,
    base: Annotated[
        list[str] | None,
        typer.Option(
            "--base", metavar="NAME[=MODEL]", help="Offer a base: a catalogue name, or any name for a folder or Hub id."
        ),
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option("--alias", metavar="NAME=BASE", help="Another name for a base.")
    ] = None,
    database: DatabaseUrl = None,
    no_worker: Annotated[bool, typer.Option("--no-worker", help="Train nothing here; `luthier worker` does.")] = False,
) -> None:
    """Serve the OpenAI API: files, fine-tuning jobs, models, chat and completions.

    The first start makes an admin key and shows it once. Without a key the server listens on this machine only.
    Ctrl-C or SIGTERM lets streams finish for a few seconds and saves running jobs at a checkpoint.
    """
    from luthier.cli.bases import base_folders
    from luthier.cli.running import only_server, run_server

    settings = configured(base, alias, database)
    store = open_store(settings)
    with only_server(store):
        store.migrate()
        _let_in(store, host)
        folders = base_folders(settings)
        run_server(settings, store, folders, listening(host, port), 0 if no_worker else workers)


def worker(
    name: Annotated[str | None, typer.Option("--name", help="Its name in logs. Default: host and process.")] = None,
    database: DatabaseUrl = None,
    attached: Annotated[bool, typer.Option("--attached", hidden=True, help="End when stdin does.")] = False,
) -> None:
    """Carry out jobs, one at a time, for the server of the same home and database.

    Ctrl-C or SIGTERM saves the running job at a checkpoint and gives it back.
    """
    from luthier.work.worker import Worker

    stop = threading.Event()
    if attached:
        threading.Thread(target=_pulse, daemon=True).start()
        threading.Thread(target=_end_with_stdin, args=(stop,), daemon=True).start()
    settings = configured(None, None, database)
    store = open_store(settings)
    store.migrate()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr, force=True
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    called = name or f"{socket.gethostname()}-{os.getpid()}"
    console(stderr=True).print(f"Worker {called} waits for jobs in {store.home}.", markup=False, soft_wrap=True)
    try:
        Worker(settings, store, settings.offered, called).run(stop)
    finally:
        store.close()


def _end_with_stdin(stop: threading.Event) -> None:
    """Whoever started this process holds the other end: the kernel closes it however that process ends."""
    while os.read(0, 1024):
        pass
    stop.set()


def _pulse() -> None:
    """Tell the server at the other end that this process is not stopped."""
    with contextlib.suppress(OSError):
        while True:
            os.write(0, b".")
            time.sleep(PULSE)


def configured(base: list[str] | None = None, alias: list[str] | None = None, database: str | None = None) -> Settings:
    """The environment's settings with these options over them. Raises BadSetting."""
    from luthier.settings import Settings, load_settings

    changes = {"bases": ",".join(base or ()), "aliases": ",".join(alias or ()), "database": database}
    for option, words in (("--base", base), ("--alias", alias)):
        for word in words or ():
            if "," in word or (option == "--alias" and "=" not in word):
                wanted = "NAME[=MODEL]" if option == "--base" else "NAME=BASE"
                raise BadSetting(f"{option}: found {word!r}, wanted {wanted} without commas.", param=option[2:])
    try:
        settings = load_settings()
        settings = Settings(**{**settings.model_dump(), **{name: value for name, value in changes.items() if value}})
        _ = settings.offered
    except ValueError as error:
        raise BadSetting(str(error)) from error
    return settings


def open_store(settings: Settings) -> Database:
    """The database of these settings; connects to nothing yet."""
    from luthier.store.db import Database

    return Database(settings.home, settings.database)


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _let_in(store: Database, host: str) -> None:
    """Make and show the first key. Raises BadSetting instead when other machines could reach a server without keys."""
    from luthier.store.keys import Keys

    keys = Keys(store)
    if not is_loopback(host) and not any(key.revoked_at is None for key in keys.list()):
        raise BadSetting(
            f"--host {host} would open this server to other machines, and it has no API key yet.",
            hint="Make one first: luthier keys create --role admin",
            param="host",
        )
    show_first_key(keys)


def show_first_key(keys: Keys) -> None:
    made = keys.create_first("admin")
    if made is None:
        return
    out = console(stderr=True)
    out.print("The admin key of this server, shown this once (only its hash is kept):", soft_wrap=True)
    out.print(f"  {made[1]}", markup=False, soft_wrap=True)


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there. Raises BadSetting for no address of this machine, NotNow for a port in use."""
    import errno

    from luthier.spec.errors import NotNow

    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            why = "is in use" if error.errno == errno.EADDRINUSE else "is not for this user"
            raise NotNow(f"Port {port} of {host} {why}.", hint="Choose another --port.", param="port") from error
        raise BadSetting(
            f"{host} is no address of this machine: {error.strerror or error}.", hint="See --host.", param="host"
        ) from error
    made.set_inheritable(False)
    return made


def child_settings(settings: Settings) -> dict[str, str]:
    """The variables that give a child process these settings."""
    named = {name: value for name, value in settings.model_dump().items() if value is not None}
    return {f"LUTHIER_{name.upper()}": str(value) for name, value in named.items()}


def log_folder(settings: Settings) -> Path:
    folder = settings.home / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
