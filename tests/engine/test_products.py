"""Laws of products made of halves: as near to the truth as promised, for any shape and scale; whole runs with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luthier.engine import forest, kernels, layers, loss, machine, models, products, step
from luthier.engine.tiles import Tiles
from tests import tiny as tiny_models
from tests.engine import runs
from tests.engine.test_forest import Gradients, rows_of
from tests.engine.test_layers import adapted, kept, learnt, make, stop_after

here = pytest.mark.skipif(bool(products.absent()), reason=f"no products of halves: {products.absent()}")
SIZES = st.integers(1, 250)
OFF = 1.7e-3  # most that was seen is 1.4e-3, of sizes below 250


def numbers(rows: int, columns: int, seed: int, turned: bool) -> Tensor:
    """Rows of very different sizes, as states have them, with gaps between lines; lines along either dimension."""
    generator = torch.Generator().manual_seed(seed)
    shape = (columns, rows) if turned else (rows, columns)
    made = torch.randn(shape[0], shape[1] + 3, generator=generator)[:, : shape[1]]
    made = made.t() if turned else made
    return made * 10.0 ** torch.randint(-12, 12, (rows, 1), generator=generator) if not turned else made


def off(found: Tensor, a: Tensor, b: Tensor, plus: Tensor | None = None) -> float:
    """Each row's distance from the truth beside what a row of such numbers usually comes to, the largest of them."""
    away = found.double() - a.double() @ b.double() - (0 if plus is None else plus.double())
    usual = a.double().norm(dim=1) * b.double().norm() / a.shape[1] ** 0.5
    return float((away.norm(dim=1) / usual).max())


@here
@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, st.booleans(), st.booleans(), st.integers(1, 4))
def test_products_are_near_the_truth(
    rows: int, inner: int, columns: int, left: bool, right: bool, threads: int
) -> None:
    a, b = numbers(rows, inner, 1, left), numbers(inner, columns, 2, True) if right else torch.randn(inner, columns)
    out = torch.full((rows, columns + 5), 7.0)
    with machine.threads(threads):
        kernels.product_of_halves(a, b, None, out[:, :columns])
    worst = OFF * (1 + 8 / columns**0.5)  # few numbers may all be rounded the same way
    assert off(out[:, :columns], a, b) < worst
    assert (out[:, columns:] == 7).all()


@here
@pytest.mark.parametrize("shape", [(2048, 608, 960), (193, 1300, 3200), (100, 641, 97), (64, 64, 7000)])
def test_blocks_meet_and_threads_change_no_bit(shape: tuple[int, int, int]) -> None:
    """Sizes that are cut along every dimension; each number is summed in the same order whoever sums it."""
    a, b = numbers(shape[0], shape[1], 1, False), numbers(shape[1], shape[2], 2, True)
    found = []
    for threads in (1, 2, 3):
        out = torch.empty(shape[0], shape[2])
        with machine.threads(threads):
            kernels.product_of_halves(a, b, None, out)
        found.append(out)
    assert off(found[0], a, b) < OFF
    assert all(torch.equal(found[0], other) for other in found[1:])


@here
def test_what_is_added() -> None:
    a, b = torch.randn(70, 300), torch.randn(300, 200)
    line, whole = torch.randn(200), torch.randn(70, 210)[:, :200]
    for plus in (line, whole):
        assert off(products.halved(a, b, plus), a, b, plus) < OFF
    before = whole.clone()
    assert products.halved(a, b, whole, whole) is whole
    assert off(whole, a, b, before) < OFF


@here
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_stays_so_and_spoils_its_row_alone(wrong: float) -> None:
    a, b = torch.randn(70, 300), torch.randn(300, 200)
    a[3, 7] = wrong
    found = products.halved(a, b)
    assert not found[3].isfinite().any()
    assert off(torch.cat([found[:3], found[4:]]), torch.cat([a[:3], a[4:]]), b) < OFF


@here
def test_zeros_and_the_smallest_and_largest_numbers() -> None:
    b = torch.randn(256, 200)
    tiny, huge = torch.randn(64, 256) * 2.0**-120, torch.randn(64, 256) * 2.0**118
    assert (products.halved(torch.zeros(64, 256), b) == 0).all()
    assert off(products.halved(tiny, b), tiny, b) < OFF
    assert off(products.halved(huge, b), huge, b) < OFF
    assert (products.halved(torch.full((64, 256), 1e-45), b).abs() < 1e-40).all()


@here
@pytest.mark.parametrize(("heads", "key_heads", "size"), [(9, 3, 64), (4, 1, 256), (2, 2, 96)])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_in_halves(heads: int, key_heads: int, size: int, window: int | None) -> None:
    """Beside float32: no further off than inputs rounded to bfloat16 are; gradients of any size."""
    tokens, before = 300, 70
    generator = torch.Generator().manual_seed(0)
    query, grad = (torch.randn(1, heads, tokens, size, generator=generator) for _ in range(2))
    key, value = (torch.randn(1, key_heads, before + tokens, size, generator=generator) for _ in range(2))
    key[:, :, 0] *= 30
    grad *= 10.0 ** torch.arange(-9, 1).repeat_interleave(30)[:, None]  # of no two tiles alike
    tiles = Tiles.of([(0, 130, -1), (130, 300, -1)], np.r_[np.arange(70, 200), np.arange(70, 240)], window, before)

    def computed(halved: bool, *inputs: Tensor) -> tuple[Tensor, ...]:
        query, key, value, grad = inputs
        output, lse = kernels.attention(query, key, value, tiles, size**-0.5, halved)
        return (output, *kernels.attention_backward(grad, query, key, value, output, lse, tiles, size**-0.5, halved))

    exact = computed(False, query, key, value, grad)
    rounded = computed(False, *(tensor.bfloat16().float() for tensor in (query, key, value, grad)))
    for name, one, other, truth in zip(
        ("output", "query", "key", "value"), computed(True, query, key, value, grad), rounded, exact, strict=True
    ):
        near, wanted = float((one - truth).norm() / truth.norm()), float((other - truth).norm() / truth.norm())
        assert 0 < near < wanted, name


@here
def test_attention_in_halves_of_the_largest_numbers() -> None:
    """Everything at its bound: one key that all see alone, and gradients of one sign."""
    tokens, size = 200, 64
    query, key, value, grad = (torch.full((1, 1, tokens, size), float(number)) for number in (1.99, 15.9, 15.9, 0.99))
    value[..., ::2, :] *= -1
    tiles = Tiles.of([(0, tokens, -1)], np.arange(tokens), None, 0)
    found = []
    for halved in (True, False):
        output, lse = kernels.attention(query, key, value, tiles, 1.0, halved)
        found.append((output, *kernels.attention_backward(grad, query, key, value, output, lse, tiles, 1.0, halved)))
    slope = (
        size * 15.9 * 0.99
    )  # of a score, at most; what comes back to queries and keys are sums of those, which cancel
    for one, other, most in zip(*found, (15.9, slope * 15.9, slope * 1.99 * tokens, 0.99 * tokens), strict=True):
        assert one.isfinite().all()
        assert float((one - other).abs().max()) < 2e-3 * most


def test_what_is_small_or_not_float32_is_torchs() -> None:
    for a, b in (
        (torch.randn(63, 300), torch.randn(300, 200)),
        (torch.randn(70, 300).bfloat16(), torch.randn(300, 200).bfloat16()),
        (torch.randn(70, 600)[:, ::2], torch.randn(300, 200)),
    ):
        assert torch.equal(products.halved(a, b), torch.mm(a, b))


@here
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_gradients_through_layers_and_head(family: str, method: str) -> None:
    """Of a whole step, beside float32: nearer than bfloat16 comes."""
    sizes = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 48, "num_key_value_heads": 4}
    rows = rows_of([70, 90, 40], 60, 1)
    found: dict[str, Gradients] = {}
    for name, dtype in (("float32", torch.float32), ("float16", torch.float32), ("bfloat16", torch.bfloat16)):
        model = adapted(make(family, **sizes).to(dtype), method)
        products.choose(step.inner(model), name == "float16")
        assert layers.fuse(step.inner(model)) is None
        found[name] = learnt(model, [rows])[1]
    flat = {n: torch.cat([grads[k].double().flatten() for k in sorted(grads)]) for n, grads in found.items()}
    near = {name: torch.nn.functional.cosine_similarity(flat[name], flat["float32"], dim=0) for name in flat}
    wrong = {name: 1 - float(value) for name, value in near.items()}
    assert 0 < wrong["float16"] < min(wrong["bfloat16"] / 2, 1e-4)


@here
def test_gate_and_up_are_kept_in_half_of_their_size() -> None:
    sizes = {"hidden_size": 192, "intermediate_size": 256, "head_dim": 48, "num_key_value_heads": 4}
    tree = forest.build(rows_of([70, 90, 40], 60, 1))
    held = {}
    for halved in (False, True):
        model = adapted(make("llama", **sizes))
        products.choose(step.inner(model), halved)
        assert layers.fuse(step.inner(model)) is None
        held[halved] = kept(step.hidden_states(model, tree), model)
    rows = tree.tokens + len(tree.sources)  # of the last layer only what is learnt
    assert held[False] - held[True] == 2 * 2 * sizes["intermediate_size"] * rows


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model whose products are large enough."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return tiny_models.make_model(folder, hidden=192, heads=3, kv_heads=1, layers=products.EXACT + 2)


@here
def test_a_run_in_halves(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It learns what float32 learns, resumed or not to the bit, and its result answers in float32."""
    data = runs.write(tmp_path / "rows.jsonl", runs.chats(24))
    options: dict[str, Any] = {"epochs": 2, "checkpoint_every": 1, "validation": "0.2"}
    names = ("product_of_halves", "attention", "attention_backward")
    used = {name: mock.Mock(wraps=getattr(kernels, name)) for name in names}
    for name, kernel in used.items():
        monkeypatch.setattr(kernels, name, kernel)
    whole = runs.train(tmp_path / "whole", base, data, precision="float16", **options)
    assert used["product_of_halves"].called
    for name in names[1:]:
        assert {call.args[-1] for call in used[name].call_args_list} == (
            {True} if "backward" in name else {True, False}
        )
    assert json.loads(whole.spec.read_text())["settings"]["precision"] == "float16"
    plain = runs.losses(runs.train(tmp_path / "plain", base, data, precision="float32", **options))
    assert runs.losses(whole) == pytest.approx(plain, rel=2e-3)
    assert runs.losses(whole) != plain
    run = runs.lay_out(tmp_path / "run", base, data, precision="float16", **options)
    stop_after(monkeypatch, 3)
    assert runs.carry_out(run) != 0
    monkeypatch.undo()
    assert runs.carry_out(run) == 0
    assert runs.losses(run)[-len(plain) :] == runs.losses(whole)
    loaded = models.load_for_use(str(run.path), "float16").model
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}


@here
def test_a_run_that_goes_on_where_there_are_none_is_told(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.write(tmp_path / "rows.jsonl", runs.chats(16))
    run = runs.lay_out(tmp_path / "run", base, data, precision="float16", epochs=1, checkpoint_every=1)
    stop_after(monkeypatch, 2)
    assert runs.carry_out(run) != 0
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "halves_absent", lambda: "played")
    asked = mock.Mock(wraps=products.choose)
    monkeypatch.setattr(products, "choose", asked)
    assert runs.carry_out(run) == 0
    assert asked.call_args.args[1] is False  # so nothing is kept in less than float32 either
    said = "The run began with products of float16 numbers and goes on in float32: played"
    assert said in [event["message"] for event in runs.events(run, "warning")]


def test_refused_where_there_are_none(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "halves_absent", lambda: "the processor is another")
    data = runs.write(tmp_path / "rows.jsonl", runs.chats(16))
    failed = runs.refused(tmp_path / "run", base, data, precision="float16")
    assert failed["message"] == "--precision float16: the processor is another."
    assert products.gain() == 0


@pytest.mark.parametrize(
    ("stored", "gain", "quicker", "wanted"),
    [
        (1 << 30, 1.5, "float32", "float16"),
        (1 << 30, 1.1, "float32", "float32"),
        (1 << 30, 1.5, "bfloat16", "bfloat16"),
        (1 << 20, 1.5, "float32", "float32"),
    ],
)
def test_auto_takes_them_where_they_pay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: int, gain: float, quicker: str, wanted: str
) -> None:
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(stored)
    monkeypatch.setattr(models, "default_precision", lambda: "bfloat16")
    monkeypatch.setattr(models, "quicker", lambda: quicker)
    monkeypatch.setattr(models, "_gain", lambda: 2.0)
    monkeypatch.setattr(products, "gain", lambda: gain)
    monkeypatch.setattr(machine, "memory_room", lambda: 1 << 40)
    precision, why = models.training_precision(tmp_path)
    assert precision == wanted
    assert bool(why) == (wanted != "bfloat16")


@here
def test_the_gain_is_measured_here() -> None:
    assert products.gain() == products.gain() > 0


@here
def test_the_head_of_another_model_is_torchs() -> None:
    """The choice is a model's own."""
    one, other = make("llama"), make("llama")
    products.choose(one, True)
    assert (loss.Head(one).multiply, loss.Head(other).multiply) == (products.halved, products.whole)
