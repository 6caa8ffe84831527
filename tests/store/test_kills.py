"""kill -9 at any instant: what was answered is there, whole; what was not is there whole or not at all."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import time
from pathlib import Path

from sqlalchemy import select

from luthier.spec.errors import NotFound
from luthier.store import tables
from luthier.store.db import Database
from luthier.store.files import Files
from luthier.store.history import History
from luthier.store.jobs import Jobs
from luthier.store.uploads import Uploads
from tests.store import children

KILLS = 5
WRITERS = 2


def test_kills_lose_nothing_and_leave_nothing_half(place: tuple[Path, str], tmp_path: Path) -> None:
    source = random.Random(5)
    notes: list[Path] = []
    for kill in range(KILLS):
        writers = []
        for writer in range(WRITERS):
            notes.append(tmp_path / f"notes-{kill}-{writer}")
            writers.append(children.start(children.write_for_ever, (*place, notes[-1], kill * 10 + writer)))
        while not all(note.exists() and note.stat().st_size > 200 for note in notes[-WRITERS:]):
            assert all(writer.is_alive() for writer in writers)
            time.sleep(0.01)
        time.sleep(source.random() * 0.1)
        for writer in writers:
            assert writer.pid is not None and writer.is_alive()
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
    database = Database(*place)
    _judge(database, [line.split() for note in notes for line in note.read_text().splitlines()])
    database.close()


def _judge(database: Database, noted: list[list[str]]) -> None:
    files, jobs, history = Files(database), Jobs(database), History(database)
    deleting = {words[1] for words in noted if words[0] == "deleting"}
    for kind, id, *more in noted:
        if kind == "file" and id not in deleting:
            assert files.get(id).sha256 == children.digest(int(more[0]))
        elif kind == "upload":
            upload = Uploads(database, files).get(id)
            assert (upload.status, upload.file_id) == ("completed", more[0])
            assert files.get(more[0]).bytes == 1500
        elif kind == "job":
            assert jobs.get(id).status == "validating_files"
    assert {words[0] for words in noted} == {"file", "deleting", "upload", "job"}
    files.sweep()
    with database.reading() as connection:
        rows = connection.execute(select(tables.files.c.id, tables.files.c.sha256)).all()
        parts = connection.scalars(select(tables.upload_parts.c.sha256)).all()
    for row in rows:  # those that were made and never answered, too
        with files.open(row.id) as handle:
            assert hashlib.sha256(handle.read()).hexdigest() == row.sha256
    assert set(files.blobs.all()) == {row.sha256 for row in rows} | set(parts)
    assert {path.name for path in files.blobs.root.rglob("*") if path.is_file()} == set(files.blobs.all())
    for job in jobs.list(limit=100_000).data:
        assert len(history.events(job.id).data) == 2
    for id in deleting:
        try:
            assert files.get(id).id == id  # killed before it was done
        except NotFound:
            continue
