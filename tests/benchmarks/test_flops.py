"""Operations counted from shapes, against counts by hand and by brute force."""

from __future__ import annotations

from benchmarks.training import flops
from hypothesis import given
from hypothesis import strategies as some

SMOLLM2 = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
}
TINY = flops.Shape(2, 4, 8, 2, 1, 2, 10, (None, None), rank=1)
ROWS = some.lists(
    some.lists(some.integers(0, 2), min_size=1, max_size=8).flatmap(
        lambda ids: some.tuples(some.just(ids), some.lists(some.integers(0, 1), min_size=len(ids), max_size=len(ids)))
    ),
    min_size=1,
    max_size=6,
)


def test_weights_of_smollm2() -> None:
    model = flops.shape(SMOLLM2)
    assert model.head_dim == 64
    assert (model.frozen, model.lora) == (106_168_320, 4_884_480)


def test_gemma_has_windows() -> None:
    config = {**SMOLLM2, "num_hidden_layers": 2, "sliding_window": 512, "head_dim": 256}
    model = flops.shape({**config, "layer_types": ["sliding_attention", "full_attention"]})
    assert (model.windows, model.head_dim) == ((512, None), 256)


def test_one_row_by_hand() -> None:
    """Three tokens, one learnt: 4 N T + 6 N_lora T + 4 V H + 12 heads x dim x pairs x layers."""
    work = flops.flat([([1, 2, 3], [0, 0, 1])])
    assert (work.tokens, work.predicting) == (3, 1)
    assert (
        flops.step(TINY, work, full=False) == 4 * TINY.frozen * 3 + 6 * TINY.lora * 3 + 4 * 10 * 4 + 12 * 2 * 2 * 6 * 2
    )
    assert flops.step(TINY, work, full=True) == 6 * TINY.frozen * 3 + 6 * 10 * 4 + 12 * 2 * 2 * 6 * 2


@given(
    some.lists(some.tuples(some.integers(0, 9), some.integers(0, 9)), max_size=4), some.none() | some.integers(1, 12)
)
def test_pairs_are_those_that_one_would_count(pieces: list[tuple[int, int]], window: int | None) -> None:
    seen = sum(
        min(place + 1, window or place + 1) for depth, length in pieces for place in range(depth, depth + length)
    )
    assert flops.pairs(pieces, window) == seen


@given(ROWS)
def test_a_forest_computes_every_prefix_once(rows: list[tuple[list[int], list[int]]]) -> None:
    work = flops.shared(rows)
    paths = {tuple(ids[: end + 1]) for ids, _ in rows for end in range(len(ids))}
    asked = {tuple(ids[:at]) for ids, mask in rows for at in range(1, len(ids)) if mask[at]}
    assert (work.tokens, work.predicting) == (len(paths), len(asked))
    assert flops.pairs(work.pieces, None) == sum(map(len, paths))


@given(ROWS)
def test_sharing_never_costs(rows: list[tuple[list[int], list[int]]]) -> None:
    assert flops.step(TINY, flops.shared(rows), False) <= flops.step(TINY, flops.flat(rows), False)
