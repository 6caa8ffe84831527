"""What the server does unasked: takes jobs from dead workers' hands, and deletes what has expired.

Does not know: requests.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import anyio

from luthier.api.services import Services
from luthier.spec.errors import LuthierError

log = logging.getLogger("luthier.api")

LEASES_SECONDS = 2.0
FILES_SECONDS = 60.0


@contextlib.asynccontextmanager
async def sweeping(services: Services) -> AsyncIterator[None]:
    """Sweep for as long as the block runs."""
    async with anyio.create_task_group() as group:
        group.start_soon(_every, LEASES_SECONDS, "leases", services.leases.reclaim_expired)
        group.start_soon(_every, FILES_SECONDS, "files", services.files.sweep)
        group.start_soon(_every, FILES_SECONDS, "uploads", services.uploads.sweep)
        try:
            yield
        finally:
            group.cancel_scope.cancel()


async def _every(seconds: float, name: str, sweep: Callable[[], object]) -> None:
    """The database may be away for a while: a sweep that fails is logged, and the next one comes all the same."""
    while True:
        await anyio.sleep(seconds)
        try:
            await anyio.to_thread.run_sync(sweep)
        except LuthierError as error:
            log.warning("A sweep failed.", extra={"fields": {"sweep": name, "error": str(error)}})
        except Exception:
            log.exception("A sweep failed by our own fault.", extra={"fields": {"sweep": name}})
