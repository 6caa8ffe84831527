"""Laws of trunks, in float32: a beginning that is computed once gives the step of everything at once, however cut."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.engine import attention, blocks, forest, layers, models, planner, stream
from luthier.engine.attention import Trunk
from luthier.engine.forest import Row
from luthier.engine.step import Tally
from tests import tiny as tiny_models
from tests.engine.test_attention import apart, tensors
from tests.engine.test_forest import FAMILIES, Gradients, rows_of, same


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("stream") / request.param
    options = {"family": request.param, **FAMILIES[request.param]}
    found = models.load_base(tiny_models.make_model(folder, **options), "float32").eval()
    attention.install(found)
    return found


@pytest.fixture(autouse=True)
def small_trunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "MIN_SAVED", 8)


def learnt(model: Any, rows: list[Row], budget: int, tally: Tally | None = None) -> tuple[float, Gradients]:
    model.zero_grad(set_to_none=True)
    planned = planner.works(rows, budget)
    total = sum(stream.forward_backward(model, work, 100.0, 0.1, tally) for _, work in planned)
    return total, {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("fused", [False, True])
def test_streamed_is_together(model: Any, fused: bool) -> None:
    """Loss, every gradient and the counts of answers, with targets in the trunk and at its last token."""
    rows = rows_of([3, 9, 1, 14, 6, 5, 2], prefix=40, seed=1)
    rows.append((rows[1][0][:40], rows[1][1][:40]))  # a row that ends with the trunk
    for _, weights in rows:
        weights[1:5] = 1
        weights[40:41] = 1
    model = copy.deepcopy(model)
    if fused:
        assert layers.fuse(model) is None
    tally = Tally()
    whole = learnt(model, rows, 10_000, tally)
    for budget in (110, 60):
        [(_, work)] = planner.works(rows, budget)
        assert work.trunk is not None and work.trunk.tokens == 40 and len(work.forests) > 1
        again = Tally()
        same(whole, learnt(model, rows, budget, again))
        assert again == tally


def test_a_trunk_that_nobody_learns_in(model: Any) -> None:
    """A system prompt: no targets of its own, and yet its gradients count, for it was seen."""
    rows = rows_of([3, 9, 1, 14], prefix=40, seed=2)
    for _, weights in rows:
        weights[:64] = 0
    model = copy.deepcopy(model)
    whole = learnt(model, rows, 10_000)
    assert layers.fuse(model) is None
    [(_, work)] = planner.works(rows, 60)
    assert work.trunk is not None and not len(work.trunk.sources)
    same(whole, learnt(model, rows, 60))


def test_measured_through_trunks(model: Any) -> None:
    """Sums, counts and each row's log-probability."""
    rows = rows_of([3, 9, 1, 14, 6], prefix=40, seed=3)
    tallies = Tally(), Tally()
    sums = [
        stream.measure_rows(model, rows, budget, tally=tally)
        for budget, tally in zip((10_000, 60), tallies, strict=True)
    ]
    assert sums[0].nll == pytest.approx(sums[1].nll, rel=1e-6) and sums[0].hits == sums[1].hits
    assert tallies[0] == tallies[1]
    each = [stream.row_log_probs(model, rows, budget) for budget in (10_000, 60)]
    assert np.allclose(*each, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 30)), min_size=1, max_size=12),
    st.integers(1, 120),
    st.integers(1, 3),
)
def test_works_hold_every_row_once(shapes: list[tuple[int, int]], budget: int, ranks: int) -> None:
    """All tokens of all rows lie on some path, all targets are there once, whatever the budget and ranks; nothing is
    computed more often than without trunks, and no forest is larger than it may be."""
    rng = np.random.default_rng(5)
    prefixes = [rng.integers(0, 99, 0), rng.integers(0, 99, 40), rng.integers(0, 99, 70)]
    rows: list[Row] = []
    for prefix, length in shapes:
        ids = np.concatenate([prefixes[prefix], rng.integers(100, 300, length)]).astype(np.int32)
        rows.append((ids, (rng.random(len(ids)) < 0.5).astype(np.float32)))
    parts = [planner.works(rows, budget, part=slice(rank, None, ranks)) for rank in range(ranks)]
    works = [work for part in parts for _, work in part]
    numbers = [number for part in parts for number, _ in part]
    assert len(set(numbers)) == len(numbers)
    targets = sorted(
        (int(s), int(t)) for w in works for f in w.all for s, t in zip(f.sequences, f.targets, strict=True)
    )
    wanted = sorted(
        (row, int(ids[at])) for row, (ids, weights) in enumerate(rows) for at in np.flatnonzero(weights) if at
    )
    assert targets == wanted
    assert sum(f.logical_tokens for w in works for f in w.all) == sum(len(ids) for ids, _ in rows)
    longest = max(len(ids) for ids, _ in rows)
    for work in works:
        trunk = work.trunk.tokens if work.trunk else 0
        assert work.held <= max(budget, trunk + budget // 2, trunk + longest)
    if ranks == 1:
        plain = sum(work.tokens for _, work in planner.works(rows, budget, trunks=False))
        assert sum(work.tokens for work in works) <= plain


@pytest.mark.parametrize("window", [None, 1, 7, 45, 1000])
def test_attention_behind_a_trunk(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of the trunk come first, and distances count from its first token."""
    rows = rows_of([3, 9, 30, 14], prefix=0, seed=4)
    tree = forest.build(rows, begin=50)
    query, key, value = (part.float() for part in tensors(tree, (4, 2), 16))
    more = torch.randn(2, 1, 2, 50, 16, generator=torch.Generator().manual_seed(3))
    key, value = torch.cat([more[0], key], dim=2), torch.cat([more[1], value], dim=2)
    seed = torch.randn(query.shape, generator=torch.Generator().manual_seed(1))
    for halved in (20, 1 << 20):
        monkeypatch.setattr(blocks, "HALVED", halved)
        monkeypatch.setattr(blocks, "LEAST", 1)
        plan = attention.Plan(tree, torch.device("cpu"), Trunk(50))
        output, saved = attention.forward(query, key, value, plan, window, 0.25)
        found = [output, *attention.backward(seed, saved)]
        leaves = [part.double().requires_grad_() for part in (query, key, value)]
        exact = attention.masked_attention(*leaves, plan.dense(window), 0.25)
        assert apart(found, [exact.detach(), *torch.autograd.grad(exact, leaves, seed.double())]) < 1e-5
