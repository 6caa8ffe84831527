"""The rows of a run: which template renders them, how long they may be, what is held out, what is mixed in.

Does not know: models, the loop.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from luthier.data import general
from luthier.data.dataset import Prepared, Rows, mentions_tools, says_tools, split
from luthier.data.render import Renderer
from luthier.data.replay import mix
from luthier.engine import rendered
from luthier.spec.errors import BadData, BadSetting
from luthier.spec.job import AUTO_TEMPLATE, TrainRequest, auto_max_length, auto_validation_share, validation_share

Emit = Callable[..., None]


def renderer_of(request: TrainRequest, folder: Path, inherited: str | None, emit: Emit) -> Renderer:
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


def longest(request: TrainRequest, renderer: Renderer) -> int:
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


def read(
    request: TrainRequest,
    renderer: Renderer,
    base_hash: str,
    max_length: int,
    seed: int,
    emit: Emit,
    heed: Callable[[], None],
) -> tuple[Prepared, Rows, Rows | None]:
    def prepare(paths: list[str], name: str) -> Prepared:
        last = -1

        def progress(done: int, total: int) -> None:
            nonlocal last
            heed()
            share = 20 * done // max(total, 1)
            if share != last:
                last = share
                emit("progress", name=name, done=done, total=total)

        return rendered.prepare(
            paths,
            renderer,
            base_hash,
            max_length=max_length,
            overlong=request.overlong,
            pairs=request.prefers,
            progress=progress,
        )

    prepared = prepare(request.data, "data")
    _tell_warnings(prepared, emit)
    share = validation_share(request.validation)
    if share is not None:
        if request.validation == "auto":
            share = auto_validation_share(prepared.rows.examples)
        train, validation = split(prepared.rows, share, seed)
        return prepared, train, validation.answers()
    if request.validation is None:
        return prepared, prepared.rows, None
    try:
        held = prepare([request.validation], "validation")
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


def with_general(
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


def asked_twice(train: Rows, validation: Rows | None) -> int:
    """How many validation examples have a prompt that is trained on."""
    asked = set(train.keys)
    return sum(key in asked for key in validation.keys) // validation.sides if validation is not None else 0
