"""Jobs as workers see them: claim the next, beat while it runs, write what came of it, let go.

A claim gives a lease: a random token in the job's row that ends by itself unless its worker beats. Everything a worker
writes names the token and is refused (LeaseLost) when the row has another or none, so a worker that was thought dead,
and comes back, changes nothing. reclaim_expired, which any worker may call, puts the jobs of dead workers back into the
queue, where the next one goes on from the last checkpoint. A job that loses worker after worker without a checkpoint
in between is the cause of it, and fails.
Leases are compared with the clocks of the machines: these must agree to well within a lease.
Does not know: processes; how a run is started, stopped or resumed; what is in an event.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqlalchemy import Connection, Row, delete, func, insert, select, update

from luthier.spec.errors import Broken, NotNow
from luthier.store.db import Database, new_id
from luthier.store.history import WORKER_LOST, Checkpoint, EventDraft, append, make_checkpoint, say, sentence
from luthier.store.jobs import NO_LEASE, TERMINAL, Job, Status, Wanted, hold, make_job, move
from luthier.store.tables import job_checkpoints, jobs

Stage = Literal["validate", "run"]
WAITING: dict[Stage, Status] = {"validate": "validating_files", "run": "queued"}
AFTER: dict[Wanted, Status] = {"run": "queued", "pause": "paused", "cancel": "cancelled"}
MOST_LOSSES = 3


class LeaseLost(NotNow):
    """The job is no longer this worker's: stop working on it, write nothing more."""

    code = "lease_lost"


@dataclass(frozen=True, slots=True)
class Lease:
    """A worker's hold on one job, for `seconds` after each beat."""

    job_id: str
    token: str
    seconds: float


class Leases:
    """The jobs of one database, for the workers."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def claim(self, worker: str, seconds: float, stage: Stage = "run") -> tuple[Job, Lease] | None:
        """The oldest job that waits, for one worker alone; None when none does.

        Stage `run` takes from the queue, and the job is running; `validate` takes a job whose files are to be checked,
        which stays validating_files until validated() or fail().
        """
        waiting = (
            select(jobs)
            .where(jobs.c.status == WAITING[stage], jobs.c.lease_token.is_(None))
            .order_by(jobs.c.number)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        lease_token = secrets.token_hex(16)
        if not self._anything(WAITING[stage]):
            return None
        with self.database.transaction() as connection:
            row = connection.execute(waiting).one_or_none()
            if row is None:
                return None
            now = self.database.now()
            held = {
                "lease_token": lease_token,
                "lease_expires": self.database.clock() + seconds,
                "worker": worker,
            }
            if stage == "run":
                said = sentence("started" if row.started_at is None else "resumed", row.kind)
                started = now if row.started_at is None else row.started_at
                move(connection, row, "running", now, said, started_at=started, **held)
            else:
                connection.execute(update(jobs).where(jobs.c.id == row.id).values(held))
            return make_job(self.database, hold(connection, row.id)), Lease(row.id, lease_token, seconds)

    def beat(self, lease: Lease) -> Wanted:
        """Hold on for another `lease.seconds`; what the job's owner wants of it now. Raises LeaseLost."""
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            expires = self.database.clock() + lease.seconds
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(lease_expires=expires))
            wanted: Wanted = row.wanted
            return wanted

    def record(
        self,
        lease: Lease,
        *,
        hyperparameters: dict[str, Any] | None = None,
        proof: dict[str, Any] | None = None,
        forgetting: dict[str, Any] | None = None,
        gate: dict[str, Any] | None = None,
        run_folder: Path | None = None,
        trained_tokens: int | None = None,
        estimated_finish: int | None = None,
    ) -> None:
        """Write down what is known by now; None leaves a field. Raises LeaseLost; UserError for a folder outside."""
        given = {
            "hyperparameters": hyperparameters,
            "proof": proof,
            "forgetting": forgetting,
            "gate": gate,
            "run_folder": None if run_folder is None else self.database.inside(run_folder),
            "trained_tokens": trained_tokens,
            "estimated_finish": estimated_finish,
        }
        values = {name: value for name, value in given.items() if value is not None}
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            now = self.database.now()
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(updated_at=now, **values))

    def append_events(self, lease: Lease, drafts: Sequence[EventDraft]) -> int:
        """Add events, each once however often it is sent; how many were new. Raises LeaseLost."""
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            return append(connection, row.id, self.database.now(), drafts)

    def append_late(self, job_id: str, drafts: Sequence[EventDraft]) -> int:
        """Add events that no lease is needed for, to a job that is not over; how many were new."""
        with self.database.transaction() as connection:
            waiting = select(jobs).where(jobs.c.id == job_id, jobs.c.status.not_in(sorted(TERMINAL))).with_for_update()
            if connection.execute(waiting).one_or_none() is None:
                return 0
            return append(connection, job_id, self.database.now(), drafts)

    def add_checkpoint(self, lease: Lease, *, step: int, model: str, metrics: dict[str, float]) -> Checkpoint:
        """Enter a checkpoint; a step that is there already keeps its row. Raises LeaseLost."""
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            mine = select(job_checkpoints).where(job_checkpoints.c.job_id == row.id, job_checkpoints.c.step == step)
            there = connection.execute(mine).one_or_none()
            if there is not None:
                return make_checkpoint(there)
            made = Checkpoint(new_id("ftckpt_"), row.id, step, self.database.now(), model, metrics)
            values = {name: getattr(made, name) for name in Checkpoint.__slots__}
            connection.execute(insert(job_checkpoints).values(values))
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(losses=0))
            return made

    def drop_checkpoint(self, lease: Lease, step: int) -> None:
        """Strike one that is no longer kept, if it is there. Raises LeaseLost."""
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            gone = connection.execute(
                delete(job_checkpoints)
                .where(job_checkpoints.c.job_id == row.id, job_checkpoints.c.step == step)
                .returning(job_checkpoints.c.id, job_checkpoints.c.number)
            ).one_or_none()
            if gone is not None:
                self.database.remember_place(connection, job_checkpoints, gone.id, gone.number)

    def validated(self, lease: Lease) -> Job:
        """The files are good: into the queue. Raises LeaseLost, also when the job was cancelled meanwhile."""
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            if row.status != "validating_files":
                raise Broken(f"The job {row.id} is {row.status}: its files were validated before.")
            ahead = select(func.count()).where(jobs.c.status == "queued", jobs.c.number < row.number)
            said = sentence("validated", row.kind, ahead=connection.scalar(ahead))
            move(connection, row, "queued", self.database.now(), said, losses=0, **NO_LEASE)
            return make_job(self.database, hold(connection, row.id))

    def release(self, lease: Lease) -> Job:
        """Let go of a job whose engine has stopped cleanly. Where it goes is what its owner wants: into the queue,
        paused, or cancelled; one whose files were being checked waits for the next worker. Raises LeaseLost.
        """
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            self._let_go(connection, row, row.losses)
            return make_job(self.database, hold(connection, row.id))

    def finish(self, lease: Lease, *, fine_tuned_model: str, result_files: Sequence[str], trained_tokens: int) -> Job:
        """The model is registered and the job over: succeeded, or cancelled when that was wanted meanwhile (then the
        model is the caller's to remove). Raises LeaseLost.
        """
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            if row.wanted == "cancel":
                self._let_go(connection, row, row.losses)
            else:
                files = [f"Uploaded result file: {file_id}" for file_id in result_files if row.kind == "legacy"]
                said = [sentence("model", row.kind, model=fine_tuned_model), *files, sentence("succeeded", row.kind)]
                move(
                    connection,
                    row,
                    "succeeded",
                    self.database.now(),
                    *said,
                    wanted="run",
                    fine_tuned_model=fine_tuned_model,
                    result_files=list(result_files),
                    trained_tokens=trained_tokens,
                    **NO_LEASE,
                )
            return make_job(self.database, hold(connection, row.id))

    def fail(self, lease: Lease, *, code: str, message: str, param: str | None = None) -> Job:
        """The job is over: failed for this reason, or cancelled when that was wanted meanwhile. Raises LeaseLost."""
        with self.database.transaction() as connection:
            row = self._mine(connection, lease)
            if row.wanted == "cancel":
                self._let_go(connection, row, row.losses)
            else:
                self._fail(connection, row, code, message, param)
            return make_job(self.database, hold(connection, row.id))

    def reclaim_expired(self) -> tuple[Job, ...]:
        """Take the jobs of workers that beat no more out of their hands; those jobs, as they are now."""
        dead = select(jobs).where(jobs.c.lease_expires <= self.database.clock()).order_by(jobs.c.number)
        if not self._expired():
            return ()
        with self.database.transaction() as connection:
            rows = connection.execute(dead.with_for_update(skip_locked=True)).all()
            for row in rows:
                if row.wanted == "run" and row.losses + 1 >= MOST_LOSSES:
                    message = f"{row.losses + 1} workers in a row were lost with this job, the last one {row.worker}."
                    self._fail(connection, row, "worker_lost", message, None, losses=row.losses + 1)
                    continue
                if row.wanted == "run":
                    say(connection, row.id, self.database.now(), WORKER_LOST, level="warn")
                self._let_go(connection, row, row.losses + 1)
            return tuple(make_job(self.database, hold(connection, row.id)) for row in rows)

    def _mine(self, connection: Connection, lease: Lease) -> Row[Any]:
        mine = select(jobs).where(jobs.c.id == lease.job_id, jobs.c.lease_token == lease.token)
        row = connection.execute(mine.with_for_update()).one_or_none()
        if row is None:
            raise LeaseLost(f"The job {lease.job_id} is no longer held by this worker.", hint="Stop working on it.")
        return row

    def _let_go(self, connection: Connection, row: Row[Any], losses: int) -> None:
        now = self.database.now()
        if row.status == "validating_files":
            connection.execute(update(jobs).where(jobs.c.id == row.id).values(losses=losses, **NO_LEASE))
            return
        to = AFTER[row.wanted]
        move(connection, row, to, now, sentence(to, row.kind), losses=losses, estimated_finish=None, **NO_LEASE)

    def _fail(
        self, connection: Connection, row: Row[Any], code: str, message: str, param: str | None, **values: Any
    ) -> None:
        move(
            connection,
            row,
            "failed",
            self.database.now(),
            sentence("failed", row.kind, message=message),
            wanted="run",
            error={"code": code, "message": message, "param": param},
            **values,
            **NO_LEASE,
        )

    def _anything(self, status: Status) -> bool:
        """A look without the write lock: idle workers ask often, and should not keep writers waiting on SQLite."""
        waiting = select(jobs.c.number).where(jobs.c.status == status, jobs.c.lease_token.is_(None)).limit(1)
        with self.database.reading() as connection:
            return connection.execute(waiting).first() is not None

    def _expired(self) -> bool:
        late = select(jobs.c.number).where(jobs.c.lease_expires <= self.database.clock()).limit(1)
        with self.database.reading() as connection:
            return connection.execute(late).first() is not None
