"""What the data doctor finds in a job's files comes as events, before the job queues or beside it."""

from __future__ import annotations

import time
from typing import Any

import pytest

from luthier.data import checkup
from luthier.work import findings
from luthier.work.findings import told
from tests.data.test_doctor import row
from tests.work.ask import pairs
from tests.work.conftest import Bench

ROWS = [row(n) for n in range(12)] + [row(3), row(20, "write to bob@firm.org")]


def finding(kind: str, severity: str = "warning", **more: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "severity": severity,
        "count": 30,
        "rows": list(range(1, 21)),
        "message": f"30 rows: {kind}",
        "why": "It matters.",
        "fix": None,
        "file": "t.jsonl",
        "details": ["a detail"] * 20,
        **more,
    }


def test_findings_come_before_the_queue(bench: Bench) -> None:
    job = bench.submit(ROWS)
    assert bench.worker().once("validate", bench.stop)
    assert bench.jobs.get(job.id).status == "queued"
    events = bench.events(job)
    warned = [event for event in events if event.level == "warn"]
    assert [(event.data["kind"], event.data["count"], event.data["rows"]) for event in warned] == [
        ("personal_data", 1, [14]),
        ("duplicate", 1, [13]),
    ]
    assert warned[1].message == (
        "Training file: 1 row: repeats an earlier row (row 13). Repeated rows weigh more than the others and are "
        "learnt by heart. The first: repeats row 4."
    )
    assert warned[1].data["file_id"] == job.training_file and "--dedupe exact" in warned[1].data["fix"]
    assert "bob@firm" not in "".join(event.message for event in events)
    assert events[-1].level == "info" and events[-1].sequence == len(events)


def test_the_validation_file_is_compared(bench: Bench) -> None:
    job = bench.submit([row(n) for n in range(12)], validation=[row(3), row(50)])
    bench.worker().once("validate", bench.stop)
    (event,) = [event for event in bench.events(job) if event.level == "warn"]
    assert event.message.startswith("Validation file: 1 row: validation prompt that is also in training (row 1).")
    assert event.data["file_id"] == job.validation_file


def test_older_jobs_hear_it_too(bench: Bench) -> None:
    job = bench.submit([*pairs(12), pairs(1)[0]], kind="legacy")
    bench.worker().once("validate", bench.stop)
    told = [event.message for event in bench.events(job) if event.level == "warn"]
    assert any("repeats an earlier row (row 13)" in message for message in told)


def test_a_job_does_not_wait(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "SECONDS", 0.0)
    job = bench.submit(ROWS)
    worker = bench.worker()
    worker.once("validate", bench.stop)
    assert bench.jobs.get(job.id).status == "queued"
    assert not [event for event in bench.events(job) if event.level == "warn"]
    deadline = time.monotonic() + 60
    while worker._late:
        assert time.monotonic() < deadline
        worker.once("validate", bench.stop)
    assert [event.data["kind"] for event in bench.events(job) if event.level == "warn"] == [
        "personal_data",
        "duplicate",
    ]


def test_what_was_looked_at_is_not_looked_at_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.submit(ROWS)
    bench.worker().once("validate", bench.stop)
    monkeypatch.setattr(checkup, "command", lambda: ["/nowhere"])
    second = bench.submit(ROWS)
    bench.worker().once("validate", bench.stop)
    said = [[e.message for e in bench.events(job) if e.level == "warn"] for job in (first, second)]
    assert said[0] == said[1] and len(said[0]) == 2


def test_a_look_that_fails_fails_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkup, "command", lambda: ["sh", "-c", "exit 1"])
    job = bench.submit(ROWS)
    bench.worker().once("validate", bench.stop)
    assert bench.jobs.get(job.id).status == "queued"
    assert any(message.startswith("The files were not searched for repeats") for message in bench.said(job))


def test_events_are_few_and_short(bench: Bench) -> None:
    job = bench.submit()
    many = [finding(f"kind{n}", details=["x" * 5000]) for n in range(30)] + [finding("odd", "note")] * 5
    drafts = told(many, {"t.jsonl": job.training_file}, job)
    assert len(drafts) == findings.MOST_TOLD + 1
    assert max(len(draft.message) for draft in drafts) <= findings.LONGEST
    assert [draft.level for draft in drafts] == ["warn"] * findings.MOST_TOLD + ["info"]
    assert drafts[0].message.startswith("Training file: 30 rows: kind0 (rows 1, 2, 3, 4, 5, ...). It matters.")
    assert drafts[-1].data["findings"][-1] == {"kind": "odd", "count": 30}
    assert len({(draft.offset, draft.part) for draft in drafts}) == len(drafts)
    assert told([], {}, job) == []
