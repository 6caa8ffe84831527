"""The ablation ladder: the engine with one of its parts turned off, the rest as it is.

Each rung replaces something of the engine, in this process alone, by what a plain trainer does there. A rung that an
engine does not have any more fails loudly, for its replacement finds nothing to replace.
Does not know: time, gates. (A rung must pass the gate as everything else does.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock


def _sharing(stack: ExitStack) -> None:
    """Every row keeps its own copy of a prefix: plain packing."""
    from luthier.engine import forest, planner

    never = 1 << 30
    stack.enter_context(mock.patch.object(planner, "MIN_SAVED", never))
    plan, build = forest.plan, forest.build
    stack.enter_context(mock.patch.object(forest, "plan", lambda rows, budget, *_, **__: plan(rows, budget, never)))
    stack.enter_context(
        mock.patch.object(forest, "build", lambda rows, sequences=None, *_: build(rows, sequences, never))
    )


def _blocks(stack: ExitStack) -> None:
    """Attention by one dense mask over the whole forest instead of the parts that are seen."""
    import torch

    from luthier.engine import attention

    graphs: dict[int, Any] = {}  # by the address of a layer's output, from its forward to its backward

    def forward(query: Any, key: Any, value: Any, plan: Any, window: int | None, scale: float, *_: int) -> Any:
        inputs = [part.detach().requires_grad_() for part in (query, key, value)]
        with torch.enable_grad():
            output = attention.masked_attention(*inputs, plan.dense(window), scale)
        saved = attention.Saved(query, key, value, output.detach(), output.new_empty(0), plan, window, scale)
        graphs[saved.output.data_ptr()] = output, inputs
        return saved.output, saved

    def backward(gradient: Any, saved: Any) -> Any:
        output, inputs = graphs.pop(saved.output.data_ptr())
        return torch.autograd.grad(output, inputs, gradient)

    stack.callback(graphs.clear)
    stack.enter_context(mock.patch.object(attention, "forward", forward))
    stack.enter_context(mock.patch.object(attention, "backward", backward))


def _packing(stack: ExitStack) -> None:
    """One row in a forward pass."""
    from luthier.engine import forest, planner

    def alone(rows: Sequence[Any], *_: Any, **__: Any) -> list[list[int]]:
        return [[index] for index in range(len(rows))]

    stack.enter_context(mock.patch.object(planner, "MIN_SAVED", 1 << 30))
    stack.enter_context(mock.patch.object(forest, "plan", alone))


def _fused(stack: ExitStack) -> None:
    """Layers through transformers and PEFT, instead of functions of our own with gradients by hand."""
    from luthier.engine import layers

    stack.enter_context(mock.patch.object(layers, "fuse", return_value="the ladder asks for it"))


def _head(stack: ExitStack) -> None:
    """Logits at every position, learnt or not."""
    from luthier.engine import forest

    def everywhere(make: Any, *given: Any, **named: Any) -> Any:
        import numpy as np

        tree = make(*given, **named)
        others = np.setdiff1d(np.arange(tree.tokens), tree.sources)
        return dataclasses.replace(
            tree,
            sources=np.r_[tree.sources, others],
            targets=np.r_[tree.targets, np.zeros_like(others)],
            weights=np.r_[tree.weights, np.zeros(len(others), np.float32)],
            sequences=np.r_[tree.sequences, np.zeros_like(others)],
        )

    for name in ("build", "trunk"):
        stack.enter_context(mock.patch.object(forest, name, partial(everywhere, getattr(forest, name))))


def _precision(stack: ExitStack) -> None:
    """Weights and activations in bfloat16, or in float32 where it would be bfloat16."""
    from luthier.engine import setup

    asked = setup._precision

    def other(*given: Any) -> str:
        return "float32" if asked(*given) == "bfloat16" else "bfloat16"

    stack.enter_context(mock.patch.object(setup, "_precision", other))


def _halves(stack: ExitStack) -> None:
    """Products of float32 numbers where they would be of float16."""
    from luthier.engine import products

    stack.enter_context(mock.patch.object(products, "chosen", return_value=False))


def _kernels(stack: ExitStack) -> None:
    """Torch's kernels only: attention in blocks that are merged, several passes between products."""
    from luthier.engine import kernels

    stack.enter_context(mock.patch.object(kernels, "able", return_value=False))


RUNGS = {
    "sharing": _sharing,
    "packing": _packing,
    "halves": _halves,
    "kernels": _kernels,
    "blocks": _blocks,
    "fused": _fused,
    "head": _head,
    "precision": _precision,
}


def instead(name: str) -> str:
    """What stands in the place of a part that is turned off, in words."""
    return " ".join((RUNGS[name].__doc__ or "").split()).rstrip(".") if name in RUNGS else ""


@contextmanager
def without(names: Sequence[str]) -> Iterator[None]:
    """Inside, the engine lacks the named parts. Raises KeyError for a name that is no rung."""
    with ExitStack() as stack:
        for name in names:
            RUNGS[name](stack)
        yield
