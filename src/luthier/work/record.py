"""A run's events as the job's: sentences, metrics, checkpoints that can be asked for, the time it will take.

An event's place in events.jsonl is its name, so whatever is read for the second time, by this worker or the next, adds
nothing. Steps that a resumed engine takes again are told once. Of long runs not every step becomes an event: each up to
step 1,000, then every tenth, and from step 10,000 every hundredth; the last step and those with a validation always do,
and the result file has them all.
Does not know: processes; how a job ends.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from luthier.spec.errors import NotFound, UserError
from luthier.spec.forgetting import Forgetting
from luthier.spec.run import TERMINAL, RunFolder
from luthier.store.db import Database
from luthier.store.history import EventDraft, History
from luthier.store.jobs import Job
from luthier.store.leases import Lease, Leases
from luthier.store.models import Model, Models
from luthier.work.layout import KEPT_CHECKPOINTS, resolved
from luthier.work.results import final_name, folder_hash, metrics_of
from luthier.work.trackers import Trackers

logger = logging.getLogger("luthier.work")

TRACKER_PART = 1000  # parts of an event's place that trackers' warnings take
MOST_NAMES = 100


def worth_an_event(step: int, steps: int) -> bool:
    every = 1 if step <= 1_000 else 10 if step <= 10_000 else 100
    return step % every == 0 or step == steps


class Recorder:
    """Reads on in events.jsonl and writes what it finds. `terminal` is the last event of the present attempt."""

    def __init__(self, database: Database, job: Job, lease: Lease, run: RunFolder, organization: str) -> None:
        self.database, self.job, self.lease, self.run, self.organization = database, job, lease, run, organization
        self.leases, self.models, self.history = Leases(database), Models(database), History(database)
        self.trackers = Trackers(job)
        self.terminal: dict[str, Any] | None = None
        self.checkpoints = 0  # seen so far, in all attempts
        self._told = self.history.last_offset(job.id)
        self._offset = 0
        self._step = 0  # the highest so far
        self._epochs = 0
        self._last: dict[str, float] = {}
        self._validation: dict[str, Any] | None = None
        self._settings: dict[str, Any] = {}
        self._todo: list[tuple[str, Any]] = []  # in order: ("event", draft) | ("checkpoint", ...) | ("record", fields)
        self._warnings = 0

    # -- reading -----------------------------------------------------------------------------------------------------

    def forget_the_end(self) -> None:
        """A new attempt begins: how the last one ended is no longer the end."""
        self.terminal = None

    def read(self) -> None:
        """Take in what the engine has written since the last call. Raises OSError."""
        for offset, event in self.run.events(self._offset):
            self._offset = offset
            self._see(offset, event)
        for message in self.trackers.warnings():
            self._warnings += 1
            draft = EventDraft(message, max(self._offset, 1), TRACKER_PART + self._warnings, "warn")
            self._todo.append(("event", draft))

    def _see(self, offset: int, event: dict[str, Any]) -> None:
        new = offset > self._told  # else it is told already, and only remembered
        kind = event["type"]
        if kind == "prepared":
            self._settings = event["settings"]
            self._record(hyperparameters=resolved(self.job, self._settings))
            self.trackers.start({**resolved(self.job, self._settings), "seed": self.job.seed, "steps": event["steps"]})
        elif kind == "forecast":
            self._see_forecast(offset, event, new)
        elif kind == "warning" and new:
            self._say(offset, event, event["message"], level="warn")
        elif kind == "validation":
            self._validation = event
        elif kind == "step" and event["step"] > self._step:
            self._see_step(offset, event, new)
        elif kind == "checkpoint":
            self.checkpoints += 1
            if new:
                self._todo.append(("checkpoint", (offset, event, dict(self._last))))
        elif kind in TERMINAL:
            self.terminal = event
            self._see_proof(offset, event, new)

    def _see_forecast(self, offset: int, event: dict[str, Any], new: bool) -> None:
        left = event["seconds"] - event["load_seconds"]
        self._record(estimated_finish=round(event["time"] + left))
        if new and self.job.kind == "modern":
            memory = event["peak_memory_bytes"] / 1e9
            text = f"Forecast: {max(1, round(left / 60))} min from now, at most {memory:.1f} GB of memory"
            data = {name: value for name, value in event.items() if name not in ("time", "type")}
            self._say(offset, event, text, data=data)

    def _see_proof(self, offset: int, event: dict[str, Any], new: bool) -> None:
        report = event.get("report") or {}
        if proof := report.get("proof"):
            self._record(proof=proof)
            if new and self.job.kind == "modern":
                self._say(offset, event, f"Proof: {proof['sentence']}", data={"proof": proof})
        if forgotten := report.get("forgetting"):
            self._record(forgetting=forgotten)
            if new and self.job.kind == "modern":
                self._say(offset, event, Forgetting(**forgotten).verdict, part=1, data={"forgetting": forgotten})
        if (kept := report.get("keeping")) and new and self.job.kind == "modern":
            self._say(offset, event, kept["sentence"], part=2, data={"keeping": kept})
        if gate := report.get("gate"):
            self._record(gate=gate)

    def _see_step(self, offset: int, event: dict[str, Any], new: bool) -> None:
        step, steps = event["step"], event["steps"]
        validation = self._validation if self._validation and self._validation["step"] == step else None
        self._step, self._last = step, metrics_of(event, validation)
        if new:
            self.trackers.log(step, {name: value for name, value in self._last.items() if name != "step"})
        epochs, before = int(event["epoch"]), self._epochs
        self._epochs = max(epochs, before)
        if event.get("eta_seconds") is not None:
            self._record(estimated_finish=self.database.now() + round(event["eta_seconds"]))
        if not new:
            return
        if self.job.kind == "legacy":
            for epoch in range(before + 1, epochs + 1):
                text = f"Completed epoch {epoch}/{self._settings['epochs']}"
                self._say(offset, event, text, part=epoch)
        elif validation is not None or worth_an_event(step, steps):
            text = _step_words(step, steps, self._last)
            self._say(offset, event, text, type="metrics", data={**self._last, "total_steps": steps})

    def _say(self, offset: int, event: dict[str, Any], message: str, **given: Any) -> None:
        self._todo.append(("event", EventDraft(message, offset, created_at=int(event["time"]), **given)))

    def _record(self, **fields: Any) -> None:
        """Of what is recorded only the newest matters."""
        waiting = [place for place, (what, _) in enumerate(self._todo) if what == "record"]
        for place in reversed(waiting):
            fields = {**self._todo.pop(place)[1], **fields}
        self._todo.append(("record", fields))

    # -- writing -----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> bool:
        return bool(self._todo)

    def write(self) -> None:
        """Write what was read. What could not be written waits for the next call. Raises LeaseLost, NotNow, OSError."""
        while self._todo:
            what, value = self._todo[0]
            if what == "event":
                count = next((n for n, (kind, _) in enumerate(self._todo) if kind != "event"), len(self._todo))
                self.leases.append_events(self.lease, [draft for _, draft in self._todo[:count]])
                del self._todo[:count]
                continue
            if what == "record":
                self.leases.record(self.lease, **value)
            else:
                self._write_checkpoint(*value)
            del self._todo[0]

    def _write_checkpoint(self, offset: int, event: dict[str, Any], metrics: dict[str, float]) -> None:
        """Register the checkpoint that can be served, when it (still) is there, and strike those that are gone."""
        step = event["step"]
        model = self._published(event)
        if model is not None:
            self.leases.add_checkpoint(self.lease, step=step, model=model.name, metrics={**metrics, "step": step})
            if self.job.kind == "modern":
                text = f"Checkpoint created at step {step}"
                draft = EventDraft(text, offset, created_at=int(event["time"]), data={"step": step})
                self.leases.append_events(self.lease, [draft])
            self._strike_old()

    def _published(self, event: dict[str, Any]) -> Model | None:
        """The model of a checkpoint event; None when it is none, or gone: the engine keeps only the last few, and may
        remove one while it is being read here."""
        if not event.get("published"):
            return None
        folder = self.run.published / Path(event["published"]).name  # its machine may mount the data folder elsewhere
        try:
            return self.register(folder, step=event["step"]) if folder.is_dir() else None
        except FileNotFoundError:
            if folder.is_dir():
                raise
            return None

    def _strike_old(self) -> None:
        there = self.history.checkpoints(self.job.id, limit=1000).data
        for old in sorted(there, key=lambda one: one.step, reverse=True)[KEPT_CHECKPOINTS:]:
            self.leases.drop_checkpoint(self.lease, old.step)
            unregister(self.models, old.model)

    def register(self, folder: Path, step: int | None = None) -> Model:
        """Enter the folder's model in the registry, under the job's name. Again: the same entry. Raises OSError."""
        content_hash = folder_hash(folder)
        for later in range(MOST_NAMES):
            name = final_name(self.job, self.organization, later)
            name = name if step is None else f"{name}:ckpt-step-{step}"
            there = _found(self.models, name)
            if there is not None and there.job_id != self.job.id:
                continue
            if there is not None and there.content_hash != content_hash:  # of an attempt that was not heard to its end
                unregister(self.models, name)
            base, owner = self.job.request["base"], self.job.owner
            return self.models.register(
                name, base=base, folder=folder, content_hash=content_hash, owner=owner, job_id=self.job.id, step=step
            )
        raise UserError(f"{MOST_NAMES} models of this name are there already.", param="suffix")


SAID = (  # of a step: metric -> its name in the sentence
    ("train_loss", "training loss"),
    ("valid_loss", "validation loss"),
    ("train_reward_accuracy", "training reward accuracy"),
    ("valid_reward_accuracy", "validation reward accuracy"),
)


def _step_words(step: int, steps: int, metrics: dict[str, float]) -> str:
    said = ", ".join(f"{name}={metrics[key]:.2f}" for key, name in SAID if key in metrics)
    return f"Step {step}/{steps}" + (f": {said}" if said else "")


def _found(models: Models, name: str) -> Model | None:
    try:
        return models.get(name)
    except NotFound:
        return None


def unregister(models: Models, name: str) -> None:
    """Strike it; somebody else may have."""
    try:
        models.delete(name)
    except NotFound:
        logger.info("%s was gone already", name)
