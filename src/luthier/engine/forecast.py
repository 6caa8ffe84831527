"""What a run will take, before its first step: a few of its own micro-batches are computed, the rest is reckoned.

Time comes from the pace at which this machine does such work (pace.py), memory is what the largest micro-batch really
took. Measuring leaves no trace: gradients are thrown away, and every random number of a run follows from (seed, step).
Does not know: who is told.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from luthier.data.dataset import Rows
from luthier.engine import closing, machine, references, stream
from luthier.engine.optimizer import adamw
from luthier.engine.pace import Known, Point, Price, Size, prices, steady
from luthier.engine.planner import Work
from luthier.engine.setup import Ready, examples_of, works_of
from luthier.spec.errors import NotNow, UserError
from luthier.spec.forecast import Forecast
from luthier.spec.run import RunFolder

STEPS_LOOKED_AT = 64  # evenly spaced; the others are taken to be like them
PLACES = (0.5, 0.95, 0.1, 0.75)  # of the micro-batches by size: which are timed, in this order
MOST_SHARE = 0.03  # of the training time that measuring may take, from the third micro-batch on
SAFETY = 1.02  # memory: allocators keep a little more than is asked for


def make(
    run: RunFolder, ready: Ready, counts: dict[str, Any], begun: float, ranks: int, heed: Callable[[], None]
) -> Forecast:
    """The forecast of a run that is ready. `counts`: what setup.totals gave; `begun`: when this process set to work on
    it, of time.monotonic().

    Raises what `heed` raises; OSError when the run folder cannot be written.
    """
    settings, prepared = ready.settings, ready.prepared
    looked = sorted({round(place) for place in np.linspace(0, settings.steps - 1, STEPS_LOOKED_AT)})
    works = [_steps_works(ready, number) for number in looked]
    sizes = [[_size(work) for work in of_step] for of_step in works]
    training, forward = prices(ready.model)
    memory = Known(ready)
    every = sorted((work for of_step in works for work in of_step), key=lambda work: training.of(_size(work)))
    largest = max(every, key=lambda work: work.held)
    known = memory.covers([training.of(_size(work)) for work in every], largest.held)
    factor = settings.steps / len(looked)
    if not known:
        total = sum(training.of(size) for of_step in sizes for size in of_step) * factor
        memory.add(_measure(ready, every, largest, training, forward, total, heed))

    per_step = [sum(memory.seconds(training.of(size), "train") for size in of_step) for of_step in sizes]
    train = (sum(per_step) / ranks + len(looked) * _update_seconds(ready)) * factor
    held = ready.validation
    passes = _validations(ready) if held is not None else 0
    validate = passes * _forward_seconds(ready, held, memory, forward) / ranks if held is not None else 0.0
    looked_at = [rows for rows in (ready.train, held) if ready.request.prefers and rows is not None]
    unknown = [rows for rows in looked_at if not references.known(ready, rows)]
    reference = sum(_forward_seconds(ready, rows, memory, forward) for rows in unknown) / ranks
    learning = sum(weight.numel() for weight in ready.masters.values.values())
    result, state = result_bytes(ready), 12 * learning
    saves, published = _saves(ready)
    per_byte = machine.disk_seconds_per_byte(run.path)
    models = 1 + (saves if published else 0)
    save = per_byte * (saves * state + models * result) + models * ready.save_seconds
    ending = closing.foretell(ready, memory, forward, train, published, heed)
    several = any(sum(len(work.all) for work in of_step) > 1 for of_step in works)
    peak = memory.peak(largest.held, learning, several)
    return Forecast(
        rows=ready.rows,
        dropped=prepared.dropped,
        truncated=prepared.truncated,
        lost_tokens=prepared.lost_tokens,
        tokens=counts["tokens"],
        supervised_tokens=counts["supervised_tokens"],
        tree_ratio=counts["tree_ratio"],
        epochs=settings.epochs,
        steps=settings.steps,
        micro_batches=round(sum(len(work.all) for of_step in works for work in of_step) * factor),
        reference_seconds=round(reference, 2),
        train_seconds=round(train, 2),
        validate_seconds=round(validate, 2),
        save_seconds=round(save, 2),
        prove_seconds=round(ending.prove_seconds, 2),
        curve_seconds=round(ending.curve_seconds, 2),
        forget_seconds=round(ending.forget_seconds, 2),
        probe_items=ending.probe_items,
        peak_memory_bytes=max(machine.peak_memory(), round(SAFETY * peak)),
        memory_bytes=machine.memory_limit(),
        disk_bytes=min(saves, 2) * state + (1 + published) * result,
        free_disk_bytes=machine.free_disk(run.path),
        measured=not known or ending.measured,
        load_seconds=round(time.monotonic() - begun, 2),
    )


def told(run: RunFolder) -> Forecast | None:
    """What the first attempt foretold."""
    found = [event for _, event in run.events() if event["type"] == "forecast"]
    return Forecast(**{name: found[-1][name] for name in Forecast.model_fields if name in found[-1]}) if found else None


def weigh(forecast: Forecast, ready: Ready) -> dict[str, str] | None:
    """A warning (message, hint) when other processes hold the memory that the run needs. Raises UserError when the run
    can never fit this machine, NotNow when the disk is too full."""
    need, have = forecast.peak_memory_bytes, forecast.memory_bytes
    if have is not None and need > have:
        raise UserError(
            f"The run would need {_gb(need)} of memory; this machine has {_gb(have)}.",
            hint=_smaller(forecast, ready),
            param="micro_tokens",
        )
    if forecast.disk_bytes > forecast.free_disk_bytes:
        raise NotNow(
            f"The run folder would grow to {_gb(forecast.disk_bytes)}; {_gb(forecast.free_disk_bytes)} are free there.",
            hint="Free some space, choose another --out, or keep fewer models with --publish-checkpoints.",
            param="out",
        )
    free = machine.memory_free()
    more = need - machine.memory_now()
    if free is not None and more > free:
        message = (
            f"The run will need {_gb(more)} more memory, and {_gb(free)} are free: it may become slow or be killed."
        )
        return {"message": message, "hint": _smaller(forecast, ready)}
    return None


def _smaller(forecast: Forecast, ready: Ready) -> str:
    """Which setting would make it fit."""
    rest = machine.memory_now()
    room = (forecast.memory_bytes or 0) - rest
    taken = max(1, forecast.peak_memory_bytes - rest)
    tokens = int(0.9 * ready.settings.micro_tokens * room / taken) // 64 * 64
    if tokens >= 64 and room > 0:
        words = f"--micro-tokens {tokens} would fit"
        longest = ready.prepared.longest
        return f"{words}, with --max-length {tokens}." if longest > tokens else f"{words}."
    return "Choose --method lora or a smaller base." if not ready.request.uses_adapter else "Choose a smaller base."


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"


def _measure(
    ready: Ready,
    every: Sequence[Work],
    largest: Work,
    training: Price,
    forward: Price,
    total: float,
    heed: Callable[[], None],
) -> list[Point]:
    """Time some of the micro-batches `every` (sorted by work), after the largest has shown its memory and warmed up
    what is made once. `total`: operations of the whole run."""
    resting = machine.memory_now()
    seen = machine.forget_peak()
    seconds = _timed(lambda: _train_on(ready, largest))
    memory = (machine.peak_since() if seen else machine.peak_memory()) - resting
    points = [Point("first", training.of(_size(largest)), seconds, largest.held, max(0, memory))]
    spent = 0.0
    for place in dict.fromkeys(round(place * (len(every) - 1)) for place in PLACES):
        if steady(points) and spent > MOST_SHARE * total * points[-1].seconds / points[-1].work:
            break
        heed()
        work = every[place]
        seconds = _timed(lambda work=work: _train_on(ready, work))  # type: ignore[misc]
        spent += seconds
        points.append(Point("train", training.of(_size(work)), seconds, work.held))
    middle = every[len(every) // 2]
    looking = _timed(lambda: stream.measure(ready.model, middle))
    return [*points, Point("forward", forward.of(_size(middle)), looking, middle.held)]


def _size(work: Work) -> Size:
    return Size.of(*work.all)


def _timed(work: Callable[[], Any]) -> float:
    begun = machine.clock()
    work()
    return machine.clock() - begun


def _train_on(ready: Ready, work: Work) -> None:
    """A piece of a step as the loop takes it, its gradients thrown away."""
    ready.model.train()
    stream.forward_backward(ready.model, work, 1.0, ready.request.label_smoothing, collect=ready.masters.collect)
    ready.masters.clear()


def _steps_works(ready: Ready, number: int) -> list[Work]:
    """What the loop will compute in optimizer step `number`."""
    rows = ready.train.of(examples_of(ready, number))
    return [work for _, work in works_of(rows, ready)]


def _update_seconds(ready: Ready) -> float:
    """Of one AdamW step over all learning weights, from one over a part of them."""
    values = list(ready.masters.values.values())
    learning = sum(value.numel() for value in values)
    part = torch.zeros(min(learning, 4_000_000), device=values[0].device, requires_grad=True)
    part.grad = torch.ones_like(part)
    update = adamw([part])
    update.step()  # makes its state
    return _timed(lambda: (torch.nn.utils.clip_grad_norm_([part], 1.0), update.step())) * learning / part.numel()


def _forward_seconds(ready: Ready, rows: Rows, known: Known, forward: Price) -> float:
    """Of one pass over rows that are held out."""
    planned = [work for _, work in works_of(list(rows), ready)]
    looked = planned[:: max(1, len(planned) // STEPS_LOOKED_AT)]
    return sum(known.seconds(forward.of(_size(work)), "forward") for work in looked) * len(planned) / len(looked)


def _validations(ready: Ready) -> int:
    """Passes over the validation rows: one of the base, one for each stretch; with classes that no first token tells
    apart, one more for each class."""
    passes = 1 + _stretches(ready, ready.request.validate_every)
    classes = ready.classes
    return passes * (1 + len(classes.names)) if classes is not None and classes.first is None else passes


def _saves(ready: Ready) -> tuple[int, int]:
    """(checkpoints written, of them kept as models)."""
    saves = _stretches(ready, ready.request.checkpoint_every)
    return saves, min(saves, ready.request.publish_checkpoints)


def _stretches(ready: Ready, every: int | str) -> int:
    settings = ready.settings
    if every == "epoch":
        return max(1, math.ceil(settings.steps * settings.batch_size / ready.rows))
    return math.ceil(settings.steps / int(every))


def result_bytes(ready: Ready) -> int:
    """Of the weights that are published: an adapter in float32, a whole model in its own dtype."""
    if ready.request.uses_adapter:
        twice = 2 if ready.request.method == "pissa" else 1
        return 4 * twice * sum(value.numel() for value in ready.masters.values.values())
    return sum(weight.numel() * weight.element_size() for weight in ready.model.parameters())
