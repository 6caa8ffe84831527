"""The job machine against a slow twin: a dictionary that follows the sentences of the documentation.

Hypothesis chooses who does what next: owners, workers with good and with lost leases, time that passes. After every
step each job in the database is what the dictionary says, and its events are numbered without a gap.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select

from luthier.spec.errors import Broken, UserError
from luthier.store import tables
from luthier.store.db import Database
from luthier.store.history import EventDraft, History
from luthier.store.jobs import Jobs
from luthier.store.leases import Lease, LeaseLost, Leases
from tests.store.asks import finish, submit
from tests.store.clock import Clock

OVER = ("succeeded", "failed", "cancelled")


@dataclass
class Twin:
    """What a job should be. `holder` is the lease that may write; `until` when it ends."""

    status: str = "validating_files"
    wanted: str = "run"
    losses: int = 0
    holder: Lease | None = None
    until: float = 0.0

    def free(self, status: str | None = None, losses: int | None = None) -> None:
        self.holder = None
        self.status = status or self.status
        self.losses = self.losses if losses is None else losses

    def where_wanted(self) -> str:
        if self.status == "validating_files":
            return self.status
        return {"run": "queued", "pause": "paused", "cancel": "cancelled"}[self.wanted]


class Machine(RuleBasedStateMachine):
    database: Database
    clock: Clock

    job_ids = Bundle("job_ids")
    given_leases = Bundle("given_leases")

    def __init__(self) -> None:
        super().__init__()
        self.jobs, self.leases, self.history = Jobs(self.database), Leases(self.database), History(self.database)
        with self.database.transaction() as connection:
            connection.execute(delete(tables.jobs))
        self.twins: dict[str, Twin] = {}  # in the order of submission

    @rule(target=job_ids)
    def submit(self) -> str:
        job = submit(self.jobs)
        self.twins[job.id] = Twin()
        return job.id

    @rule(target=given_leases, stage=st.sampled_from(["validate", "run", "run"]), seconds=st.sampled_from([5, 50]))
    def claim(self, stage: Any, seconds: int) -> Any:
        status = {"validate": "validating_files", "run": "queued"}[stage]
        waiting = [id for id, twin in self.twins.items() if twin.status == status and twin.holder is None]
        claimed = self.leases.claim("w", seconds, stage)
        if not waiting:
            assert claimed is None
            return multiple()
        assert claimed is not None and claimed[0].id == waiting[0]
        twin = self.twins[waiting[0]]
        twin.holder, twin.until = claimed[1], self.clock() + seconds
        twin.status = "running" if stage == "run" else twin.status
        return claimed[1]

    def _write(self, lease: Lease, write: Callable[[], Any]) -> tuple[Twin, Any] | None:
        """Do it: with a lost lease it must be refused."""
        twin = self.twins[lease.job_id]
        if twin.holder != lease:
            with pytest.raises(LeaseLost):
                write()
            return None
        return twin, write()

    @rule(lease=given_leases)
    def beat(self, lease: Lease) -> None:
        if done := self._write(lease, lambda: self.leases.beat(lease)):
            twin, wanted = done
            twin.until = self.clock() + lease.seconds
            assert wanted == twin.wanted

    @rule(lease=given_leases, offset=st.integers(1, 4))
    def tell(self, lease: Lease, offset: int) -> None:
        self._write(lease, lambda: self.leases.append_events(lease, [EventDraft("m", offset)]))

    @rule(lease=given_leases)
    def checkpoint(self, lease: Lease) -> None:
        known = len(self.history.checkpoints(lease.job_id).data)
        if known < 10 and (
            done := self._write(lease, lambda: self.leases.add_checkpoint(lease, step=known, model="m", metrics={}))
        ):
            done[0].losses = 0

    @rule(lease=given_leases)
    def validated(self, lease: Lease) -> None:
        twin = self.twins[lease.job_id]
        if twin.holder == lease and twin.status != "validating_files":
            with pytest.raises(Broken):
                self.leases.validated(lease)
        elif self._write(lease, lambda: self.leases.validated(lease)):
            twin.free("queued", losses=0)

    @rule(lease=consumes(given_leases), end=st.sampled_from(["release", "finish", "fail"]))
    def let_go(self, lease: Lease, end: str) -> None:
        twin = self.twins[lease.job_id]
        if end == "finish" and twin.holder == lease and twin.status == "validating_files":
            with pytest.raises(Broken):
                finish(self.leases, lease)
            return
        writes = {
            "release": lambda: self.leases.release(lease),
            "finish": lambda: finish(self.leases, lease),
            "fail": lambda: self.leases.fail(lease, code="c", message="m"),
        }
        if self._write(lease, writes[end]):
            if end == "release" or twin.wanted == "cancel":
                twin.free(twin.where_wanted())
            else:
                twin.wanted = "run"
                twin.free({"finish": "succeeded", "fail": "failed"}[end])

    @rule(job_id=job_ids, ask=st.sampled_from(["cancel", "pause", "resume"]))
    def request(self, job_id: str, ask: str) -> None:
        twin = self.twins[job_id]
        asked = getattr(self.jobs, f"request_{ask}")
        refused = (
            twin.status in OVER
            or (twin.wanted == "cancel" and ask != "cancel")
            or (ask == "pause" and twin.status == "validating_files")
        )
        if refused:
            with pytest.raises(UserError):
                asked(job_id)
            return
        asked(job_id)
        twin.wanted = {"cancel": "cancel", "pause": "pause", "resume": "run"}[ask]
        if twin.status != "running":
            if twin.status == "paused" and ask == "resume":
                twin.losses = 0
            before = twin.status
            twin.status = {"cancel": "cancelled", "pause": "paused", "resume": "queued"}[ask]
            if ask == "resume" and before == "validating_files":
                twin.status = before
            else:
                twin.holder = None

    @rule(seconds=st.sampled_from([1, 5, 60]))
    def time_passes(self, seconds: int) -> None:
        self.clock.forward(seconds)

    @rule()
    def reclaim(self) -> None:
        late = [id for id, twin in self.twins.items() if twin.holder is not None and twin.until <= self.clock()]
        assert [job.id for job in self.leases.reclaim_expired()] == late
        for id in late:
            twin = self.twins[id]
            if twin.wanted == "run" and twin.losses == 2:
                twin.free("failed", losses=3)
            else:
                twin.free(twin.where_wanted(), losses=twin.losses + 1)

    @invariant()
    def the_database_agrees(self) -> None:
        with self.database.reading() as connection:
            rows = connection.execute(select(tables.jobs)).all()
            events = select(tables.job_events.c.job_id, tables.job_events.c.sequence).order_by(
                tables.job_events.c.number
            )
            sequences: dict[str, list[int]] = {}
            for job_id, sequence in connection.execute(events):
                sequences.setdefault(job_id, []).append(sequence)
        assert {
            row.id: (row.status, row.wanted, row.losses, row.lease_token, row.finished_at is not None) for row in rows
        } == {
            id: (twin.status, twin.wanted, twin.losses, twin.holder and twin.holder.token, twin.status in OVER)
            for id, twin in self.twins.items()
        }
        assert sequences == {row.id: list(range(1, row.events + 1)) for row in rows}


def test_the_job_machine_is_its_twin(database: Database, clock: Clock) -> None:
    bound = type("BoundMachine", (Machine,), {"database": database, "clock": clock})
    run_state_machine_as_test(
        bound,
        settings=settings(
            max_examples=25,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
