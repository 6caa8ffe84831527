"""What every route may use: the store, the replicas and the configuration, made once when the server starts.

Does not know: routes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fastapi import Request  # at run time: FastAPI reads the annotation of services()

from luthier.settings import Settings
from luthier.spec.bases import Bases
from luthier.store.aliases import Aliases
from luthier.store.db import Database
from luthier.store.files import Files
from luthier.store.history import History
from luthier.store.jobs import Jobs
from luthier.store.keys import Keys
from luthier.store.leases import Leases
from luthier.store.models import Models
from luthier.store.uploads import Uploads

if TYPE_CHECKING:
    from luthier.serve.router import Router
    from luthier.store.completions import Completions


@dataclass(frozen=True, slots=True)
class Services:
    """`folders`: public name of a base -> its local folder (weights, tokenizer, template)."""

    settings: Settings
    database: Database
    files: Files
    uploads: Uploads
    jobs: Jobs
    leases: Leases
    history: History
    models: Models
    aliases: Aliases
    keys: Keys
    completions: Completions
    router: Router
    bases: Bases
    folders: dict[str, Path]


async def services(request: Request) -> Services:
    """The services of the app that got this request; the dependency of every route. A coroutine, as a plain function
    would be called in a thread, and two changes of thread cost more than the rest of a short answer."""
    return cast(Services, request.app.state.services)
