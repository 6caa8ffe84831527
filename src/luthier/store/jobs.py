"""Jobs as their owners see them: ask for one, look at it, want it paused, resumed or cancelled.

    validating_files ──► queued ◄──► running ──► succeeded
                           ▲  │         │ │
                           │  ▼         │ └────► failed          (from validating_files too)
                           paused ◄─────┘        cancelled       (from every state that is not an end)

A state changes in one place, `move`, along TRANSITIONS, in a transaction that holds the job's row and writes the event
that tells of it. What no worker holds changes at once. What a worker runs is only *wanted* otherwise, until the worker
hears of it with its next beat and lets go (leases.py). Once a job is wanted cancelled it can end in no other state, so
a door may show it as cancelled at once.
Does not know: HTTP; workers' leases; what a request's fields mean beyond those it is searched by.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from luthier.spec.errors import Broken, UserError
from luthier.store.db import Database, Order, Page, check_id, missing, new_id
from luthier.store.history import Kind, say, sentence
from luthier.store.tables import job_tags, jobs

Status = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Wanted = Literal["run", "pause", "cancel"]

TRANSITIONS: dict[Status, frozenset[Status]] = {
    "validating_files": frozenset({"queued", "failed", "cancelled"}),
    "queued": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
    "succeeded": frozenset(),
    "failed": frozenset(),
    "cancelled": frozenset(),
}
TERMINAL: frozenset[Status] = frozenset(status for status, following in TRANSITIONS.items() if not following)
PREFIX: dict[Kind, str] = {"modern": "ftjob-", "legacy": "ft-"}
NO_LEASE: dict[str, None] = {"lease_token": None, "lease_expires": None, "worker": None}


@dataclass(frozen=True, slots=True)
class Job:
    """One fine-tuning job. `request` is what was asked, whole; `hyperparameters` what it came to, None before that;
    `proof` whether it helped, None before that and without held-out rows; `forgetting` what was lost and `gate` whether
    the thresholds were kept, None before that and where nobody asked.

    Times are Unix seconds; `error` has the keys code, message and param; `losses` counts the workers that were lost in
    a row, without a checkpoint in between; `run_folder` is absolute.
    """

    id: str
    kind: Kind
    request: dict[str, Any]
    model: str
    training_file: str
    validation_file: str | None
    suffix: str | None
    seed: int
    metadata: dict[str, str] | None
    owner: str | None
    status: Status
    wanted: Wanted
    error: dict[str, str | None] | None
    hyperparameters: dict[str, Any] | None
    proof: dict[str, Any] | None
    forgetting: dict[str, Any] | None
    gate: dict[str, Any] | None
    fine_tuned_model: str | None
    result_files: list[str]
    trained_tokens: int | None
    created_at: int
    updated_at: int
    started_at: int | None
    finished_at: int | None
    estimated_finish: int | None
    run_folder: Path | None
    worker: str | None
    losses: int

    @property
    def method(self) -> str:
        """`supervised` or `dpo`."""
        return str((self.request.get("method") or {}).get("type") or "supervised")


def make_job(database: Database, row: Row[Any]) -> Job:
    values = {name: getattr(row, name) for name in Job.__slots__}
    folder = values["run_folder"]
    return Job(**{**values, "run_folder": None if folder is None else database.home / folder})


def check_job_id(job_id: str) -> str:
    return check_id(job_id, *PREFIX.values(), what="fine-tuning job")


def hold(connection: Connection, job_id: str) -> Row[Any]:
    """The job's row, nobody else's to change until the transaction ends. Raises NotFound."""
    row = connection.execute(select(jobs).where(jobs.c.id == job_id).with_for_update()).one_or_none()
    if row is None:
        raise missing("fine-tuning job", job_id)
    return row


def move(connection: Connection, row: Row[Any], to: Status, now: int, *messages: str, **values: Any) -> None:
    """The passage of a held job to `to`, with its events. Raises Broken when TRANSITIONS does not have it."""
    if to not in TRANSITIONS[row.status]:
        raise Broken(f"The job {row.id} is {row.status} and cannot become {to}.")
    if to in TERMINAL:
        values = {**values, "finished_at": now, "estimated_finish": None}
    connection.execute(update(jobs).where(jobs.c.id == row.id).values(status=to, updated_at=now, **values))
    say(connection, row.id, now, *messages, level="error" if to == "failed" else "info")


class Jobs:
    """The jobs of one database, for the doors."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def submit(
        self,
        *,
        request: dict[str, Any],
        model: str,
        training_file: str,
        validation_file: str | None = None,
        kind: Kind = "modern",
        suffix: str | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        owner: str | None = None,
        notes: Sequence[str] = (),
        retry_within: float | None = None,
    ) -> tuple[Job, bool]:
        """A new job in validating_files, and True; a seed is chosen when there is none. `notes` become events.

        `retry_within` (seconds) says that the client repeats itself: when the same owner made the same request within
        that time, that job is the answer, and False. Raises NotFound for what is no id of a file.
        """
        for param, file_id in (("training_file", training_file), ("validation_file", validation_file)):
            if file_id is not None:
                check_id(file_id, "file-", what="file", param=param)
        request_hash = _request_hash(owner, kind, request)
        with self.database.transaction() as connection:
            self.database.lock(connection, request_hash)
            if retry_within is not None:
                row = self._same(connection, request_hash, self.database.clock() - retry_within)
                if row is not None:
                    return make_job(self.database, row), False
            now = self.database.now()
            job_id = new_id(PREFIX[kind])
            connection.execute(
                insert(jobs).values(
                    id=job_id,
                    kind=kind,
                    request=request,
                    request_hash=request_hash,
                    model=model,
                    training_file=training_file,
                    validation_file=validation_file,
                    suffix=suffix,
                    seed=secrets.randbelow(2**31) if seed is None else seed,
                    metadata=None if metadata is None else dict(metadata),
                    owner=owner,
                    status="validating_files",
                    wanted="run",
                    result_files=[],
                    created_at=now,
                    updated_at=now,
                    events=0,
                    losses=0,
                )
            )
            for key, value in (metadata or {}).items():
                connection.execute(insert(job_tags).values(job_id=job_id, key=key, value=value))
            say(connection, job_id, now, *_opening(kind, job_id, training_file, validation_file), *notes)
            return make_job(self.database, hold(connection, job_id)), True

    def get(self, job_id: str) -> Job:
        """Raises NotFound."""
        check_job_id(job_id)
        with self.database.reading() as connection:
            row = connection.execute(select(jobs).where(jobs.c.id == job_id)).one_or_none()
        if row is None:
            raise missing("fine-tuning job", job_id)
        return make_job(self.database, row)

    def list(
        self,
        *,
        kind: Kind | None = None,
        owner: str | None = None,
        metadata: Mapping[str, str] | None = None,
        without_metadata: bool = False,
        after: str | None = None,
        limit: int = 20,
        order: Order = "desc",
    ) -> Page[Job]:
        """Newest first unless `order` is asc. `metadata`: those that have each of these pairs; `without_metadata`:
        those that were given none. Raises NotFound for an `after` that never was.
        """
        rows = select(jobs)
        if kind is not None:
            rows = rows.where(jobs.c.kind == kind)
        if owner is not None:
            rows = rows.where(jobs.c.owner == owner)
        if without_metadata:
            rows = rows.where(jobs.c.metadata.is_(None))
        for key, value in (metadata or {}).items():
            has = select(job_tags.c.job_id).where(
                job_tags.c.job_id == jobs.c.id, job_tags.c.key == key, job_tags.c.value == value
            )
            rows = rows.where(has.exists())
        with self.database.reading() as connection:
            return self.database.page(
                connection,
                rows,
                jobs.c.number,
                lambda row: make_job(self.database, row),
                id_column=jobs.c.id,
                after=after,
                limit=limit,
                order=order,
            )

    def counts(self) -> dict[Status, int]:
        """How many jobs there are in each state."""
        with self.database.reading() as connection:
            found = connection.execute(
                select(jobs.c.status, func.count().label("number")).group_by(jobs.c.status)
            ).all()
        return dict.fromkeys(TRANSITIONS, 0) | {row.status: row.number for row in found}

    def request_cancel(self, job_id: str) -> Job:
        """At once unless a worker runs it. Again before it ended: the same answer. Raises NotFound, UserError."""
        check_job_id(job_id)
        with self.database.transaction() as connection:
            row = _open(connection, job_id, "cancelled")
            if row.status == "running":
                self._want(connection, row, "cancel")
            else:
                said = sentence("cancelled", row.kind)
                move(connection, row, "cancelled", self.database.now(), said, wanted="cancel", **NO_LEASE)
            return make_job(self.database, hold(connection, job_id))

    def request_pause(self, job_id: str) -> Job:
        """At once when it waits in the queue; a running one when its worker has saved it. Idempotent.

        Raises NotFound; UserError when it is over, about to be cancelled, or its files are still being checked.
        """
        check_job_id(job_id)
        with self.database.transaction() as connection:
            row = _open(connection, job_id, "paused")
            if row.status == "validating_files":
                raise UserError(f"The job {job_id} is still validating its files and cannot be paused yet.")
            if row.status == "running":
                self._want(connection, row, "pause")
            elif row.status == "queued":
                said = sentence("paused", row.kind)
                move(connection, row, "paused", self.database.now(), said, wanted="pause")
            return make_job(self.database, hold(connection, job_id))

    def request_resume(self, job_id: str) -> Job:
        """Back into the queue, in the old place; a pause that was not carried out yet is taken back. Idempotent.

        Raises NotFound; UserError when it is over or about to be cancelled.
        """
        check_job_id(job_id)
        with self.database.transaction() as connection:
            row = _open(connection, job_id, "resumed")
            if row.status == "paused":
                said = sentence("queued", row.kind)
                move(connection, row, "queued", self.database.now(), said, wanted="run", losses=0)
            else:
                self._want(connection, row, "run")
            return make_job(self.database, hold(connection, job_id))

    def delete(self, job_id: str) -> None:
        """Forget a job that is over, its events and checkpoints too; models stay. Raises NotFound, UserError."""
        check_job_id(job_id)
        with self.database.transaction() as connection:
            row = hold(connection, job_id)
            if row.status not in TERMINAL:
                if row.wanted == "cancel":
                    hint = "Its worker has not let go yet: try again in a few seconds."
                    raise UserError(f"The job {job_id} is being cancelled.", hint=hint)
                raise UserError(f"The job {job_id} is {row.status}.", hint="Cancel it first.")
            connection.execute(delete(jobs).where(jobs.c.id == job_id))
            self.database.remember_place(connection, jobs, job_id, row.number)

    def _want(self, connection: Connection, row: Row[Any], wanted: Wanted) -> None:
        if row.wanted != wanted:
            values = {"wanted": wanted, "updated_at": self.database.now()}
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(values))

    def _same(self, connection: Connection, request_hash: str, since: float) -> Row[Any] | None:
        rows = select(jobs).where(jobs.c.request_hash == request_hash, jobs.c.created_at >= int(since))
        return connection.execute(rows.order_by(jobs.c.number.desc()).limit(1)).one_or_none()


def _open(connection: Connection, job_id: str, asked: str) -> Row[Any]:
    """The held row of a job that can still be asked for something. Raises NotFound, UserError."""
    row = hold(connection, job_id)
    if row.status in TERMINAL:
        raise UserError(f"The job {job_id} has already {_ENDED[row.status]} and cannot be {asked}.")
    if row.wanted == "cancel" and asked != "cancelled":
        raise UserError(f"The job {job_id} is being cancelled and cannot be {asked}.")
    return row


_ENDED = {"succeeded": "succeeded", "failed": "failed", "cancelled": "been cancelled"}


def _opening(kind: Kind, job_id: str, training_file: str, validation_file: str | None) -> list[str]:
    created = sentence("created", kind, id=job_id)
    if kind == "legacy":
        return [created]
    validation = f" and validation file: {validation_file}" if validation_file else ""
    return [created, f"Validating training file: {training_file}{validation}"]


def _request_hash(owner: str | None, kind: Kind, request: dict[str, Any]) -> str:
    whole = json.dumps([owner, kind, request], sort_keys=True, allow_nan=False)
    return hashlib.sha256(whole.encode()).hexdigest()
