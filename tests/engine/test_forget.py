"""The meter asks a model as serving would and reads likelihoods as the model gives them; known scores are read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from luthier.data.render import Renderer
from luthier.engine import forget, generate, models, step
from luthier.proof import probe
from luthier.proof.probe import Item
from luthier.spec.data import Message


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> Renderer:
    return Renderer.load(tiny)


@pytest.fixture(scope="module")
def model(tiny: Path) -> object:
    return models.load_base(tiny, "float32").eval().requires_grad_(False)


CHOICES = [
    Item(f"c{n}", "knowledge", "en", pairs=tuple((f"the quick brown {n} is", f" {word}") for word in words))
    for n, words in enumerate((("fox", "dog and cat"), ("a", "lazy", "the the the"), ("one", "two")))
]
TEXT = Item("t", "text", "en", pairs=(("", "the quick brown fox jumps over the lazy dog"),))


def test_choices_and_text_are_scored_as_the_models_own_forward_scores_them(model: object, renderer: Renderer) -> None:
    found = forget.measure(model, renderer, [*CHOICES, TEXT], micro_tokens=64)
    for item in CHOICES:
        sums = []
        for context, answer in item.pairs:
            ids = renderer.tokenizer.plain(context + answer)
            start = len(renderer.tokenizer.plain(context))
            assert ids[:start] == renderer.tokenizer.plain(context)
            sums.append(float(step.plain_log_probs(model, ids)[start - 1 :].sum()) / len(answer.encode()))
        assert found[item.id] == float(np.argmax(sums) == item.gold)
    ids = renderer.tokenizer.plain(TEXT.pairs[0][1])
    assert found["t"] == pytest.approx(-float(step.plain_log_probs(model, ids).mean()), abs=1e-4)


def test_a_tie_is_a_share_and_an_exact_item_wants_the_models_own_words(model: object, renderer: Renderer) -> None:
    tie = Item("tie", "k", pairs=(("a", " b"), ("a", " b"), ("a", " b")), gold=2)
    ids = renderer.tokenizer.plain("the quick")
    [said] = generate.generate(model, [ids], [], 0, generate.Sampling(max_tokens=1), context=512)
    word = renderer.tokenizer.decode(said.ids)
    own = Item("own", "k", pairs=(("the quick", word),))
    other = Item("other", "k", pairs=(("the quick", "q" if word != "q" else "z"),))
    found = forget.measure(model, renderer, [tie, own, other])
    assert found["tie"] == pytest.approx(1 / 3)
    if renderer.tokenizer.plain("the quick" + word) == [*ids, *said.ids]:
        assert found["own"] == 1.0
    assert found["other"] == 0.0


def test_tasks_are_asked_with_the_prompt_of_serving(model: object, renderer: Renderer) -> None:
    prompt = renderer.prompt([Message("user", "one two")])
    [said] = generate.generate(
        model, [prompt], renderer.stop_ids, 0, generate.Sampling(max_tokens=forget.ROOMS[-1]), context=512
    )
    answer = renderer.answer(said.ids)
    assert answer.strip()
    right = Item("right", "instruction", prompt="one two", check={"at_most_characters": len(answer)})
    wrong = Item("wrong", "instruction", prompt="one two", check={"at_most_characters": len(answer.strip()) - 1})
    assert forget.measure(model, renderer, [right, wrong]) == {"right": 1.0, "wrong": 0.0}


def test_what_the_model_cannot_read_whole_has_no_score(model: object, renderer: Renderer) -> None:
    long = "fox " * 600
    items = [
        Item("choice", "k", pairs=((long, " a"), (long, " b"))),
        Item("task", "instruction", prompt=long, check={"at_least_words": 1}),
        TEXT,
    ]
    assert forget.measure(model, renderer, items).keys() == {"t"}


def test_known_scores_are_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LUTHIER_HOME", str(tmp_path))
    calls = []

    def make() -> dict[str, float]:
        calls.append(1)
        return {"a": 0.5}

    for key, items, wanted in (("m", CHOICES, 1), ("m", CHOICES, 1), ("n", CHOICES, 2), ("m", CHOICES[:1], 3)):
        assert forget.remembered(key, items, make) == {"a": 0.5}
        assert len(calls) == wanted
    for path in (tmp_path / "cache" / "probe").iterdir():
        path.write_text("{broken")
    assert forget.remembered("m", CHOICES, make) == {"a": 0.5}
    assert len(calls) == 4


def test_the_key_tells_models_precisions_and_templates_apart(model: object, tiny: Path, renderer: Renderer) -> None:
    other = Renderer.load(tiny, "plain")
    half = models.load_base(tiny, "bfloat16")
    keys = {
        forget.key_of("a", renderer, model),
        forget.key_of("b", renderer, model),
        forget.key_of("a", other, model),
        forget.key_of("a", renderer, half),
    }
    assert len(keys) == 4


def test_the_packages_own_probe_can_be_asked(model: object, renderer: Renderer) -> None:
    items = probe.sample(probe.general(), 1)
    found = forget.measure(model, renderer, items)
    assert found.keys() <= {item.id for item in items}
    assert {item.form for item in items if item.id in found} == {"choice", "task", "text"}
