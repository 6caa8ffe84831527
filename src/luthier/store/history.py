"""What a job tells: its events, numbered from 1 without a gap, and its checkpoints.

The sentences of a job's passage from state to state are written here, by the transaction that makes the passage, so
that history and state never differ. They are those that OpenAI's clients print and some of them look for
(fine_tuning.jobs and the older fine-tunes differ). Events of training come from the worker, each with its place in the
run's events.jsonl: a worker that tails a file for the second time adds nothing.
Does not know: who may ask; what state a job is in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Row, func, insert, select, update

from luthier.store.db import Database, Order, Page, check_id, missing, new_id
from luthier.store.tables import job_checkpoints, job_events, jobs

Level = Literal["info", "warn", "error"]
Kind = Literal["modern", "legacy"]

SENTENCES: dict[str, tuple[str, str]] = {  # moment -> (modern, legacy)
    "created": ("Created fine-tuning job: {id}", "Created fine-tune: {id}"),
    "validated": ("Files validated, moving job to queued state", "Fine-tune enqueued. Queue number: {ahead}"),
    "started": ("Fine-tuning job started", "Fine-tune started"),
    "resumed": ("Fine-tuning job resumed", "Fine-tune resumed"),
    "paused": ("Fine-tuning job paused", "Fine-tune paused"),
    "queued": ("Fine-tuning job put back into the queue", "Fine-tune put back into the queue"),
    "model": ("New fine-tuned model created: {model}", "Uploaded model: {model}"),
    "succeeded": ("The job has successfully completed", "Fine-tune succeeded"),
    "failed": ("{message}", "Fine-tune failed. {message}"),
    "cancelled": ("Fine-tuning job cancelled", "Fine-tune cancelled"),
}
WORKER_LOST = "The worker stopped answering; the job goes on from its last checkpoint with the next one."


@dataclass(frozen=True, slots=True)
class Event:
    """One line of a job's history. `sequence` counts from 1 in each job."""

    id: str
    job_id: str
    sequence: int
    created_at: int
    level: Level
    type: str
    message: str
    data: Any


@dataclass(frozen=True, slots=True)
class EventDraft:
    """What a worker adds. (`offset`, `part`) says once and for all which event it is: the byte offset of its line in
    the run's events.jsonl, and which of several events that line came to. `created_at` None means now.
    """

    message: str
    offset: int
    part: int = 0
    level: Level = "info"
    type: str = "message"
    data: Any = None
    created_at: int | None = None


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A state of the weights that can be asked for as `model`; `metrics` are numbers by name."""

    id: str
    job_id: str
    step: int
    created_at: int
    model: str
    metrics: dict[str, float]


def _event(row: Row[tuple[object, ...]]) -> Event:
    return Event(**{name: getattr(row, name) for name in Event.__slots__})


def make_checkpoint(row: Row[tuple[object, ...]]) -> Checkpoint:
    return Checkpoint(**{name: getattr(row, name) for name in Checkpoint.__slots__})


def sentence(moment: str, kind: Kind, **words: object) -> str:
    return SENTENCES[moment][kind == "legacy"].format(**words)


def say(connection: Connection, job_id: str, now: int, *messages: str, level: Level = "info") -> None:
    """Add the passage's own events. The caller holds the job's row."""
    _add(connection, job_id, [_values(now, message, level=level) for message in messages])


def append(connection: Connection, job_id: str, now: int, drafts: Sequence[EventDraft]) -> int:
    """Add those of `drafts` that are not there yet, in their order; how many. The caller holds the job's row."""
    offsets = sorted({draft.offset for draft in drafts})
    known = set()
    for start in range(0, len(offsets), 500):  # SQLite bounds the variables of a statement
        asked = select(job_events.c.source_offset, job_events.c.source_part).where(
            job_events.c.job_id == job_id, job_events.c.source_offset.in_(offsets[start : start + 500])
        )
        known |= {(offset, part) for offset, part in connection.execute(asked)}
    new = {(draft.offset, draft.part): draft for draft in reversed(drafts)}
    fresh = [draft for place, draft in reversed(new.items()) if place not in known]
    _add(
        connection,
        job_id,
        [
            _values(
                now if draft.created_at is None else draft.created_at,
                draft.message,
                level=draft.level,
                type=draft.type,
                data=draft.data,
                source_offset=draft.offset,
                source_part=draft.part,
            )
            for draft in fresh
        ],
    )
    return len(fresh)


def _values(created_at: int, message: str, **given: Any) -> dict[str, Any]:
    plain = {"type": "message", "data": None, "source_offset": None, "source_part": 0}
    return {**plain, **given, "created_at": created_at, "message": message}


def _add(connection: Connection, job_id: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    counted = update(jobs).where(jobs.c.id == job_id).values(events=jobs.c.events + len(rows))
    last = connection.execute(counted.returning(jobs.c.events)).scalar_one()
    first = last - len(rows) + 1
    connection.execute(
        insert(job_events),
        [{**row, "id": new_id("ftevent-"), "job_id": job_id, "sequence": first + i} for i, row in enumerate(rows)],
    )


class History:
    """The reading side: lists of events and checkpoints."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def events(self, job_id: str, *, after: str | None = None, limit: int = 20, order: Order = "desc") -> Page[Event]:
        """Newest first unless `order` is asc. Raises NotFound for the job or the cursor."""
        with self.database.reading() as connection:
            self._job(connection, job_id)
            return self.database.page(
                connection,
                select(job_events),
                job_events.c.sequence,
                _event,
                id_column=job_events.c.id,
                after=after,
                limit=limit,
                order=order,
                within=job_events.c.job_id == job_id,
            )

    def checkpoints(
        self, job_id: str, *, after: str | None = None, limit: int = 10, order: Order = "desc"
    ) -> Page[Checkpoint]:
        """Newest first unless `order` is asc. Raises NotFound for the job or the cursor."""
        with self.database.reading() as connection:
            self._job(connection, job_id)
            return self.database.page(
                connection,
                select(job_checkpoints),
                job_checkpoints.c.number,
                make_checkpoint,
                id_column=job_checkpoints.c.id,
                after=after,
                limit=limit,
                order=order,
                within=job_checkpoints.c.job_id == job_id,
            )

    def last_offset(self, job_id: str) -> int:
        """The greatest place in events.jsonl that has an event here; 0 before the first. Raises NotFound."""
        with self.database.reading() as connection:
            self._job(connection, job_id)
            greatest = select(func.max(job_events.c.source_offset)).where(job_events.c.job_id == job_id)
            return connection.scalar(greatest) or 0

    def _job(self, connection: Connection, job_id: str) -> None:
        check_id(job_id, "ftjob-", "ft-", what="fine-tuning job")
        if connection.scalar(select(jobs.c.number).where(jobs.c.id == job_id)) is None:
            raise missing("fine-tuning job", job_id)
