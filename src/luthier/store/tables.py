"""The tables, once: what migrations/ must arrive at, and what every query of this room is written against.

Two column types carry what strangers send. Text columns of both databases are poorer than a Python string (PostgreSQL
refuses a NUL, both refuse half a surrogate pair), and a file's name may hold either; so such text is escaped on the
way in and read back exactly. JSON is kept as ASCII text: no database ever looks inside, and none can change it.
Times are Unix seconds; `number` counts rows in the order of their creation, so that two of one second have an order.
Does not know: what the rows mean; that is in files.py, uploads.py, jobs.py, leases.py, history.py, models.py,
aliases.py, keys.py.
"""

from __future__ import annotations

import json
import re
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)

_UNWRITABLE = re.compile("[\\\\\x00\ud800-\udfff]")
_WRITTEN = re.compile(r"\\u([0-9a-f]{4})")


class AnyText(TypeDecorator[str]):
    """Any Python string, NULs and lone surrogates included; equal strings are equal in the database too."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value and _UNWRITABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> str | None:
        return value and _WRITTEN.sub(lambda found: chr(int(found[1], 16)), value)


class Json(TypeDecorator[Any]):
    """A JSON value; None is NULL. Raises ValueError (by way of StatementError) for NaN and infinities."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json.dumps(value, allow_nan=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


# SQLite counts on its own only in a column of the type INTEGER, which has 64 bits there.
Number = BigInteger().with_variant(Integer(), "sqlite")
Seconds = BigInteger
Id = String(64)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _number() -> Column[int]:
    return Column("number", Number, primary_key=True, autoincrement=True)


def _id() -> Column[str]:
    return Column("id", Id, nullable=False, unique=True)


files = Table(
    "files",
    metadata,
    _number(),
    _id(),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("created_at", Seconds, nullable=False),
    Column("expires_at", Seconds, index=True),
    Column("filename", AnyText, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    sqlite_autoincrement=True,
)

uploads = Table(
    "uploads",
    metadata,
    _number(),
    _id(),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", Seconds, nullable=False),
    Column("expires_at", Seconds, nullable=False),
    Column("filename", AnyText, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("mime_type", AnyText, nullable=False),
    Column("file_expires_after", BigInteger),
    Column("status", String(16), nullable=False),
    Column("file_id", Id),
    sqlite_autoincrement=True,
)

upload_parts = Table(
    "upload_parts",
    metadata,
    _number(),
    _id(),
    Column("upload_id", Id, ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False),
    Column("sha256", String(64), nullable=False, index=True),
    Column("created_at", Seconds, nullable=False),
    sqlite_autoincrement=True,
)

jobs = Table(
    "jobs",
    metadata,
    _number(),
    _id(),
    Column("kind", String(16), nullable=False),
    Column("request", Json, nullable=False),
    Column("request_hash", String(64), nullable=False, index=True),
    Column("model", AnyText, nullable=False),
    Column("training_file", Id, nullable=False),
    Column("validation_file", Id),
    Column("suffix", AnyText),
    Column("seed", BigInteger, nullable=False),
    Column("metadata", Json),
    Column("owner", Id),
    Column("status", String(24), nullable=False),
    Column("wanted", String(8), nullable=False),
    Column("error", Json),
    Column("hyperparameters", Json),
    Column("proof", Json),
    Column("forgetting", Json),
    Column("gate", Json),
    Column("fine_tuned_model", AnyText),
    Column("result_files", Json, nullable=False),
    Column("trained_tokens", BigInteger),
    Column("created_at", Seconds, nullable=False),
    Column("updated_at", Seconds, nullable=False),
    Column("started_at", Seconds),
    Column("finished_at", Seconds),
    Column("estimated_finish", Seconds),
    Column("run_folder", AnyText),
    Column("events", BigInteger, nullable=False),
    Column("worker", AnyText),
    Column("lease_token", String(64)),
    Column("lease_expires", Double, index=True),
    Column("losses", Integer, nullable=False),
    Index("ix_jobs_status_number", "status", "number"),
    sqlite_autoincrement=True,
)

job_tags = Table(
    "job_tags",
    metadata,
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True),
    Column("key", AnyText, primary_key=True),
    Column("value", AnyText, nullable=False),
)

job_events = Table(
    "job_events",
    metadata,
    _number(),
    _id(),
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("sequence", BigInteger, nullable=False),
    Column("created_at", Seconds, nullable=False),
    Column("level", String(8), nullable=False),
    Column("type", String(32), nullable=False),
    Column("message", AnyText, nullable=False),
    Column("data", Json),
    Column("source_offset", BigInteger),
    Column("source_part", Integer, nullable=False),
    UniqueConstraint("job_id", "sequence"),
    UniqueConstraint("job_id", "source_offset", "source_part"),
    sqlite_autoincrement=True,
)

job_checkpoints = Table(
    "job_checkpoints",
    metadata,
    _number(),
    _id(),
    Column("job_id", Id, ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False),
    Column("step", BigInteger, nullable=False),
    Column("created_at", Seconds, nullable=False),
    Column("model", AnyText, nullable=False),
    Column("metrics", Json, nullable=False),
    UniqueConstraint("job_id", "step"),
    sqlite_autoincrement=True,
)

models = Table(
    "models",
    metadata,
    _number(),
    Column("name", AnyText, nullable=False, unique=True),
    Column("base", AnyText, nullable=False),
    Column("folder", AnyText, nullable=False),
    Column("content_hash", String(64), nullable=False),
    Column("created_at", Seconds, nullable=False),
    Column("owner", Id),
    Column("job_id", Id, index=True),
    Column("step", BigInteger),
    sqlite_autoincrement=True,
)

permissions = Table(
    "permissions",
    metadata,
    _number(),
    _id(),
    Column("model", AnyText, ForeignKey("models.name", ondelete="CASCADE"), nullable=False),
    Column("project_id", Id, nullable=False),
    Column("created_at", Seconds, nullable=False),
    UniqueConstraint("model", "project_id"),
    sqlite_autoincrement=True,
)

gates = Table(
    "gates",
    metadata,
    Column("model", AnyText, ForeignKey("models.name", ondelete="CASCADE"), primary_key=True),
    Column("passed", Integer, nullable=False),
    Column("reasons", Json, nullable=False),
    Column("created_at", Seconds, nullable=False),
)

alias_moves = Table(
    "alias_moves",
    metadata,
    _number(),
    Column("alias", AnyText, nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("kind", String(8), nullable=False),
    Column("model", AnyText, nullable=False),
    Column("created_at", Seconds, nullable=False),
    Column("by", Id),
    UniqueConstraint("alias", "version"),
    sqlite_autoincrement=True,
)

api_keys = Table(
    "api_keys",
    metadata,
    _number(),
    _id(),
    Column("name", AnyText, nullable=False),
    Column("role", String(8), nullable=False),
    Column("prefix", String(32), nullable=False),
    Column("hash", String(64), nullable=False, unique=True),
    Column("created_at", Seconds, nullable=False),
    Column("revoked_at", Seconds),
    sqlite_autoincrement=True,
)

stored_completions = Table(
    "stored_completions",
    metadata,
    _number(),
    _id(),
    Column("model", AnyText, nullable=False),
    Column("created_at", Seconds, nullable=False),
    Column("request", Json, nullable=False),
    Column("completion", Json, nullable=False),
    Column("metadata", Json),
    sqlite_autoincrement=True,
)

completion_tags = Table(
    "completion_tags",
    metadata,
    Column(
        "completion_id", Id, ForeignKey("stored_completions.id", ondelete="CASCADE"), primary_key=True, nullable=False
    ),
    Column("key", AnyText, primary_key=True),
    Column("value", AnyText, nullable=False),
)

# A client that deletes while it walks a list names the deleted row as its cursor: the row's place outlives it.
places = Table(
    "places",
    metadata,
    Column("list", String(32), primary_key=True),
    Column("id", Id, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("deleted_at", Seconds, nullable=False, index=True),
)
