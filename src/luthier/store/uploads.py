"""Uploads: a large file that comes in parts, in any order, and becomes one file when its client says which and how.

A part is a blob with a row, as a file is. Completing reads the parts in the named order into a new blob, checks size
and MD5 as declared, and in one transaction makes the file and closes the upload; the parts' rows go with it. Asking
again to complete or to cancel what already is so gives the same answer: clients repeat what they heard no reply to.
Does not know: how parts travel; how large a part may be (the caller passes a limit).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from sqlalchemy import Connection, Row, delete, insert, select, update

from luthier.spec.errors import Broken, UserError
from luthier.store.blobs import pieces_of
from luthier.store.db import Database, check_id, missing, new_id
from luthier.store.files import Files, check_purpose
from luthier.store.tables import upload_parts, uploads

LIFETIME_SECONDS = 3600
Status = Literal["pending", "completed", "cancelled", "expired"]


@dataclass(frozen=True, slots=True)
class Upload:
    """`bytes` is the declared size; `file_expires_after` (seconds) is for the file it becomes."""

    id: str
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: str
    mime_type: str
    file_expires_after: int | None
    status: Status
    file_id: str | None


@dataclass(frozen=True, slots=True)
class Part:
    id: str
    upload_id: str
    bytes: int
    sha256: str
    created_at: int


def _made(row: Row[tuple[object, ...]], now: int) -> Upload:
    upload = Upload(**{name: getattr(row, name) for name in Upload.__slots__})
    if upload.status == "pending" and upload.expires_at <= now:
        return replace(upload, status="expired")
    return upload


class Uploads:
    """The uploads of one database; `files` takes what they become."""

    def __init__(self, database: Database, files: Files) -> None:
        self.database = database
        self.files = files

    def create(
        self, *, filename: str, purpose: str, bytes: int, mime_type: str, file_expires_after: int | None = None
    ) -> Upload:
        """Announce a file of `bytes` bytes; it has an hour to arrive. Raises UserError for a purpose or size."""
        check_purpose(purpose)
        if not 1 <= bytes < 2**63:
            raise UserError(f"bytes: found {bytes}, wanted a size of 1 or more.", param="bytes")
        now = self.database.now()
        upload = Upload(
            id=new_id("upload_"),
            bytes=bytes,
            created_at=now,
            expires_at=now + LIFETIME_SECONDS,
            filename=filename,
            purpose=purpose,
            mime_type=mime_type,
            file_expires_after=file_expires_after,
            status="pending",
            file_id=None,
        )
        with self.database.transaction() as connection:
            connection.execute(insert(uploads).values({name: getattr(upload, name) for name in Upload.__slots__}))
        return upload

    def get(self, upload_id: str) -> Upload:
        """Raises NotFound."""
        with self.database.reading() as connection:
            return self._get(connection, upload_id)

    def parts(self, upload_id: str) -> list[Part]:
        """In the order of their arrival; none once the upload is closed. Raises NotFound."""
        with self.database.reading() as connection:
            self._get(connection, upload_id)
            return self._parts(connection, upload_id)

    def add_part(self, upload_id: str, content: Iterable[bytes], *, limit: int | None = None) -> Part:
        """Raises NotFound; UserError when the upload is closed or the part is over `limit` bytes; NotNow (disk)."""
        self._pending(self.get(upload_id))
        with self.files.blobs.receive(content, limit) as new, self.database.transaction() as connection:
            self._pending(self._get(connection, upload_id, hold=True))
            self.database.lock(connection, new.sha256)
            self.files.blobs.keep(new)
            part = Part(new_id("part_"), upload_id, new.size, new.sha256, self.database.now())
            connection.execute(insert(upload_parts).values({name: getattr(part, name) for name in Part.__slots__}))
        return part

    def complete(self, upload_id: str, part_ids: Sequence[str], *, md5: str | None = None) -> Upload:
        """Join the parts, in the order given, into one file. Again on a completed upload: the same answer.

        Raises NotFound; UserError when it is cancelled or expired, a part is unknown or named twice, or the size or
        `md5` (hex) is not as declared: then it stays pending.
        """
        upload = self.get(upload_id)
        if upload.status == "completed":
            return upload
        self._pending(upload)
        parts = {part.id: part for part in self.parts(upload_id)}
        chosen = _chosen(upload, parts, part_ids)
        try:
            return self._join(upload, chosen, md5)
        except FileNotFoundError as error:
            current = self.get(upload_id)  # closed meanwhile, and its parts let go
            if current.status == "completed":
                return current
            self._pending(current)
            raise Broken(f"The content of a part of {upload_id} is missing.") from error

    def _join(self, upload: Upload, chosen: Sequence[Part], md5: str | None) -> Upload:
        joined = pieces_of(self.files.opener(part.sha256) for part in chosen)
        with self.files.blobs.receive(joined) as new:
            if md5 is not None and md5.lower() != new.md5:
                raise UserError(f"md5: found {md5[:80]!a}, but the content has {new.md5}.", param="md5")
            with self.database.transaction() as connection:
                current = self._get(connection, upload.id, hold=True)
                if current.status == "completed":
                    return current
                self._pending(current)
                file = self.files.insert(
                    connection,
                    new,
                    filename=upload.filename,
                    purpose=upload.purpose,
                    expires_after=upload.file_expires_after,
                )
                left = self._close(connection, upload.id, "completed", file.id)
        self._drop(left)
        return self.get(upload.id)

    def cancel(self, upload_id: str) -> Upload:
        """Raises NotFound; UserError when it is completed or expired."""
        with self.database.transaction() as connection:
            upload = self._get(connection, upload_id, hold=True)
            if upload.status == "cancelled":
                return upload
            self._pending(upload)
            left = self._close(connection, upload_id, "cancelled")
        self._drop(left)
        return self.get(upload_id)

    def sweep(self) -> int:
        """Close the uploads whose hour is over and let their parts go; how many uploads."""
        late = select(uploads.c.id).where(uploads.c.status == "pending", uploads.c.expires_at <= self.database.now())
        with self.database.transaction() as connection:
            ids = list(connection.scalars(late.with_for_update(skip_locked=True)))
            left = [sha256 for upload_id in ids for sha256 in self._close(connection, upload_id, "expired")]
        self._drop(left)
        return len(ids)

    def _get(self, connection: Connection, upload_id: str, *, hold: bool = False) -> Upload:
        check_id(upload_id, "upload_", what="upload")
        rows = select(uploads).where(uploads.c.id == upload_id)
        row = connection.execute(rows.with_for_update() if hold else rows).one_or_none()
        if row is None:
            raise missing("upload", upload_id)
        return _made(row, self.database.now())

    def _parts(self, connection: Connection, upload_id: str) -> list[Part]:
        rows = select(upload_parts).where(upload_parts.c.upload_id == upload_id).order_by(upload_parts.c.number)
        return [Part(**{name: getattr(row, name) for name in Part.__slots__}) for row in connection.execute(rows)]

    def _pending(self, upload: Upload) -> None:
        if upload.status != "pending":
            raise UserError(f"The upload {upload.id} is {upload.status}.", hint="Start a new one.", param="upload_id")

    def _close(self, connection: Connection, upload_id: str, status: Status, file_id: str | None = None) -> list[str]:
        connection.execute(update(uploads).where(uploads.c.id == upload_id).values(status=status, file_id=file_id))
        gone = delete(upload_parts).where(upload_parts.c.upload_id == upload_id).returning(upload_parts.c.sha256)
        return list(connection.scalars(gone))

    def _drop(self, hashes: Iterable[str]) -> None:
        for sha256 in set(hashes):
            self.files.drop_unused(sha256)


def _chosen(upload: Upload, parts: dict[str, Part], part_ids: Sequence[str]) -> list[Part]:
    """The parts that are asked for, in that order. Raises UserError."""
    for part_id in part_ids:
        if part_id not in parts:
            raise UserError(f"The upload {upload.id} has no part {part_id[:80]!a}.", param="part_ids")
    if len(set(part_ids)) != len(part_ids):
        raise UserError("A part is named twice.", param="part_ids")
    chosen = [parts[part_id] for part_id in part_ids]
    total = sum(part.bytes for part in chosen)
    if total != upload.bytes:
        raise UserError(f"The parts have {total} bytes together, but {upload.bytes} were declared.", param="part_ids")
    return chosen
