"""Holding on to a job while it is worked on: a thread that beats for the lease and hears what the owner wants.

The thread beats whatever the worker does at the moment (hashing a model takes minutes), and only while the worker's
process lives. A database that does not answer is forgiven until the lease must have ended.
Does not know: what is done with the job.
"""

from __future__ import annotations

import logging
import threading
import time
from types import TracebackType

from luthier.spec.errors import NotNow
from luthier.store.jobs import Job, Wanted
from luthier.store.leases import Lease, LeaseLost, Leases

logger = logging.getLogger("luthier.work")


class Hold:
    """`wanted` is what the job's owner wants of it; `lost` says that it is another's, or soon may be: write no more."""

    def __init__(self, leases: Leases, lease: Lease, job: Job, every: float) -> None:
        self.leases, self.lease, self.every = leases, lease, every
        self.wanted: Wanted = job.wanted
        self.lost = False
        self._heard = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name=f"beat {lease.job_id}", daemon=True)

    def __enter__(self) -> Hold:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def check(self) -> None:
        """Raises LeaseLost when the job is no longer ours."""
        if self.lost:
            raise LeaseLost(f"The job {self.lease.job_id} is no longer held by this worker.")

    def _beat_on(self) -> None:
        try:
            self._beats()
        finally:  # whatever ended it: a job for which nobody beats is soon another's
            self.lost = not self._over.is_set()

    def _beats(self) -> None:
        while not self._over.wait(self.every):
            begun = time.monotonic()
            try:
                self.wanted = self.leases.beat(self.lease)
                self._heard = begun
            except LeaseLost:
                return
            except NotNow as error:
                logger.warning("%s: %s", self.lease.job_id, error)
                if time.monotonic() - self._heard >= self.lease.seconds:
                    return
