"""Where a step of Luthier's goes: its second step under torch's profiler. Writes result.json with shares of its time.

A share is the own time of operators of a kind, whatever called them; all that runs inside attention is attention, and
all of the loss but its products is loss.
Does not know: why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from benchmarks.training.drivers import job as jobs
from benchmarks.training.drivers import luthier_engine

ATTENTION, LOSS, HALVES = "attention of the forest", "loss of the targets", "product of halves"
PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::linear",
    "aten::bmm",
    "aten::baddbmm",
    "aten::mkldnn",
    "mkldnn::",
    "aten::matmul",
    HALVES,
)
COPIES = ("aten::copy_", "aten::cat", "aten::index", "aten::fill_", "aten::zero_", "aten::empty", "aten::resize_")


def kind(names: Iterable[str]) -> str:
    """Of an operator, given its name and then those of what called it, the nearest first."""
    own, *above = names
    if ATTENTION in (own, *above):
        return "attention"
    if own.startswith(PRODUCTS):
        return "matrix products"
    if LOSS in (own, *above):
        return "loss"
    if own.startswith(COPIES):
        return "copies"
    return "pointwise and the rest"


def shares(events: Iterable[Any]) -> dict[str, float]:
    """By kind the part of all own time, largest first. Events are torch's: name, cpu_parent, self_cpu_time_total."""
    total: Counter[str] = Counter()
    for event in events:
        names, above = [event.name], event.cpu_parent
        while above is not None:
            names.append(above.name)
            above = above.cpu_parent
        total[kind(names)] += event.self_cpu_time_total
    whole = sum(total.values())
    return {what: spent / whole for what, spent in total.most_common()} if whole else {}


@contextmanager
def watched(found: dict[str, float]) -> Iterator[None]:
    """Inside, the second step of a run leaves its shares in `found`."""
    from torch.profiler import ProfilerActivity, profile, record_function

    from luthier.engine import attention, kernels, loss
    from luthier.engine import train as engine

    one_step = engine.Loop._one_step

    def named(function: Any, name: str = ATTENTION) -> Any:
        def call(*given: Any, **more: Any) -> Any:
            with record_function(name):
                return function(*given, **more)

        return call

    def one_step_watched(self: Any, number: int) -> Any:
        if number != 1:
            return one_step(self, number)
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            measured = one_step(self, number)
        found.update(shares(seen.events()))
        return measured

    with (
        mock.patch.object(attention, "forward", named(attention.forward)),
        mock.patch.object(attention, "backward", named(attention.backward)),
        mock.patch.object(kernels, "product_of_halves", named(kernels.product_of_halves, HALVES)),
        mock.patch.object(loss, "_in_place", named(loss._in_place, LOSS)),
        mock.patch.object(engine.Loop, "_one_step", one_step_watched),
    ):
        yield


def main() -> None:
    job = jobs.read()
    found: dict[str, float] = {}
    with watched(found):
        record = luthier_engine.train(job)
    record.notes["shares"] = found
    record.finish()


if __name__ == "__main__":
    main()
