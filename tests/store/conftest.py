"""Every test of the store runs twice: on SQLite and on a real PostgreSQL server."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import delete

from luthier.store.db import Database
from luthier.store.files import Files
from luthier.store.history import History
from luthier.store.jobs import Jobs
from luthier.store.keys import Keys
from luthier.store.leases import Leases
from luthier.store.models import Models
from luthier.store.tables import metadata
from luthier.store.uploads import Uploads
from tests.store import postgres
from tests.store.clock import Clock


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a migrated database on a server that these tests started."""
    bin = postgres.programs()
    if bin is None:
        pytest.skip("no PostgreSQL programs here (Debian: apt-get install postgresql)")
    with postgres.server(bin) as url:
        _migrate(tmp_path_factory.mktemp("home"), url)
        yield url


@pytest.fixture(scope="session")
def sqlite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database, to copy."""
    home = tmp_path_factory.mktemp("home")
    _migrate(home, None)
    return home / "luthier.db"


def _migrate(home: Path, url: str | None) -> None:
    database = Database(home, url)
    database.migrate()
    database.close()


def _empty(home: Path, url: str) -> None:
    database = Database(home, url)
    with database.transaction() as connection:
        for table in reversed(metadata.sorted_tables):  # quicker than TRUNCATE, which makes new files
            connection.execute(delete(table))
    database.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def place(backend: str, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """An empty, migrated store: its home and its URL, for processes of its own."""
    home = tmp_path / "home"
    home.mkdir()
    if backend == "sqlite":
        shutil.copy(request.getfixturevalue("sqlite_file"), home / "luthier.db")
        return home, f"sqlite:///{home / 'luthier.db'}"
    url: str = request.getfixturevalue("postgres_url")
    _empty(home, url)
    return home, url


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def database(place: tuple[Path, str], clock: Clock) -> Iterator[Database]:
    database = Database(*place, clock=clock)
    yield database
    database.close()


@pytest.fixture
def files(database: Database) -> Files:
    return Files(database)


@pytest.fixture
def uploads(database: Database, files: Files) -> Uploads:
    return Uploads(database, files)


@pytest.fixture
def jobs(database: Database) -> Jobs:
    return Jobs(database)


@pytest.fixture
def leases(database: Database) -> Leases:
    return Leases(database)


@pytest.fixture
def history(database: Database) -> History:
    return History(database)


@pytest.fixture
def models(database: Database) -> Models:
    return Models(database)


@pytest.fixture
def keys(database: Database) -> Keys:
    return Keys(database)
