"""Migrations, transactions, ids, URLs."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import func, inspect, select, text
from sqlalchemy.dialects import sqlite

from luthier.spec.errors import BadSetting, NotFound, NotNow, UserError
from luthier.store import db, tables
from luthier.store.db import Database, check_id, new_id
from tests.store import children
from tests.store.clock import START, Clock


def test_migrations_from_empty_make_the_tables(database: Database) -> None:
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
        for table in tables.metadata.tables.values():
            found = inspect(connection).get_unique_constraints(table.name)
            wanted = {c.name for c in table.constraints if type(c).__name__ == "UniqueConstraint"}
            assert {constraint["name"] for constraint in found} == wanted


def test_migrating_again_keeps_what_is_there(database: Database) -> None:
    with database.transaction() as connection:
        database.remember_place(connection, tables.files, "file-x", 7)
    database.migrate()
    with database.reading() as connection:
        assert connection.scalar(select(tables.places.c.number)) == 7
        assert connection.scalar(text("SELECT version_num FROM alembic_version")) == "0005"


def test_four_processes_migrate_an_empty_database_at_once(place: tuple[Path, str], backend: str) -> None:
    emptied = Database(*place)
    with emptied.transaction() as connection:
        tables.metadata.drop_all(connection)
        connection.execute(text("DROP TABLE alembic_version"))
    emptied.close()
    if backend == "sqlite":
        for path in place[0].glob("luthier.db*"):
            path.unlink()
    assert children.run_all([(children.migrate, place)] * 4) == [0] * 4
    with emptied.reading() as connection:
        assert inspect(connection).get_table_names() != []
    emptied.close()


def test_sqlite_is_set_up_to_survive(tmp_path: Path) -> None:
    database = Database(tmp_path)
    with database.reading() as connection:
        read = {
            name: connection.scalar(text(f"PRAGMA {name}")) for name in ("journal_mode", "foreign_keys", "synchronous")
        }
    database.close()
    assert read == {"journal_mode": "wal", "foreign_keys": 1, "synchronous": 2}


def test_a_block_that_raises_leaves_nothing(database: Database) -> None:
    def half() -> None:
        with database.transaction() as connection:
            database.remember_place(connection, tables.files, "file-x", 7)
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        half()
    with database.reading() as connection:
        assert connection.scalar(select(func.count()).select_from(tables.places)) == 0


def test_a_database_that_does_not_answer_is_said_without_its_password(tmp_path: Path) -> None:
    database = Database(tmp_path, f"postgresql://me:secret-word@/nothing?host={tmp_path}")
    with pytest.raises(NotNow, match="does not answer") as caught, database.reading():
        pass
    assert "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["mysql://x/y", "sqlite://", "sqlite:///:memory:", "postgresql+asyncpg://h/d", "nonsense"]
)
def test_urls_that_cannot_be_used(tmp_path: Path, url: str) -> None:
    with pytest.raises(BadSetting) as caught:
        Database(tmp_path, url)
    assert caught.value.param == "database_url"


def test_default_is_a_file_in_home(tmp_path: Path) -> None:
    database = Database(tmp_path / "deep" / "home", clock=Clock())
    database.migrate()
    assert (tmp_path / "deep" / "home" / "luthier.db").is_file()
    assert database.now() == START
    database.close()


def test_ids_have_the_form_that_is_checked() -> None:
    made = {new_id("file-") for _ in range(1000)}
    assert len(made) == 1000
    assert all(check_id(id, "file-", what="file") == id for id in made)
    assert len(new_id("ft-")) == len("ft-") + 24


@pytest.mark.parametrize(
    "name",
    ["", "file-", "../../etc/passwd", "file-../../../../etc/passwd0", "file-" + "a" * 21, "file-" + "a" * 25,
     "file-" + "a" * 24 + "\n", "file-" + "ä" * 24, "file-" + "a" * 23 + "\x00", "x" * 4000, "ftjob-" + "a" * 24],
)  # fmt: skip
def test_what_is_no_id_is_not_found(name: str) -> None:
    with pytest.raises(NotFound) as caught:
        check_id(name, "file-", what="file")
    assert len(str(caught.value)) < 500 and str(caught.value).isprintable()


@given(st.text(st.characters(exclude_categories=()) | st.sampled_from("\\u0\x00\ud800")))
def test_any_text_comes_back(value: str) -> None:
    column = tables.AnyText()
    written = column.process_bind_param(value, sqlite.dialect())
    assert written is not None
    written.encode()  # no lone surrogate
    assert "\x00" not in written
    assert column.process_result_value(written, sqlite.dialect()) == value


def test_inside_refuses_to_lead_out(tmp_path: Path) -> None:
    home = tmp_path / "home"
    database = Database(home)
    (home / "link").symlink_to(tmp_path)
    assert database.inside(home / "runs" / "a") == "runs/a"
    assert database.inside(Path("runs/a")) == "runs/a"
    for out in ("..", "../x", "runs/../../x", "/etc", "link/x", "", "."):
        with pytest.raises(UserError, match="is not inside"):
            database.inside(Path(out))


def test_module_keeps_to_alphabet() -> None:
    assert len(db.ALPHABET) == 62 and db.ALPHABET.isalnum()
