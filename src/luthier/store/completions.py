"""Stored chat completions: what was asked and what was answered, found by model and by metadata.

Does not know: what an answer's fields mean; the `answer` is the object that the client got, and more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, delete, insert, select, update

from luthier.store.db import Database, Order, Page, check_id, missing
from luthier.store.tables import completion_tags, completions

PREFIX = "chatcmpl-"
WHAT = "stored chat completion"


@dataclass(frozen=True, slots=True)
class Completion:
    """One answer with the messages that it answers."""

    id: str
    model: str
    metadata: dict[str, str] | None
    owner: str | None
    created_at: int
    answer: dict[str, Any]
    messages: list[dict[str, Any]]


def _completion(row: Row[Any]) -> Completion:
    return Completion(**{name: getattr(row, name) for name in Completion.__slots__})


class Completions:
    """The stored completions of one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def save(
        self,
        id: str,
        *,
        model: str,
        answer: Mapping[str, Any],
        messages: Sequence[Mapping[str, Any]],
        metadata: Mapping[str, str] | None = None,
        owner: str | None = None,
    ) -> Completion:
        """Keep a completion under the id that its client got."""
        check_id(id, PREFIX, what=WHAT)
        with self.database.transaction() as connection:
            connection.execute(
                insert(completions).values(
                    id=id,
                    model=model,
                    metadata=None if metadata is None else dict(metadata),
                    owner=owner,
                    created_at=self.database.now(),
                    answer=dict(answer),
                    messages=[dict(message) for message in messages],
                )
            )
            _tag(connection, id, metadata)
            return _completion(_row(connection, id))

    def get(self, id: str) -> Completion:
        """Raises NotFound."""
        with self.database.reading() as connection:
            return _completion(_row(connection, id))

    def list(
        self,
        *,
        model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        after: str | None = None,
        limit: int = 20,
        order: Order = "asc",
    ) -> Page[Completion]:
        """Oldest first unless `order` is desc. `metadata`: those that have each of these pairs. Raises NotFound for
        an `after` that never was."""
        rows = select(completions)
        if model is not None:
            rows = rows.where(completions.c.model == model)
        for key, value in (metadata or {}).items():
            has = select(completion_tags.c.completion_id).where(
                completion_tags.c.completion_id == completions.c.id,
                completion_tags.c.key == key,
                completion_tags.c.value == value,
            )
            rows = rows.where(has.exists())
        with self.database.reading() as connection:
            return self.database.page(
                connection,
                rows,
                completions.c.number,
                _completion,
                id_column=completions.c.id,
                after=after,
                limit=limit,
                order=order,
            )

    def update(self, id: str, metadata: Mapping[str, str] | None) -> Completion:
        """Put `metadata` in the place of what was there. Raises NotFound."""
        with self.database.transaction() as connection:
            _row(connection, id)
            values = None if metadata is None else dict(metadata)
            connection.execute(update(completions).where(completions.c.id == id).values(metadata=values))
            connection.execute(delete(completion_tags).where(completion_tags.c.completion_id == id))
            _tag(connection, id, metadata)
            return _completion(_row(connection, id))

    def delete(self, id: str) -> None:
        """Raises NotFound."""
        with self.database.transaction() as connection:
            row = _row(connection, id)
            connection.execute(delete(completions).where(completions.c.id == id))
            self.database.remember_place(connection, completions, id, row.number)


def _row(connection: Connection, id: str) -> Row[Any]:
    check_id(id, PREFIX, what=WHAT)
    row = connection.execute(select(completions).where(completions.c.id == id)).one_or_none()
    if row is None:
        raise missing(WHAT, id)
    return row


def _tag(connection: Connection, id: str, metadata: Mapping[str, str] | None) -> None:
    for key, value in (metadata or {}).items():
        connection.execute(insert(completion_tags).values(completion_id=id, key=key, value=value))
