"""Everything between a request and the first step: base, data, settings, adapter, and every check that can fail early.

Order matters. What a run can be refused for is found out before anything slow or irreversible: data before weights,
a dry run of the final save before step 1, and a proof that our forward pass is the model's own.
Does not know: the loop.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from luthier.data.dataset import Prepared, Rows
from luthier.data.render import Renderer
from luthier.engine import (
    agreement,
    attention,
    catalogue,
    classify,
    forest,
    kernels,
    layers,
    machine,
    models,
    parent,
    planner,
    products,
    publish,
    reading,
    step,
)
from luthier.engine.adapters import Start
from luthier.engine.forest import Row
from luthier.engine.optimizer import Masters
from luthier.spec.errors import BadSetting, Broken
from luthier.spec.job import (
    AUTO_BETA,
    Settings,
    TrainRequest,
    auto_batch_size,
    auto_epochs,
    auto_learning_rate,
)
from luthier.spec.run import RunFolder, write_json

SELF_CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 1e-2}  # share of the loss


@dataclass
class Ready:
    """A run that can take its first step. `request` holds what a model to continue from decided."""

    request: TrainRequest
    settings: Settings
    renderer: Renderer
    base_folder: Path
    base_hash: str
    train: Rows
    validation: Rows | None
    prepared: Prepared
    model: Any
    masters: Masters
    initial: Start
    classes: classify.Classes | None
    replayed: int  # general rows among those of `train`
    base_seconds: float  # what loading the base took
    save_seconds: float  # what the dry run of the final save took: all of it but the weights
    start: str  # how what the model computes at first differs from the base: a parent's hash, or a way of rounding

    @property
    def rows(self) -> int:
        """Examples to train on: rows, or pairs of them."""
        return self.train.examples


Emit = Callable[..., None]


@machine.loading()
def make_ready(
    run: RunFolder,
    request: TrainRequest,
    emit: Emit,
    resumed: dict[str, Any] | None,
    *,
    leads: bool = True,
    heed: Callable[[], None] = lambda: None,
) -> Ready:
    """Load and check everything. `resumed` is the spec.json of an earlier attempt, which must still hold; only the
    process that `leads` writes. `heed` is called now and then and may raise, to stop.

    Raises UserError kin for data, settings and models that cannot be trained.
    """
    emit("phase", name="load", message=f"Loading {request.model}")
    base_folder = catalogue.resolve(request.model)
    base_hash = catalogue.content_hash(base_folder)
    asked, forebear = request, parent.find(request, base_hash)
    if forebear is not None:
        request = forebear.fit(request)
    renderer = reading.renderer_of(request, base_folder, forebear.template if forebear else None, emit)
    max_length = reading.longest(request, renderer)

    emit("phase", name="data", message=f"Reading {', '.join(request.data)}")
    seed = _seed(run, request)
    prepared, train, validation = reading.read(request, renderer, base_hash, max_length, seed, emit, heed)
    train, replayed = reading.with_general(request, renderer, base_hash, max_length, seed, train, emit)
    if validation is not None and (twice := reading.asked_twice(train, validation)):
        emit(
            "warning",
            message=f"{twice} of {validation.examples} validation rows ask what training rows ask.",
            hint="Their score says little about new prompts; --validation 0.1 holds out prompts of their own.",
        )
    classes = classify.prepare(
        request, renderer, train, validation, lambda message: emit("warning", message=message, hint="")
    )
    precision = _precision(request, base_folder, resumed, emit)
    whole = forebear is not None and not forebear.adapter
    begun = time.monotonic()
    base: Any = models.placed(models.load_base(forebear.folder if forebear and whole else base_folder, precision))
    base_seconds = time.monotonic() - begun
    hidden_size = int(base.config.get_text_config().hidden_size)
    micro_tokens = _micro_tokens(request, base, resumed)
    settings = settle(request, train, seed, max_length, precision, hidden_size, micro_tokens)
    spec = {
        "request": asked.model_dump(),
        "settings": settings.model_dump(),
        "base": {"folder": str(base_folder), "hash": base_hash},
        "parent": forebear.hash if forebear else None,
        "template": {"name": renderer.template.name, "source": renderer.template.source},
        "stop_ids": list(renderer.stop_ids),
        "data": {"files": prepared.files, "rows": train.digest()},
        "validation": {"rows": validation.digest() if validation else None},
        "kernels": kernels.choose((resumed or {}).get("kernels"), emit),
    }
    if resumed is not None:
        agreement.require(resumed, spec)
    elif leads:
        write_json(run.spec, spec)

    heed()
    attention.install(base)
    notes = models.still(base)
    state: dict[str, torch.Tensor] = {}
    if forebear is not None and forebear.adapter:
        model, state = forebear.attach(base, request)
    else:
        model = models.attach(base, request, settings)
    products.choose(step.inner(model), precision == "float16" and not products.absent())
    if (reason := layers.fuse(step.inner(model))) is not None:
        emit("phase", name="load", message=f"Layers go through transformers and PEFT, which is slower: {reason}")
    trainable = models.trainable(model)
    if not trainable:
        raise BadSetting("Nothing would be trained: no weight of this model is chosen.", param="method")
    masters = Masters(trainable, request.weight_decay, steady=request.uses_adapter)
    if state:
        parent.start_from(masters.values, model, state)
        masters.publish()
    begun = time.monotonic()
    if leads:
        notes += publish.dry_run(
            model,
            request=request,
            base_folder=base_folder,
            template=renderer.template.source,
            stop_ids=renderer.stop_ids,
            pad_id=renderer.tokenizer.pad_id,
            out=run.model,
        )
    save_seconds = time.monotonic() - begun
    _prove_path(model, train, precision)
    initial = publish.fingerprint(masters.values)
    for note in notes:
        emit("warning", message=note, hint="")
    return Ready(
        request,
        settings,
        renderer,
        base_folder,
        base_hash,
        train,
        validation,
        prepared,
        model,
        masters,
        initial,
        classes,
        replayed,
        base_seconds,
        save_seconds,
        forebear.hash if forebear else _rounding(request, settings),
    )


def _rounding(request: TrainRequest, settings: Settings) -> str:
    """What an adapter that has learnt nothing makes different from the base: nothing, or the last bits."""
    if request.method == "pissa":
        return f"pissa {request.rank} {settings.alpha} {sorted(request.target_modules)} {settings.seed}"
    return request.method if request.method == "dora" else ""


def silent(*_: Any, **__: Any) -> None:
    """The emit of a process that does not lead."""


def _seed(run: RunFolder, request: TrainRequest) -> int:
    """The seed asked for; else the one that an earlier attempt chose, also when it came to no checkpoint; else a new
    one. All ranks take the first one's, or each would train another adapter on other rows."""
    if request.seed is not None:
        return request.seed
    seed = secrets.randbelow(2**31)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        seed = int(json.loads(run.spec.read_text(encoding="utf-8"))["settings"]["seed"])
    if dist.is_initialized():
        shared = torch.tensor(seed)
        dist.broadcast(shared, src=0)
        seed = int(shared)
    return seed


def _micro_tokens(request: TrainRequest, base: Any, resumed: dict[str, Any] | None) -> int:
    """The number asked for; else the one that the run began with, as its dropout masks follow from it; else what fits
    the free memory. All ranks take the first one's."""
    if request.micro_tokens != "auto":
        return request.micro_tokens
    if resumed is not None:
        return int(resumed["settings"]["micro_tokens"])
    return _of_the_first(models.fitting_tokens(base, whole=not request.uses_adapter))


def _of_the_first(number: int) -> int:
    """The number that the first rank has."""
    shared = torch.tensor(number)
    if dist.is_initialized():
        dist.broadcast(shared, src=0)
    return int(shared)


def _precision(request: TrainRequest, folder: Path, resumed: dict[str, Any] | None, emit: Emit) -> models.Precision:
    """The one asked for; else the one that the run began with; else what suits this machine, the first rank's.
    Raises BadSetting for halves where there are none; a run that began with them goes on without, and is told."""
    known: tuple[models.Precision, ...] = ("float32", "bfloat16", "float16")
    if request.precision != "auto":
        precision = request.precision
    elif resumed is not None:
        precision = known[known.index(resumed["settings"]["precision"])]
    else:
        precision, why = models.training_precision(folder)
        if why:
            emit("phase", name="load", message=why)
        return known[_of_the_first(known.index(precision))]
    if precision == "float16" and (lack := products.absent()):
        if resumed is None:
            raise BadSetting(
                f"--precision float16: {lack}.",
                param="precision",
                hint="Choose float32, or auto: what suits the machine.",
            )
        message = f"The run began with products of float16 numbers and goes on in float32: {lack}"
        emit("warning", message=message, hint="")
    return precision


def settle(
    request: TrainRequest,
    train: Rows,
    seed: int,
    max_length: int,
    precision: models.Precision,
    hidden_size: int,
    micro_tokens: int,
) -> Settings:
    """Every "auto" becomes a number."""
    rows = train.examples
    epochs = auto_epochs(rows, train.text) if request.epochs == "auto" else request.epochs
    batch_size = auto_batch_size(rows) if request.batch_size == "auto" else request.batch_size
    batch_size = min(batch_size, rows)
    steps = -(-rows * epochs // batch_size)
    if request.max_steps is not None:
        steps = min(steps, request.max_steps)
    rate = request.learning_rate
    if rate == "auto":
        learnt = train.supervised * batch_size / rows
        rate = auto_learning_rate(hidden_size, request.uses_adapter, learnt, request.prefers)
    return Settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=rate * request.learning_rate_multiplier,
        steps=steps,
        warmup_steps=min(steps - 1, round(steps * request.warmup)),
        seed=seed,
        max_length=max_length,
        micro_tokens=micro_tokens,
        precision=precision,
        alpha=2.0 * request.rank if request.alpha is None else request.alpha,
        beta=(AUTO_BETA if request.beta == "auto" else request.beta) if request.prefers else None,
    )


def _prove_path(model: Any, train: Rows, precision: str) -> None:
    """Refuse to train a model that we do not compute as it computes itself."""
    candidates = [train[index] for index in range(min(len(train), 64))]
    longest = sorted(candidates, key=lambda row: -len(row[0]))[:3]
    gap = step.self_check(model, [(ids[:256], weights[:256]) for ids, weights in longest])
    if not gap <= SELF_CHECK_TOLERANCE[precision]:
        raise Broken(
            f"Self-check failed: our forward pass differs from the model's own by {gap:.1%}.",
            hint="This architecture is not supported yet; please report it with the model's config.json.",
        )


def totals(rows: Rows, settings: Settings) -> dict[str, Any]:
    """What a run will compute: logical, supervised and physical tokens of one pass, planned as steps will be."""
    physical = 0
    order = position_order(rows.examples, settings.seed, 0)
    for start in range(0, rows.examples, settings.batch_size):
        physical += forest.physical_tokens(rows.of(order[start : start + settings.batch_size].tolist()))
    return {
        "tokens": rows.tokens,
        "supervised_tokens": rows.supervised,
        "physical_tokens": physical,
        "tree_ratio": round(rows.tokens / physical, 3) if physical else None,
    }


def works_of(rows: Sequence[Row], ready: Ready, part: slice = slice(None)) -> list[tuple[int, planner.Work]]:
    """What the loop computes of a step's rows, or of a share of its micro-batches; each with its number in the step."""
    trunks = step.branches(ready.model)
    return planner.works(rows, ready.settings.micro_tokens, part=part, trunks=trunks, each=ready.train.sides)


def position_order(rows: int, seed: int, epoch: int) -> Any:
    """The order of rows in an epoch: a function of (seed, epoch) alone, so a resumed run needs no memory of it."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def examples_of(ready: Ready, step: int) -> list[int]:
    """What optimizer step `step` (0-based) learns: `batch_size` examples, the last step what is left."""
    position = step * ready.settings.batch_size
    count = min(ready.settings.batch_size, ready.settings.epochs * ready.rows - position)
    return step_rows(position, count, ready.rows, ready.settings.seed)


def step_rows(position: int, count: int, rows: int, seed: int) -> list[int]:
    """Row indices at positions [position, position + count) of the endless sequence of shuffled epochs."""
    picked: list[int] = []
    while count > 0:
        epoch, offset = divmod(position, rows)
        part = position_order(rows, seed, epoch)[offset : offset + count]
        picked += [int(index) for index in part]
        position += len(part)
        count -= len(part)
    return picked


def seed_everything(*numbers: int) -> None:
    """Seed torch from a tuple of numbers: dropout masks follow from (seed, step, micro-batch), not from history."""
    state = np.random.SeedSequence(list(numbers)).generate_state(2)
    torch.manual_seed(int(state[0]) << 32 | int(state[1]))
