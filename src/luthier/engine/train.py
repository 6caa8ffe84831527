"""The one loop, readable top to bottom: forward and backward over forests, one update, events, checkpoints, the end.

The loop is rank-aware: every rank plans the same step and takes its share of the micro-batches; gradients are added up,
and the loss was divided by the supervised weight of the whole step beforehand, so the number of ranks, like the size
of a micro-batch, changes nothing but speed. Only rank 0 writes.

Everything random follows from (seed, step): a resumed run continues bit for bit, having stored no generator state.
Does not know: who started it, who watches.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from luthier import __version__
from luthier.engine import agreement, checkpoint, forecast, keep, machine, meter, metrics_file, publish, rung
from luthier.engine.ending import HeldOut, end
from luthier.engine.preference import Preference
from luthier.engine.ranks import join
from luthier.engine.rung import Part
from luthier.engine.setup import Ready, examples_of, make_ready, silent, totals
from luthier.engine.supervised import Supervised
from luthier.spec.errors import UserError
from luthier.spec.forecast import Forecast
from luthier.spec.job import learning_rate_at
from luthier.spec.report import Report, Score
from luthier.spec.run import RunFolder

# Work that leaves so much of the memory foretold beside the model itself is followed by `machine.trim`. A share of all
# would be passed by a large model at rest; at 0.8 most work would be followed, and memory taken anew costs a twentieth
# of the time. Measured: docs/experiments.md.
FULL = 0.95


class Stopped(Exception):
    """The stop note was found; the run is at a checkpoint, or has not taken its first step."""


def train(run: RunFolder, estimate: bool = False, part: Part | None = None) -> None:
    """Carry out the run in `run`, from its newest checkpoint when there is one; with `estimate`, a new one only up to
    its forecast; with `part`, only up to that share of its steps (rung.py), to be gone on with later. Emits a terminal
    event on success and when stopped; raises what refuses or ends it (the caller emits `failed`)."""
    rank, ranks = join()
    machine.repeatable()
    emit = run.emit if rank == 0 else silent
    begun = time.monotonic()
    request = agreement.request_of(run)
    if rank == 0:
        run.stop_note.unlink(missing_ok=True)
    found, damaged = checkpoint.newest(run.checkpoints)
    resumed = agreement.spec_of(run) if found else None
    start = int(found[1]["step"]) if found else 0
    emit("started", pid=os.getpid(), run=str(run.path), version=__version__, resumed_from=start if found else None)
    for step in damaged:
        emit("warning", message=f"The checkpoint of step {step} is damaged; it is passed over.", hint="")

    def heed() -> None:
        if ranks == 1 and run.stop_asked:  # with more, ranks may only part at a step, together
            raise Stopped

    try:
        ready = make_ready(run, request, emit, resumed, leads=rank == 0, heed=heed)
        held = HeldOut.of(ready)
        if held is not None:
            held.check_metric(heed)
        loop = Loop(run, ready, emit, rank, ranks, begun)
        counts = loop.announce()
        if not found:
            loop.foresee(counts, heed)
        if estimate:
            emit("finished", status="estimated", model=None, report=None)
            return
        loop.look_at_start(heed)
        if found:
            ready.masters.load(found[0], start)
            loop.restore(start, found[1]["progress"])
        loop.go(start, part)
        start = loop.step
        report = loop.finish() if part is None else loop.report()
        steps, train_seconds = loop.settings.steps, loop.progress["seconds"]
        asked = meter.Meter.of(ready)
        del loop, ready  # the weights that learnt: what is proven is the model that was published
        machine.trim()
        if part is not None:
            if rank == 0:
                rung.conclude(run, report, steps, held, asked, part, emit, heed)
            raise Stopped(start)
        if rank == 0:
            keep.in_a_run(run, report, held, asked, emit, heed)
            end(run, report, held, asked, train_seconds, emit, heed)
    except Stopped as stopped:
        at = stopped.args[0] if stopped.args else start
        emit("stopped", status="stopped", step=at, resume=f"luthier train --resume {run.path}")


class Loop:
    """State of a training run between steps: `progress` is all that a checkpoint keeps beside the tensors."""

    def __init__(self, run: RunFolder, ready: Ready, emit: Any, rank: int, ranks: int, begun: float) -> None:
        self.run, self.ready, self.emit, self.rank, self.ranks = run, ready, emit, rank, ranks
        self.begun, self.before = begun, 0.0  # this attempt's start; seconds of earlier attempts
        self.settings, self.request = ready.settings, ready.request
        share = slice(rank, None, ranks)
        self.objective = Preference(ready, share) if ready.request.prefers else Supervised(ready, share)
        self.step, self.until = 0, ready.settings.steps  # `until`: where this attempt ends
        self.told: Forecast | None = None
        self.room = math.inf  # bytes that the process may hold before it is trimmed
        self.progress: dict[str, Any] = {
            "best_loss": None, "best_step": None, "base": None, "last": None, "last_step": None,
            "first_loss": None, "last_loss": None, "tokens": 0, "supervised": 0, "physical": 0,
            "seconds": 0.0, "elapsed": 0.0,
        }  # fmt: skip

    def look_at_start(self, heed: Callable[[], None]) -> None:
        """What must be computed with the weights that the run starts from."""
        if self.request.prefers:
            self.emit("phase", name="reference", message="Log-probabilities of both answers under the start")
        self.objective.begin(self._progress("reference"), heed)

    # -- the loop ------------------------------------------------------------------------------------------------

    def go(self, start: int, part: Part | None = None) -> None:
        """Take the steps after `start`: all, or a part of them, with the schedule of all either way."""
        self.step, self.told = start, forecast.told(self.run)
        if self.told:
            machine.trim()
            resting = machine.memory_now()
            self.room = resting + FULL * (self.told.peak_memory_bytes - resting)
        if part is not None:
            self.until = part.steps(self.settings.steps)
        if start == 0:
            if self.rank == 0:
                metrics_file.start(self.run, self.request.prefers)
            if self.ready.validation is not None:
                self._validate()
                self.progress["base"] = self.progress["last"]
        self.emit("phase", name="train", message=f"Training for {self.settings.steps} steps")
        while self.step < self.until:
            measured = self._one_step(self.step)
            self.step += 1
            validation = self._validate() if self._due(self.request.validate_every) else None
            self._record(measured, validation)
            stop = self._stop_asked()
            best = self.progress["best_step"] == self.step  # or it would be named in the report and lost
            if self._due(self.request.checkpoint_every) or stop or best:
                self._checkpoint()
            if stop and self.step < self.until:
                raise Stopped(self.step)
        if part is not None and self.progress.get("last_step") != self.step:
            self._validate()

    def _one_step(self, step: int) -> dict[str, Any]:
        """One optimizer step over `batch_size` examples; returns its measurements (sums over all ranks)."""
        begun = time.monotonic()
        settings, ready = self.settings, self.ready
        examples = examples_of(ready, step)
        rows = ready.train.of(examples)
        ready.model.train()
        learnt = self.objective.learn(examples, step, self._make_room)
        ready.masters.reduce()
        loss = learnt["loss"]
        rate = learning_rate_at(step, settings, self.request.schedule)
        norm = ready.masters.step(rate, self.request.max_grad_norm)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise UserError(
                f"The loss became {loss} (gradient norm {norm}) at step {step + 1}; the weights were not touched.",
                hint="Lower --learning-rate. The last checkpoint is intact.",
                param="learning_rate",
            )
        return {
            "step": step + 1,
            "epoch": self._epoch(step + 1),
            **learnt,
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens": sum(len(ids) for ids, _ in rows),
            "supervised_tokens": int(sum((weights >= 1).sum() for _, weights in rows)),
            "examples": step * settings.batch_size + len(examples),
            "seconds": time.monotonic() - begun,
        }

    def _make_room(self) -> None:
        """Hand back what was freed when more is held than was foretold."""
        if machine.memory_now() > self.room:
            machine.trim()

    def _due(self, every: int | str) -> bool:
        """Whether step `self.step` ends a stretch: N steps, or an epoch; the last step of an attempt always does."""
        if self.step >= self.until:
            return True
        if every == "epoch":
            seen = self.step * self.settings.batch_size
            return seen // self.ready.rows > (seen - self.settings.batch_size) // self.ready.rows
        return self.step % int(every) == 0

    def _epoch(self, step: int) -> float:
        """Passes over the data after `step` steps."""
        visits = min(step * self.settings.batch_size, self.settings.epochs * self.ready.rows)
        return round(visits / self.ready.rows, 4)

    def _stop_asked(self) -> bool:
        """All ranks must agree, or some would wait for ever: rank 0 looks, the others hear."""
        asked = torch.tensor(float(self.rank == 0 and self.run.stop_asked))
        if dist.is_initialized():
            dist.broadcast(asked, src=0)
        return bool(asked)

    # -- measuring -----------------------------------------------------------------------------------------------

    def _validate(self) -> dict[str, Any] | None:
        """The held-out loss and what else the objective measures; None without rows."""
        rows = self.ready.validation
        if rows is None:
            return None
        self.emit("phase", name="validate", message=f"Validating on {rows.examples} {self._noun}")
        score, beside = self.objective.measure(self._progress("validate"))
        self.progress.update(last=score.model_dump(), last_step=self.step)
        best = self.progress["best_loss"]
        if self.step and score.loss is not None and (best is None or score.loss < best):
            self.progress.update(best_loss=score.loss, best_step=self.step)
        self.emit(
            "validation",
            step=self.step,
            epoch=self._epoch(self.step),
            loss=score.loss,
            token_accuracy=score.token_accuracy,
            supervised_tokens=rows.supervised,
            **beside,
        )
        return {"loss": score.loss, "token_accuracy": score.token_accuracy, **beside}

    @property
    def _noun(self) -> str:
        return "pairs" if self.request.prefers else "rows"

    def _progress(self, name: str) -> Callable[[int, int], None]:
        return lambda done, total: self.emit("progress", name=name, done=done, total=total)

    def announce(self) -> dict[str, Any]:
        """Tell what the data came to; returns the totals."""
        prepared, rows = self.ready.prepared, self.ready.validation
        self.emit("phase", name="plan", message="Planning the forests")
        counts = totals(self.ready.train, self.settings)
        self.emit(
            "prepared",
            rows=prepared.records,
            train_rows=self.ready.rows,
            validation_rows=rows.examples if rows else 0,
            **counts,
            dropped=prepared.dropped,
            truncated=prepared.truncated,
            lost_tokens=prepared.lost_tokens,
            lost_supervised_tokens=prepared.lost_supervised,
            longest=prepared.longest,
            steps=self.settings.steps,
            settings=self.settings.model_dump(),
            template=self.ready.renderer.template.name,
        )
        if prepared.dropped or prepared.truncated:
            self.emit(
                "warning",
                message=f"{prepared.dropped} {self._noun} were dropped and {prepared.truncated} cut at "
                f"{self.settings.max_length} tokens; {prepared.lost_supervised} tokens to learn were lost.",
                hint="Raise --max-length to keep them.",
            )
        return counts

    def foresee(self, counts: dict[str, Any], heed: Callable[[], None]) -> None:
        """Tell what the run will take. Raises UserError or NotNow when this machine cannot hold it."""
        if self.rank:
            return
        self.emit("phase", name="forecast", message="Measuring what the run will take")
        found = forecast.make(self.run, self.ready, counts, self.begun, self.ranks, heed)
        self.emit("forecast", **found.model_dump(), seconds=round(found.seconds, 2))
        if warning := forecast.weigh(found, self.ready):
            self.emit("warning", **warning)

    # -- what is written -----------------------------------------------------------------------------------------

    def _record(self, measured: dict[str, Any], validation: dict[str, Any] | None) -> None:
        progress = self.progress
        progress["first_loss"] = measured["loss"] if progress["first_loss"] is None else progress["first_loss"]
        progress["last_loss"] = measured["loss"]
        progress["tokens"] += measured["tokens"]
        progress["supervised"] += measured["supervised_tokens"]
        progress["physical"] += measured["physical_tokens"]
        progress["seconds"] += measured["seconds"]
        if self.rank:
            return
        left = self.settings.steps - self.step
        self.emit(
            "step",
            **measured,
            steps=self.settings.steps,
            memory_bytes=machine.peak_memory(),
            eta_seconds=round(self._left(progress["seconds"] / self.step * left, left), 1),
        )
        metrics_file.add(self.run, measured, validation or {})

    def _left(self, training: float, steps: int) -> float:
        """Seconds until the run is over: the steps that are left at the pace so far, the rest as it was foretold."""
        return self.told.left(training, steps) if self.told else training

    def restore(self, step: int, progress: dict[str, Any]) -> None:
        """Go back to the checkpoint's place: later lines of metrics.csv belong to steps that will be taken again."""
        self.step, self.progress, self.before = step, progress, float(progress["elapsed"])
        if self.rank:
            return
        metrics_file.cut(self.run, step, self.request.prefers)
        told = {event["step"] for _, event in self.run.events() if event["type"] == "checkpoint"}
        if step not in told:  # killed between the two
            self._tell_checkpoint()

    def _checkpoint(self) -> None:
        self.progress["elapsed"] = self._elapsed()
        if self.rank == 0:
            self._publish_checkpoint()
            checkpoint.save(self.run.checkpoints, self.step, self.ready.masters.state(), {"progress": self.progress})
            checkpoint.prune(self.run.checkpoints, {self.step, self.progress["best_step"] or self.step})
            self._tell_checkpoint()
        if dist.is_initialized():
            dist.barrier()

    def _tell_checkpoint(self) -> None:
        path, published = (checkpoint.path_of(at, self.step) for at in (self.run.checkpoints, self.run.published))
        self.emit(
            "checkpoint",
            step=self.step,
            path=str(path),
            best=self.progress["best_step"] == self.step,
            published=str(published) if published.is_dir() else None,
        )

    def _publish_checkpoint(self) -> None:
        """The checkpoint as a model that can be used. It comes before the checkpoint itself: a run that is killed
        between the two takes these steps again and writes it again."""
        if not self.request.publish_checkpoints:
            return
        out = checkpoint.path_of(self.run.published, self.step)
        self._publish(out, must_differ=False)
        earlier = [step for step in checkpoint.steps(self.run.published) if step <= self.step]
        checkpoint.prune(self.run.published, set(earlier[-self.request.publish_checkpoints :]))

    def _publish(self, out: Path, must_differ: bool = True) -> list[str]:
        ready = self.ready
        return publish.publish(
            ready.model,
            weights=ready.masters.values,
            initial=ready.initial,
            request=self.request,
            base_folder=ready.base_folder,
            base_name=self.request.model,
            base_hash=ready.base_hash,
            template=ready.renderer.template.source,
            stop_ids=ready.renderer.stop_ids,
            pad_id=ready.renderer.tokenizer.pad_id,
            out=out,
            must_differ=must_differ,
        )

    def _elapsed(self) -> float:
        """Seconds of all attempts, less what was done after the checkpoints that they went on from."""
        return self.before + time.monotonic() - self.begun

    def finish(self) -> Report:
        """Publish the result, after checking it, where this rank writes; what was measured."""
        if self.rank == 0:
            self.emit("phase", name="save", message="Checking and saving the result")
            for note in self._publish(self.run.model):
                self.emit("warning", message=note, hint="")
        return self.report(weights_changed=True)

    def report(self, weights_changed: bool | None = None) -> Report:
        """What was measured so far."""
        progress = self.progress
        return Report(
            base=Score(**progress["base"]) if progress["base"] else None,
            tuned=Score(**progress["last"]) if progress["last"] else None,
            steps=self.step,
            epochs=self._epoch(self.step),
            replayed_rows=self.ready.replayed,
            trained_tokens=progress["tokens"],
            supervised_tokens=progress["supervised"],
            physical_tokens=progress["physical"],
            tree_ratio=round(progress["tokens"] / progress["physical"], 3) if progress["physical"] else None,
            train_loss_first=progress["first_loss"],
            train_loss_last=progress["last_loss"],
            validation_loss_best=progress["best_loss"],
            best_step=progress["best_step"],
            seconds=round(self._elapsed(), 2),
            peak_memory_bytes=machine.peak_memory(),
            weights_changed=weights_changed,
            forecast=forecast.told(self.run),
        )
