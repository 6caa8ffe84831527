"""Jobs for their owners: submitting, duplicates, every request in every state, lists and filters."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from luthier.spec.errors import Broken, NotFound, UserError
from luthier.store.db import Database
from luthier.store.history import History
from luthier.store.jobs import TERMINAL, TRANSITIONS, Job, Jobs, hold, move
from luthier.store.leases import Leases
from tests.store.asks import FILE, bring_to, finish, queue, run, submit
from tests.store.clock import START, Clock

REQUEST = {"model": "gpt-4o-mini", "training_file": FILE, "method": {"type": "supervised"}, "odd": "\x00\ud800"}


def messages(history: History, job: Job) -> list[str]:
    return [event.message for event in history.events(job.id, order="asc", limit=100).data]


def test_a_job_is_what_was_asked(jobs: Jobs, history: History) -> None:
    asked: dict[str, Any] = {
        "request": REQUEST,
        "model": "gpt-4o-mini",
        "training_file": FILE,
        "validation_file": "file-" + "v" * 22,
        "suffix": "../../x",
        "seed": 0,
        "metadata": {"team": "a\x00b", "": ""},
        "owner": "key_" + "k" * 24,
    }
    job, created = jobs.submit(**asked)
    assert created
    assert {name: getattr(job, name) for name in asked} == asked
    assert (job.status, job.wanted, job.kind) == ("validating_files", "run", "modern")
    assert (job.created_at, job.updated_at, job.started_at, job.finished_at) == (START, START, None, None)
    assert (job.error, job.hyperparameters, job.fine_tuned_model, job.result_files) == (None, None, None, [])
    assert (job.trained_tokens, job.run_folder, job.worker, job.losses) == (None, None, None, 0)
    assert job.id.startswith("ftjob-") and jobs.get(job.id) == job
    assert messages(history, job) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {FILE} and validation file: file-{'v' * 22}",
    ]


def test_a_legacy_job_has_its_own_id_and_words(jobs: Jobs, leases: Leases, history: History) -> None:
    job, lease = run(jobs, leases, kind="legacy")
    finish(leases, lease)
    assert job.id.startswith("ft-")
    assert messages(history, job) == [
        f"Created fine-tune: {job.id}",
        "Fine-tune enqueued. Queue number: 0",
        "Fine-tune started",
        "Uploaded model: ft:m:us::12345678",
        f"Uploaded result file: {FILE}",
        "Fine-tune succeeded",
    ]


def test_a_seed_is_chosen_once(jobs: Jobs) -> None:
    job = submit(jobs)
    assert 0 <= job.seed < 2**31 and jobs.get(job.id).seed == job.seed
    assert len({submit(jobs).seed for _ in range(5)}) > 1


@pytest.mark.parametrize("param", ["training_file", "validation_file"])
def test_files_are_named_by_ids(jobs: Jobs, param: str) -> None:
    with pytest.raises(NotFound) as caught:
        submit(jobs, **{param: "../../../etc/passwd"})
    assert caught.value.param == param
    assert jobs.list().data == ()


def test_a_repeated_request_is_one_job_for_a_while(jobs: Jobs, clock: Clock) -> None:
    ask: dict[str, Any] = {"request": REQUEST, "model": "m", "training_file": FILE, "owner": "key_a"}
    first, created = jobs.submit(**ask)
    clock.forward(20)
    assert created and jobs.submit(**ask, retry_within=30) == (first, False)
    again = {**ask, "request": dict(reversed(REQUEST.items()))}
    assert jobs.submit(**again, retry_within=30) == (first, False)
    assert jobs.submit(**{**ask, "owner": "key_b"}, retry_within=30)[1]
    assert jobs.submit(**{**ask, "request": {**REQUEST, "seed": 1}}, retry_within=30)[1]
    assert jobs.submit(**ask, kind="legacy", retry_within=30)[1]
    clock.forward(11)
    assert jobs.submit(**ask, retry_within=30)[1]
    assert jobs.submit(**ask)[1]
    assert len(jobs.list().data) == 6


def test_retries_at_the_same_moment_are_one_job(jobs: Jobs) -> None:
    got: list[tuple[Job, bool]] = []
    ready = threading.Barrier(8)

    def ask() -> None:
        ready.wait()
        got.append(jobs.submit(request=REQUEST, model="m", training_file=FILE, retry_within=30))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({job.id for job, _ in got}) == 1
    assert [created for _, created in got].count(True) == 1


# What each request comes to in each state: (status, wanted) after it, or None where it is refused.
ASKED: dict[str, dict[str, tuple[str, str] | None]] = {
    "request_cancel": {
        "validating_files": ("cancelled", "cancel"),
        "queued": ("cancelled", "cancel"),
        "running": ("running", "cancel"),
        "paused": ("cancelled", "cancel"),
    },
    "request_pause": {
        "validating_files": None,
        "queued": ("paused", "pause"),
        "running": ("running", "pause"),
        "paused": ("paused", "pause"),
    },
    "request_resume": {
        "validating_files": ("validating_files", "run"),
        "queued": ("queued", "run"),
        "running": ("running", "run"),
        "paused": ("queued", "run"),
    },
}


@pytest.mark.parametrize("ask", ASKED)
@pytest.mark.parametrize("status", TRANSITIONS)
def test_every_request_in_every_state(jobs: Jobs, leases: Leases, ask: str, status: str) -> None:
    job = bring_to(jobs, leases, status)
    assert job.status == status
    wanted = ASKED[ask].get(status)
    if wanted is None:
        with pytest.raises(UserError):
            getattr(jobs, ask)(job.id)
        assert jobs.get(job.id) == job
        return
    after = getattr(jobs, ask)(job.id)
    assert (after.status, after.wanted) == wanted
    assert (after.finished_at is not None) == (after.status in TERMINAL)
    if after.status in TERMINAL:
        with pytest.raises(UserError, match="has already been cancelled"):
            getattr(jobs, ask)(job.id)
    else:
        assert getattr(jobs, ask)(job.id) == after


def test_a_job_being_cancelled_takes_no_other_request(jobs: Jobs, leases: Leases) -> None:
    job, _ = run(jobs, leases)
    asked = jobs.request_cancel(job.id)
    for ask in (jobs.request_pause, jobs.request_resume):
        with pytest.raises(UserError, match="is being cancelled"):
            ask(job.id)
    with pytest.raises(UserError, match="is being cancelled") as refused:
        jobs.delete(job.id)
    assert refused.value.hint == "Its worker has not let go yet: try again in a few seconds."
    assert jobs.request_cancel(job.id) == asked


@pytest.mark.parametrize("start", TRANSITIONS)
def test_the_table_of_transitions_is_the_law(jobs: Jobs, leases: Leases, database: Database, start: str) -> None:
    """Every pair of states: passed when the table has it, refused with nothing changed when it has not."""
    job = bring_to(jobs, leases, start)
    for to in TRANSITIONS:
        with database.engine.connect() as connection, connection.begin() as undone:
            row = hold(connection, job.id)
            if to in TRANSITIONS[job.status]:
                move(connection, row, to, START)
                assert hold(connection, job.id).status == to
            else:
                with pytest.raises(Broken, match=f"is {start} and cannot become {to}"):
                    move(connection, row, to, START)
                assert hold(connection, job.id) == row
            undone.rollback()


def test_the_story_of_a_job(jobs: Jobs, leases: Leases, history: History, clock: Clock) -> None:
    job, lease = run(jobs, leases)
    jobs.request_pause(job.id)
    clock.forward(5)
    leases.release(lease)
    jobs.request_resume(job.id)
    clock.forward(5)
    _, lease = leases.claim("worker-2", 60) or pytest.fail("nothing waits")
    done = finish(leases, lease)
    assert (done.started_at, done.finished_at, done.status) == (START, START + 10, "succeeded")
    assert (done.fine_tuned_model, done.result_files, done.trained_tokens) == ("ft:m:us::12345678", [FILE], 7)
    assert messages(history, job) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {FILE}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Fine-tuning job paused",
        "Fine-tuning job put back into the queue",
        "Fine-tuning job resumed",
        "New fine-tuned model created: ft:m:us::12345678",
        "The job has successfully completed",
    ]
    page = history.events(job.id, limit=100)
    assert [event.sequence for event in page.data] == list(range(9, 0, -1))
    assert all(event.id.startswith("ftevent-") for event in page.data)


def test_lists_filter_by_owner_kind_and_metadata(jobs: Jobs) -> None:
    first = submit(jobs, metadata={"team": "red", "run": "1"}, owner="key_a")
    second = submit(jobs, metadata={"team": "red", "run": "2"}, owner="key_b")
    third = submit(jobs, metadata={}, kind="legacy")
    fourth = submit(jobs)
    assert jobs.list().data == (fourth, third, second, first)
    assert jobs.list(order="asc").data == (first, second, third, fourth)
    assert jobs.list(metadata={"team": "red"}).data == (second, first)
    assert jobs.list(metadata={"team": "red", "run": "1"}).data == (first,)
    assert jobs.list(metadata={"team": "blue"}).data == ()
    assert jobs.list(metadata={"team": ""}).data == ()
    assert jobs.list(without_metadata=True).data == (fourth,)
    assert jobs.list(owner="key_a").data == (first,)
    assert jobs.list(kind="legacy").data == (third,)


def test_a_long_metadata_value_fits(jobs: Jobs) -> None:
    pairs = {"\\" * 64: "\\" * 512, "\ud800" * 64: "文" * 512}
    job = submit(jobs, metadata=pairs)
    assert jobs.list(metadata=pairs).data == (job,)


def test_counts(jobs: Jobs, leases: Leases) -> None:
    finish(leases, run(jobs, leases)[1])
    queue(jobs, leases)
    submit(jobs)
    assert jobs.counts() == {
        "validating_files": 1, "queued": 1, "running": 0, "paused": 0, "succeeded": 1, "failed": 0, "cancelled": 0
    }  # fmt: skip


def test_a_job_that_is_over_can_be_forgotten(jobs: Jobs, leases: Leases, history: History) -> None:
    older = submit(jobs)
    jobs.request_cancel(older.id)
    job, lease = run(jobs, leases, metadata={"a": "b"})
    leases.add_checkpoint(lease, step=1, model="x", metrics={})
    with pytest.raises(UserError, match="is running"):
        jobs.delete(job.id)
    finish(leases, lease)
    jobs.delete(job.id)
    for ask in (jobs.get, jobs.delete, history.events, history.checkpoints, history.last_offset, jobs.request_cancel):
        with pytest.raises(NotFound):
            ask(job.id)
    assert [found.id for found in jobs.list(after=job.id).data] == [older.id]


@pytest.mark.parametrize("id", ["ftjob-" + "a" * 24, "../../x", "ftjob-../../../../etc/passw", "", "file-" + "a" * 24])
def test_unknown_jobs(jobs: Jobs, history: History, id: str) -> None:
    asks = [jobs.get, jobs.request_cancel, jobs.request_pause, jobs.request_resume, jobs.delete, history.events]
    for ask in asks:
        with pytest.raises(NotFound):
            ask(id)
