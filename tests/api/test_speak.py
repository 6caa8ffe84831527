"""Tokens to text: however the parts come, the text is the one that the whole answer makes; and calls in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.api.speak import Said, Speaker
from luthier.api.tools import Listener, Toolbox, prompt_ids, toolbox
from luthier.data.messages import Findings, read_messages
from luthier.data.render import Renderer, Unrenderable
from luthier.data.tokenizer import Tokenizer
from luthier.spec.data import Chat, Message
from luthier.spec.serving import Part, Token
from tests import tiny as tiny_models

TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer(base_folder: Path) -> Tokenizer:
    return Tokenizer(base_folder)


def spoken(
    tokenizer: Tokenizer, ids: list[int], sizes: list[int], ended: bool = True, **more: Any
) -> tuple[str, list[Said], Speaker]:
    """The text and tokens of `ids` that come in parts of `sizes`."""
    speaker = Speaker(tokenizer, **more)
    text, said, at = "", [], 0
    sizes = [*sizes, *[1] * len(ids)]
    while at < len(ids) and speaker.finish is None:
        size = sizes.pop(0)
        piece = speaker.push(Part(id="a", tokens=[Token(id=id) for id in ids[at : at + size]]))
        text, said, at = text + piece.text, said + piece.tokens, at + size
    if speaker.finish is None:
        piece = speaker.push(Part(id="a", finish="stop" if ended else "length", generated=len(ids) + ended))
        text, said = text + piece.text, said + piece.tokens
    return text, said, speaker


ALPHABET = st.text(alphabet="ab <tool你é\n", max_size=24)


@given(
    text=ALPHABET,
    stops=st.lists(st.text(alphabet="ab t你\n", min_size=1, max_size=4), max_size=4),
    sizes=st.lists(st.integers(1, 5), max_size=8),
    lead=st.sampled_from(["", " ", "ab"]),
    trail=st.sampled_from(["", "\n"]),
)
@settings(max_examples=300, deadline=None)
def test_parts_make_the_whole(
    tokenizer: Tokenizer, text: str, stops: list[str], sizes: list[int], lead: str, trail: str
) -> None:
    ids = tokenizer.plain(text)
    got, said, speaker = spoken(tokenizer, ids, sizes, stops=stops, lead=lead, trail=trail)
    whole = text.removeprefix(lead)
    found = [place for stop in stops if (place := whole.find(stop)) >= 0]
    if found:
        # Parts of many tokens are looked through token by token: the first stop to be complete ends the answer.
        assert speaker.stopped is not None
        assert got + speaker.stopped == whole[: len(got) + len(speaker.stopped)]
        assert not any(stop in got for stop in stops)
        assert speaker.generated <= len(ids) + 1
    else:
        assert got == whole.removesuffix(trail)
        assert [one.token.id for one in said] == ids
        assert speaker.generated == len(ids) + 1
    assert [one.offset for one in said] == sorted(one.offset for one in said)
    assert all(one.offset < max(1, len(got)) or not found for one in said)


def test_half_a_character_at_the_end_is_told(tokenizer: Tokenizer) -> None:
    ids = tokenizer.plain("aж")
    assert spoken(tokenizer, ids[:-1], [], ended=False)[0] == tokenizer.decode(ids[:-1])


@given(text=ALPHABET, sizes=st.lists(st.integers(1, 6), max_size=10), forced=st.booleans())
@settings(max_examples=200, deadline=None)
def test_a_listener_loses_nothing(text: str, sizes: list[int], forced: bool) -> None:
    box = Toolbox((TOOL,), ("look",), "required" if forced else "auto")
    listener, got, at = Listener(box), "", 0
    for size in [*sizes, len(text)]:
        got, at = got + listener.push(text[at : at + size]), at + size
    rest, calls = listener.end()
    assert (got + rest, calls) == (text, [])


CONVERSATION = [
    {"role": "user", "content": "find me"},
    {
        "role": "assistant",
        "content": "I look.",
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"a": "it\'s <b>", "n": [1]}'}}
        ],
    },
    {"role": "tool", "tool_call_id": "c", "content": "there"},
]


def test_what_a_row_teaches_is_what_a_listener_hears(tmp_path: Path) -> None:
    renderer = Renderer.load(tiny_models.make_tokenizer(tmp_path / "m"), "chatml")
    turns = read_messages(CONVERSATION, "messages", Findings("", 0, 0))
    row = renderer.rows(Chat(tuple(turns[:2]), (TOOL,)))[0]
    ids = [id for id, weight in zip(row.ids, row.weights, strict=True) if weight]
    text = spoken(renderer.tokenizer, ids[:-1], [], lead=renderer.lead, trail=renderer.trail)[0]
    listener = Listener(toolbox([TOOL], None, None, None, None))
    content = listener.push(text)
    rest, calls = listener.end()
    assert content + rest == "I look."
    assert [(call.name, json.loads(call.arguments)) for call in calls] == [("look", {"a": "it's <b>", "n": [1]})]
    assert prompt_ids(renderer, turns, [TOOL]) == renderer.prompt(turns, [TOOL])


def test_a_template_without_a_place_for_tools_gets_words(tmp_path: Path) -> None:
    renderer = Renderer.load(tiny_models.make_tokenizer(tmp_path / "m"), "plain")
    turns = read_messages(CONVERSATION, "messages", Findings("", 0, 0))
    text = renderer.tokenizer.base.decode(prompt_ids(renderer, turns, [TOOL]), skip_special_tokens=False)
    assert text.startswith("You can call these functions.")
    assert json.dumps(TOOL) in text
    assert 'I look.\n<tool_call>{"name": "look", "arguments": {"a": "it\'s <b>", "n": [1]}}</tool_call>' in text
    assert "User: <tool_response>there</tool_response>" in text
    with pytest.raises(Unrenderable):
        renderer.prompt(turns, [TOOL])


def test_what_no_words_can_mend_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    template += "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    folder = tiny_models.make_tokenizer(tmp_path / "m", template=tiny_models.CHATML)
    renderer = Renderer.load(folder)
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(Unrenderable, match="no system"):
        prompt_ids(_loaded(folder, renderer), [Message("system", "x"), Message("user", "y")], [])


def _loaded(folder: Path, renderer: Renderer) -> Renderer:
    """`renderer` with the folder's template, which no training would take."""
    renderer.template = type(renderer.template)(
        (folder / "chat_template.jinja").read_text(), "own", renderer.template.variables
    )
    return renderer
