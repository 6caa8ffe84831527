"""A server for the tests: a home of its own on SQLite, a tiny base, and replicas that are played unless asked for."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi.testclient import TestClient

from luthier.api.app import create_app
from luthier.api.heads import BoundedHeads
from luthier.api.services import Services
from luthier.settings import Settings
from luthier.spec.bases import Bases
from luthier.spec.serving import Ask, Part, Token
from luthier.store.aliases import Aliases
from luthier.store.completions import Completions
from luthier.store.db import Database
from luthier.store.files import Files
from luthier.store.history import History
from luthier.store.jobs import Jobs
from luthier.store.keys import Keys
from luthier.store.leases import Leases
from luthier.store.models import Models
from luthier.store.uploads import Uploads
from tests import tiny as tiny_models

BASE = "tiny"


class FakeRouter:
    """Plays serve.router.Router: answers every ask with `script` (token ids), one a Part, then ends as `finish` says.

    `asks` holds what it was asked; `closed` the ids of asks whose iterator was closed before its end.
    """

    def __init__(self) -> None:
        self.script: list[int] = [72, 73, 74]
        self.asks: list[tuple[str, Ask]] = []
        self.closed: list[str] = []
        self.started = False

    async def start(self) -> None:
        self.started = True

    async def close(self) -> None:
        self.started = False

    def ready(self, base: str) -> bool:
        return self.started

    async def generate(self, base: str, ask: Ask) -> AsyncIterator[Part]:
        self.asks.append((base, ask))
        whole = False
        try:
            script = self.script[: ask.max_tokens]
            for count, token in enumerate(script, 1):
                if token in ask.stop_ids:
                    whole = True
                    yield Part(id=ask.id, generated=count, finish="stop")
                    return
                yield Part(id=ask.id, tokens=[Token(id=token, logprob=-0.5, top=[])], generated=count)
            whole = True
            yield Part(id=ask.id, generated=len(script), finish="length")
        finally:
            if not whole:
                self.closed.append(ask.id)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokenizer and chat template of the tiny base; no weights: the replica is played."""
    return tiny_models.make_tokenizer(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Override it in a test file to change the configuration."""
    return Settings(home=tmp_path / "home", bases=BASE, hub="off")


@pytest.fixture
def router() -> Any:
    """Override it in a test file to use real replicas."""
    return FakeRouter()


@pytest.fixture
def services(settings: Settings, base_folder: Path, router: Any) -> Iterator[Services]:
    """An empty, migrated store in a new home, with the base `tiny` on offer."""
    database = Database(settings.home)
    database.migrate()
    yield make_services(settings, database, router, {BASE: base_folder})
    database.close()


def make_services(settings: Settings, database: Database, router: Any, folders: dict[str, Path]) -> Services:
    files = Files(database)
    return Services(
        settings=settings,
        database=database,
        files=files,
        uploads=Uploads(database, files),
        jobs=Jobs(database),
        leases=Leases(database),
        history=History(database),
        models=Models(database),
        aliases=Aliases(database),
        keys=Keys(database),
        completions=Completions(database),
        router=router,
        bases=Bases(sources={name: str(folder) for name, folder in folders.items()}, default=next(iter(folders))),
        folders=folders,
    )


@pytest.fixture
def key(services: Services) -> str:
    """The token of a user's key."""
    return services.keys.create("test", "user")[1]


@pytest.fixture
def admin_key(services: Services) -> str:
    return services.keys.create("admin", "admin")[1]


@pytest.fixture
def client(services: Services, key: str) -> Iterator[TestClient]:
    """Speaks to the app in this process, with a user's key."""
    with TestClient(create_app(services), headers={"Authorization": f"Bearer {key}"}) as client:
        yield client


@dataclass(frozen=True)
class Live:
    """A server on a port. `base_url` ends in /v1."""

    base_url: str
    key: str


@contextlib.contextmanager
def serving(services: Services) -> Iterator[str]:
    """The app over `services` on a free port, in a thread of this process; gives its URL without /v1."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    config = uvicorn.Config(create_app(services), http=BoundedHeads, log_config=None, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listening.close()


@pytest.fixture
def live(services: Services, key: str) -> Iterator[Live]:
    """A real server for real clients."""
    with serving(services) as url:
        yield Live(f"{url}/v1", key)
