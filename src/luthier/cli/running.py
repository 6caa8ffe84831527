"""The server's processes: one server a home, its workers kept alive, the HTTP server until it is told to end.

Workers live in process groups of their own, so the terminal's Ctrl-C reaches only the server, which ends them in
order. A worker's standard input is a line between the two: its end tells the worker that the server is gone, and the
worker's pulse tells the server that it is not stopped, perhaps with SQLite's lock in its hands.
Does not know: options, routes, jobs.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn

from luthier.cli.output import console
from luthier.cli.serve import PULSE, child_settings, log_folder
from luthier.settings import Settings, child_environment
from luthier.spec.errors import NotNow

if TYPE_CHECKING:
    from luthier.api.services import Services
    from luthier.store.db import Database

STREAMS_GRACE = 5  # seconds that answers have to end after the signal
SWITCH_SECONDS = (
    0.0001  # how long one thread may keep the others waiting: a fiftieth of the usual, for even answers under load
)
WORKER_GRACE = 30.0  # seconds that a worker has to save its job
STEADY = 30.0  # seconds after which a worker counts as well, and the next wait is short again
LONGEST_WAIT = 30.0
SILENT_PULSES = 20  # left out in a row, after which it is killed; counted, as in serve/router.py
LARGEST_LOG = 10_000_000  # bytes; a longer log is set aside when its worker starts


@contextlib.contextmanager
def only_server(store: Database) -> Iterator[None]:
    """Hold the home's lock. With PostgreSQL several servers may share a database, so there is none.

    Raises NotNow when another server has it. The kernel frees the lock however its holder ends.
    """
    if not store.is_sqlite:
        yield
        return
    with open(store.home / "serve.lock", "a+") as lock:
        try:
            fcntl.flock(lock.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise NotNow(
                f"Another server uses {store.home} (process {lock.read().strip() or 'unknown'}).",
                hint="End it first, or set LUTHIER_HOME to another folder.",
            ) from error
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


class Workers:
    """Keeps `count` worker processes running: one that dies comes back, later each time when it dies soon."""

    def __init__(self, settings: Settings, count: int) -> None:
        self.settings, self.count = settings, count
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, args=(n,), name=f"worker-{n}") for n in range(1, count + 1)
        ]
        self._lock = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Workers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Ask all to save and leave; end those that do not."""
        self._stop.set()
        with self._lock:
            for process in self._running.values():
                with contextlib.suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + WORKER_GRACE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        for process in self._running.values():
            if process.poll() is None:
                end_group(process)
        for thread in self._threads:
            thread.join()

    def _keep(self, number: int) -> None:
        wait = 0.5
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                became = f"ended with exit code {self._one(number)}"
            except OSError as error:  # no room for its log, no process to be had: it may be otherwise soon
                became = f"did not start: {error.strerror or error}"
            if self._stop.is_set():
                return
            wait = 0.5 if time.monotonic() - began > STEADY else min(2 * wait, LONGEST_WAIT)
            say(f"Worker {number} {became}; another starts in {wait:.0f} s.")
            self._stop.wait(wait)

    def _one(self, number: int) -> int:
        """One worker process, from its start to its end: its exit code. Raises OSError when none can be started."""
        name = f"{socket.gethostname()}-{os.getpid()}-{number}"
        path = log_folder(self.settings) / f"worker-{number}.log"
        if path.exists() and path.stat().st_size > LARGEST_LOG:
            path.replace(path.with_suffix(".log.1"))
        ours, theirs = socket.socketpair()
        with ours:
            with theirs, self._lock, open(path, "ab") as log:
                if self._stop.is_set():
                    return 0
                process = subprocess.Popen(
                    [sys.executable, "-m", "luthier.cli", "worker", "--attached", "--name", name],
                    stdin=theirs.fileno(),
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    env=child_environment(**child_settings(self.settings), PYTHONUNBUFFERED="1"),
                )
                self._running[number] = process
            if not _lives(ours):
                say(f"Worker {number} does not answer and is killed.")
                process.kill()
            code: int = process.wait()
            end_group(process)  # what it may have left behind
        return code


def _lives(line: socket.socket) -> bool:
    """Wait for the end of whoever is at the other end of `line`; False when it has been silent for too long instead."""
    silent = 0
    while silent < SILENT_PULSES:
        if not select.select([line], [], [], PULSE)[0]:
            silent += 1
        elif line.recv(4096):
            silent = 0
        else:
            return True
    return False


def say(words: str) -> None:
    console(stderr=True).print(words, markup=False, soft_wrap=True)


def end_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


class Announced(uvicorn.Server):
    """Says where it listens once it does."""

    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self.url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            say(f"Luthier listens at {self.url}. Clients: export OPENAI_BASE_URL={self.url}/v1 OPENAI_API_KEY=...")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        from luthier.api.follow import end_all

        app: Any = self.config.app
        end_all(app)  # a follower of a job would keep the server for the whole grace
        await super().shutdown(sockets)


def run_server(
    settings: Settings, store: Database, folders: dict[str, Path], listening: socket.socket, workers: int
) -> None:
    """Serve until SIGTERM or Ctrl-C; then streams, replicas and workers end in order."""
    from luthier.api.app import create_app
    from luthier.api.heads import BoundedHeads

    sys.setswitchinterval(SWITCH_SECONDS)
    _log_to(log_folder(settings) / "server.log")
    app = create_app(make_services(settings, store, folders))
    config = uvicorn.Config(
        app,
        http=BoundedHeads,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=STREAMS_GRACE,
        server_header=False,
    )
    host, port = listening.getsockname()[:2]
    server = Announced(config, f"http://{f'[{host}]' if ':' in host else host}:{port}")
    for number in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises the signal again when it is done: the rest follows
        signal.signal(number, lambda *_: None)
    try:
        with Workers(settings, workers):
            server.run(sockets=[listening])
    finally:
        listening.close()
        store.close()


def _log_to(path: Path) -> None:
    """Every record of this process as a line of JSON in a file of bounded length; the terminal keeps for people."""
    from luthier.api.logs import JsonLines

    handler = RotatingFileHandler(path, maxBytes=LARGEST_LOG, backupCount=3)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)


def make_services(settings: Settings, store: Database, folders: dict[str, Path]) -> Services:
    """Everything that routes use, over one database."""
    from luthier.api.services import Services
    from luthier.serve.router import Router
    from luthier.store.aliases import Aliases
    from luthier.store.completions import Completions
    from luthier.store.files import Files
    from luthier.store.history import History
    from luthier.store.jobs import Jobs
    from luthier.store.keys import Keys
    from luthier.store.leases import Leases
    from luthier.store.models import Models
    from luthier.store.uploads import Uploads

    files = Files(store)
    return Services(
        settings=settings,
        database=store,
        files=files,
        uploads=Uploads(store, files),
        jobs=Jobs(store),
        leases=Leases(store),
        history=History(store),
        models=Models(store),
        aliases=Aliases(store),
        keys=Keys(store),
        completions=Completions(store),
        router=Router(settings, folders),
        bases=settings.offered,
        folders=folders,
    )
