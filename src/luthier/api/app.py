"""The server: every router under /v1, behind one gate, with one shape of errors.

Does not know: what the routes do; how a process is started (cli).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI

from luthier.api import faults
from luthier.api.auth import caller
from luthier.api.limits import Gate
from luthier.api.services import Services

ROUTERS = (
    "files", "uploads", "models", "jobs", "permissions", "legacy", "engines", "chat", "completions", "stored",
)  # fmt: skip


def create_app(services: Services) -> FastAPI:
    """The application over `services`; its lifespan starts and ends the router."""
    app = FastAPI(title="Luthier", lifespan=_lifespan, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.state.services = services
    for name in ROUTERS:
        try:
            module: Any = importlib.import_module(f"luthier.api.{name}")
        except ModuleNotFoundError:
            continue
        app.include_router(module.router, prefix="/v1", dependencies=[Depends(caller)])
    faults.install(app)
    app.add_middleware(Gate, services=services)
    return app


@contextlib.asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    services: Services = app.state.services
    await services.router.start()
    try:
        yield
    finally:
        await services.router.close()
