"""A database by URL: its transactions, its migrations, new ids, and pages of lists.

SQLite by default: one file, write-ahead log, every commit synced, and writers take the write lock when they begin, so
that no transaction finds out at its end that it came too late. A file locks reliably on one machine only; workers on
several machines need PostgreSQL. There the few places where "look, then write" must be one act take an advisory lock.
Transactions are short: nobody computes, reads a stream or waits for a process inside one. Whoever is stopped or cut
off in the middle of one must not keep its locks: PostgreSQL ends it after IDLE_SECONDS; on SQLite it is a process of
this machine, and whoever started it kills it (cli/running.py).
Does not know: what is stored (tables.py has the columns, the other files their meaning).
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import secrets
import string
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    Column,
    ColumnElement,
    Connection,
    Engine,
    Row,
    Select,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    select,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, OperationalError, TimeoutError

from luthier.spec.errors import BadSetting, NotFound, NotNow, UserError
from luthier.store.tables import places

Order = Literal["asc", "desc"]
T = TypeVar("T")

ALPHABET = string.ascii_letters + string.digits
BUSY_SECONDS = 30
IDLE_SECONDS = 30  # that PostgreSQL lets a transaction wait for its client's next word
PLACES_KEPT_SECONDS = 24 * 3600


def new_id(prefix: str, length: int = 24) -> str:
    """`new_id("file-")` -> `file-` and 24 random letters and digits: about 143 bits."""
    return prefix + "".join(secrets.choice(ALPHABET) for _ in range(length))


def check_id(value: str, *prefixes: str, what: str, param: str | None = None) -> str:
    """`value` when it has the form of an id with one of `prefixes`; raises NotFound for all other text."""
    if any(re.fullmatch(re.escape(prefix) + "[A-Za-z0-9]{22,24}", value) for prefix in prefixes):
        return value
    raise missing(what, value, param)


def missing(what: str, name: str, param: str | None = None) -> NotFound:
    """The error for a name that is not there, whatever it looks like. Long and strange names are shown cut, quoted."""
    shown = ascii(name if len(name) <= 80 else name[:77] + "...")
    return NotFound(f"There is no {what} {shown}.", param=param)


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Some rows of a list, and whether there are more behind them."""

    data: tuple[T, ...]
    has_more: bool


class Database:
    """The tables under `home` (SQLite) or at `url`, and the folder that relative paths in them start from.

    `clock` gives Unix seconds. Safe to share between threads; a forked child makes its own.
    """

    def __init__(self, home: Path, url: str | None = None, *, clock: Callable[[], float] = time.time) -> None:
        """Connects to nothing yet. Raises BadSetting for a URL that cannot be used."""
        self.home = home.absolute()
        self.clock = clock
        self.url = _checked(url or URL.create("sqlite", database=str(self.home / "luthier.db")))
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        self.engine = self._engine()

    def now(self) -> int:
        return int(self.clock())

    def _engine(self) -> Engine:
        if not self.is_sqlite:
            try:
                engine = create_engine(self.url, pool_pre_ping=True)
            except ModuleNotFoundError as error:
                raise BadSetting(
                    f"The driver for {self.url.get_backend_name()} is not installed.",
                    hint="pip install 'luthier[postgres]'",
                    param="database_url",
                ) from error
            # Many rows as one statement. The driver would send one for each, and the word that ends them with the last;
            # who is stopped in between keeps its locks, as PostgreSQL takes it for busy and not for idle.
            engine.dialect.use_insertmanyvalues_wo_returning = True
            event.listen(engine, "connect", _prepare_postgres)
            return engine
        self.home.mkdir(parents=True, exist_ok=True)
        engine = create_engine(self.url, connect_args={"timeout": BUSY_SECONDS})
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine

    @contextlib.contextmanager
    def transaction(self, *, writes: bool = True) -> Iterator[Connection]:
        """One transaction: committed when the block ends, rolled back when it raises.

        Raises NotNow when the database does not answer or stays locked.
        """
        try:
            with self.engine.connect().execution_options(luthier_writes=writes) as connection, connection.begin():
                yield connection
        except (DBAPIError, TimeoutError) as error:  # the second: no connection of the pool became free
            if not (isinstance(error, OperationalError | TimeoutError) or error.connection_invalidated):
                raise
            why = error.orig if isinstance(error, DBAPIError) else error
            raise NotNow(
                f"The database {self.url.render_as_string(hide_password=True)} does not answer: {why}.",
                hint="Check that it runs, that its folder can be written, and that its disk is not full.",
            ) from error

    def reading(self) -> contextlib.AbstractContextManager[Connection]:
        """A transaction that only looks."""
        return self.transaction(writes=False)

    def lock(self, connection: Connection, name: str) -> None:
        """Keep `name` to this transaction until it ends. On SQLite a writer is alone anyway."""
        if not self.is_sqlite:
            key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big", signed=True)
            connection.execute(select(func.pg_advisory_xact_lock(key)))

    def migrate(self) -> None:
        """Bring the tables to this version's form. Safe to call at once in many processes, and again."""
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
        config.set_main_option("path_separator", "newline")
        with self.transaction() as connection:
            self.lock(connection, "migrate")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def is_current(self) -> bool:
        """Whether the tables have this version's form. Raises NotNow when the database does not answer."""
        heads = ScriptDirectory(str(Path(__file__).parent / "migrations")).get_heads()
        with self.reading() as connection:
            return set(MigrationContext.configure(connection).get_current_heads()) == set(heads)

    def close(self) -> None:
        self.engine.dispose()

    def inside(self, path: Path) -> str:
        """`path` as it is stored: relative to home. Raises UserError when it leads out, links followed."""
        whole = (self.home / path).resolve()
        if not whole.is_relative_to(self.home.resolve()) or whole == self.home.resolve():
            raise UserError(f"{str(path)[:200]!a} is not inside {self.home}.")
        return str(whole.relative_to(self.home.resolve()))

    def page(
        self,
        connection: Connection,
        rows: Select[Any],
        number: Column[int],
        make: Callable[[Row[Any]], T],
        *,
        id_column: Column[str],
        after: str | None,
        limit: int,
        order: Order,
        within: ColumnElement[bool] | None = None,
    ) -> Page[T]:
        """The `limit` rows behind the row whose id is `after`, from the newest on (`desc`) or the oldest (`asc`).

        `within` bounds the list and its cursors; what else `rows` filters by may no longer hold for a cursor's row.
        Raises NotFound for a cursor that never was, UserError for a limit below 1 or an order of another name.
        """
        if limit < 1:
            raise UserError(f"limit: found {limit}, wanted 1 or more.", param="limit")
        if order not in ("asc", "desc"):
            raise UserError(f"order: found {order!a}, wanted asc or desc.", param="order")
        if within is not None:
            rows = rows.where(within)
        if after is not None:
            place = self._place(connection, number, id_column, after, within)
            rows = rows.where(number < place if order == "desc" else number > place)
        rows = rows.order_by(number.desc() if order == "desc" else number.asc()).limit(limit + 1)
        found = connection.execute(rows).all()
        return Page(tuple(make(row) for row in found[:limit]), len(found) > limit)

    def _place(
        self,
        connection: Connection,
        number: Column[int],
        id_column: Column[str],
        after: str,
        within: ColumnElement[bool] | None,
    ) -> int:
        if re.fullmatch("[A-Za-z0-9_-]{1,64}", after):
            rows = select(number).where(id_column == after)
            place = connection.scalar(rows if within is None else rows.where(within))
            if place is None:
                listed = places.c.list == number.table.description
                place = connection.scalar(select(places.c.number).where(listed, places.c.id == after))
            if place is not None:
                return place
        raise missing("list entry", after, "after")

    def remember_place(self, connection: Connection, table: Table, id: str, number: int) -> None:
        """Let `id` of `table` go on working as a cursor for a day after its row is gone."""
        now = self.now()
        connection.execute(delete(places).where(places.c.deleted_at < now - PLACES_KEPT_SECONDS))
        connection.execute(insert(places).values(list=table.name, id=id, number=number, deleted_at=now))


def _checked(url: str | URL) -> URL:
    try:
        made = make_url(url)
    except ArgumentError as error:
        raise BadSetting("The database URL cannot be read.", param="database_url") from error
    kind = made.get_backend_name()
    if kind == "postgresql" and made.drivername in ("postgresql", "postgresql+psycopg"):
        return made.set(drivername="postgresql+psycopg")
    if kind == "sqlite" and made.database not in (None, "", ":memory:"):
        return made
    raise BadSetting(
        f"The database URL begins with {made.drivername!a}.",
        hint="Wanted postgresql://USER@HOST/NAME or sqlite:////A/FILE.db.",
        param="database_url",
    )


def _prepare_sqlite(raw: Any, record: Any) -> None:
    raw.isolation_level = None  # the driver begins nothing by itself: _begin_sqlite does
    cursor = raw.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000}")
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA synchronous = FULL")  # an answered request survives a power cut
    if cursor.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


def _prepare_postgres(raw: Any, record: Any) -> None:
    with raw.cursor() as cursor:
        cursor.execute(f"SET idle_in_transaction_session_timeout = '{IDLE_SECONDS}s'")
    raw.commit()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("luthier_writes", True)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
