"""A store with a worker's view of it: a tiny base on offer, files and jobs in one call."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from luthier.settings import Settings
from luthier.store.db import Database
from luthier.store.files import Files
from luthier.store.history import Event, History
from luthier.store.jobs import TERMINAL, Job, Jobs
from luthier.store.leases import Leases
from luthier.store.models import Models
from luthier.work import findings
from luthier.work.worker import Worker
from tests.engine.runs import chats
from tests.store.conftest import postgres_url, sqlite_file
from tests.work.ask import jsonl

__all__ = ["postgres_url", "sqlite_file"]  # fixtures of the store's tests


HYPERPARAMETERS = (
    "n_epochs",
    "batch_size",
    "learning_rate_multiplier",
    "beta",
    "prompt_loss_weight",
    "compute_classification_metrics",
    "classification_positive_class",
    "classification_betas",
)


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine, what is found in a job's files comes before it queues."""
    monkeypatch.setattr(findings, "SECONDS", 60.0)


@dataclass
class Bench:
    """`settings` offer one base, `tiny`; everything lies under `database.home`."""

    database: Database
    settings: Settings
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.files, self.jobs, self.history = Files(self.database), Jobs(self.database), History(self.database)
        self.models, self.leases = Models(self.database), Leases(self.database)

    def file(self, records: list[dict[str, Any]] | bytes) -> str:
        content = records if isinstance(records, bytes) else jsonl(records)
        return self.files.create([content], filename="../../data.jsonl", purpose="fine-tune").id

    def submit(
        self,
        records: list[dict[str, Any]] | bytes | None = None,
        *,
        validation: list[dict[str, Any]] | bytes | None = None,
        kind: Any = "modern",
        **request: Any,
    ) -> Job:
        """A job on `records` (12 chats), with request fields and hyperparameters as keywords."""
        names = HYPERPARAMETERS
        hyperparameters = {name: request.pop(name) for name in names if name in request}
        training = self.file(chats(12) if records is None else records)
        held_out = None if validation is None else self.file(validation)
        asked = {
            "model": "tiny",
            "base": "tiny",
            "parent": None,
            "training_file": training,
            "validation_file": held_out,
            "method": {"type": "supervised"},
            "hyperparameters": {"n_epochs": 2, "batch_size": 4, **hyperparameters},
            **request,
        }
        job, _ = self.jobs.submit(
            request=asked,
            model="tiny",
            training_file=training,
            validation_file=held_out,
            kind=kind,
            suffix=request.get("suffix"),
            seed=7,
        )
        return job

    def worker(self, name: str = "one", **options: Any) -> Worker:
        return Worker(self.settings, self.database, self.settings.offered, name, **options)

    def start(self, name: str = "one", **options: Any) -> None:
        """A worker in a thread, until the test ends or `stop` is set."""
        options.setdefault("beat", 0.2)
        thread = threading.Thread(target=self.worker(name, **options).run, args=(self.stop,), name=f"worker {name}")
        self.threads.append(thread)
        thread.start()

    def halt(self) -> None:
        self.stop.set()
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()

    def until(self, job: Job, wanted: Callable[[Job], bool], seconds: float = 60) -> Job:
        deadline = time.monotonic() + seconds
        while not wanted(found := self.jobs.get(job.id)):
            assert time.monotonic() < deadline, (found, [event.message for event in self.events(job)][-10:])
            time.sleep(0.05)
        return found

    def ended(self, job: Job) -> Job:
        return self.until(job, lambda found: found.status in TERMINAL)

    def events(self, job: Job) -> tuple[Event, ...]:
        return self.history.events(job.id, limit=10_000, order="asc").data

    def said(self, job: Job) -> list[str]:
        return [event.message for event in self.events(job)]

    def stepped(self, job: Job, step: int = 1) -> Job:
        """The running job, when it has told of that step."""
        return self.until(job, lambda _: any(text.startswith(f"Step {step}/") for text in self.said(job)))


def _bench(database: Database, tiny: Path) -> Iterator[Bench]:
    bench = Bench(database, Settings(home=database.home, hub="off", bases=f"tiny={tiny}", organization="Acme Inc."))
    yield bench
    bench.halt()
    database.close()


@pytest.fixture
def bench(sqlite_file: Path, tiny: Path, tmp_path: Path) -> Iterator[Bench]:
    home = tmp_path / "home"
    home.mkdir()
    shutil.copy(sqlite_file, home / "luthier.db")
    yield from _bench(Database(home), tiny)


@pytest.fixture
def postgres_bench(postgres_url: str, tiny: Path, tmp_path: Path) -> Iterator[Bench]:
    home = tmp_path / "home"
    home.mkdir()
    yield from _bench(Database(home, postgres_url), tiny)
