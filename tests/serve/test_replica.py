"""The laws of the replica (float32): batching, caching, adapters beside each other and cancelling change no answer."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.serve.compute import Lean
from luthier.serve.memory import BLOCK
from luthier.serve.scheduler import PROMPT_TOKENS
from luthier.spec.errors import BadSetting, NotFound, UserError
from luthier.spec.serving import Ask
from tests import tiny as tiny_models
from tests.serve.replicas import Answer, Bench, ask, make_adapter

PROMPTS = [[(7 * n * n + 3 * k + 5) % 300 for n in range(length)] for k, length in enumerate((3, 40, 17, 33, 64, 1))]


@pytest.fixture(scope="module")
def adapters(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return [
        make_adapter(tiny, folder / "a", 1),
        make_adapter(tiny, folder / "b", 2, r=8, lora_alpha=8, target_modules=["q_proj", "up_proj"]),
        make_adapter(tiny, folder / "c", 3, use_dora=True),
    ]


def same(found: Answer, wanted: Answer) -> None:
    assert found.ids == wanted.ids
    assert found.finish == wanted.finish
    assert found.logprobs == pytest.approx(wanted.logprobs, abs=1e-4)


def mixed(adapters: list[Path], **more: Any) -> list[Ask]:
    """Asks over the base and all adapters, of many lengths."""
    owners = [None, *map(str, adapters)]
    return [
        ask(f"{k}", prompt, adapter=owners[k % len(owners)], max_tokens=5 + 3 * k, **more)
        for k, prompt in enumerate(PROMPTS)
    ]


def test_a_batch_is_its_sequences_alone(tiny: Path, adapters: list[Path]) -> None:
    together = Bench(tiny).run(mixed(adapters))
    for one in mixed(adapters):
        same(together[one.id], Bench(tiny).run([one])[one.id])
    differ = {
        tuple(Bench(tiny).run([ask("x", PROMPTS[1], adapter=owner)])["x"].ids) for owner in [None, *map(str, adapters)]
    }
    assert len(differ) == 4


def test_joining_late_and_few_slots_change_nothing(tiny: Path, adapters: list[Path]) -> None:
    wanted = Bench(tiny).run(mixed(adapters))
    few = Bench(tiny, rows=2).run(mixed(adapters))
    late = Bench(tiny)
    for one in mixed(adapters):
        late.add(one)
        late.scheduler.step()
        late.scheduler.step()
    joined = late.run()
    for name, answer in wanted.items():
        same(few[name], answer)
        same(joined[name], answer)


def test_a_cancelled_neighbour_changes_nothing(tiny: Path, adapters: list[Path]) -> None:
    wanted = Bench(tiny).run(mixed(adapters))
    for gone in ("0", "3", "5"):
        bench = Bench(tiny)
        for one in mixed(adapters):
            bench.add(one)
        for _ in range(3):
            bench.scheduler.step()
        bench.scheduler.cancel(gone)
        bench.scheduler.cancel("nobody")
        given = bench.run()
        assert given[gone].finish == "cancelled"
        for name, answer in wanted.items():
            if name != gone:
                same(given[name], answer)


def test_out_of_memory_sequences_wait_and_go_on(tiny: Path, adapters: list[Path]) -> None:
    """64 tokens in all: the youngest go back in line, and say in the end what they would have said."""
    asks = [ask(f"{k}", PROMPTS[k][:10], adapter=str(adapters[0]) if k % 2 else None, max_tokens=30) for k in range(4)]
    wanted = Bench(tiny).run(asks)
    tight = Bench(tiny, kv_tokens=64)
    given = tight.run(asks)
    for name, answer in wanted.items():
        same(given[name], answer)
    sampled = [one.model_copy(update={"temperature": 1.5, "seed": 3}) for one in asks]
    again = Bench(tiny, kv_tokens=64).run(sampled)
    for one in sampled:
        assert again[one.id].ids == Bench(tiny).run([one])[one.id].ids


def test_what_can_never_fit_is_refused(tiny: Path) -> None:
    bench = Bench(tiny, kv_tokens=64)
    with pytest.raises(UserError, match="this server holds 64"):
        bench.add(ask("a", PROMPTS[1], max_tokens=400))
    with pytest.raises(UserError) as refused:
        bench.add(ask("a", [1] * 512, max_tokens=1))
    assert refused.value.code == "context_length_exceeded"
    for prompt in ([100_000], [-1]):
        with pytest.raises(UserError, match="token id"):
            bench.add(ask("a", prompt))
    with pytest.raises(UserError, match="logit_bias"):
        bench.add(ask("a", [1], logit_bias={100_000: 1.0}))


def test_a_remembered_prefix_changes_nothing(tiny: Path, adapters: list[Path]) -> None:
    prompt = PROMPTS[4]
    for owner in (None, str(adapters[0])):
        bench = Bench(tiny)
        first = bench.run([ask("a", prompt, adapter=owner)])["a"]
        again = bench.run([ask("b", prompt, adapter=owner)])["b"]
        same(again, first)
        assert first.last and first.last.cached == 0
        assert again.last and again.last.cached == (len(prompt) - 1) // BLOCK * BLOCK
        longer = [*prompt, *first.ids[:8], 9]
        other = bench.run([ask("c", longer, adapter=owner)])["c"]
        assert other.last and other.last.cached == 64  # the answer is remembered, too
        same(other, Bench(tiny).run([ask("c", longer, adapter=owner)])["c"])


def test_prefixes_are_no_other_adapters(tiny: Path, adapters: list[Path]) -> None:
    bench = Bench(tiny)
    for k, owner in enumerate([None, *map(str, adapters), None]):
        given = bench.run([ask(f"{k}", PROMPTS[4], adapter=owner)])[f"{k}"]
        same(given, Bench(tiny).run([ask("x", PROMPTS[4], adapter=owner)])["x"])


def test_choices_of_one_prompt_compute_it_once(tiny: Path) -> None:
    given = Bench(tiny).run([ask(f"{k}", PROMPTS[4], temperature=1, seed=k) for k in range(5)])
    assert [answer.last.cached for answer in given.values() if answer.last] == [0, 48, 48, 48, 48]


def test_remembered_bytes_are_bounded(tiny: Path) -> None:
    bench = Bench(tiny, prefix_bytes=20_000)
    for k in range(10):
        bench.run([ask(f"{k}", [k, *PROMPTS[4]])])
    assert isinstance(bench.compute, Lean)
    assert 0 < bench.compute.prefixes.bytes <= 20_000
    same(bench.run([ask("x", PROMPTS[4])])["x"], Bench(tiny).run([ask("x", PROMPTS[4])])["x"])


def test_long_prompts_are_read_in_pieces(tmp_path: Path) -> None:
    base = tiny_models.make_model(tmp_path / "long", max_positions=2048)
    prompt = [(11 * n + n * n) % 300 for n in range(PROMPT_TOKENS + 50)]
    bench = Bench(base)
    bench.add(ask("short", PROMPTS[0], max_tokens=40))
    bench.scheduler.step()
    bench.add(ask("long", prompt))
    spoken = []
    for _ in range(9):
        before = len(bench.parts)
        bench.scheduler.step()
        spoken.append([part.id for part in bench.parts[before:]])
    assert spoken[:4] == [["short"]] * 4  # 1,074 tokens, 256 a step
    assert "long" in spoken[4]
    given = bench.run()
    same(given["long"], Bench(base).run([ask("long", prompt)])["long"])


# --- adapters that must not answer ----------------------------------------------------------------------------------


def copy(adapter: Path, to: Path) -> Path:
    return Path(shutil.copytree(adapter, to))


def rewrite(adapter: Path, change: Any) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: {key.replace("layers", "blocks"): value for key, value in state.items()}, "matches no module"),
        (lambda state: dict(list(state.items())[1:]), "lacks"),
        (lambda state: state | {"base_model.model.strange.lora_A.weight": torch.ones(2)}, "has no place for"),
        (lambda state: {}, "is empty"),
        (lambda state: {key: value * float("nan") for key, value in state.items()}, "not finite"),
        (lambda state: {key: value[:, :-1].clone() for key, value in state.items()}, "shape"),
    ],
    ids=["renamed", "missing", "unknown", "empty", "nan", "shape"],
)
def test_broken_adapters_are_refused(
    change: Any, reason: str, tiny: Path, adapters: list[Path], tmp_path: Path
) -> None:
    broken = copy(adapters[0], tmp_path / "broken")
    rewrite(broken, change)
    with pytest.raises(BadSetting, match=reason):
        Bench(tiny).add(ask("a", PROMPTS[0], adapter=str(broken)))


def test_another_bases_adapter_is_refused(adapters: list[Path], tmp_path: Path) -> None:
    other = tiny_models.make_model(tmp_path / "other", seed=1)
    with pytest.raises(BadSetting, match="another base"):
        Bench(other).add(ask("a", PROMPTS[0], adapter=str(adapters[0])))
    with pytest.raises(NotFound):
        Bench(other).add(ask("a", PROMPTS[0], adapter=str(tmp_path / "nothing")))
    unknown = copy(adapters[0], tmp_path / "unknown")
    (unknown / "luthier.json").write_text("{}")
    with pytest.raises(BadSetting, match="does not say which base"):
        Bench(other).add(ask("a", PROMPTS[0], adapter=str(unknown)))


def test_an_adapter_whose_bytes_changed_since_it_was_published_is_refused(
    tiny: Path, adapters: list[Path], tmp_path: Path
) -> None:
    damaged = copy(adapters[0], tmp_path / "damaged")
    weights = damaged / "adapter_model.safetensors"
    note = json.loads((damaged / "luthier.json").read_text())
    note["files"] = {weights.name: {"sha256": hashlib.sha256(weights.read_bytes()).hexdigest()}}
    (damaged / "luthier.json").write_text(json.dumps(note))
    assert Bench(tiny).run([ask("a", PROMPTS[0], adapter=str(damaged))])["a"].finish == "length"
    rewrite(damaged, lambda state: {key: 2 * value for key, value in state.items()})
    with pytest.raises(BadSetting, match="is not the one that was published"):
        Bench(tiny).add(ask("a", PROMPTS[0], adapter=str(damaged)))


def test_a_retrained_adapter_at_the_same_place_is_a_new_one(tiny: Path, adapters: list[Path], tmp_path: Path) -> None:
    place = copy(adapters[0], tmp_path / "named")
    bench = Bench(tiny)
    first = bench.run([ask("a", PROMPTS[4], adapter=str(place))])["a"]
    shutil.rmtree(place)
    copy(adapters[1], place)
    second = bench.run([ask("b", PROMPTS[4], adapter=str(place))])["b"]
    same(second, Bench(tiny).run([ask("b", PROMPTS[4], adapter=str(adapters[1]))])["b"])
    assert second.ids != first.ids
    assert second.last and second.last.cached == 0


def test_reading_an_adapter_leaves_the_computing_thread_alone(
    tiny: Path, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread reads them: torch's default dtype, which is every thread's, must not change meanwhile."""
    bench = Bench(tiny, precision="bfloat16")
    changed: list[torch.dtype] = []
    monkeypatch.setattr(torch, "set_default_dtype", changed.append)
    for folder in adapters:
        bench.adapter(folder)
    assert len(bench.shelf) == len(adapters)
    assert not changed


def test_what_the_default_dtype_is_changes_no_answer(tiny: Path, adapters: list[Path]) -> None:
    bench, other = (Bench(tiny, precision="bfloat16") for _ in range(2))
    wanted = bench.run(mixed(adapters))
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        given = other.run(mixed(adapters))
    finally:
        torch.set_default_dtype(usual)
    assert {name: answer.ids for name, answer in given.items()} == {name: answer.ids for name, answer in wanted.items()}


def test_deleting_an_adapter_lets_its_answers_end(tiny: Path, adapters: list[Path], tmp_path: Path) -> None:
    place = copy(adapters[0], tmp_path / "named")
    bench = Bench(tiny)
    bench.add(ask("a", PROMPTS[1], adapter=str(place)))
    bench.scheduler.step()
    shutil.rmtree(place)
    same(bench.run()["a"], Bench(tiny).run([ask("a", PROMPTS[1], adapter=str(adapters[0]))])["a"])
    with pytest.raises(NotFound):
        bench.add(ask("b", PROMPTS[1], adapter=str(place)))


def test_the_shelf_keeps_the_last_used(tiny: Path, adapters: list[Path]) -> None:
    bench = Bench(tiny, adapters=2)
    a, b, c = adapters
    first = bench.adapter(a)
    bench.adapter(b)
    assert bench.adapter(a) is first
    bench.adapter(c)
    assert len(bench.shelf) == 2
    assert bench.adapter(a) is first
    assert bench.adapter(b) is not None
    assert len(bench.shelf) == 2


def test_values_that_are_not_finite_end_one_sequence_only(tiny: Path, adapters: list[Path], tmp_path: Path) -> None:
    wild = copy(adapters[0], tmp_path / "wild")
    rewrite(wild, lambda state: {key: value * 1e30 for key, value in state.items()})
    wanted = Bench(tiny).run(mixed(adapters))
    bench = Bench(tiny)
    given = bench.run([ask("wild", PROMPTS[2], adapter=str(wild)), *mixed(adapters)])
    assert given["wild"].finish == "error"
    assert given["wild"].last and given["wild"].last.error
    assert given["wild"].last.error["code"] == "internal"
    assert given["wild"].ids == []
    for name, answer in wanted.items():
        same(given[name], answer)
    for name, answer in bench.run(
        [one.model_copy(update={"id": f"again {one.id}"}) for one in mixed(adapters)]
    ).items():
        if name.startswith("again "):
            same(answer, wanted[name.removeprefix("again ")])
