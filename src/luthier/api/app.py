"""The server: every router under /v1, behind one gate, with one shape of errors.

From the outside in: Trace (logs.py: request id, log line, 500), Gate (limits.py: key, rate, body), the routes.
Does not know: what the routes do; how a process is started (cli).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import anyio
from fastapi import Depends, FastAPI

from luthier import __version__
from luthier.api import (
    aliases,
    chat,
    checks,
    completions,
    engines,
    faults,
    files,
    health,
    jobs,
    legacy,
    metrics,
    models,
    permissions,
    stored,
    uploads,
)
from luthier.api.auth import Doorkeeper, caller
from luthier.api.described import ANSWERS, describe
from luthier.api.follow import Followers
from luthier.api.form import READERS
from luthier.api.limits import Gate
from luthier.api.logs import Trace
from luthier.api.metrics import Metrics
from luthier.api.services import Services
from luthier.api.sweeps import sweeping

# Everything under /v1, in the order in which paths are tried.
ROUTERS = (
    files.router,
    uploads.router,
    checks.router,
    models.router,
    jobs.router,
    permissions.router,
    aliases.router,
    legacy.router,
    engines.router,
    chat.router,
    completions.router,
    stored.router,
)


def create_app(services: Services) -> FastAPI:
    """The application over `services`; its lifespan starts and ends the router and the sweeps."""
    app = FastAPI(
        title="Luthier",
        version=__version__,
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.services = services
    app.state.readers = anyio.CapacityLimiter(READERS)
    app.state.doorkeeper = Doorkeeper(services.keys)
    app.state.metrics = Metrics(services.jobs)
    app.state.followers = Followers(services)
    app.state.checkups = checks.Checkups(services)
    for router in ROUTERS:
        app.include_router(router, prefix="/v1", dependencies=[Depends(caller)], responses=ANSWERS)
    app.include_router(health.router, responses=ANSWERS)
    app.include_router(metrics.router, responses=ANSWERS)
    faults.install(app)
    describe(app)
    app.add_middleware(Gate, settings=services.settings, doorkeeper=app.state.doorkeeper)
    app.add_middleware(Trace, metrics=app.state.metrics, organization=services.settings.organization)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.router.start()
    try:
        async with sweeping(services), app.state.checkups.running():
            yield
    finally:
        await services.router.close()
