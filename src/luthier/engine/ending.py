"""The end of a run that holds rows out: the model that was published is proven, and the report says what came of it.

The model lies in its place before any of this begins, so nothing here can lose it: a proof that fails is told and left
out, one that is stopped or killed goes on from the answers it has when the run is resumed.
Does not know: the loop; how answers are judged.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.data.pairs import Meaning, read_meanings, render_all
from luthier.data.render import Renderer
from luthier.data.split import prompt_key
from luthier.engine import checkpoint, evaluate, generate, learning, models, prove, rendered
from luthier.engine.answers import Asker
from luthier.engine.closing import PROOF_SHARE
from luthier.engine.meter import Meter
from luthier.engine.setup import Ready
from luthier.proof import choose
from luthier.proof.neighbours import MOST_ROWS
from luthier.proof.page import curves, page
from luthier.spec.data import Example, Preference, Problem
from luthier.spec.errors import BadData, LuthierError
from luthier.spec.job import TrainRequest, validation_share
from luthier.spec.learning import Learning
from luthier.spec.proof import Proof
from luthier.spec.report import PARTS, Part, PartName, Report
from luthier.spec.run import RunFolder, write_json, write_whole

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
    proof: list[Place]  # in the file `proof_data`; without one the validation rows prove too
    known: int = 0  # rows of that file that ask what training rows ask
    halved: bool = False  # half of the validation rows choose a scale (keep.py); without proof rows the others prove
    base_seconds: float = 0.0  # what loading the base took

    @classmethod
    def of(cls, ready: Ready) -> HeldOut | None:
        """None when the run holds no rows out, or is not to be proven. Raises BadData for a file of proof rows that
        cannot be read."""
        if (ready.validation is None and ready.request.proof_data is None) or ready.request.proof_rows == 0:
            return None
        seed = ready.settings.seed
        places = [place for place in dict.fromkeys(ready.train.places) if place[0] >= 0]  # not those that are replayed
        if len(places) > MOST_ROWS:
            picked = np.random.default_rng(seed).choice(len(places), MOST_ROWS, replace=False)
            places = [places[n] for n in sorted(picked)]
        held = list(dict.fromkeys(ready.validation.places if ready.validation else ()))
        proof, known = _proof_rows(ready)
        return cls(
            ready.request,
            ready.renderer,
            ready.settings.precision,
            seed,
            places,
            held,
            proof,
            known,
            ready.request.keep_general,
            ready.base_seconds,
        )

    def examples(self, heed: Callable[[], None]) -> list[Meaning]:
        """The rows that prove, read again. Raises LuthierError when they are not there any more."""
        if self.request.proof_data is None:
            return self._half(self.deciding(heed), 1) if self.halved else self.deciding(heed)
        return _read([self.request.proof_data], self.proof, self.request.prefers, heed)

    def choosing(self, heed: Callable[[], None]) -> list[Meaning]:
        """The rows that choose a scale: none of those that prove. Raises as `examples` does."""
        found = self.deciding(heed)
        return found if self.request.proof_data is not None else self._half(found, 0)

    def _half(self, examples: list[Meaning], which: int) -> list[Meaning]:
        """Every other prompt, in an order by the seed; whole prompts stay together."""
        keys = {prompt_key(example) for example in examples}
        order = sorted(keys, key=lambda key: hashlib.sha256(self.seed.to_bytes(8, "little") + key).digest())
        chosen = set(order[which::2])
        return [example for example in examples if prompt_key(example) in chosen]

    def deciding(self, heed: Callable[[], None]) -> list[Meaning]:
        """The validation rows, read again. Raises as `examples` does."""
        shared = validation_share(self.request.validation) is not None
        paths = self.request.data if shared else [str(self.request.validation)]
        return _read(paths, self.validation, self.request.prefers, heed)

    def check_metric(self, heed: Callable[[], None]) -> None:
        """Raises BadSetting for a metric that was named and that these rows cannot have: before the first step, not
        after the last."""
        if self.request.metric != "auto":
            asked = map(self.renderer.question, _to_imitate(self.examples(heed)))
            choose.choose(self.request.metric, [question[1] for question in asked if question is not None])


def _proof_rows(ready: Ready) -> tuple[list[Place], int]:
    """The rows of `proof_data`, and how many of them ask what training rows ask."""
    if (path := ready.request.proof_data) is None:
        return [], 0
    fitting = {"max_length": ready.settings.max_length, "overlong": "truncate", "pairs": ready.request.prefers}
    try:
        rows = rendered.prepare([path], ready.renderer, ready.base_hash, **fitting).rows  # type: ignore[arg-type]
    except BadData as error:
        error.param = "proof_data"
        raise
    asked = set(ready.train.keys)
    return list(dict.fromkeys(rows.places)), sum(key in asked for key in rows.keys) // rows.sides


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
    begun = time.monotonic()
    if held is not None:
        report.proof, report.proof_note = conclude(run, held, train_seconds, emit, heed)
    proven = time.monotonic()
    if held is not None and report.proof is not None:
        report.learning = _learning(run, held, report.proof, train_seconds, emit, heed)
    learnt = time.monotonic()
    meter.conclude(run, report, emit, heed)
    ended = time.monotonic()
    report.parts = _parts(report, train_seconds, proven - begun, learnt - proven, ended - learnt)
    report.seconds = round(report.seconds + ended - begun, 2)
    write_json(run.report, report.model_dump())
    write_whole(run.page, page(report, curves(event for _, event in run.events())))
    emit("finished", status="succeeded", model=str(run.model), report=report.told())


def _learning(
    run: RunFolder, held: HeldOut, proof: Proof, train_seconds: float, emit: Emit, heed: Callable[[], None]
) -> Learning | None:
    """The metric at each published checkpoint, when there are several and there is time. What fails is told and left
    out: the model and its proof are there."""
    steps, tuned = checkpoint.steps(run.published), proof.way("tuned")
    if len(steps) < 2 or not held.validation or tuned is None or tuned.cost is None:
        return None
    load = held.base_seconds
    rows = learning.rows_worth(
        len(steps), train_seconds, load, tuned.cost.seconds / len(proof.rows), len(held.validation)
    )
    losses = {event["step"]: event["loss"] for _, event in run.events() if event["type"] == "validation"}

    def answered(step: int, count: int) -> Proof:
        emit("phase", name="curve", message=f"The learning curve: {count} rows asked of the checkpoint at step {step}")
        return score(run, held, checkpoint.path_of(run.published, step), emit, heed, count)

    try:
        return learning.measure(run, rows, losses, held.seed, answered)
    except (LuthierError, OSError, RuntimeError, ValueError, MemoryError) as error:
        emit("warning", message=f"There is no learning curve: {str(error) or type(error).__name__}", hint="")
        return None


def _parts(report: Report, training: float, proof: float, curve: float, forgetting: float) -> list[Part]:
    """What the parts took, in seconds, beside what was foretold; only those that there were."""
    took: dict[PartName, float] = {"training": training}
    took |= {"proof": proof} if report.proof else {}
    took |= {"curve": curve} if report.learning else {}
    took |= {"forgetting": forgetting} if report.forgetting else {}
    told = report.forecast
    beside: dict[PartName, float | None] = dict.fromkeys(PARTS)
    if told:
        beside |= {"training": told.train_seconds, "proof": told.prove_seconds}
        beside |= {"curve": told.curve_seconds, "forgetting": told.forget_seconds}
    return [
        Part(name=name, foretold=beside[name], seconds=round(seconds, 2), share=round(seconds / training, 4))
        for name, seconds in took.items()
    ]


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


def score(
    run: RunFolder,
    held: HeldOut,
    folder: Path,
    emit: Emit,
    heed: Callable[[], None],
    rows: int = prove.MOST_ROWS,
    beside: bool = False,
) -> Proof:
    """What the model in `folder` answers to the validation rows, and what its base does when it is `beside`: what
    chooses, not what proves."""
    notes: list[str] = []
    loaded = models.load_for_use(str(folder), held.precision)
    model: Any = loaded.model
    context = generate.context_of(model)
    examples = held.deciding(heed)
    material = evaluate.prepare(held.renderer, [*_fitting(held.renderer, examples, context, notes)], context, "")
    plan = prove.Plan(held.request.metric, rows=rows, examples=0, seed=held.seed, memory=memory_of(run, held.request))
    base = prove.untuned(loaded, None, notes.append) if beside else None
    return _asked(held, loaded, material, plan, context, base, (), emit, heed, notes)


def memory_of(run: RunFolder, request: TrainRequest) -> Path:
    return prove.memory_folder() if request.proof_memory == "shared" else run.answers


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
        elif event["type"] == "finished":
            tries = 0
    return tries


def _prove(run: RunFolder, held: HeldOut, train_seconds: float, emit: Emit, heed: Callable[[], None]) -> Proof:
    begun = time.monotonic()
    request = held.request
    examples = held.examples(heed)
    known = [] if request.prefers else _to_imitate(_read(request.data, held.training, False, heed))
    loaded = models.load_for_use(str(run.path), held.precision)
    notes: list[str] = []
    base = prove.untuned(loaded, None, notes.append)
    context = generate.context_of(loaded.model)
    material = evaluate.prepare(held.renderer, [*_fitting(held.renderer, examples, context, notes)], context, "")
    auto = request.proof_rows == "auto"
    plan = prove.Plan(
        metric=request.metric,
        rows=prove.MOST_ROWS if request.proof_rows == "auto" else request.proof_rows,
        seconds=max(0.0, train_seconds * PROOF_SHARE - (time.monotonic() - begun)) if auto else None,
        examples=request.proof_examples,
        seed=held.seed,
        memory=memory_of(run, request),
        why_seconds="a third of the training time",
    )
    if held.known:
        notes.append(f"{held.known} of the proof's rows ask what training rows ask: they say little about new prompts.")
    proof = _asked(held, loaded, material, plan, context, base, known, emit, heed, notes)
    proof.notes += notes
    proof.seconds = round(time.monotonic() - begun, 3)
    return proof


def _asked(
    held: HeldOut,
    loaded: models.Loaded,
    material: evaluate.Material,
    plan: prove.Plan,
    context: int,
    base: prove.Untuned | None,
    known: Sequence[Example],
    emit: Emit,
    heed: Callable[[], None],
    notes: list[str],
) -> Proof:
    """Every way asked, or measured on texts; `notes` grows."""

    def progress(what: str, done: int, total: int) -> None:
        del what
        emit("progress", name="prove", done=done, total=total)

    if material.pairs:
        return prove.prove_pairs(loaded, material.pairs, plan, base)
    if not material.questions:
        return prove.prove_texts(loaded, material.texts, plan, base)
    most = evaluate.answer_tokens(held.renderer, material.questions, notes.append)
    asker = Asker(held.renderer, context, generate.Sampling(max_tokens=most), heed=heed)
    return prove.prove(
        loaded, asker, material.questions, plan, base=base, known=known, progress=progress, tell=notes.append
    )


def _read(paths: Sequence[str], places: Sequence[Place], pairs: bool, heed: Callable[[], None]) -> list[Meaning]:
    """The examples at `places`, in the order of the files. Raises LuthierError when they are not there any more."""
    wanted = set(places)
    found: list[Meaning] = []
    for number, path in enumerate(paths):
        heed()
        items = (item for item in read_meanings(Path(path), pairs) if not isinstance(item, Problem))
        found += [item for item in items if (number, item.row) in wanted]
    if len(found) != len(wanted):
        raise LuthierError(f"{len(wanted) - len(found)} of {len(wanted)} rows are not in {', '.join(paths)} any more.")
    return found


def _to_imitate(examples: Sequence[Meaning]) -> list[Example]:
    return [example for example in examples if not isinstance(example, Preference)]


def _fitting(renderer: Renderer, examples: Sequence[Meaning], context: int, notes: list[str]) -> Iterable[Meaning]:
    """Those that can be asked whole: training may have cut longer ones."""
    left_out = 0
    for example, rows in render_all(renderer, examples):
        if not isinstance(rows, Problem) and any(len(row.ids) > context for row in rows):
            left_out += 1
        else:
            yield example
    if left_out:
        notes.append(f"{left_out} held-out rows are longer than the model reads and were not asked.")
