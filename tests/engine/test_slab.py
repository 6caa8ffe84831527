"""Laws of slabs: no two tensors share a byte, and memory is used again only when nobody holds any of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.engine import forest, layers, step, stream
from luthier.engine.planner import Work
from luthier.engine.slab import LINE, Slab, Slabs
from tests.engine.test_forest import Gradients, rows_of
from tests.engine.test_layers import adapted, make

DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40), DTYPES), max_size=12), st.integers(0, 4000), st.integers()
)
def test_tensors_are_apart_and_memory_returns(shapes: list[tuple[int, int, torch.dtype]], size: int, seed: int) -> None:
    """Also of those that find no place in it any more; whichever is dropped last."""
    slabs = Slabs()
    inside = [tensor for tensor in _filled(slabs, shapes, size) if tensor.numel()]
    random.Random(seed).shuffle(inside)
    while inside:
        assert not any(_free(slabs, address) for address in map(torch.Tensor.data_ptr, inside))
        inside.pop()
    assert len(slabs.free) == 1


def _filled(slabs: Slabs, shapes: list[tuple[int, int, torch.dtype]], size: int) -> list[torch.Tensor]:
    slab = slabs.take(size)
    held = [slab.empty((rows, width), kind).fill_(at) for at, (rows, width, kind) in enumerate(shapes)]
    for at, (one, (rows, width, kind)) in enumerate(zip(held, shapes, strict=True)):
        assert one.shape == (rows, width) and one.dtype == kind and bool((one == at).all())
        assert one.data_ptr() % LINE == 0
    return held


def _free(slabs: Slabs, address: int) -> bool:
    return any(memory.ctypes.data <= address < memory.ctypes.data + len(memory) for memory in slabs.free)


def test_the_smallest_that_fits_is_used_again() -> None:
    slabs = Slabs()
    both = [slabs.take(size) for size in (4096, 8192)]
    del both
    assert [len(memory) for memory in sorted(slabs.free, key=len)] == [4096 + LINE, 8192 + LINE]
    small = slabs.take(1000)
    assert [len(memory) for memory in slabs.free] == [8192 + LINE]
    large = slabs.take(10_000)  # in the place of the one that is too small
    assert slabs.free == []
    del small, large
    assert sorted(len(memory) for memory in slabs.free) == [4096 + LINE, 10_000 + LINE]


def fused(family: str, **config: Any) -> Any:
    model = adapted(make(family, **config))
    assert layers.fuse(step.inner(model)) is None
    return model


def decoder_of(model: Any) -> layers.Decoder:
    found = layers.of(step.inner(model))
    assert found is not None
    return found


def gradients(model: Any) -> Gradients:
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


@pytest.mark.usefixtures("either_kernels")
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_graphs_that_live_at_once_share_nothing(family: str) -> None:
    """Forests that go backward in another order than forward, others between them: each has the gradients that it has
    alone, to the bit."""
    model = fused(family, head_dim=16)
    trees = [forest.build(rows_of(lengths, prefix=9, seed=2)) for lengths in ([5, 8], [3], [4, 30, 7])]
    alone = []
    for tree in trees:
        step.learn(model, tree, step.hidden_states(model, tree), 100.0)
        alone.append(gradients(model))
    first, second = (step.hidden_states(model, tree) for tree in trees[:2])
    step.learn(model, trees[0], first, 100.0)
    found = [gradients(model)]
    del first
    third = step.hidden_states(model, trees[2])
    step.learn(model, trees[1], second, 100.0)
    found.append(gradients(model))
    step.learn(model, trees[2], third, 100.0)
    found.append(gradients(model))
    assert all(
        torch.equal(value, ours[name]) for ours, one in zip(found, alone, strict=True) for name, value in one.items()
    )


def test_one_slab_for_all_forests_and_one_for_a_trunk() -> None:
    """None for what never goes backward."""
    model = fused("llama")
    slabs = decoder_of(model).slabs
    rows = rows_of([8, 5, 9], prefix=24, seed=4)
    trees = [forest.build([row]) for row in rows]
    stream.measure(model, Work(trees))
    assert slabs.free == []
    stream.forward_backward(model, Work(trees), 100.0)
    assert len(slabs.free) == 1
    behind = [forest.build([(ids[24:], weights[24:])], begin=24) for ids, weights in rows]
    places = []
    for _ in range(3):
        stream.forward_backward(model, Work(behind, forest.trunk(rows, [0, 1, 2], 24)), 100.0)
        places.append(sorted(memory.ctypes.data for memory in slabs.free))
    assert len(places[0]) == 2 and places[0] == places[1] == places[2]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_all_that_layers_put_there_fits(family: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """And little is left: what they keep is reckoned right."""
    model = fused(family, head_dim=16).to(precision)
    assert layers.fuse(step.inner(model)) is None
    seen: list[Slab] = []
    usual = Slab.empty

    def spied(self: Slab, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        before = self._at
        made = usual(self, shape, dtype)
        assert self._at > before
        seen.append(self)
        return made

    monkeypatch.setattr(Slab, "empty", spied)
    row = (torch.arange(layers.EVEN).numpy() % 290, torch.ones(layers.EVEN).numpy())
    hidden = step.hidden_states(model, forest.build([row]))
    assert hidden.requires_grad and len(set(map(id, seen))) == 1
    row_of_last = 4 * 4 * layers.EVEN  # the last layer has one row less: its last token predicts nothing
    rounded = sum(layers.EVEN * layer.o.inputs * 2 for layer in decoder_of(model).layers)  # attention's, from float32
    assert seen[0]._end - seen[0]._at < row_of_last + (rounded if precision == torch.bfloat16 else 0)
