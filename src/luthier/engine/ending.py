"""The end of a run that holds rows out: the model that was published is proven, and the report says what came of it.

The model lies in its place before any of this begins, so nothing here can lose it: a proof that fails is told and left
out, one that is stopped or killed goes on from the answers it has when the run is resumed.
Does not know: the loop; how answers are judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luthier.data.formats import read_examples
from luthier.data.render import Renderer
from luthier.engine import evaluate, generate, models, prove
from luthier.engine.answers import Asker
from luthier.engine.meter import Meter
from luthier.engine.setup import Ready
from luthier.proof import choose
from luthier.proof.neighbours import MOST_ROWS
from luthier.proof.page import curves, page
from luthier.spec.data import Example, Problem
from luthier.spec.errors import LuthierError
from luthier.spec.job import TrainRequest, validation_share
from luthier.spec.proof import Proof
from luthier.spec.report import Report
from luthier.spec.run import RunFolder, write_json, write_whole

SHARE = 1 / 3  # of the training time that a proof may take by default
MOST_TRIES = 3  # a proof that ended its process this often is left out

Emit = Callable[..., None]
Place = tuple[int, int]  # (which file, which record of it)


@dataclass(frozen=True)
class HeldOut:
    """What a proof needs of a run that is over; its weights are not among it."""

    request: TrainRequest
    renderer: Renderer
    precision: models.Precision
    seed: int
    training: list[Place]
    validation: list[Place]

    @classmethod
    def of(cls, ready: Ready) -> HeldOut | None:
        """None when the run holds no rows out, or is not to be proven."""
        if ready.validation is None or ready.request.proof_rows == 0:
            return None
        seed = ready.settings.seed
        places = [place for place in dict.fromkeys(ready.train.places) if place[0] >= 0]  # not those that are replayed
        if len(places) > MOST_ROWS:
            picked = np.random.default_rng(seed).choice(len(places), MOST_ROWS, replace=False)
            places = [places[n] for n in sorted(picked)]
        held = list(dict.fromkeys(ready.validation.places))
        return cls(ready.request, ready.renderer, ready.settings.precision, seed, places, held)

    def examples(self, heed: Callable[[], None]) -> list[Example]:
        """The rows that were held out, read again. Raises LuthierError when they are not there any more."""
        shared = validation_share(self.request.validation) is not None
        return _read(self.request.data if shared else [str(self.request.validation)], self.validation, heed)

    def check_metric(self, heed: Callable[[], None]) -> None:
        """Raises BadSetting for a metric that was named and that these rows cannot have: before the first step, not
        after the last."""
        if self.request.metric != "auto":
            asked = map(self.renderer.question, self.examples(heed))
            choose.choose(self.request.metric, [question[1] for question in asked if question is not None])


def end(
    run: RunFolder,
    report: Report,
    held: HeldOut | None,
    meter: Meter,
    train_seconds: float,
    emit: Emit,
    heed: Callable[[], None],
) -> None:
    """Prove the published model, unless nothing was held out; ask what it forgot; write the report, tell the end."""
    write_json(run.report, report.model_dump())  # should the proof end its process
    if held is not None:
        report.proof, report.proof_note = conclude(run, held, train_seconds, emit, heed)
    meter.conclude(run, report, emit, heed)
    write_json(run.report, report.model_dump())
    write_whole(run.page, page(report, curves(event for _, event in run.events())))
    emit("finished", status="succeeded", model=str(run.model), report=report.told())


def conclude(
    run: RunFolder, held: HeldOut, train_seconds: float, emit: Emit, heed: Callable[[], None]
) -> tuple[Proof | None, str | None]:
    """(proof, None), or (None, why there is none). `heed` is called between batches and may raise, to stop."""
    if (tries := _tries(run)) >= MOST_TRIES:
        return None, f"The proof was left out: it ended its process {tries} times."
    emit("phase", name="prove", message="Proving it: held-out rows answered by base and tuned")
    try:
        proof = _prove(run, held, train_seconds, emit, heed)
    except (LuthierError, OSError, RuntimeError, ValueError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        emit("warning", message=f"The proof failed; the model is not touched by that: {reason}", hint=_again(run))
        return None, f"The proof failed: {reason}"
    return proof, None


def _again(run: RunFolder) -> str:
    return f"Measure it with `luthier evaluate {run.path} --data FILE`."


def _tries(run: RunFolder) -> int:
    """How often a proof of this run was begun and ended by nobody's wish."""
    tries = 0
    for _, event in run.events():
        if event["type"] == "phase" and event["name"] == "prove":
            tries += 1
        elif event["type"] == "stopped" and tries:
            tries -= 1
    return tries


def _prove(run: RunFolder, held: HeldOut, train_seconds: float, emit: Emit, heed: Callable[[], None]) -> Proof:
    begun = time.monotonic()
    request = held.request
    examples = held.examples(heed)
    known = _read(request.data, held.training, heed)
    loaded = models.load_for_use(str(run.path), held.precision)
    model: Any = loaded.model
    if torch.cuda.is_available():
        model.cuda()
    notes: list[str] = []
    base = prove.untuned(loaded, None, notes.append)
    context = generate.context_of(loaded.model)
    material = evaluate.prepare(held.renderer, [*_fitting(held.renderer, examples, context, notes)], context, "")
    auto = request.proof_rows == "auto"
    plan = prove.Plan(
        metric=request.metric,
        rows=prove.MOST_ROWS if request.proof_rows == "auto" else request.proof_rows,
        seconds=max(0.0, train_seconds * SHARE - (time.monotonic() - begun)) if auto else None,
        examples=request.proof_examples,
        seed=held.seed,
        memory=prove.memory_folder() if request.proof_memory == "shared" else run.answers,
        why_seconds="a third of the training time",
    )

    def progress(what: str, done: int, total: int) -> None:
        del what
        emit("progress", name="prove", done=done, total=total)

    if material.questions:
        most = evaluate.answer_tokens(held.renderer, material.questions, notes.append)
        asker = Asker(held.renderer, context, generate.Sampling(max_tokens=most), heed=heed)
        proof = prove.prove(
            loaded, asker, material.questions, plan, base=base, known=known, progress=progress, tell=notes.append
        )
    else:
        proof = prove.prove_texts(loaded, material.texts, plan, base)
    proof.notes += notes
    proof.seconds = round(time.monotonic() - begun, 3)
    return proof


def _read(paths: Sequence[str], places: Sequence[Place], heed: Callable[[], None]) -> list[Example]:
    """The examples at `places`, in the order of the files. Raises LuthierError when they are not there any more."""
    wanted = set(places)
    found: list[Example] = []
    for number, path in enumerate(paths):
        heed()
        items = (item for item in read_examples(Path(path)) if not isinstance(item, Problem))
        found += [item for item in items if (number, item.row) in wanted]
    if len(found) != len(wanted):
        raise LuthierError(f"{len(wanted) - len(found)} of {len(wanted)} rows are not in {', '.join(paths)} any more.")
    return found


def _fitting(renderer: Renderer, examples: Sequence[Example], context: int, notes: list[str]) -> Iterable[Example]:
    """Those that can be asked whole: training may have cut longer ones."""
    left_out = 0
    for example in examples:
        if any(len(row.ids) > context for row in renderer.rows(example)):
            left_out += 1
        else:
            yield example
    if left_out:
        notes.append(f"{left_out} held-out rows are longer than the model reads and were not asked.")
