"""Jobs for workers: one winner, beats, lost leases, dead workers, events and checkpoints that can be sent twice."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.exc import StatementError

from luthier.spec.errors import Broken, NotFound, UserError
from luthier.store.db import Database
from luthier.store.history import WORKER_LOST, EventDraft, History
from luthier.store.jobs import Job, Jobs
from luthier.store.leases import MOST_LOSSES, Lease, LeaseLost, Leases
from tests.store import children
from tests.store.asks import LEASE, bring_to, finish, queue, run, submit
from tests.store.clock import START, Clock

# Every write of a worker.
WRITES: dict[str, Callable[[Leases, Lease], Any]] = {
    "beat": lambda leases, lease: leases.beat(lease),
    "record": lambda leases, lease: leases.record(lease, trained_tokens=1),
    "append_events": lambda leases, lease: leases.append_events(lease, [EventDraft("m", 1)]),
    "add_checkpoint": lambda leases, lease: leases.add_checkpoint(lease, step=1, model="x", metrics={}),
    "drop_checkpoint": lambda leases, lease: leases.drop_checkpoint(lease, 1),
    "validated": lambda leases, lease: leases.validated(lease),
    "release": lambda leases, lease: leases.release(lease),
    "finish": lambda leases, lease: finish(leases, lease),
    "fail": lambda leases, lease: leases.fail(lease, code="c", message="m"),
}


def claim(leases: Leases, worker: str = "w") -> tuple[Job, Lease]:
    claimed = leases.claim(worker, LEASE)
    assert claimed is not None
    return claimed


def test_postgresql_never_waits_for_the_rest_of_many_rows(database: Database, jobs: Jobs, leases: Leases) -> None:
    """A worker that was stopped between them held its job for ever: no time limit of PostgreSQL's counts there."""
    _, lease = run(jobs, leases)
    sent: list[str] = []
    event.listen(database.engine, "before_cursor_execute", lambda *told: sent.append(told[2]))
    assert leases.append_events(lease, [EventDraft(f"m{n}", n) for n in range(3)]) == 3
    (inserted,) = (statement for statement in sent if statement.startswith("INSERT INTO job_events"))
    assert database.is_sqlite or inserted.partition("VALUES")[2].count("), (") == 2


def test_first_come_first_served(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    assert leases.claim("w", LEASE) is None
    queued = [queue(jobs, leases).id for _ in range(3)]
    got = []
    for _ in queued:
        clock.forward(1)
        got.append(claim(leases, "w")[0])
    assert [job.id for job in got] == queued
    assert [(job.status, job.worker, job.started_at) for job in got] == [("running", "w", START + n) for n in (1, 2, 3)]
    assert leases.claim("w", LEASE) is None


def test_validating_is_claimed_by_itself(jobs: Jobs, leases: Leases) -> None:
    job = submit(jobs)
    assert leases.claim("w", LEASE) is None
    claimed = leases.claim("v", LEASE, "validate")
    assert claimed is not None and claimed[0].status == "validating_files" and claimed[0].id == job.id
    assert leases.claim("v", LEASE, "validate") is None
    failed = leases.fail(claimed[1], code="invalid_training_file", message="Line 3 is no JSON.", param="training_file")
    assert failed.error == {"code": "invalid_training_file", "message": "Line 3 is no JSON.", "param": "training_file"}
    assert failed.status == "failed" and failed.finished_at == START


def test_a_running_job_is_not_validated_again(jobs: Jobs, leases: Leases) -> None:
    _, lease = run(jobs, leases)
    with pytest.raises(Broken, match="were validated before"):
        leases.validated(lease)


def test_eight_threads_claim_a_hundred_jobs_each_once(jobs: Jobs, leases: Leases) -> None:
    wanted = sorted(queue(jobs, leases).id for _ in range(100))
    got: list[str] = []
    ready = threading.Barrier(8)

    def work(worker: str) -> None:
        ready.wait()
        while (claimed := leases.claim(worker, LEASE)) is not None:
            got.append(claimed[0].id)

    threads = [threading.Thread(target=work, args=(f"w{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == wanted
    assert jobs.counts()["running"] == 100


def test_four_processes_claim_each_job_once(
    jobs: Jobs, leases: Leases, place: tuple[Path, str], tmp_path: Path
) -> None:
    wanted = sorted(queue(jobs, leases).id for _ in range(40))
    notes = [tmp_path / f"notes-{n}" for n in range(4)]
    calls = [(children.claim_all, (*place, note.name, note)) for note in notes]
    assert children.run_all(calls) == [0] * 4
    assert sorted("".join(note.read_text() for note in notes).split()) == wanted


def test_a_beat_extends_and_tells_what_is_wanted(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    job, lease = run(jobs, leases)
    for _ in range(5):
        clock.forward(LEASE - 1)
        assert leases.reclaim_expired() == ()
        assert leases.beat(lease) == "run"
    jobs.request_pause(job.id)
    assert leases.beat(lease) == "pause"
    jobs.request_resume(job.id)
    assert leases.beat(lease) == "run"
    jobs.request_pause(job.id)
    jobs.request_cancel(job.id)
    assert leases.beat(lease) == "cancel"


@pytest.mark.parametrize("write", WRITES)
def test_a_lost_lease_changes_nothing(jobs: Jobs, leases: Leases, history: History, clock: Clock, write: str) -> None:
    job, old = run(jobs, leases)
    clock.forward(LEASE)
    assert [job.status for job in leases.reclaim_expired()] == ["queued"]
    for moment in ("in the queue", "with another worker"):
        before = jobs.get(job.id), history.events(job.id).data, history.checkpoints(job.id).data
        with pytest.raises(LeaseLost) as caught:
            WRITES[write](leases, old)
        assert caught.value.code == "lease_lost", moment
        assert (jobs.get(job.id), history.events(job.id).data, history.checkpoints(job.id).data) == before
        if moment == "in the queue":
            claim(leases, "worker-2")


def test_an_expired_lease_that_nobody_took_still_holds(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    _, lease = run(jobs, leases)
    clock.forward(LEASE * 10)
    assert leases.beat(lease) == "run"
    assert leases.reclaim_expired() == ()


def test_dead_workers_jobs_go_where_their_owner_wants_them(
    jobs: Jobs, leases: Leases, history: History, clock: Clock
) -> None:
    run_on, _ = run(jobs, leases)
    pause, _ = run(jobs, leases)
    cancel, _ = run(jobs, leases)
    validating = submit(jobs)
    leases.claim("v", LEASE, "validate")
    jobs.request_pause(pause.id)
    jobs.request_cancel(cancel.id)
    clock.forward(LEASE)
    found = {job.id: (job.status, job.losses, job.worker) for job in leases.reclaim_expired()}
    assert found == {
        run_on.id: ("queued", 1, None),
        pause.id: ("paused", 1, None),
        cancel.id: ("cancelled", 1, None),
        validating.id: ("validating_files", 1, None),
    }
    told = history.events(run_on.id, limit=2).data
    assert [(event.message, event.level) for event in told] == [
        ("Fine-tuning job put back into the queue", "info"),
        (WORKER_LOST, "warn"),
    ]
    assert leases.claim("v", LEASE, "validate") is not None
    assert claim(leases)[0].id == run_on.id


def test_a_job_that_kills_its_workers_fails(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    job, _ = run(jobs, leases)
    for loss in range(1, MOST_LOSSES):
        clock.forward(LEASE)
        assert [found.losses for found in leases.reclaim_expired()] == [loss]
        claim(leases, "worker-x")
    clock.forward(LEASE)
    (failed,) = leases.reclaim_expired()
    assert (failed.id, failed.status) == (job.id, "failed")
    assert failed.error == {
        "code": "worker_lost",
        "message": "3 workers in a row were lost with this job, the last one worker-x.",
        "param": None,
    }


def test_a_checkpoint_forgives_the_losses(jobs: Jobs, leases: Leases, clock: Clock) -> None:
    job, _ = run(jobs, leases)
    for step in range(MOST_LOSSES * 2):
        clock.forward(LEASE)
        leases.reclaim_expired()
        _, lease = claim(leases)
        leases.add_checkpoint(lease, step=step, model=f"m:ckpt-step-{step}", metrics={})
    assert jobs.get(job.id).status == "running"


def test_release_puts_back_in_the_old_place(jobs: Jobs, leases: Leases) -> None:
    first, lease = run(jobs, leases)
    queue(jobs, leases)
    assert leases.release(lease).status == "queued"
    assert claim(leases)[0].id == first.id


def test_a_pause_that_was_taken_back_goes_on(jobs: Jobs, leases: Leases) -> None:
    job, lease = run(jobs, leases)
    jobs.request_pause(job.id)
    jobs.request_resume(job.id)
    assert leases.release(lease).status == "queued"


@pytest.mark.parametrize("end", ["finish", "fail", "release"])
def test_what_is_to_be_cancelled_ends_so(jobs: Jobs, leases: Leases, end: str) -> None:
    job, lease = run(jobs, leases)
    jobs.request_cancel(job.id)
    ended = WRITES[end](leases, lease)
    assert (ended.status, ended.fine_tuned_model, ended.error, ended.result_files) == ("cancelled", None, None, [])
    assert ended.finished_at == START


@pytest.mark.parametrize("end", ["finish", "fail"])
def test_an_end_is_an_end_though_a_pause_was_wanted(jobs: Jobs, leases: Leases, end: str) -> None:
    job, lease = run(jobs, leases)
    jobs.request_pause(job.id)
    assert WRITES[end](leases, lease).status in ("succeeded", "failed")
    for write in WRITES.values():
        with pytest.raises(LeaseLost):
            write(leases, lease)


def test_cancelling_takes_the_job_from_its_validator(jobs: Jobs, leases: Leases) -> None:
    job = submit(jobs)
    claimed = leases.claim("v", LEASE, "validate")
    assert claimed is not None
    assert jobs.request_cancel(job.id).status == "cancelled"
    with pytest.raises(LeaseLost):
        leases.validated(claimed[1])


def test_what_a_worker_writes_down(jobs: Jobs, leases: Leases, database: Database, clock: Clock) -> None:
    job, lease = run(jobs, leases)
    folder = database.home / "runs" / job.id
    clock.forward(3)
    leases.record(lease, hyperparameters={"n_epochs": 3}, run_folder=folder, estimated_finish=START + 60)
    leases.record(lease, trained_tokens=12)
    found = jobs.get(job.id)
    assert (found.hyperparameters, found.run_folder, found.trained_tokens) == ({"n_epochs": 3}, folder, 12)
    assert (found.estimated_finish, found.updated_at) == (START + 60, START + 3)
    with pytest.raises(UserError, match="is not inside"):
        leases.record(lease, run_folder=database.home / ".." / "elsewhere")
    assert finish(leases, lease).estimated_finish is None


def test_events_sent_twice_are_there_once(jobs: Jobs, leases: Leases, history: History) -> None:
    job, lease = run(jobs, leases)
    assert history.last_offset(job.id) == 0
    sent = [
        EventDraft("Step 1/9: training loss=0.50", 100, type="metrics", data={"step": 1}, created_at=START - 5),
        EventDraft("watch out", 200, level="warn"),
        EventDraft("of the same line", 200, part=1),
    ]
    assert leases.append_events(lease, sent[:2]) == 2
    assert leases.append_events(lease, sent) == 1
    assert leases.append_events(lease, [*sent, *sent]) == 0
    assert leases.append_events(lease, []) == 0
    found = history.events(job.id, order="asc", limit=100).data[4:]
    assert [
        (event.sequence, event.message, event.level, event.type, event.data, event.created_at) for event in found
    ] == [
        (5, "Step 1/9: training loss=0.50", "info", "metrics", {"step": 1}, START - 5),
        (6, "watch out", "warn", "message", None, START),
        (7, "of the same line", "info", "message", None, START),
    ]
    assert history.last_offset(job.id) == 200


def test_many_events_at_once_and_odd_text(jobs: Jobs, leases: Leases, history: History) -> None:
    job, lease = run(jobs, leases)
    drafts = [EventDraft(f"\x00{n}\ud800", n, data={"text": "\x00"}) for n in range(1, 2001)]
    assert leases.append_events(lease, drafts) == 2000
    assert leases.append_events(lease, drafts) == 0
    newest = history.events(job.id, limit=1).data[0]
    assert (newest.sequence, newest.message, newest.data) == (2004, "\x002000\ud800", {"text": "\x00"})


def test_numbers_that_json_lacks_are_refused_whole(jobs: Jobs, leases: Leases, history: History) -> None:
    job, lease = run(jobs, leases)
    before = history.events(job.id).data
    with pytest.raises(StatementError, match="not JSON compliant"):
        leases.append_events(lease, [EventDraft("good", 1), EventDraft("bad", 2, data={"loss": float("nan")})])
    assert history.events(job.id).data == before
    assert leases.append_events(lease, [EventDraft("good", 1)]) == 1


def test_checkpoints(jobs: Jobs, leases: Leases, history: History) -> None:
    job, lease = run(jobs, leases)
    made = [leases.add_checkpoint(lease, step=n, model=f"m:ckpt-step-{n}", metrics={"step": n}) for n in (5, 10, 15)]
    assert leases.add_checkpoint(lease, step=5, model="other", metrics={}) == made[0]
    assert history.checkpoints(job.id).data == tuple(reversed(made))
    first = history.checkpoints(job.id, limit=1)
    assert first.has_more
    leases.drop_checkpoint(lease, 15)
    leases.drop_checkpoint(lease, 15)
    assert history.checkpoints(job.id, after=first.data[0].id).data == (made[1], made[0])
    with pytest.raises(NotFound):
        history.checkpoints(job.id, after="ftckpt_unknown")


def test_a_cursor_belongs_to_its_job(jobs: Jobs, leases: Leases, history: History) -> None:
    job, other = bring_to(jobs, leases, "succeeded"), submit(jobs)
    cursor = history.events(job.id).data[0].id
    with pytest.raises(NotFound):
        history.events(other.id, after=cursor)
