"""`luthier keys`: on the store, without a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from luthier import cli
from luthier.store.db import Database
from luthier.store.keys import Keys


def called(*words: str) -> int:
    with pytest.raises(SystemExit) as leaving:
        cli.main(words)
    return int(leaving.value.code or 0)


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    database = Database(tmp_path)
    database.migrate()
    return Keys(database)


def test_the_key_alone_is_on_stdout(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("keys", "create", "me", "--role", "admin") == 0
    told = capsys.readouterr()
    key = keys.verify(told.out.strip())
    assert key is not None
    assert (key.name, key.role) == ("me", "admin")
    assert told.out.strip() not in told.err


def test_create_as_json(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    assert called("keys", "create", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["role"] == told["name"] == "user"
    assert keys.verify(told["key"]) is not None
    assert called("keys", "create", "--role", "king") == 2


def test_a_list_shows_no_key(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    _, token = keys.create("a \x1b[31m name", "user")
    gone = keys.revoke(keys.create("b", "user")[0].id)
    assert called("keys", "list") == 0
    told = capsys.readouterr().out
    assert token not in told
    assert "\x1b" not in told
    assert [line.split("  ")[4] for line in told.splitlines()] == ["opens", "revoked"]
    assert called("keys", "list", "--json") == 0
    shown = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert shown[1] == {
        "id": gone.id, "name": "b", "role": "user", "prefix": gone.prefix, "created_at": gone.created_at,
        "revoked_at": gone.revoked_at,
    }  # fmt: skip


def test_revoke(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    key, token = keys.create("me", "user")
    assert called("keys", "revoke", key.id) == 0
    assert capsys.readouterr().out == f"Revoked {key.id} (me).\n"
    assert keys.verify(token) is None
    assert called("keys", "revoke", "key_nothing", "--json") == 2
    assert json.loads(capsys.readouterr().out)["code"] == "not_found"


def test_the_last_admin_key_stays(keys: Keys, capsys: pytest.CaptureFixture[str]) -> None:
    first, token = keys.create("first", "admin")
    assert called("keys", "revoke", first.id) == 2
    assert "is the last admin key" in capsys.readouterr().err
    assert keys.verify(token) is not None
    keys.create("second", "admin")
    assert called("keys", "revoke", first.id) == 0
    assert keys.verify(token) is None
