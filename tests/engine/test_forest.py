"""Laws of the forest, in float32: it computes what its rows compute alone, however they are packed."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.engine import attention, forest, loss, models, step, stream
from luthier.engine.forest import Row
from luthier.spec.errors import BadSetting
from tests import tiny as tiny_models

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral-window": {"family": "mistral", "sliding_window": 9},
    "gemma3-window": {
        "family": "gemma3",
        "kv_heads": 1,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}
Gradients = dict[str, torch.Tensor]


def rows_of(lengths: list[int], prefix: int, seed: int, vocabulary: int = 300) -> list[Row]:
    """Rows that share `prefix` ids, in pairs that share half of the rest too; about half of the ids are learnt."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(5, vocabulary, prefix)
    made: list[Row] = []
    middle = rng.integers(5, vocabulary, 24)
    for n, length in enumerate(lengths):
        if n % 2 == 0:
            middle = rng.integers(5, vocabulary, 24)
        ids = np.concatenate([shared, middle, rng.integers(5, vocabulary, length)]).astype(np.int32)
        weights = (rng.random(len(ids)) < 0.5).astype(np.float32) * rng.choice([1.0, 0.5], len(ids)).astype(np.float32)
        weights[0] = 0
        made.append((ids, weights))
    return made


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("forest") / request.param
    options = {"family": request.param, **FAMILIES[request.param]}
    return models.load_base(tiny_models.make_model(folder, **options), "float32").eval()


def flat(model: Any, rows: list[Row], smoothing: float = 0.0) -> tuple[float, Gradients]:
    """The slow twin: each row alone through the model's own forward."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    total = 0.0
    for ids, weights in rows:
        tokens = torch.from_numpy(ids.astype(np.int64))
        logits = twin(input_ids=tokens[None], use_cache=False).logits[0, :-1].float()
        value = loss.supervised(logits, tokens[1:], torch.from_numpy(weights[1:].copy()), smoothing) / 100
        value.backward()
        total += value.item()
    return total, {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}


def planted(model: Any, groups: list[list[Row]], smoothing: float = 0.0) -> tuple[float, Gradients]:
    """Forests, one for each group of rows."""
    twin = copy.deepcopy(model)
    attention.install(twin)
    total = 0.0
    for tree in map(forest.build, groups):
        total += step.learn(twin, tree, step.hidden_states(twin, tree), 100.0, smoothing)[0]
    return total, {name: value.grad for name, value in twin.named_parameters() if value.grad is not None}


def same(left: tuple[float, Gradients], right: tuple[float, Gradients], tolerance: float = 1e-5) -> None:
    assert left[0] == pytest.approx(right[0], abs=tolerance, rel=tolerance)
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        scale = max(1.0, float(gradient.abs().max()))
        assert float((gradient - right[1][name]).abs().max()) < tolerance * scale, name


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_forest_is_its_rows_alone(model: Any, smoothing: float) -> None:
    """B27 too: smoothing shares the normaliser."""
    rows = rows_of([3, 9, 1, 14, 6], prefix=20, seed=1)
    rows.append(rows[0])  # a duplicate
    rows.append((rows[1][0][:30], rows[1][1][:30]))  # a row that ends inside another
    tree = forest.build(rows)
    assert tree.tokens < tree.logical_tokens * 0.7
    same(flat(model, rows, smoothing), planted(model, [rows], smoothing))


def test_order_and_cuts_do_not_matter(model: Any) -> None:
    rows = rows_of([3, 9, 1, 14, 6, 2], prefix=20, seed=2)
    whole = planted(model, [rows])
    same(whole, planted(model, [rows[::-1]]))
    same(whole, planted(model, [rows[:2], rows[2:5], rows[5:]]))
    same(whole, planted(model, [[row] for row in rows]))


def test_a_row_packed_after_another_is_the_row_alone(model: Any) -> None:
    """B29: log-probabilities of B are the same alone, after A, and after another A."""
    row, first, other = rows_of([12, 10, 11], prefix=0, seed=3)
    attention.install(model)
    alone = step.measure(model, forest.build([row]))
    for neighbour in (first, other):
        pair = step.measure(model, forest.build([neighbour, row]))
        own = step.measure(model, forest.build([neighbour]))
        assert pair.nll - own.nll == pytest.approx(alone.nll, abs=1e-4)
        assert pair.weight - own.weight == alone.weight


def test_validation_does_not_depend_on_batches(model: Any) -> None:
    """B28: rows of 1 to 50 learnt tokens, any budget; a row with none changes nothing."""
    rows: list[Row] = []
    for count, (ids, _) in zip((1, 5, 12, 30, 50), rows_of([40] * 5, 4, 4), strict=True):
        weights = np.zeros(len(ids), np.float32)
        weights[len(ids) - count :] = 1
        rows.append((ids, weights))
    attention.install(model)
    losses = [stream.measure_rows(model, rows, budget).loss for budget in (1, 150, 10_000)]
    masked = [*rows, (rows[0][0], np.zeros_like(rows[0][1]))]
    losses.append(stream.measure_rows(model, masked, 10_000).loss)
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.integers(0, 2), min_size=1, max_size=40).map(lambda ids: (ids, [0.0] + [1.0] * (len(ids) - 1))),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 20),
)
def test_structure(pairs: list[tuple[list[int], list[float]]], min_shared: int) -> None:
    """Every row can be read back along a path, with its own positions and targets; nothing else is there."""
    rows = [(np.array(ids, np.int32), np.array(weights, np.float32)) for ids, weights in pairs]
    tree = forest.build(rows, min_shared=min_shared)
    parents = np.full(tree.tokens, -1)
    for segment in tree.segments:
        assert segment.parent < len(tree.segments)
        inside = np.arange(segment.start, segment.end)
        parents[inside] = inside - 1
        if len(inside):
            before = segment.parent
            while before >= 0 and tree.segments[before].start == tree.segments[before].end:
                before = tree.segments[before].parent
            parents[segment.start] = tree.segments[before].end - 1 if before >= 0 else -1
    for number, (ids, weights) in enumerate(rows):
        mine = tree.sequences == number
        assert int(mine.sum()) == int((weights > 0).sum())
        if not mine.any():
            continue
        at = int(tree.sources[mine].max())
        path: list[int] = []
        while at >= 0:
            path.append(int(tree.token_ids[at]))
            assert tree.positions[at] == 0 or parents[at] >= 0
            at = int(parents[at])
        assert path[::-1] == list(ids[: len(path)]) and len(path) == len(ids) - 1
        predicted = zip(tree.positions[tree.sources[mine]] + 1, tree.targets[mine], strict=True)
        assert {int(at): int(target) for at, target in predicted} == dict(enumerate(ids.tolist()[1:], 1))
    assert tree.tokens <= tree.logical_tokens == sum(len(ids) for ids, _ in rows)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(1, 120), st.integers(0, 30))
def test_plans_keep_every_row_and_the_budget(lengths: list[int], budget: int, prefix: int) -> None:
    rows = rows_of(lengths, prefix, seed=5)
    batches = forest.plan(rows, budget)
    assert sorted(index for batch in batches for index in batch) == list(range(len(rows)))
    for batch in batches:
        if len(batch) > 1:
            assert forest.build([rows[index] for index in batch]).tokens <= budget + forest.MIN_SHARED * len(batch)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=8), st.integers(60, 200), st.integers(0, 30))
def test_no_cut_is_as_few_and_smaller(lengths: list[int], budget: int, prefix: int) -> None:
    """Of all ways to cut the sorted rows into micro-batches within the budget: none has fewer, and of those with as
    many none has a smaller largest."""
    rows = rows_of(lengths, prefix, seed=5)
    budget = max(budget, *(len(ids) for ids, _ in rows), prefix + 60)

    def size(batch: list[int]) -> int:
        return forest.physical_tokens([rows[index] for index in batch])

    batches = forest.plan(rows, budget)
    order = [index for batch in batches for index in batch]
    ways = []
    for cuts in itertools.product([False, True], repeat=len(order) - 1):
        ends = [at for at, cut in enumerate(cuts, 1) if cut]
        parts = [order[start:end] for start, end in zip([0, *ends], [*ends, len(order)], strict=True)]
        if (largest := max(map(size, parts))) <= budget:
            ways.append((len(parts), largest))
    assert (len(batches), max(map(size, batches))) == min(ways)


def test_bfloat16_stays_close(tmp_path: Path) -> None:
    """The merge keeps float32 sums: bfloat16 gradients point where the flat float32 ones do."""
    folder = tiny_models.make_model(tmp_path / "m")
    rows = rows_of([12, 30, 7, 22], prefix=40, seed=6)
    exact = flat(models.load_base(folder, "float32"), rows)
    rough = planted(models.load_base(folder, "bfloat16"), [rows])
    assert rough[0] == pytest.approx(exact[0], rel=2e-2)
    for name, gradient in exact[1].items():
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), rough[1][name].float().flatten(), dim=0)
        assert float(cosine) > 0.99, name


def test_the_masked_twin_is_equal() -> None:
    """What other devices compute: one dense mask, with and without a window."""
    rows = rows_of([5, 9, 3, 12], prefix=18, seed=7)
    tree = forest.build(rows)
    plan = attention.Plan(tree, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 6, tree.tokens, 16, generator=generator, requires_grad=True)
    key, value = (torch.randn(1, 2, tree.tokens, 16, generator=generator, requires_grad=True) for _ in range(2))
    for window in (None, 8, 21):
        ours = attention._ForestAttention.apply(query, key, value, plan, window, 0.25, 0)
        twin = attention.masked_attention(query, key, value, plan.dense(window), 0.25)
        assert torch.allclose(ours, twin, atol=1e-5)
        seed = torch.randn(ours.shape, generator=generator)
        left = torch.autograd.grad(ours, (query, key, value), seed)
        right = torch.autograd.grad(twin, (query, key, value), seed)
        for one, other in zip(left, right, strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_attention_that_cannot_be_exact_is_refused(tmp_path: Path) -> None:
    model = models.load_base(tiny_models.make_model(tmp_path / "m", family="gemma2"), "float32")
    attention.install(model)
    with pytest.raises(BadSetting, match="softcap"):
        step.measure(model, forest.build(rows_of([3], 4, 8)))


def test_self_check_sees_a_head_it_does_not_know(tmp_path: Path) -> None:
    """A model whose own forward does something to its logits that ours does not."""
    model: Any = models.load_base(tiny_models.make_model(tmp_path / "m"), "float32")
    attention.install(model)
    rows = rows_of([5, 9, 3], prefix=18, seed=9)
    assert step.self_check(model, rows) < 1e-4
    own = model.lm_head.forward
    seen: list[int] = []

    def odd(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.dim())
        logits: torch.Tensor = own(hidden)
        return logits * 2 if hidden.dim() == 3 else logits  # only the model's own forward passes [1, T, H]

    model.lm_head.forward = odd
    assert step.self_check(model, rows) > 0.03
    assert {2, 3} <= set(seen)


def test_a_model_with_attention_code_of_its_own_is_refused(tmp_path: Path) -> None:
    """B29: it never asks for ours, so rows of a forest would see each other, by less than a self-check can tell."""
    folder = tiny_models.make_model(tmp_path / "m", family="bloom")
    model: Any = models.load_base(folder, "float32")
    attention.install(model)
    with pytest.raises(BadSetting, match="BloomForCausalLM computes its attention in a way of its own"):
        step.self_check(model, rows_of([3], 4, 8))
