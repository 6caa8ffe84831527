"""What tests let other processes do to a store, and how they start and kill them."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import random
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from luthier.store.db import Database
from luthier.store.files import Files
from luthier.store.jobs import Jobs
from luthier.store.leases import Leases
from luthier.store.uploads import Uploads

# Children are forked from a small server that has the store loaded: quick, and no thread of pytest comes along.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.store.children"])


def start(target: Callable[..., None], arguments: Sequence[Any]) -> BaseProcess:
    child = _context.Process(target=target, args=tuple(arguments), daemon=True)
    child.start()
    return child


def run_all(calls: Sequence[tuple[Callable[..., None], Sequence[Any]]]) -> list[int | None]:
    """Run them at the same time; the exit codes."""
    children = [start(target, arguments) for target, arguments in calls]
    for child in children:
        child.join(60)
    return [child.exitcode for child in children]


def migrate(home: Path, url: str) -> None:
    Database(home, url).migrate()


def claim_all(home: Path, url: str, worker: str, notes: Path) -> None:
    """Claim until nothing waits; write down what was got."""
    leases = Leases(Database(home, url))
    with open(notes, "w") as handle:
        while (claimed := leases.claim(worker, 600)) is not None:
            handle.write(claimed[0].id + "\n")


def content(seed: int) -> Iterator[bytes]:
    """A repeatable stream of 0 to 30 pieces of up to 100,000 bytes; few seeds in use, so contents meet again."""
    source = random.Random(seed)
    for _ in range(source.randrange(31)):
        yield source.randbytes(source.randrange(100_000))


def digest(seed: int) -> str:
    whole = hashlib.sha256()
    for piece in content(seed):
        whole.update(piece)
    return whole.hexdigest()


def write_for_ever(home: Path, url: str, notes: Path, seed: int) -> None:
    """Files, uploads, deletes and submits until killed. Each is noted when it is done: the test holds us to it."""
    database = Database(home, url)
    files, jobs = Files(database), Jobs(database)
    uploads = Uploads(database, files)
    source = random.Random(seed)
    handle = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*words: object) -> None:
        os.write(handle, (" ".join(map(str, words)) + "\n").encode())

    mine: list[str] = []
    while True:
        kind = source.randrange(10)
        number = source.randrange(12)
        if kind < 4:
            file = files.create(content(number), filename=f"{number}", purpose="fine-tune")
            note("file", file.id, number)
            mine.append(file.id)
        elif kind < 6 and mine:
            gone = mine.pop(source.randrange(len(mine)))
            note("deleting", gone)
            files.delete(gone)
        elif kind < 7:
            data = [b"a" * 1000, b"b" * 500]
            upload = uploads.create(filename="u", purpose="fine-tune", bytes=1500, mime_type="text/plain")
            parts = [uploads.add_part(upload.id, [piece]).id for piece in data]
            done = uploads.complete(upload.id, parts)
            note("upload", done.id, done.file_id)
        else:
            job, _ = jobs.submit(request={"n": number}, model="m", training_file="file-" + "a" * 24)
            note("job", job.id)
