"""The best trade between what was learnt and what was forgotten, without training: one model at several scales.

An adapter's contribution is multiplied; a model of which all weights learnt is interpolated with its base (WiSE-FT,
Wortsman et al. 2022), in float32, then rounded as it was published. Rows and items that choose a scale are not those
that the report's proof and number are of. What was measured is remembered by content, so a search that was killed goes
on. Does not know: the rule of the choice (proof/tradeoff.py).
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from luthier import __version__
from luthier.engine import answers, evaluate, forget, generate, models, prove, publish
from luthier.engine.ending import HeldOut, end, memory_of
from luthier.engine.meter import Meter
from luthier.engine.setup import make_ready
from luthier.proof import choose, judge, probe, tradeoff
from luthier.proof.forgetting import compare
from luthier.proof.metrics import mean
from luthier.spec.errors import BadSetting, LuthierError, NotFound
from luthier.spec.job import TrainRequest
from luthier.spec.keeping import ITEMS, KEPT_SHARE, ROWS, SCALES, By, Keeping, Point
from luthier.spec.proof import ProofRow
from luthier.spec.report import Report
from luthier.spec.run import RunFolder

WHOLE = "model.scale-1"  # where the model stays as it was trained

Emit = Callable[..., None]


@dataclass(frozen=True)
class Search:
    """What is tried and how it is judged."""

    scales: tuple[float, ...] = SCALES
    by: By = "metric"
    share: float = KEPT_SHARE
    items: int = ITEMS
    rows: int = ROWS


def conclude(
    run: RunFolder, held: HeldOut, meter: Meter, search: Search, emit: Emit, heed: Callable[[], None]
) -> Keeping:
    """Measure every scale, choose one, publish the model at it; the model at scale 1 stays beside it.

    Raises BadSetting for DoRA, whose magnitudes no scale takes back; LuthierError when there is nothing to choose by.
    """
    begun = time.monotonic()
    emit("phase", name="keep", message="Asking the model at several scales: what it knows against what it forgot")
    whole = run.model.with_name(WHOLE)
    source = whole if whole.is_dir() else run.model
    loaded = models.load_for_use(str(source), held.precision)
    scaled = Scaled(loaded)
    measure = _Measure(run, held, meter, search, loaded, heed)
    scales = [0.0, *sorted({*search.scales, 1.0})]
    points, before = [], None
    for number, scale in enumerate(scales):
        heed()
        emit("progress", name="keep", done=number, total=len(scales))
        scaled.set(scale)
        scores = measure.general(scale)
        before = before or scores
        lost = compare(measure.items, before, scores, held.request.base_name)
        points.append(
            Point(
                scale=scale,
                score=measure.score(scale),
                loss=measure.loss(),
                forgetting=lost.loss,
                low=lost.low,
                high=lost.high,
            )
        )
    found = Keeping(
        method="scaled adapter" if loaded.adapter else "interpolated weights",
        by=search.by if measure.material.questions else "loss",
        metric=measure.metric.name if measure.metric else "loss",
        higher_is_better=measure.metric.higher_is_better if measure.metric else False,
        rows=measure.count,
        items=len(measure.items),
        points=points,
        chosen=1.0,
        rule="",
        sentence="",
    )
    tradeoff.decide(found, search.share, held.request.max_forgetting)
    scaled.set(found.chosen)
    if found.chosen != 1.0:
        publish.replace(run.model, source, whole, loaded.model, loaded.adapter, found.chosen)
        found.old = str(whole)
    elif source == whole:
        publish.replace(run.model, source, whole, loaded.model, loaded.adapter, 1.0)
    found.seconds = round(time.monotonic() - begun, 2)
    return found


def in_a_run(run: RunFolder, report: Report, held: HeldOut | None, meter: Meter, emit: Emit, heed: Any) -> None:
    """Fill in `keeping` of a run that asked for it, before its proof. What fails is told; the model is published."""
    if not meter.request.keep_general or held is None:
        return
    whole = run.model.with_name(WHOLE)
    if whole.is_dir():  # of an attempt that was killed: the model was published again meanwhile
        shutil.rmtree(whole)
    try:
        report.keeping = conclude(run, held, meter, Search(), emit, heed)
    except (LuthierError, OSError, RuntimeError, ValueError, MemoryError) as error:
        reason = str(error) or type(error).__name__
        again = f"Try again with `luthier keep-general {run.path}`."
        emit("warning", message=f"No scale could be chosen, so the model stays as trained: {reason}", hint=again)


def again(run: RunFolder, search: Search, emit: Emit, heed: Callable[[], None]) -> None:
    """Choose a scale for a run that is over, prove what is published, measure what it forgot; tell the end.

    Raises NotFound for a run without a result, BadSetting for one that holds no rows out or cannot be scaled.
    """
    emit("started", pid=os.getpid(), run=str(run.path), version=__version__, resumed_from=None)
    if not run.report.is_file() or not (run.model.is_dir() or run.model.with_name(WHOLE).is_dir()):
        raise NotFound(f"The run {run.path} has no result yet.", hint=f"luthier train --resume {run.path}", param="run")
    request = TrainRequest.model_validate_json(run.request.read_text(encoding="utf-8"))
    report = Report.model_validate_json(run.report.read_text(encoding="utf-8"))
    resumed = json.loads(run.spec.read_text(encoding="utf-8"))
    ready = make_ready(run, request, emit, resumed, heed=heed)
    held, meter = HeldOut.of(ready), Meter.of(ready)
    del ready
    if held is None or request.validation is None:
        raise BadSetting(
            "The run holds no rows out, so nothing can choose a scale.",
            hint="Train with --validation.",
            param="run",
        )
    held, meter = replace(held, halved=True), replace(meter, halved=True)
    report.keeping = conclude(run, held, meter, search, emit, heed)
    end(run, report, held, meter, report.seconds, emit, heed)


class Scaled:
    """A loaded model whose tuning can be multiplied."""

    def __init__(self, loaded: models.Loaded) -> None:
        self.model: Any = loaded.model
        self.layers: list[tuple[dict[str, float], str, float]] = []
        self.weights: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []
        if loaded.adapter:
            for module in self.model.modules():
                if isinstance(known := getattr(module, "scaling", None), dict):
                    if getattr(module, "use_dora", {}).get("default"):
                        raise BadSetting("A DoRA adapter has magnitudes, which no scale takes back.", param="method")
                    self.layers += [(known, name, value) for name, value in known.items()]
            return
        notes: list[str] = []
        base = prove.untuned(loaded, None, notes.append)
        if base is None:
            raise LuthierError(" ".join(notes))
        with base.open() as untuned:
            start = dict(untuned.named_parameters())
            for name, weight in self.model.named_parameters():
                if not torch.equal(weight, start[name]):
                    self.weights.append((weight, start[name].detach().clone(), weight.detach().clone()))

    @torch.no_grad()
    def set(self, scale: float) -> None:
        for known, name, value in self.layers:
            known[name] = value * scale
        for weight, start, tuned in self.weights:
            if scale in (0.0, 1.0):
                weight.copy_(tuned if scale else start)
            else:
                weight.copy_(start.float() + scale * (tuned.float() - start.float()))


class _Measure:
    """The rows and items that choose, asked of the model as it is now."""

    def __init__(
        self, run: RunFolder, held: HeldOut, meter: Meter, search: Search, loaded: models.Loaded,
        heed: Callable[[], None],
    ) -> None:  # fmt: skip
        self.held, self.loaded, self.model = held, loaded, loaded.model
        model: Any = loaded.model
        self.renderer = meter.renderer
        self.items = probe.sample(probe.half(probe.general(), 0), search.items)
        context = generate.context_of(model)
        self.notes: list[str] = []
        examples = held.choosing(heed)[: search.rows]
        self.material = evaluate.prepare(self.renderer, examples, context, "")
        self.count = self.material.examples
        self.identity = f"{loaded.base_hash} {prove.weights_hash(loaded.folder)} {next(model.parameters()).dtype}"
        self.folder = memory_of(run, held.request)
        self.metric = None
        if self.material.questions:
            wanted = [question.wanted for question in self.material.questions]
            self.metric, _ = choose.choose(held.request.metric, wanted)
            most = evaluate.answer_tokens(self.renderer, self.material.questions, self.notes.append)
            self.asker = answers.Asker(self.renderer, context, generate.Sampling(max_tokens=most), heed=heed)

    def general(self, scale: float) -> dict[str, float]:
        """Scores of the probe's items."""
        key = forget.key_of(f"{self.identity} scale {scale!r}", self.renderer, self.model)
        return forget.remembered(key, self.items, lambda: forget.measure(self.model, self.renderer, self.items))

    def score(self, scale: float) -> float | None:
        """Mean score of the answers."""
        if self.metric is None:
            return None
        questions = self.material.questions
        memory = answers.Memory(self.folder, f"{self.identity} scale {scale!r}")
        said = self.asker.ask(self.model, [each.prompt for each in questions], memory)
        rows = [
            ProofRow(
                row=each.example.row,
                prompt="",
                wanted=each.wanted,
                answers={"tuned": answers.answer_of(self.renderer, each.example, answer.ids)},
            )
            for each, answer in zip(questions, said, strict=True)
        ]
        scored = judge.score_answers(self.metric, rows, [each.example for each in questions])
        return mean(scored["tuned"].rows)

    def loss(self) -> float | None:
        return evaluate.score_rows(self.model, self.material).loss
