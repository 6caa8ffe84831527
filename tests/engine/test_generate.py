"""Decoding laws, in float32 on tiny models of four families: batching, caching and sharing change nothing."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.engine import attention
from luthier.engine import generate as room
from luthier.engine.generate import Generation, Sampling, generate
from luthier.spec.errors import BadSetting, UserError
from tests import tiny

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "mistral": {"sliding_window": 8},
    "gemma3": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTHS = (2, 9, 23, 37, 60)
NO_STOP: list[int] = []
TWENTY = Sampling(max_tokens=20)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load("llama", tmp_path_factory.mktemp("llama"))


def load(family: str, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    tiny.make_model(folder, family=family, seed=3, **FAMILIES[family])
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def some_prompts(lengths: tuple[int, ...] = LENGTHS, prefix: tuple[int, ...] = (), seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[*prefix, *(draw.randrange(5, 250) for _ in range(length))] for length in lengths]


def run(model: Any, prompts: list[list[int]], sampling: Sampling = TWENTY, **more: Any) -> list[Generation]:
    options: dict[str, Any] = {"stop_ids": NO_STOP, "pad_id": 0, "context": 512, **more}
    return generate(model, prompts, options.pop("stop_ids"), options.pop("pad_id"), sampling, **options)


def ids(generations: list[Generation]) -> list[list[int]]:
    return [generation.ids for generation in generations]


def uncached(model: Any, prompt: list[int], count: int) -> list[int]:
    """The slow twin: the whole row through the model again for every token."""
    row = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            row.append(int(model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
    return row[len(prompt) :]


def test_cached_equals_uncached_and_a_batch_equals_its_rows(model: Any) -> None:
    prompts = some_prompts()
    slow = [uncached(model, prompt, 20) for prompt in prompts]
    assert len({tuple(row) for row in slow}) == len(slow), "answers that do not tell prompts apart prove nothing"
    assert ids(run(model, prompts)) == slow
    assert [run(model, [prompt])[0].ids for prompt in prompts] == slow
    assert ids(run(model, prompts, batch_size=2)) == slow


def test_order_of_prompts_is_irrelevant(model: Any) -> None:
    prompts = some_prompts()
    there, back = ids(run(model, prompts)), ids(run(model, prompts[::-1], batch_size=3))
    assert there == back[::-1]


@pytest.mark.parametrize("batch_size", [2, 5])
def test_a_shared_prefix_equals_none(model: Any, batch_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = some_prompts((1, 4, 9, 14, 25), prefix=tuple(range(20, 50)))
    slow = [uncached(model, prompt, 20) for prompt in prompts]
    assert ids(run(model, prompts, batch_size=batch_size)) == slow
    monkeypatch.setattr(room, "MIN_SHARED", 10**6)
    assert ids(run(model, prompts, batch_size=batch_size)) == slow


def test_the_shared_prefix_is_computed_once(llama: Any) -> None:
    seen: list[tuple[int, ...]] = []
    hook = llama.model.register_forward_pre_hook(
        lambda _, __, given: seen.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        run(llama, some_prompts((3, 5, 6, 7), prefix=tuple(range(20, 60))), Sampling(max_tokens=2), batch_size=2)
    finally:
        hook.remove()
    assert seen == [(1, 40), (2, 5), (2, 1), (2, 7), (2, 1)]


def test_no_prefix_is_shared_where_a_window_slides(tmp_path: Path) -> None:
    model = load("mistral", tmp_path)
    prompts = some_prompts((3, 5), prefix=tuple(range(20, 60)))
    assert len(room._shared(model, prompts, reach=65)) == 0
    model.config.sliding_window = 64
    assert len(room._shared(model, prompts, reach=65)) == 0
    assert len(room._shared(model, prompts, reach=64)) == 40


@pytest.mark.parametrize("one", [[[5, 6, 7]], []])
def test_one_prompt_or_none_has_no_prefix_to_share(llama: Any, one: list[list[int]]) -> None:
    assert len(run(llama, one)) == len(one)


def test_the_same_prompt_twice(llama: Any) -> None:
    prompt = list(range(10, 40))
    assert ids(run(llama, [prompt, prompt])) == [uncached(llama, prompt, 20)] * 2


def test_stops_at_any_of_several_stop_tokens_and_keeps_it(llama: Any) -> None:
    prompts = some_prompts()
    free = ids(run(llama, prompts))
    stops = [free[0][4], free[3][9], free[4][0]]
    for got, whole in zip(run(llama, prompts, stop_ids=stops), free, strict=True):
        first = next((n for n, token in enumerate(whole) if token in stops), None)
        assert got.ids == (whole if first is None else whole[: first + 1])
        assert got.finish_reason == ("length" if first is None else "stop")


def test_a_stop_token_at_the_last_place_is_a_stop(llama: Any) -> None:
    prompt = some_prompts((9,))[0]
    whole = run(llama, [prompt], Sampling(max_tokens=5))[0].ids
    cut = Sampling(max_tokens=whole.index(whole[4]) + 1)
    assert run(llama, [prompt], cut, stop_ids=[whole[4]])[0].finish_reason == "stop"


def test_a_pad_id_inside_a_prompt_is_a_real_token(llama: Any) -> None:
    """Padding is told by the mask, never by the id (B05)."""
    prompts = [[0, 7, 0, 9], [0, 0, 5, 5, 0, 8, 9, 0, 3]]
    assert ids(run(llama, prompts, pad_id=0)) == [uncached(llama, prompt, 20) for prompt in prompts]
    assert ids(run(llama, prompts, pad_id=9)) == [uncached(llama, prompt, 20) for prompt in prompts]


def test_generation_ends_where_the_context_ends(llama: Any) -> None:
    prompts = some_prompts((10, 28))
    got = run(llama, prompts, context=30)
    assert [len(generation.ids) for generation in got] == [20, 2]
    assert got[1].finish_reason == "length"


def test_a_prompt_without_room_for_an_answer_is_refused(llama: Any) -> None:
    with pytest.raises(UserError, match=r"has 30 tokens, and the model reads at most 30"):
        run(llama, some_prompts((30,)), context=30)
    with pytest.raises(UserError, match="Prompt 2 is empty"):
        run(llama, [[5], []])


SAMPLED = Sampling(max_tokens=12, temperature=1.5, top_p=0.95, seed=11)


def test_a_seed_reproduces_whatever_the_batch(model: Any) -> None:
    prompts = some_prompts()
    first = ids(run(model, prompts, SAMPLED))
    assert ids(run(model, prompts, SAMPLED, batch_size=2)) == first
    assert ids(run(model, prompts[:2], SAMPLED)) == first[:2]
    other = Sampling(max_tokens=12, temperature=1.5, top_p=0.95, seed=12)
    assert ids(run(model, prompts, other)) != first


def test_the_same_prompt_is_sampled_differently_in_each_place(llama: Any) -> None:
    assert len({tuple(row) for row in ids(run(llama, [[5, 6, 7]] * 4, SAMPLED))}) == 4


def test_top_p_keeps_the_smallest_set_and_temperature_its_odds() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    rows = list(range(4000))
    drawn = room._Chooser(Sampling(temperature=1.0, top_p=0.75))(logits, rows).bincount(minlength=4) / 4000
    assert drawn[2:].tolist() == [0, 0]
    assert drawn[0].item() == pytest.approx(0.625, abs=0.03)
    flat = room._Chooser(Sampling(temperature=2.0))(logits, rows).bincount(minlength=4) / 4000
    roots = torch.tensor([0.5, 0.3, 0.15, 0.05]).sqrt()
    assert (flat - roots / roots.sum()).abs().max() < 0.03
    assert room._Chooser(Sampling(temperature=1.0, top_p=1e-9))(logits[:3], rows[:3]).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("option", "value"),
    [("max_tokens", 0), ("temperature", -0.1), ("temperature", float("nan")), ("top_p", 0.0), ("top_p", 1.1)],
)
def test_sampling_refuses_values_that_mean_nothing(option: str, value: float) -> None:
    with pytest.raises(BadSetting, match=f"--{option.replace('_', '-')}: found {value}"):
        Sampling(**{option: value})  # type: ignore[arg-type]


def test_streamed_tokens_are_the_returned_tokens(llama: Any) -> None:
    prompts = some_prompts()
    stop = run(llama, prompts)[2].ids[6]
    streamed: list[list[int]] = [[] for _ in prompts]
    told: list[tuple[int, int]] = []
    got = run(
        llama,
        prompts,
        stop_ids=[stop],
        batch_size=2,
        on_token=lambda index, token: streamed[index].append(token),
        progress=lambda done, total: told.append((done, total)),
    )
    assert streamed == ids(got)
    assert told == [(count, 5) for count in range(1, 6)]


def test_a_listener_may_end_it_and_leaves_the_model_as_it_was(llama: Any) -> None:
    def leave(index: int, token: int) -> None:
        raise KeyboardInterrupt

    attention.install(llama)
    llama.train()
    try:
        with pytest.raises(KeyboardInterrupt):
            run(llama, [[5, 6]], on_token=leave)
        assert llama.training
        assert llama.config._attn_implementation == attention.NAME
    finally:
        llama.eval().set_attn_implementation("sdpa")


def test_a_model_that_trains_on_forests_answers_the_same(model: Any) -> None:
    prompts = some_prompts()
    before = ids(run(model, prompts))
    attention.install(model)
    try:
        assert ids(run(model, prompts)) == before
    finally:
        model.set_attn_implementation("sdpa")


def test_long_prompts_make_smaller_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BATCH_TOKENS", 100)
    prompts = some_prompts((10, 60, 10, 150, 10))
    batches = list(room._batches(prompts, [20] * 5, batch_size=8))
    assert batches == [[0, 2, 4], [1], [3]]
    assert list(room._batches(prompts, [20] * 5, batch_size=2)) == [[0, 2], [4], [1], [3]]
