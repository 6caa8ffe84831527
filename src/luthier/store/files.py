"""Files: a row with what the client said, and the content it names by hash.

The row appears in the transaction that moves the blob into place, under the blob's lock, so a row that can be seen has
its content. Deleting is the other way round: first the row, committed; then, under the same lock, the blob if no row
names it any more. A crash in between leaves a blob without a row, never a row without a blob; sweep() finds it.
A file's name is data: it is never part of a path.
Does not know: what is in a file; whether a purpose is one that the API accepts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import BinaryIO, Literal

from sqlalchemy import ColumnElement, Connection, Row, delete, insert, or_, select, union_all, update

from luthier.spec.errors import Broken, UserError
from luthier.store.blobs import Blobs, Incoming
from luthier.store.checks import Checks
from luthier.store.db import Database, Order, Page, check_id, missing, new_id
from luthier.store.tables import files, upload_parts

Status = Literal["uploaded", "processed", "error"]


@dataclass(frozen=True, slots=True)
class File:
    """One uploaded or written file. Times are Unix seconds; `expires_at` None means kept until deleted."""

    id: str
    bytes: int
    sha256: str
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Status


def make_file(row: Row[tuple[object, ...]]) -> File:
    return File(**{name: getattr(row, name) for name in File.__slots__})


def check_purpose(purpose: str) -> str:
    if re.fullmatch("[a-z][a-z_-]{0,62}[a-z]", purpose):
        return purpose
    raise UserError(f"purpose: found {purpose[:80]!a}, wanted a word such as fine-tune.", param="purpose")


class Files:
    """The files of one database; their contents lie under `home/files`."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.blobs = Blobs(database.home / "files")
        self.checks = Checks(database.home / "checks")

    def create(
        self,
        content: Iterable[bytes],
        *,
        filename: str,
        purpose: str,
        status: Status = "processed",
        expires_after: int | None = None,
        limit: int | None = None,
    ) -> File:
        """Store `content`, a piece at a time. `expires_after` is in seconds, `limit` in bytes.

        Raises UserError for a purpose that is no word or content above `limit`, NotNow for a full disk.
        """
        check_purpose(purpose)
        with self.blobs.receive(content, limit) as new, self.database.transaction() as connection:
            return self.insert(
                connection, new, filename=filename, purpose=purpose, status=status, expires_after=expires_after
            )

    def insert(
        self,
        connection: Connection,
        new: Incoming,
        *,
        filename: str,
        purpose: str,
        status: Status = "processed",
        expires_after: int | None = None,
    ) -> File:
        """The last act of create(), for a transaction that does more besides."""
        self.database.lock(connection, new.sha256)
        self.blobs.keep(new)
        now = self.database.now()
        file = File(
            id=new_id("file-"),
            bytes=new.size,
            sha256=new.sha256,
            created_at=now,
            expires_at=None if expires_after is None else now + expires_after,
            filename=filename,
            purpose=purpose,
            status=status,
        )
        connection.execute(insert(files).values({name: getattr(file, name) for name in File.__slots__}))
        return file

    def get(self, file_id: str) -> File:
        """Raises NotFound, also for one that has expired."""
        check_id(file_id, "file-", what="file")
        with self.database.reading() as connection:
            row = connection.execute(select(files).where(files.c.id == file_id, self._alive())).one_or_none()
        if row is None:
            raise missing("file", file_id)
        return make_file(row)

    def list(
        self,
        *,
        purpose: str | None = None,
        after: str | None = None,
        limit: int = 10_000,
        order: Order = "desc",
    ) -> Page[File]:
        """By creation, newest first unless `order` is asc. Raises NotFound for an `after` that never was."""
        rows = select(files).where(self._alive())
        if purpose is not None:
            rows = rows.where(files.c.purpose == check_purpose(purpose))
        with self.database.reading() as connection:
            return self.database.page(
                connection, rows, files.c.number, make_file, id_column=files.c.id, after=after, limit=limit, order=order
            )

    def open(self, file_id: str) -> BinaryIO:
        """The content, for reading. It stays readable when the file is deleted meanwhile. Raises NotFound."""
        file = self.get(file_id)
        try:
            return self.blobs.open(file.sha256)
        except FileNotFoundError as error:
            self.get(file_id)  # deleted between the two looks: NotFound
            raise Broken(f"The content of {file.id} is missing from {self.blobs.root}.") from error

    def mark(self, file_id: str, status: Status) -> File:
        """Set the status. Raises NotFound."""
        check_id(file_id, "file-", what="file")
        with self.database.transaction() as connection:
            changed = connection.execute(update(files).where(files.c.id == file_id).values(status=status))
        if changed.rowcount != 1:
            raise missing("file", file_id)
        return self.get(file_id)

    def delete(self, file_id: str) -> None:
        """Raises NotFound, so that of two deletes of one file one says so."""
        self.get(file_id)
        with self.database.transaction() as connection:
            gone = connection.execute(
                delete(files).where(files.c.id == file_id).returning(files.c.number, files.c.sha256)
            ).one_or_none()
            if gone is None:
                raise missing("file", file_id)
            self.database.remember_place(connection, files, file_id, gone.number)
        self.drop_unused(gone.sha256)

    def drop_unused(self, sha256: str) -> bool:
        """Remove the blob unless a row names it; whether it was removed."""
        with self.database.transaction() as connection:
            self.database.lock(connection, sha256)
            named = union_all(
                select(files.c.number).where(files.c.sha256 == sha256),
                select(upload_parts.c.number).where(upload_parts.c.sha256 == sha256),
            ).limit(1)
            if connection.execute(named).first() is not None:
                return False
            self.blobs.drop(sha256)
            self.checks.drop(sha256)
            return True

    def sweep(self) -> int:
        """Delete what has expired and what a killed process left behind; how many things that were."""
        with self.database.transaction() as connection:
            expired = connection.execute(
                delete(files).where(~self._alive()).returning(files.c.id, files.c.number)
            ).all()
            for file_id, number in expired:
                self.database.remember_place(connection, files, file_id, number)
        with self.database.reading() as connection:
            named = union_all(select(files.c.sha256), select(upload_parts.c.sha256))
            used = set(connection.scalars(named))
        orphans = sum(self.drop_unused(sha256) for sha256 in self.blobs.all() if sha256 not in used)
        return len(expired) + orphans + self.blobs.sweep_incoming() + self.checks.sweep(used)

    def opener(self, sha256: str) -> Callable[[], BinaryIO]:
        return lambda: self.blobs.open(sha256)

    def _alive(self) -> ColumnElement[bool]:
        return or_(files.c.expires_at.is_(None), files.c.expires_at > self.database.now())
