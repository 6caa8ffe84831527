"""API keys: 256 random bits, shown once; only their hash stays.

A plain SHA-256 is enough: there is nothing to guess in 256 random bits, so a slow hash would only slow each request.
Does not know: HTTP headers; what a role may do.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, Row, insert, select, update

from luthier.spec.errors import UserError
from luthier.store.db import Database, check_id, missing, new_id
from luthier.store.tables import api_keys

Role = Literal["admin", "user"]
SHOWN = 14  # characters of a token that stay readable in lists: its fixed start and 48 of its 256 bits


@dataclass(frozen=True, slots=True)
class Key:
    """A key without its token. `prefix` is how the token begins; `revoked_at` None means that it opens."""

    id: str
    name: str
    role: Role
    prefix: str
    created_at: int
    revoked_at: int | None


def _made(row: Row[tuple[object, ...]]) -> Key:
    return Key(**{name: getattr(row, name) for name in Key.__slots__})


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


class Keys:
    """The keys of one database."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def create(self, name: str, role: Role) -> tuple[Key, str]:
        """A new key and its token, which cannot be had again. Raises UserError for a role of another name."""
        with self.database.transaction() as connection:
            return self._create(connection, name, role)

    def create_first(self, name: str) -> tuple[Key, str] | None:
        """An admin key when there is no key at all, else None: of several servers that start, one makes it."""
        with self.database.transaction() as connection:
            self.database.lock(connection, "first key")
            if connection.execute(select(api_keys.c.number).limit(1)).first() is not None:
                return None
            return self._create(connection, name, "admin")

    def verify(self, token: str) -> Key | None:
        """The key that `token` opens with; None when there is none, or it is revoked.

        The row is found by the hash, whose timing tells nothing about the token; the hashes are then compared in
        constant time.
        """
        wanted = _hash(token)
        with self.database.reading() as connection:
            row = connection.execute(select(api_keys).where(api_keys.c.hash == wanted)).one_or_none()
        if row is None or not hmac.compare_digest(row.hash, wanted) or row.revoked_at is not None:
            return None
        return _made(row)

    def list(self) -> tuple[Key, ...]:
        """Every key, oldest first, the revoked ones too."""
        with self.database.reading() as connection:
            return tuple(_made(row) for row in connection.execute(select(api_keys).order_by(api_keys.c.number)))

    def revoke(self, key_id: str) -> Key:
        """From now on it opens nothing; the first time counts. Raises NotFound."""
        check_id(key_id, "key_", what="API key")
        with self.database.transaction() as connection:
            connection.execute(
                update(api_keys)
                .where(api_keys.c.id == key_id, api_keys.c.revoked_at.is_(None))
                .values(revoked_at=self.database.now())
            )
            row = connection.execute(select(api_keys).where(api_keys.c.id == key_id)).one_or_none()
        if row is None:
            raise missing("API key", key_id)
        return _made(row)

    def _create(self, connection: Connection, name: str, role: Role) -> tuple[Key, str]:
        if role not in ("admin", "user"):
            raise UserError(f"role: found {role!a}, wanted admin or user.", param="role")
        token = "sk-lu-" + secrets.token_urlsafe(32)
        key = Key(new_id("key_"), name, role, token[:SHOWN], self.database.now(), None)
        values = {field: getattr(key, field) for field in Key.__slots__}
        connection.execute(insert(api_keys).values(**values, hash=_hash(token)))
        return key, token
