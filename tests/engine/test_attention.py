"""Laws of attention by blocks: it is its masked twin, whatever the forest, heads, window, cut or size of scores."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.engine import attention, blocks, forest
from luthier.engine.forest import Forest

pytestmark = pytest.mark.usefixtures("either_kernels")

ROWS = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=60), min_size=1, max_size=7)
HEADS = st.sampled_from([(1, 1), (4, 1), (6, 2), (3, 3)])
WINDOWS = st.sampled_from([None, 1, 2, 5, 16, 33, 1000])


def planted(rows: list[list[int]]) -> Forest:
    return forest.build([(np.array(row, np.int32), np.ones(len(row), np.float32)) for row in rows], min_shared=1)


def tensors(tree: Forest, heads: tuple[int, int], size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Views of one fused product, as a layer would pass them."""
    queries, keys = heads
    generator = torch.Generator().manual_seed(seed)
    fused = torch.randn(tree.tokens, (queries + 2 * keys) * size, generator=generator, dtype=torch.float64)
    parts = fused.unflatten(1, (-1, size)).split([queries, keys, keys], dim=1)
    query, key, value = (part.transpose(0, 1)[None] for part in parts)
    return query, key, value


def ours(
    tree: Forest, parts: tuple[Tensor, ...], seed: Tensor, window: int | None, scale: float, dtype: torch.dtype
) -> list[Tensor]:
    """Output and three gradients."""
    plan = attention.Plan(tree, torch.device("cpu"))
    query, key, value = (part.to(dtype) for part in parts)
    output, saved = attention.forward(query, key, value, plan, window, scale)
    return [output, *attention.backward(seed.to(dtype), saved)]


def twin(
    tree: Forest, parts: tuple[Tensor, ...], seed: Tensor, window: int | None, scale: float, dtype: torch.dtype
) -> list[Tensor]:
    """The same in float64 by one dense mask, from inputs as `dtype` can say them."""
    mask = attention.Plan(tree, torch.device("cpu")).dense(window)
    leaves = [part.to(dtype).double().requires_grad_() for part in parts]
    output = attention.masked_attention(*leaves, mask, scale)
    return [output.detach(), *torch.autograd.grad(output, leaves, seed.to(dtype).double())]


def apart(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative difference (norm) among the tensors. A gradient that cancels out (a token that sees itself
    alone has none for its query) is rounding of numbers about 1, so it is measured against elements of a tenth."""
    return max(
        float((one.double() - two).norm() / two.norm().clamp(min=0.1 * two.numel() ** 0.5))
        for one, two in zip(left, right, strict=True)
    )


@contextmanager
def halved_from(pairs: int) -> Iterator[None]:
    """Blocks of so many pairs are halved, and windowed segments cut as finely as that."""
    before = blocks.HALVED, blocks.LEAST
    blocks.HALVED, blocks.LEAST = pairs, 1
    try:
        yield
    finally:
        blocks.HALVED, blocks.LEAST = before


@settings(max_examples=50, deadline=None)
@given(ROWS, HEADS, WINDOWS, st.sampled_from([3, 16, 64]), st.sampled_from([20, 300, 1 << 20]))
def test_blocks_are_the_masked_twin(
    rows: list[list[int]], heads: tuple[int, int], window: int | None, size: int, halved: int
) -> None:
    """Float32, 1e-5: any trie, any grouping of heads, windows counted on the path, any cut into halves."""
    tree = planted(rows)
    parts = tensors(tree, heads, size)
    seed = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(1))
    with halved_from(halved):
        found = ours(tree, parts, seed, window, size**-0.5, torch.float32)
    assert apart(found, twin(tree, parts, seed, window, size**-0.5, torch.float32)) < 1e-5


@pytest.mark.parametrize("size", [64, 80, 128, 256])
@pytest.mark.parametrize("window", [None, 100])
def test_long_segments_of_every_head_size(size: int, window: int | None) -> None:
    """A prefix that is halved, branches of unlike lengths, one branch that parts again."""
    rng = np.random.default_rng(2)
    prefix, middle = (rng.integers(0, 300, length).tolist() for length in (290, 70))
    rows = [
        prefix + middle * inner + rng.integers(0, 300, length).tolist()
        for inner, length in ((0, 90), (1, 3), (1, 80), (0, 17))
    ]
    tree = planted(rows)
    parts = tensors(tree, (4, 1), size)
    seed = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(1))
    found = ours(tree, parts, seed, window, size**-0.5, torch.float32)
    assert apart(found, twin(tree, parts, seed, window, size**-0.5, torch.float32)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("larger", [1.0, 4.0, 30.0])
def test_scores_of_any_size(dtype: torch.dtype, larger: float) -> None:
    """The first guess of a row's sum may be off by any amount: scores of 30 x 30 overflow it at once. In bfloat16 the
    rounding of weights and their gradients is what remains."""
    rng = np.random.default_rng(3)
    prefix = rng.integers(0, 300, 100).tolist()
    tree = planted([prefix + rng.integers(0, 300, length).tolist() for length in (40, 60, 33)])
    query, key, value = tensors(tree, (6, 2), 64)
    parts = (query * larger, key * larger, value)
    seed = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    found = ours(tree, parts, seed, None, 0.125, dtype)
    exact = twin(tree, parts, seed, None, 0.125, dtype)
    if dtype == torch.float32:
        assert apart(found, exact) < (1e-5 if larger < 30 else 1e-3)  # a score of 5,000 has no more digits than that
    else:
        assert apart(found[:1], exact[:1]) < 0.01
        assert apart(found, exact) < 0.02


@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_a_number_comes_out_as_such(which: int, wrong: float) -> None:
    """A diverged step must end in the refusal that the loop has for it. (Of a query that is not a number torch's kernel
    makes zeros; but the token's hidden state, from which it came, goes past attention to the loss.)"""
    tree = planted([[1, 2, 3, 4], [1, 2, 5]])
    parts = [part.float() for part in tensors(tree, (2, 1), 16)]
    parts[which][0, 0, 1, 0] = wrong
    output, _ = attention.forward(*parts, attention.Plan(tree, torch.device("cpu")), None, 0.25)
    assert not bool(output.isfinite().all())


def test_keys_on_which_heads_rest_in_bfloat16() -> None:
    """What turned gradients round once: one early key of large norm, with a small value, takes most of every row, so
    the rest of the scores matter only by their small differences. Rows of 700 tokens, scores up to 30."""
    rng = np.random.default_rng(4)
    prefix = rng.integers(0, 300, 500).tolist()
    tree = planted([prefix + rng.integers(0, 300, 200).tolist() for _ in range(3)])
    query, key, value = tensors(tree, (6, 2), 64)
    direction = torch.ones(64, dtype=torch.float64) / 8
    query, key, value = query + 8 * direction, key + 20 * direction, value.clone()
    key[:, :, 0], value[:, :, 0] = 28 * direction, value[:, :, 0] * 0.02
    seed = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    found, exact = (make(tree, (query, key, value), seed, None, 0.125, torch.bfloat16) for make in (ours, twin))
    for one, two in zip(found, exact, strict=True):
        cosine = torch.cosine_similarity(one.double().flatten(), two.flatten(), dim=0)
        assert float(cosine) > 0.9998
