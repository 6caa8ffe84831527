"""Whether the server lives (/healthz) and can work (/readyz: the database answers, in this version's form).

Does not know: whether a model is loaded; replicas start when they are asked.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from luthier.api.errors import ApiError
from luthier.api.services import Services, services

router = APIRouter(tags=["health"])


@router.get("/healthz", summary="Whether the process answers")
async def healthz() -> dict[str, str]:
    return {"status": "ok"}


@router.get("/readyz", summary="Whether requests can be served")
def readyz(serve: Annotated[Services, Depends(services)]) -> dict[str, str]:
    """Raises NotNow (503) when the database does not answer."""
    if not serve.database.is_current():
        raise ApiError(
            503, "The database is not in this version's form: run the migrations.", type="server_error", code="unready"
        )
    return {"status": "ok"}
