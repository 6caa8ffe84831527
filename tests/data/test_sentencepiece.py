"""Laws of rendering for tokenizers in SentencePiece's manner: spaces that are put before texts, bytes as a last resort,
control tokens among the pieces, control tokens that swallow the white space behind them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from luthier.data.render import Renderer
from luthier.spec.data import Chat, Completion, Message, Rendered, Text
from tests.tiny import CORPUS

CONTROLS = ("<|user|>", "<|assistant|>", "<|end|>")
TEMPLATES = {
    # Tags that are ordinary text, closed by the end token.
    "tags": "{% for m in messages %}{{ '<' + m.role + '>\\n' + m.content + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>\\n' }}{% endif %}",
    # A space of the template's own before each answer.
    "brackets": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}",
    # Control tokens around everything.
    "controls": "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}",
}
SPACES = ("normalizer", "always", "first", "never")
KINDS = ("bpe", "unigram")


def make(folder: Path, template: str, spaces: str, kind: str, swallow: bool = False) -> Path:
    """A tokenizer of about 600 entries. `spaces`: who puts a space before a text, and before which."""
    specials = ["<unk>", "<s>", "</s>", *CONTROLS, *(f"<0x{byte:02X}>" for byte in range(256))]
    if kind == "bpe":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        trainer: trainers.Trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=specials, show_progress=False)
    else:
        tokenizer = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(
            vocab_size=500, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    scheme = "never" if spaces == "normalizer" else spaces
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    if spaces == "normalizer":  # as the oldest conversions have it: no pre-tokenizer at all
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = [token for token in value["added_tokens"] if not token["content"].startswith("<0x")]
    for token in value["added_tokens"]:
        token["rstrip"] = swallow and token["content"] in CONTROLS
    value["model"]["byte_fallback"] = True
    if spaces == "normalizer":
        value["pre_tokenizer"] = None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(value))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    (folder / "chat_template.jinja").write_text(template)
    return folder


Made = dict[tuple[str, str, str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    place = tmp_path_factory.mktemp("sentencepiece")
    return {
        (name, spaces, kind): make(place / f"{name}-{spaces}-{kind}", TEMPLATES[name], spaces, kind)
        for name, spaces, kind in itertools.product(TEMPLATES, SPACES, KINDS)
    }


def turns(*contents: str) -> tuple[Message, ...]:
    return tuple(Message("assistant" if n % 2 else "user", text) for n, text in enumerate(contents))


def answers(row: Rendered) -> list[list[int]]:
    """The ids of each learnt stretch."""
    runs = itertools.groupby(zip(row.ids, row.weights, strict=True), key=lambda pair: pair[1] > 0)
    return [[token for token, _ in run] for learnt, run in runs if learnt]


def theirs(folder: Path, messages: Sequence[Message], generation: bool = False) -> list[int]:
    """The ids of transformers, with BOS in front as everywhere here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = [{"role": message.role, "content": message.content} for message in messages]
    ids: Any = tokenizer.apply_chat_template(plain, add_generation_prompt=generation, tokenize=True, return_dict=False)
    return list(ids) if ids[0] == tokenizer.bos_token_id else [tokenizer.bos_token_id, *ids]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spaces", SPACES)
@pytest.mark.parametrize("name", TEMPLATES)
def test_rows_and_prompts_are_those_of_transformers(made: Made, name: str, spaces: str, kind: str) -> None:
    """Also in conversations of several turns: the border before an answer leaves no space of its own behind."""
    folder = made[name, spaces, kind]
    renderer = Renderer.load(folder)
    for contents in (
        ("What is 7 x 8?", "56, I think", "And one more?", "nine\nten"),
        ("the é", "你好 the", "x", "dog"),
    ):
        messages = turns(*contents)
        row = renderer.rows(Chat(messages))[0]
        assert row.ids == theirs(folder, messages)
        assert renderer.prompt(messages[:3]) == theirs(folder, messages[:3], generation=True)
        assert [renderer.answer(ids) for ids in answers(row)] == [contents[1], contents[3]]
        ends = [ids[-1] for ids in answers(row)]
        assert ends == [renderer.tokenizer.control_ids[renderer.end_token]] * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spaces", SPACES)
def test_texts_begin_as_texts_and_completions_go_on(made: Made, spaces: str, kind: str) -> None:
    """A text is tokenised as if it stood alone; a completion keeps exactly the spaces that it has."""
    renderer = Renderer.load(made["tags", spaces, kind])
    own = renderer.tokenizer.base.encode("the fox jumps").ids
    assert renderer.rows(Text("the fox jumps"))[0].ids == [*own, renderer.stop_ids[0]]
    for completion in ("the dog", " the dog", "\nthe dog"):
        row = renderer.rows(Completion("the fox", completion))[0]
        assert renderer.tokenizer.decode(answers(row)[0]) == completion + "</s>"
        asked = renderer.completion_prompt("the fox")
        assert row.ids[: len(asked)] == asked == renderer.tokenizer.base.encode("the fox").ids


@pytest.mark.parametrize("kind", KINDS)
def test_user_text_never_becomes_a_control_token(made: Made, kind: str) -> None:
    """Unigram models have their control tokens among the pieces that ordinary text is cut into."""
    renderer = Renderer.load(made["controls", "always", kind])
    attack = "".join(["</s>", "<s>", "<unk>", *CONTROLS])
    control = set(renderer.tokenizer.control_ids.values())
    rows = [renderer.rows(Chat(turns(text, text + "y")))[0].ids for text in ("x", attack)]
    clean, dirty = ([token for token in ids if token in control] for ids in rows)
    assert dirty == clean
    assert renderer.tokenizer.decode(rows[1]).count(attack) == 2


@pytest.mark.parametrize("spaces", SPACES)
def test_control_tokens_that_swallow_white_space(tmp_path: Path, spaces: str) -> None:
    """As Phi's: the line break after an end marker is no token, in later turns too."""
    folder = make(tmp_path, TEMPLATES["controls"], spaces, "bpe", swallow=True)
    renderer = Renderer.load(folder)
    messages = turns("the fox", "the dog", "and", "one two")
    row = renderer.rows(Chat(messages))[0]
    assert row.ids == theirs(folder, messages)
    assert renderer.prompt(messages[:3]) == theirs(folder, messages[:3], generation=True)
    assert [renderer.answer(ids) for ids in answers(row)] == ["the dog", "one two"]
