"""The seam to experiment trackers: start(config), log(step, metrics), finish(status).

A tracker is somebody else's service: it is spoken to from a thread of its own and may be slow, absent or broken without
holding up or failing a job. What went wrong becomes a warning of the job. Weights & Biases finds its key where its own
library looks for it; none passes through here.
Does not know: the store; events of runs.
"""

from __future__ import annotations

import importlib
import queue
import threading
from collections.abc import Sequence
from typing import Any, Protocol

from luthier.store.jobs import Job

PATIENCE = 5.0  # seconds to wait for a tracker when the job is over


class Tracker(Protocol):
    """One experiment at one service. Any method may raise anything."""

    def start(self, config: dict[str, Any]) -> None: ...

    def log(self, step: int, metrics: dict[str, float]) -> None: ...

    def finish(self, status: str) -> None: ...


class Missing(Exception):
    """The tracker's own package is not installed."""


class Wandb:
    """Weights & Biases: one run a job, gone on with when the job is (its id is the run's)."""

    def __init__(self, job: Job, asked: dict[str, Any]) -> None:
        self.job, self.asked = job, asked
        self.run: Any = None

    def start(self, config: dict[str, Any]) -> None:
        try:
            wandb: Any = importlib.import_module("wandb")
        except ImportError as error:
            message = "The package wandb is not installed on the worker: pip install luthier[trackers]"
            raise Missing(message) from error
        base = self.job.request["base"]
        self.run = wandb.init(
            project=self.asked["project"],
            entity=self.asked.get("entity"),
            name=self.asked.get("name") or self.job.id,
            id=self.job.id,
            resume="allow",
            tags=self.asked.get("tags") or ["openai/finetune", f"openai/{base}", f"openai/{self.job.id}"],
            config=config,
        )

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def finish(self, status: str) -> None:
        self.run.finish(exit_code=0 if status == "succeeded" else 1)


KINDS = {"wandb": Wandb}


class Trackers:
    """The trackers that a job asked for. No method waits, but for `finish`, a little."""

    def __init__(self, job: Job) -> None:
        asked = [one for one in job.request.get("integrations") or [] if one.get("type") in KINDS]
        self.trackers: list[tuple[str, Tracker]] = [
            (one["type"], KINDS[one["type"]](job, one[one["type"]])) for one in asked
        ]
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._todo: queue.SimpleQueue[tuple[str, Sequence[Any]] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self, config: dict[str, Any]) -> None:
        if self.trackers and self._thread is None:
            self._thread = threading.Thread(target=self._work, name="trackers", daemon=True)
            self._thread.start()
            self._todo.put(("start", (config,)))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        if self._thread is not None:
            self._todo.put(("log", (step, metrics)))

    def finish(self, status: str) -> None:
        """The last word; waits at most PATIENCE for it to be passed on."""
        if self._thread is not None:
            self._todo.put(("finish", (status,)))
            self._todo.put(None)
            self._thread.join(PATIENCE)
            self._thread = None

    def warnings(self) -> list[str]:
        """What went wrong since the last look: one sentence for a tracker, which is then left alone."""
        found = []
        while not self._warnings.empty():
            found.append(self._warnings.get())
        return found

    def _work(self) -> None:
        alive = list(self.trackers)
        while (task := self._todo.get()) is not None:
            word, arguments = task
            for kind, tracker in list(alive):
                try:
                    getattr(tracker, word)(*arguments)
                except Exception as error:  # noqa: BLE001, a foreign service's edge: told, and left alone
                    reason = str(error) if isinstance(error, Missing) else f"{type(error).__name__}: {error}"
                    self._warnings.put(f"The {kind} integration is left out. {reason[:500]}")
                    alive.remove((kind, tracker))
