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

from luthier.data import general
from luthier.data.dataset import Prepared, Rows, mentions_tools, says_tools, split
from luthier.data.render import Renderer
from luthier.data.replay import mix
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
    publish,
    rendered,
    step,
)
from luthier.engine.adapters import Start
from luthier.engine.forest import Row
from luthier.engine.optimizer import Masters
from luthier.spec.errors import BadData, BadSetting, Broken
from luthier.spec.job import (
    AUTO_TEMPLATE,
    Settings,
    TrainRequest,
    auto_batch_size,
    auto_epochs,
    auto_learning_rate,
    auto_max_length,
    auto_validation_share,
    validation_share,
)
from luthier.spec.run import RunFolder, write_json

SELF_CHECK_TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2}  # share of the loss


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

    @property
    def rows(self) -> int:
        return len(self.train)


Emit = Callable[..., None]


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
    renderer = _renderer(request, base_folder, forebear.template if forebear else None, emit)
    max_length = _max_length(request, renderer)

    emit("phase", name="data", message=f"Reading {', '.join(request.data)}")
    seed = _seed(run, request)
    prepared, train, validation = _read_data(request, renderer, base_hash, max_length, seed, emit, heed)
    train, replayed = _replay(request, renderer, base_hash, max_length, seed, train, emit)
    if twice := _asked_twice(train, validation):
        emit(
            "warning",
            message=f"{twice} of {len(validation or ())} validation rows ask what training rows ask.",
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
    if (reason := layers.fuse(step.inner(model))) is not None:
        emit("phase", name="load", message=f"Layers go through transformers and PEFT, which is slower: {reason}")
    trainable = models.trainable(model)
    if not trainable:
        raise BadSetting("Nothing would be trained: no weight of this model is chosen.", param="method")
    masters = Masters(trainable, request.weight_decay)
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
    machine.trim()  # the weights as they were loaded, before they lay in one matrix, leave as much again in holes
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
    )


def silent(*_: Any, **__: Any) -> None:
    """The emit of a process that does not lead."""


def _renderer(request: TrainRequest, folder: Path, inherited: str | None, emit: Emit) -> Renderer:
    """By the template asked for, else the parent's, else the model's own; with `auto`, ChatML for tools that the own
    one cannot say, where the tokenizer has ChatML's marks. Raises what Renderer.load raises."""
    automatic = request.template == AUTO_TEMPLATE
    asked = inherited if automatic else request.template or inherited
    renderer = Renderer.load(folder, asked, request.prompt_loss_weight)
    if not automatic or asked or not renderer.tokenizer.has("<|im_end|>"):
        return renderer
    if not mentions_tools(request.data) or says_tools(renderer):
        return renderer
    emit("warning", message="The model's own chat template has no place for tools: ChatML is used.", hint="")
    return Renderer.load(folder, "chatml", request.prompt_loss_weight)


def _max_length(request: TrainRequest, renderer: Renderer) -> int:
    context = renderer.tokenizer.context
    if request.max_length == "auto":
        return auto_max_length(context)
    if request.max_length > context:
        raise BadSetting(
            f"--max-length: found {request.max_length}; this model reads at most {context} tokens.",
            param="max_length",
            hint=f"Choose {context} or less.",
        )
    return request.max_length


def _read_data(
    request: TrainRequest,
    renderer: Renderer,
    base_hash: str,
    max_length: int,
    seed: int,
    emit: Emit,
    heed: Callable[[], None],
) -> tuple[Prepared, Rows, Rows | None]:
    def read(paths: list[str], name: str) -> Prepared:
        last = -1

        def progress(done: int, total: int) -> None:
            nonlocal last
            heed()
            share = 20 * done // max(total, 1)
            if share != last:
                last = share
                emit("progress", name=name, done=done, total=total)

        return rendered.prepare(
            paths, renderer, base_hash, max_length=max_length, overlong=request.overlong, progress=progress
        )

    prepared = read(request.data, "data")
    _tell_warnings(prepared, emit)
    share = validation_share(request.validation)
    if share is not None:
        if request.validation == "auto":
            share = auto_validation_share(len(prepared.rows))
        train, validation = split(prepared.rows, share, seed)
        return prepared, train, validation.answers()
    if request.validation is None:
        return prepared, prepared.rows, None
    try:
        held = read([request.validation], "validation")
    except BadData as error:
        error.param = "validation"
        raise
    _tell_warnings(held, emit)
    if held.dropped or held.truncated:
        emit(
            "warning",
            message=f"{held.dropped} validation rows were dropped and {held.truncated} cut at {max_length} tokens.",
            hint="Raise --max-length to measure them whole.",
        )
    return prepared, prepared.rows, held.rows.answers()


def _replay(
    request: TrainRequest, renderer: Renderer, base_hash: str, max_length: int, seed: int, train: Rows, emit: Emit
) -> tuple[Rows, int]:
    """`train` with the general rows that were asked for, and how many; too long ones are left out, and counted."""
    if not request.replay:
        return train, 0
    try:
        paths = [request.replay_data or str(general.PLACE)]
        found = rendered.prepare(paths, renderer, base_hash, max_length=max_length, overlong="drop")
    except BadData as error:
        error.param = "replay_data"
        raise
    _tell_warnings(found, emit)
    mixed, count = mix(train, found.rows, request.replay, seed)
    left_out = f" ({found.dropped} were too long)" if found.dropped else ""
    emit("phase", name="data", message=f"{count} of {len(found.rows)} general rows are mixed in{left_out}")
    return mixed, count


def _tell_warnings(prepared: Prepared, emit: Emit) -> None:
    for warning in prepared.warnings[:20]:
        emit("warning", message=str(warning), hint="")
    if prepared.warning_count > 20:
        emit(
            "warning", message=f"{prepared.warning_count - 20} more warnings about the data.", hint="luthier data show"
        )


def _asked_twice(train: Rows, validation: Rows | None) -> int:
    """How many validation rows have a prompt that is trained on."""
    asked = set(train.keys)
    return sum(key in asked for key in validation.keys) if validation is not None else 0


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
    """The one asked for; else the one that the run began with; else what suits this machine, the first rank's."""
    if request.precision != "auto":
        return request.precision
    if resumed is not None:
        return "float32" if resumed["settings"]["precision"] == "float32" else "bfloat16"
    precision, why = models.training_precision(folder)
    if why:
        emit("phase", name="load", message=why)
    return "float32" if _of_the_first(precision == "float32") else "bfloat16"


def settle(
    request: TrainRequest, train: Rows, seed: int, max_length: int, precision: str, hidden_size: int, micro_tokens: int
) -> Settings:
    """Every "auto" becomes a number."""
    rows = len(train)
    epochs = auto_epochs(rows, train.text) if request.epochs == "auto" else request.epochs
    batch_size = auto_batch_size(rows) if request.batch_size == "auto" else request.batch_size
    batch_size = min(batch_size, rows)
    steps = -(-rows * epochs // batch_size)
    if request.max_steps is not None:
        steps = min(steps, request.max_steps)
    rate = request.learning_rate
    if rate == "auto":
        rate = auto_learning_rate(hidden_size, request.uses_adapter, train.supervised * batch_size / rows)
    return Settings(
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=rate * request.learning_rate_multiplier,
        steps=steps,
        warmup_steps=min(steps - 1, round(steps * request.warmup)),
        seed=seed,
        max_length=max_length,
        micro_tokens=micro_tokens,
        precision="bfloat16" if precision == "bfloat16" else "float32",
        alpha=2.0 * request.rank if request.alpha is None else request.alpha,
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
    order = position_order(len(rows), settings.seed, 0)
    for start in range(0, len(rows), settings.batch_size):
        physical += forest.physical_tokens([rows[int(index)] for index in order[start : start + settings.batch_size]])
    return {
        "tokens": rows.tokens,
        "supervised_tokens": rows.supervised,
        "physical_tokens": physical,
        "tree_ratio": round(rows.tokens / physical, 3) if physical else None,
    }


def works_of(rows: Sequence[Row], ready: Ready, part: slice = slice(None)) -> list[tuple[int, planner.Work]]:
    """What the loop computes of a step's rows, or of a share of its micro-batches; each with its number in the step."""
    return planner.works(rows, ready.settings.micro_tokens, part=part, trunks=step.branches(ready.model))


def position_order(rows: int, seed: int, epoch: int) -> Any:
    """The order of rows in an epoch: a function of (seed, epoch) alone, so a resumed run needs no memory of it."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


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
