"""Evaluation measures what training learns and serving says; base and tuned through the same material."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.render import Renderer
from luthier.engine import evaluate as room
from luthier.engine import generate as decoding
from luthier.engine import models, step
from luthier.engine.answers import answer_of
from luthier.engine.evaluate import evaluate
from luthier.engine.generate import Sampling, generate
from luthier.spec.data import Chat, Completion, Example, Message, Text, ToolCall
from luthier.spec.errors import BadData
from luthier.spec.run import write_json


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> Renderer:
    return Renderer.load(tiny)


@pytest.fixture
def loaded(tiny: Path) -> models.Loaded:
    """The tiny model as a plain one."""
    model = models.load_base(tiny, "float32").eval().requires_grad_(False)
    return models.Loaded(model, tiny, tiny, "", False, "tiny")


@pytest.fixture
def adapted(tiny: Path) -> models.Loaded:
    """The tiny model with a LoRA adapter that changes its answers."""
    from peft import LoraConfig, get_peft_model

    base = models.load_base(tiny, "float32")
    model = get_peft_model(
        base, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=64, target_modules=["q_proj", "up_proj"])
    )
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return models.Loaded(model.eval().requires_grad_(False), tiny, tiny, "", True, "tuned")


def asked(question: str, answer: str, **more: Any) -> Chat:
    return Chat((Message("user", question), Message("assistant", answer)), **more)


CHATS: list[Example] = [
    asked(f"What is {n} and {n}?", "The answer is " + "two " * n, line=n, row=n) for n in range(1, 6)
]


def said(model: Any, renderer: Renderer, example: Example, tokens: int) -> str:
    question = renderer.question(example)
    assert question is not None
    done = generate(model, [question[0]], renderer.stop_ids, 0, Sampling(max_tokens=tokens), context=512)
    assert isinstance(example, Chat | Completion)
    return answer_of(renderer, example, done[0].ids)


def test_scores_are_those_of_the_models_own_forward(loaded: models.Loaded, renderer: Renderer) -> None:
    report = evaluate(loaded, renderer, CHATS, compare=False, max_tokens=4)
    nll = hits = count = 0.0
    for example in CHATS:
        for row in renderer.rows(example):
            ids, weights = torch.tensor([row.ids]), torch.tensor(row.weights[1:])
            with torch.no_grad():
                logits = loaded.model(input_ids=ids).logits[0, :-1]
            picked = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            nll -= float((picked * weights).sum())
            hits += float(((logits.argmax(-1) == ids[0, 1:]) * weights).sum())
            count += float(weights.sum())
    assert report.tuned is not None
    assert report.tuned.rows == 5
    assert report.tuned.supervised_tokens == count
    assert report.tuned.loss == pytest.approx(nll / count, abs=1e-5)
    assert report.tuned.token_accuracy == pytest.approx(hits / count)
    assert report.tuned.exact_match == 0.0


@pytest.mark.parametrize(("micro_tokens", "batch_size"), [(1, 1), (40, 2), (4096, 32)])
def test_no_batch_size_changes_a_score(
    adapted: models.Loaded, renderer: Renderer, micro_tokens: int, batch_size: int
) -> None:
    whole = evaluate(adapted, renderer, CHATS, max_tokens=6)
    parts = evaluate(adapted, renderer, CHATS, max_tokens=6, micro_tokens=micro_tokens, batch_size=batch_size)
    assert parts.samples == whole.samples
    for one, other in ((parts.base, whole.base), (parts.tuned, whole.tuned)):
        assert one is not None
        assert other is not None
        assert one.loss == pytest.approx(other.loss, abs=1e-5)
        assert (one.token_accuracy, one.exact_match) == (other.token_accuracy, other.exact_match)


def test_exact_match_counts_answers_that_are_the_reference(loaded: models.Loaded, renderer: Renderer) -> None:
    """References taken from the model's own greedy answers match; white space at the ends does not matter."""
    own = [said(loaded.model, renderer, example, 8) for example in CHATS]
    right: list[Example] = [
        asked(f"What is {n} and {n}?", text if n % 2 else f"  {text.strip()}\n") for n, text in enumerate(own[:3], 1)
    ]
    report = evaluate(loaded, renderer, [*right, *CHATS[3:]], compare=False, max_tokens=8)
    assert report.tuned is not None
    assert report.tuned.exact_match == 3 / 5
    assert [sample.tuned for sample in report.samples] == own
    assert [room.matches(sample.tuned, sample.wanted) for sample in report.samples] == [True] * 3 + [False] * 2


def test_the_base_is_the_adapter_switched_off(
    adapted: models.Loaded, loaded: models.Loaded, renderer: Renderer
) -> None:
    report = evaluate(adapted, renderer, CHATS, max_tokens=8)
    plain = evaluate(loaded, renderer, CHATS, compare=False, max_tokens=8)
    assert report.base is not None
    assert plain.tuned is not None
    assert report.base.loss == pytest.approx(plain.tuned.loss, abs=1e-6)
    assert [sample.base for sample in report.samples] == [sample.tuned for sample in plain.samples]
    assert [sample.tuned for sample in report.samples] == [said(adapted.model, renderer, row, 8) for row in CHATS]
    assert [sample.base for sample in report.samples] != [sample.tuned for sample in report.samples]
    assert not next(iter(adapted.model.parameters())).requires_grad


def test_the_model_is_left_as_it_was(adapted: models.Loaded, renderer: Renderer) -> None:
    evaluate(adapted, renderer, CHATS[:1], max_tokens=2)
    inner = step.inner(adapted.model)
    assert inner.config._attn_implementation == "sdpa"
    assert not inner.training
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.isfinite(adapted.model(input_ids=ids).logits).all()


def full_model(tiny: Path, folder: Path, note: dict[str, str] | None) -> models.Loaded:
    """A full fine-tune: other weights in a folder that may name its base."""
    model = models.load_base(tiny, "float32").eval().requires_grad_(False)
    for weight in model.parameters():
        weight.mul_(1.1)
    folder.mkdir()
    if note is not None:
        write_json(folder / "luthier.json", {"kind": "model", "base": note})
    return models.Loaded(model, folder, folder, "", False, "my run")


def test_a_full_model_is_measured_beside_the_base_that_it_names(
    tiny: Path, tmp_path: Path, loaded: models.Loaded, renderer: Renderer
) -> None:
    from luthier.engine.catalogue import content_hash

    note = {"name": "tiny", "folder": str(tiny), "hash": content_hash(tiny)}
    report = evaluate(full_model(tiny, tmp_path / "m", note), renderer, CHATS, max_tokens=4)
    plain = evaluate(loaded, renderer, CHATS, compare=False, max_tokens=4)
    assert report.base is not None
    assert report.tuned is not None
    assert report.base == plain.tuned
    assert report.tuned.loss != report.base.loss


@pytest.mark.parametrize(
    ("note", "reason"),
    [
        (None, "does not say which base"),
        ({"name": "no-such-model", "folder": "/gone", "hash": "0"}, "is not here any more"),
        ({"name": "tiny", "folder": "TINY", "hash": "another"}, "is no longer the base"),
    ],
)
def test_without_its_base_a_full_model_is_measured_alone_and_says_why(
    tiny: Path, tmp_path: Path, renderer: Renderer, note: dict[str, str] | None, reason: str
) -> None:
    told: list[str] = []
    if note is not None and note["folder"] == "TINY":
        note = {**note, "folder": str(tiny)}
    report = evaluate(full_model(tiny, tmp_path / "m", note), renderer, CHATS, max_tokens=2, tell=told.append)
    assert report.base is None
    assert report.tuned is not None
    assert reason in told[-1]


def test_a_base_that_is_given_is_used(adapted: models.Loaded, loaded: models.Loaded, renderer: Renderer) -> None:
    report = evaluate(adapted, renderer, CHATS, base=loaded.model, max_tokens=2)
    alone = evaluate(adapted, renderer, CHATS, base=loaded.model, compare=False, max_tokens=2)
    assert report.base is not None
    assert report.base.loss == pytest.approx(evaluate(adapted, renderer, CHATS, max_tokens=2).base.loss, abs=1e-6)  # type: ignore[union-attr]
    assert alone.base is None
    assert [sample.base for sample in alone.samples] == [None] * 5


def test_text_has_a_loss_and_no_exact_match(loaded: models.Loaded, renderer: Renderer) -> None:
    report = evaluate(loaded, renderer, [Text("the quick brown fox " * 400, line=1, row=1)], compare=False)
    assert report.tuned is not None
    assert report.tuned.exact_match is None
    assert report.tuned.loss is not None
    assert report.samples == []


def test_a_completion_is_compared_as_plain_text(loaded: models.Loaded, renderer: Renderer) -> None:
    row = Completion("color 3 ->", " red", line=1, row=1)
    answer = said(loaded.model, renderer, row, 5)
    report = evaluate(loaded, renderer, [row, replace(row, completion=answer)], compare=False, max_tokens=5)
    assert report.tuned is not None
    assert report.tuned.exact_match == 0.5
    assert [(sample.prompt, sample.wanted) for sample in report.samples] == [
        ("color 3 ->", " red"),
        ("color 3 ->", answer),
    ]


def test_an_empty_prompt_is_measured_and_not_asked(loaded: models.Loaded, renderer: Renderer) -> None:
    told: list[str] = []
    examples = [Completion("", "the fox"), Completion("a", " b")]
    report = evaluate(loaded, renderer, examples, compare=False, max_tokens=4, tell=told.append)
    assert report.tuned is not None and report.tuned.rows == 2
    assert report.tuned.supervised_tokens == sum(renderer.rows(example)[0].supervised for example in examples)
    assert [sample.prompt for sample in report.samples] == ["a"]
    assert told == ["1 rows have an empty prompt: their loss is measured, and there is no answer to ask for."]


def test_samples_show_the_question_that_was_answered(loaded: models.Loaded, renderer: Renderer) -> None:
    turns = (
        Message("system", "you are a helpful assistant"),
        Message("user", "one"),
        Message("assistant", "two"),
        Message("user", "three"),
        Message("assistant", "four"),
        Message("user", "five"),
        Message("assistant", "six", weight=0),
    )
    report = evaluate(loaded, renderer, [Chat(turns)], compare=False, max_tokens=2)
    assert [(sample.prompt, sample.wanted) for sample in report.samples] == [("three", "four")]


def test_tool_calls_are_compared_as_calls(renderer: Renderer) -> None:
    """Line breaks and spaces of the template around a call are no part of the answer."""
    wanted = Message("assistant", "", tool_calls=(ToolCall("now", {"zone": "UTC"}),))
    text = '<tool_call>\n{"name":  "now", "arguments": {"zone": "UTC"}}\n</tool_call>'
    ids = [*renderer.tokenizer.plain(text), renderer.stop_ids[0]]
    example = Chat((Message("user", "a"), wanted))
    from luthier.data.answer import answer_text

    assert room.matches(answer_of(renderer, example, ids), answer_text(wanted))


def test_every_row_that_cannot_be_measured_is_named(loaded: models.Loaded, renderer: Renderer) -> None:
    rows: list[Example] = [
        asked("one", "two", line=1, row=1),
        asked("fox " * 600, "dog", line=2, row=2),
        Chat((Message("user", "one"),), line=3, row=3),
    ]
    with pytest.raises(BadData) as refused:
        evaluate(loaded, renderer, rows, source="held.jsonl")
    places = [(problem.file, problem.line) for problem in refused.value.problems]
    assert places == [("held.jsonl", 2), ("held.jsonl", 3)]
    assert refused.value.problems[0].wanted == "at most 512, which is all that the model reads"
    with pytest.raises(BadData, match="nothing to measure"):
        evaluate(loaded, renderer, [])


def test_answers_get_the_longest_reference_and_a_little_more(
    loaded: models.Loaded, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    real = decoding.generate

    def spy(model: Any, prompts: Sequence[Sequence[int]], stops: Any, pad: int, sampling: Sampling, **more: Any) -> Any:
        seen.append(sampling.max_tokens)
        return real(model, prompts, stops, pad, Sampling(max_tokens=1), **more)

    monkeypatch.setattr(decoding, "generate", spy)
    told: list[str] = []
    longest = len(renderer.tokenizer.plain("two " * 9))
    evaluate(loaded, renderer, [asked("a", "b"), asked("c", "two " * 9)], compare=False, tell=told.append)
    assert set(seen) == {longest + 16}
    assert told == [f"Answers may have {longest + 16} tokens; the longest reference has {longest}."]
    monkeypatch.setattr(room, "MOST_TOKENS", 8)
    evaluate(loaded, renderer, [asked("a", "b"), asked("c", "two " * 9)], compare=False, tell=told.append)
    assert seen[-1] == 8
    assert told[-1].startswith("1 references are longer")


def test_progress_is_told_for_each_part(adapted: models.Loaded, renderer: Renderer) -> None:
    told: list[tuple[str, int, int]] = []
    evaluate(adapted, renderer, CHATS, max_tokens=2, progress=lambda *what: told.append(what))
    assert list(dict.fromkeys(name for name, _, _ in told)) == [
        "Loss of the tuned model",
        "Loss of the base model",
        "Answers of the tuned model",
        "Answers of the base",
    ]
    assert ("Answers of the base", 5, 5) in told


def test_memory_does_not_grow_with_the_rows(loaded: models.Loaded, renderer: Renderer) -> None:
    """The largest tensor that lives while rows are measured is that of one micro-batch (B47)."""
    largest: list[int] = []
    head = loaded.model.get_output_embeddings()  # type: ignore[operator,union-attr]
    hook = head.register_forward_hook(lambda _, __, out: largest.append(out.shape[-2]))
    row = asked("one two three", "the quick brown fox " * 30)
    try:
        for count in (2, 40):
            largest.clear()
            rows: list[Example] = [
                Chat((Message("user", f"{n} {n}"), row.messages[1]), line=n, row=n) for n in range(count)
            ]
            evaluate(loaded, renderer, rows, compare=False, max_tokens=1, micro_tokens=256)
            assert max(largest) <= 256
            assert len(largest) >= count // 2
    finally:
        hook.remove()


def test_supervised_tokens_are_counted_as_training_counts_them(loaded: models.Loaded, renderer: Renderer) -> None:
    report = evaluate(loaded, renderer, CHATS, compare=False, max_tokens=1)
    assert report.tuned is not None
    rows = [row for example in CHATS for row in renderer.rows(example)]
    assert report.tuned.supervised_tokens == sum(int(np.count_nonzero(row.weights)) for row in rows)


def test_texts_are_also_compared_by_the_bases_states(adapted: models.Loaded, renderer: Renderer) -> None:
    """Again, one text at a time, without padding."""
    rows: list[Example] = [
        asked(f"say {n}", f"a long answer with the words number {n} and more than forty characters") for n in range(5)
    ]
    report = evaluate(adapted, renderer, rows, max_tokens=4)
    assert report.proof is not None and report.proof.metric == "text"

    def state(text: str) -> torch.Tensor:
        ids = torch.tensor([renderer.tokenizer.plain(text)])
        with torch.no_grad(), adapted.model.disable_adapter():  # type: ignore[operator]
            return step.inner(adapted.model).get_decoder()(input_ids=ids).last_hidden_state[0].double().mean(0)

    wanted = torch.stack([state(row.wanted) for row in report.proof.rows])
    for way in report.proof.ways:
        said_states = torch.stack([state(row.answers[way.name]) for row in report.proof.rows])
        left, right = said_states - wanted.mean(0), wanted - wanted.mean(0)
        cosines = (left * right).sum(1) / (left.norm(dim=1) * right.norm(dim=1))
        assert way.details["embedding"] == pytest.approx(float(cosines.mean()), abs=1e-4)
