"""Chat completions that a client asked to keep: the request and the whole answer, with metadata to find them by.

Does not know: what the JSON of either means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from luthier.store.db import Database, Order, Page, check_id, missing
from luthier.store.tables import completion_tags, stored_completions

WHAT = "chat completion"


@dataclass(frozen=True, slots=True)
class StoredCompletion:
    """`request` as it was asked, `completion` as it was answered; `created_at` in Unix seconds."""

    id: str
    model: str
    created_at: int
    request: dict[str, Any]
    completion: dict[str, Any]
    metadata: dict[str, str] | None


def _made(row: Row[Any]) -> StoredCompletion:
    return StoredCompletion(**{name: getattr(row, name) for name in StoredCompletion.__slots__})


class Completions:
    """The stored completions of one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def add(
        self, completion: dict[str, Any], request: dict[str, Any], metadata: Mapping[str, str] | None
    ) -> StoredCompletion:
        """Keep `completion`, whose keys id, model and created it is found by."""
        with self.database.transaction() as connection:
            connection.execute(
                insert(stored_completions).values(
                    id=completion["id"],
                    model=completion["model"],
                    created_at=completion["created"],
                    request=request,
                    completion=completion,
                    metadata=None if metadata is None else dict(metadata),
                )
            )
            self._tag(connection, completion["id"], metadata)
        return self.get(completion["id"])

    def get(self, completion_id: str) -> StoredCompletion:
        """Raises NotFound."""
        check_id(completion_id, "chatcmpl-", what=WHAT)
        with self.database.reading() as connection:
            row = connection.execute(
                select(stored_completions).where(stored_completions.c.id == completion_id)
            ).one_or_none()
        if row is None:
            raise missing(WHAT, completion_id)
        return _made(row)

    def list(
        self,
        *,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Order = "asc",
    ) -> Page[StoredCompletion]:
        """Those of `model` that have each pair of `metadata`. Raises NotFound for an `after` that never was."""
        rows = select(stored_completions)
        if model is not None:
            rows = rows.where(stored_completions.c.model == model)
        for key, value in (metadata or {}).items():
            has = select(completion_tags.c.completion_id).where(
                completion_tags.c.completion_id == stored_completions.c.id,
                completion_tags.c.key == key,
                completion_tags.c.value == value,
            )
            rows = rows.where(has.exists())
        with self.database.reading() as connection:
            return self.database.page(
                connection,
                rows,
                stored_completions.c.number,
                _made,
                id_column=stored_completions.c.id,
                after=after,
                limit=limit,
                order=order,
            )

    def set_metadata(self, completion_id: str, metadata: Mapping[str, str] | None) -> StoredCompletion:
        """Put `metadata` in the place of what was there. Raises NotFound."""
        self.get(completion_id)
        with self.database.transaction() as connection:
            changed = connection.execute(
                update(stored_completions)
                .where(stored_completions.c.id == completion_id)
                .values(metadata=None if metadata is None else dict(metadata))
                .returning(stored_completions.c.id)
            ).one_or_none()
            if changed is None:
                raise missing(WHAT, completion_id)
            connection.execute(delete(completion_tags).where(completion_tags.c.completion_id == completion_id))
            self._tag(connection, completion_id, metadata)
        return self.get(completion_id)

    def delete(self, completion_id: str) -> None:
        """Raises NotFound."""
        self.get(completion_id)
        with self.database.transaction() as connection:
            connection.execute(delete(completion_tags).where(completion_tags.c.completion_id == completion_id))
            gone = connection.execute(
                delete(stored_completions)
                .where(stored_completions.c.id == completion_id)
                .returning(stored_completions.c.number)
            ).one_or_none()
            if gone is None:
                raise missing(WHAT, completion_id)
            self.database.remember_place(connection, stored_completions, completion_id, gone.number)

    def _tag(self, connection: Connection, completion_id: str, metadata: Mapping[str, str] | None) -> None:
        for key, value in (metadata or {}).items():
            connection.execute(insert(completion_tags).values(completion_id=completion_id, key=key, value=value))
