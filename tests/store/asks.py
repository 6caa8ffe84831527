"""Short ways to ask for jobs and to bring one into any state."""

from __future__ import annotations

from typing import Any

from luthier.store.jobs import Job, Jobs
from luthier.store.leases import Lease, Leases

FILE = "file-" + "t" * 24
LEASE = 60.0


def submit(jobs: Jobs, **changes: Any) -> Job:
    asked = {"request": {"model": "m"}, "model": "m", "training_file": FILE, **changes}
    return jobs.submit(**asked)[0]


def queue(jobs: Jobs, leases: Leases, **changes: Any) -> Job:
    """A job in the queue. Takes the oldest that is to be validated: let there be no other."""
    job = submit(jobs, **changes)
    claimed = leases.claim("validator", LEASE, "validate")
    assert claimed is not None and claimed[0].id == job.id
    return leases.validated(claimed[1])


def run(jobs: Jobs, leases: Leases, **changes: Any) -> tuple[Job, Lease]:
    """A running job and its lease. Let there be no other in the queue."""
    job = queue(jobs, leases, **changes)
    claimed = leases.claim("worker-1", LEASE)
    assert claimed is not None and claimed[0].id == job.id
    return claimed


def finish(leases: Leases, lease: Lease) -> Job:
    return leases.finish(lease, fine_tuned_model="ft:m:us::12345678", result_files=[FILE], trained_tokens=7)


def bring_to(jobs: Jobs, leases: Leases, status: str, kind: str = "modern") -> Job:
    """A new job in that state."""
    if status == "validating_files":
        return submit(jobs, kind=kind)
    if status == "queued":
        return queue(jobs, leases, kind=kind)
    job, lease = run(jobs, leases, kind=kind)
    if status == "running":
        return job
    if status == "paused":
        jobs.request_pause(job.id)
        return leases.release(lease)
    if status == "cancelled":
        jobs.request_cancel(job.id)
        return leases.release(lease)
    if status == "failed":
        return leases.fail(lease, code="c", message="It broke.")
    assert status == "succeeded"
    return finish(leases, lease)
