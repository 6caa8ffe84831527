"""API keys: shown once, kept as a hash, revoked for good."""

from __future__ import annotations

import threading

import pytest
from sqlalchemy import select

from luthier.spec.errors import NotFound, UserError
from luthier.store import tables
from luthier.store.db import Database
from luthier.store.keys import Key, Keys
from tests.store.clock import START, Clock


def test_a_key_opens_until_it_is_revoked(keys: Keys, clock: Clock) -> None:
    key, token = keys.create("laptop", "user")
    assert key == Key(key.id, "laptop", "user", token[:14], START, None)
    assert token.startswith("sk-lu-") and len(token) == 6 + 43
    assert keys.verify(token) == key
    clock.forward(5)
    assert keys.revoke(key.id).revoked_at == START + 5
    clock.forward(5)
    assert keys.revoke(key.id).revoked_at == START + 5
    assert keys.verify(token) is None
    assert [found.revoked_at for found in keys.list()] == [START + 5]


@pytest.mark.parametrize("change", ["", "x", "\x00", "\ud800", "../"])
def test_nothing_else_opens(keys: Keys, change: str) -> None:
    key, token = keys.create("k", "admin")
    for wrong in (change, token[:-1] + change, token + (change or " "), key.prefix, key.id):
        assert keys.verify(wrong) is None
    assert keys.verify(token) == key


def test_the_token_is_nowhere(keys: Keys, database: Database) -> None:
    _, token = keys.create("k", "admin")
    with database.reading() as connection:
        stored = " ".join(map(str, connection.execute(select(tables.api_keys)).one()))
    assert token not in stored and token[14:] not in stored
    assert token not in repr(keys.list())


def test_roles_and_unknown_keys(keys: Keys) -> None:
    with pytest.raises(UserError, match="wanted admin or user"):
        keys.create("k", "root")  # type: ignore[arg-type]
    for id in ("key_" + "a" * 24, "../x"):
        with pytest.raises(NotFound):
            keys.revoke(id)


def test_the_first_key_is_made_once(keys: Keys) -> None:
    made: list[object] = []
    ready = threading.Barrier(6)

    def start() -> None:
        ready.wait()
        made.append(keys.create_first("first start"))

    threads = [threading.Thread(target=start) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [one for one in made if one is not None] != [] and made.count(None) == 5
    assert [(key.name, key.role) for key in keys.list()] == [("first start", "admin")]
