"""Laws of attention by calls of a variable-length kernel: it is its masked twin, whatever the forest, heads or window.

Where there is no GPU the kernel is written out here in plain torch, from its documentation; test_cuda.py has the real
one.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from luthier.engine import attention, forest, varlen
from luthier.engine.attention import Trunk
from luthier.engine.varlen import Call
from tests.engine.test_attention import HEADS, ROWS, WINDOWS, apart, planted, tensors, twin
from tests.engine.test_forest import rows_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def plain_kernel() -> object:
    """Calls are computed by what is below."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(varlen, "kernel_forward", kernel_forward)
        patch.setattr(varlen, "kernel_backward", kernel_backward)
        yield


def scores(query: Tensor, key: Tensor, number: int, call: Call, scale: float) -> tuple[slice, slice, Tensor]:
    """Of one sequence: its queries, its keys, and their masked scores [H, Q, K]."""
    rows = slice(*call.query_starts[number : number + 2].tolist())
    seen = slice(*call.key_starts[number : number + 2].tolist())
    keys = key[seen].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    found = torch.einsum("qhd,khd->hqk", query[rows], keys) * scale
    length, count = found.shape[1:]
    assert 0 < length <= call.most_queries and 0 < count <= call.most_keys
    distance = torch.arange(length)[:, None] + count - length - torch.arange(count)
    if call.causal:
        found = found.masked_fill(distance < 0, -torch.inf)
    if call.window is not None:
        found = found.masked_fill(distance >= call.window, -torch.inf)
    return rows, seen, found


def kernel_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, scale: float) -> tuple[Tensor, Tensor]:
    output, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query))
    for number in range(len(call.query_starts) - 1):
        rows, seen, found = scores(query, key, number, call, scale)
        values = value[seen].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        output[rows] = torch.einsum("hqk,khd->qhd", found.softmax(dim=-1), values)
        lse[:, rows] = found.logsumexp(dim=-1)
    assert call.query_starts[-1] == len(query) and call.key_starts[-1] == len(key) == len(value)
    return output, lse


def kernel_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, call: Call, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads = [torch.zeros_like(one) for one in (query, key, value)]
    groups = query.shape[1] // key.shape[1]
    for number in range(len(call.query_starts) - 1):
        rows, seen, found = scores(query, key, number, call, scale)
        keys, values = (one[seen].repeat_interleave(groups, dim=1) for one in (key, value))
        weights = (found - lse[:, rows, None]).exp()
        own = (grad[rows] * output[rows]).sum(dim=-1).t()[..., None]
        inner = weights * (torch.einsum("qhd,khd->hqk", grad[rows], values) - own) * scale
        grads[0][rows] = torch.einsum("hqk,khd->qhd", inner, keys)
        for place, part in (
            (grads[1], torch.einsum("hqk,qhd->khd", inner, query[rows])),
            (grads[2], torch.einsum("hqk,qhd->khd", weights, grad[rows])),
        ):
            place[seen] = part.unflatten(1, (-1, groups)).sum(dim=2)
    return grads[0], grads[1], grads[2]


def by_calls(plan: attention.Plan, parts: tuple[Tensor, ...], seed: Tensor, window: int | None) -> list[Tensor]:
    """Output and three gradients, [1, H, T, D]."""
    first = [one[0].transpose(0, 1) for one in (*parts, seed)]
    made = plan.sequences(window)
    scale = parts[0].shape[-1] ** -0.5
    output, lse = varlen.forward(first[0], first[1], first[2], made, scale)
    grads = varlen.backward(first[3], first[0], first[1], first[2], output, lse, made, scale)
    return [one.transpose(0, 1)[None] for one in (output, *grads)]


@settings(max_examples=60, deadline=None)
@given(ROWS, HEADS, WINDOWS)
def test_calls_are_the_masked_twin(rows: list[list[int]], heads: tuple[int, int], window: int | None) -> None:
    tree = planted(rows)
    parts = tuple(part.float() for part in tensors(tree, heads, 8))
    seed = torch.randn(parts[0].shape, generator=torch.Generator().manual_seed(1))
    found = by_calls(attention.Plan(tree, CPU), parts, seed, window)
    assert apart(found, twin(tree, parts, seed, window, 8**-0.5, torch.float32)) < 1e-5


@pytest.mark.parametrize("window", [None, 1, 7, 45, 60, 1000])
def test_behind_a_trunk(window: int | None) -> None:
    tree = forest.build(rows_of([3, 9, 30, 14], prefix=0, seed=4), begin=50)
    query, key, value = (part.float() for part in tensors(tree, (4, 2), 16))
    more = torch.randn(2, 1, 2, 50, 16, generator=torch.Generator().manual_seed(3))
    key, value = torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2)
    seed = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    plan = attention.Plan(tree, CPU, Trunk(50))
    found = by_calls(plan, (query, key, value), seed, window)
    leaves = [part.double().requires_grad_() for part in (query, key, value)]
    exact = attention.masked_attention(*leaves, plan.dense(window), 0.25)
    assert apart(found, [exact.detach(), *torch.autograd.grad(exact, leaves, seed.double())]) < 1e-5


def test_calls_are_few() -> None:
    """One for each depth of the tree, however many rows; one in all where a window slides, or where nothing is shared.
    What is contiguous is not copied."""
    rng = np.random.default_rng(0)
    shared = rng.integers(0, 300, 100).tolist()
    tree = planted([[*shared, number, *rng.integers(0, 300, 20).tolist()] for number in range(16)])
    full, windowed = (varlen.calls(tree, window, 0, CPU) for window in (None, 8))
    assert [(call.causal, len(call.query_starts) - 1) for call in full] == [(True, 17), (False, 1)]
    assert all(isinstance(place, slice) for call in full for place in (call.queries, call.keys))
    assert [(call.causal, len(call.query_starts) - 1, call.most_keys) for call in windowed] == [(True, 17, 100)]
    packed = varlen.calls(planted([[number] * 30 for number in range(5)]), None, 0, CPU)
    assert [(call.causal, call.most_keys) for call in packed] == [(True, 30)]


def test_the_kernel_is_asked_for_only_where_it_is() -> None:
    assert not varlen.able(CPU, torch.bfloat16, 64)
    assert not varlen.able(torch.device("cuda"), torch.float32, 64)
