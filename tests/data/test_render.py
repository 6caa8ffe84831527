"""Laws of rendering, over templates of many styles: supervised text, serving prompts, BOS, leaks, control tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.data.answer import answer_text
from luthier.data.render import Renderer, Unrenderable
from luthier.data.template import ChatTemplate, TemplateRefused
from luthier.spec.data import Chat, Completion, Message, Rendered, Text, ToolCall
from luthier.spec.errors import BadSetting
from tests import tiny as tiny_models
from tests.data.styles import STYLES, Style

SPECIALS = [*tiny_models.SPECIALS, "<|head|>", "<|eot|>", "<turn>", "</turn>", "[INST]", "[/INST]", "<|user|>"]
TOOLS = ({"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}},)


def message(role: str, content: str, **more: object) -> Message:
    return Message(role, content, **more)  # type: ignore[arg-type]


def turns(*contents: str, system: str | None = None) -> tuple[Message, ...]:
    roles = ("user", "assistant")
    first = (message("system", system),) if system is not None else ()
    return first + tuple(message(roles[n % 2], content) for n, content in enumerate(contents))


@pytest.fixture(scope="session")
def renderers(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], Renderer]:
    root = tmp_path_factory.mktemp("styles")
    made = {}
    for name, style in STYLES.items():
        for bos in (False, True):
            folder = root / f"{name}-{bos}"
            tiny_models.make_tokenizer(folder, bos=bos, template=style.source, extra_special=style.tokens)
            made[name, bos] = Renderer.load(folder)
    return made


def learnt(renderer: Renderer, row: Rendered) -> str:
    ids = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight]
    return renderer.tokenizer.decode(ids)


def learnt_turns(row: Rendered) -> list[list[int]]:
    """Runs of learnt ids, with where each begins."""
    runs: list[list[int]] = []
    for at, weight in enumerate(row.weights):
        if weight and (at == 0 or not row.weights[at - 1]):
            runs.append([])
        if weight:
            runs[-1].append(at)
    return runs


WORDS = st.text(
    st.one_of(st.characters(codec="utf-8", exclude_categories=("Cs",)), st.sampled_from("a b\n<|>[]/ 你é🙂")),
    max_size=12,
)
TRICKY = st.builds(lambda a, special, b: a + special + b, WORDS, st.sampled_from(["", *SPECIALS]), WORDS)
LAWS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("name", list(STYLES))
@LAWS
@given(data=st.data())
def test_laws(renderers: dict[tuple[str, bool], Renderer], name: str, bos: bool, data: st.DataObject) -> None:
    """For any conversation: answers + one end marker are learnt, prompts are prefixes, BOS once, parse undoes."""
    style, renderer = STYLES[name], renderers[name, bos]
    count = data.draw(st.integers(1, 3)) * 2
    contents = [data.draw(TRICKY) for _ in range(count)]
    weights = [data.draw(st.integers(0, 1)) for _ in range(count // 2)]
    weights[-1] = 1
    system = data.draw(st.one_of(st.none(), WORDS)) if style.system else None
    messages = tuple(
        Message(m.role, m.content, weight=weights[n // 2]) if m.role == "assistant" else m
        for n, m in enumerate(turns(*contents))
    )
    if system is not None:
        messages = (message("system", system), *messages)
    chat = Chat(messages)
    rows = renderer.rows(chat)
    answers = [(n, m) for n, m in enumerate(messages) if m.role == "assistant" and m.weight]
    learnt_runs = [(row, run) for row in rows for run in learnt_turns(row)]
    assert len(learnt_runs) == len(answers)
    stops = set(renderer.stop_ids)
    first = renderer.tokenizer.control_ids["<s>"]
    for (row, run), (n, answer) in zip(learnt_runs, answers, strict=True):
        ids = [row.ids[at] for at in run]
        assert ids[-1] in stops and not stops & set(ids[:-1]), "exactly one end marker, at the end"
        wanted = answer.content.strip() if style.trims else answer.content
        assert renderer.answer(ids) == wanted
        assert renderer.parse(ids).content == wanted
        assert row.ids[: run[0]] == renderer.prompt(messages[:n]), "the prompt is what serving feeds"
        assert row.ids[1:].count(first) == 0, "BOS nowhere but at the start"
    if bos or "bos_token" in style.source:
        assert all(row.ids[0] == first for row in rows)


@pytest.mark.parametrize("name", ["chatml", "llama3-like", "mistral-like", "gemma-like", "emits-bos", "tools"])
def test_ids_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    """Ordinary text: our pieces give the ids that the tokenizer gives for the whole rendered text."""
    from transformers import AutoTokenizer

    style = STYLES[name]
    tiny_models.make_tokenizer(tmp_path, template=style.source, extra_special=style.tokens)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    renderer = Renderer.load(tmp_path)
    messages = turns("What is 7 x 8?", "56, I think", "And one more?", "nine\nten")
    plain = [{"role": m.role, "content": m.content} for m in messages]
    whole = theirs.apply_chat_template(plain, tokenize=True, return_dict=False)
    assert renderer.rows(Chat(messages))[0].ids == list(whole)
    asked = theirs.apply_chat_template(plain[:3], tokenize=True, add_generation_prompt=True, return_dict=False)
    assert renderer.prompt(messages[:3]) == list(asked)


def test_smollm2_learns_answers_and_end_markers_only(smollm2: Path) -> None:
    """B01, B03: no generation tags, a default system turn, no header in the loss."""
    renderer = Renderer.load(smollm2)
    row = renderer.rows(Chat(turns("U1", "A1", "U2", "A2", system="S1")))[0]
    assert learnt(renderer, row) == "A1<|im_end|>A2<|im_end|>"
    bare = renderer.rows(Chat(turns("U1", "A1")))[0]
    assert "named SmolLM" in renderer.tokenizer.decode(bare.ids)
    assert bare.ids[: len(renderer.prompt(turns("U1")))] == renderer.prompt(turns("U1"))
    assert "named SmolLM" not in renderer.tokenizer.decode(row.ids)
    assert renderer.stop_ids == (renderer.tokenizer.control_ids["<|im_end|>"],)


@pytest.mark.parametrize("answer", ["ok ", "ok\n", "ok\u00a0", " ", "", "\n\n"])
def test_an_answer_of_white_space_does_not_open_the_next_turn(
    renderers: dict[tuple[str, bool], Renderer], answer: str
) -> None:
    """B02: whatever the answer ends in, what a user says next is never learnt."""
    for name, style in STYLES.items():
        renderer = renderers[name, False]
        text = "".join(
            learnt(renderer, row) for row in renderer.rows(Chat(turns("q", answer, "SECRET-USER-TEXT", "fine")))
        )
        assert "SECRET" not in text, name
        assert text.count(style.end) == 2 and "fine" in text, name


def test_a_template_that_never_closes_learns_the_next_opener(renderers: dict[tuple[str, bool], Renderer]) -> None:
    """B04: the last learnt id of each turn is one that serving stops on, also at the end of the row."""
    renderer = renderers["never-closes", False]
    row = renderer.rows(Chat(turns("q", "a1", "r", "a2")))[0]
    assert learnt(renderer, row) == "a1<|user|>a2<|user|>"
    assert renderer.turns == "open"
    assert renderer.tokenizer.control_ids["<|user|>"] in renderer.stop_ids


def test_earlier_thinking_becomes_rows_of_their_own(renderers: dict[tuple[str, bool], Renderer]) -> None:
    """B09: each learnt turn follows exactly the prompt that serving would give at that turn."""
    renderer = renderers["strips-thinking", False]
    messages = turns("u1", "<think>t1</think>x", "u2", "<think>t2</think>y")
    rows = renderer.rows(Chat(messages, row=7))
    assert [learnt(renderer, row) for row in rows] == ["<think>t1</think>x<|im_end|>", "<think>t2</think>y<|im_end|>"]
    assert "t1" not in renderer.tokenizer.decode(rows[1].ids)
    for row, n in zip(rows, (1, 3), strict=True):
        prompt = renderer.prompt(messages[:n])
        assert row.ids[: len(prompt)] == prompt and row.source == 7
    orphan = renderer.rows(Chat(turns("u", "t\n</think>\n\nz")))[0]
    text = renderer.tokenizer.decode(orphan.ids)
    assert text.count("<think>") <= 1 and text.count("</think>") == 1


@pytest.mark.parametrize("emits", [False, True])
@pytest.mark.parametrize("adds", [False, True])
def test_bos_once_or_never(renderers: dict[tuple[str, bool], Renderer], emits: bool, adds: bool) -> None:
    """B07: four tokenizers; training, serving, completions and texts agree."""
    renderer = renderers["emits-bos" if emits else "chatml", adds]
    bos = renderer.tokenizer.control_ids["<s>"]
    row = renderer.rows(Chat(turns("a", "b")))[0]
    assert row.ids.count(bos) == renderer.prompt(turns("a")).count(bos) == int(emits or adds)
    for example in (Completion("a", "b"), Text("a b c")):
        ids = renderer.rows(example)[0].ids
        assert ids.count(bos) == int(adds) and ids.count(renderer.tokenizer.control_ids["<|im_end|>"]) == 1
    assert renderer.completion_prompt("a").count(bos) == int(adds)


def test_system_turns_a_template_refuses(renderers: dict[tuple[str, bool], Renderer]) -> None:
    """B10: named by row, in training and in serving alike."""
    renderer = renderers["gemma-like", False]
    with pytest.raises(Unrenderable, match=r"line 13, messages: .*System role not supported"):
        renderer.rows(Chat(turns("a", "b", system="s"), line=13, row=13))
    with pytest.raises(Unrenderable, match="System role not supported"):
        renderer.prompt(turns("a", system="s"))
    for roles in (("user", "user", "assistant"), ("assistant", "user", "assistant")):
        with pytest.raises(Unrenderable):
            renderer.rows(Chat(tuple(message(role, "x") for role in roles)))


def test_a_dropped_system_turn_is_refused(tmp_path: Path) -> None:
    source = STYLES["chatml"].source.replace("{{ '<|im", "{% if m.role != 'system' %}{{ '<|im", 1)
    source = source.replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
    tiny_models.make_tokenizer(tmp_path, template=source)
    with pytest.raises(Unrenderable, match=r"messages\[0\]: found a system message that the template drops"):
        Renderer.load(tmp_path).rows(Chat(turns("a", "b", system="Be brief.")))


def test_consecutive_and_leading_assistant_turns(renderers: dict[tuple[str, bool], Renderer]) -> None:
    renderer = renderers["chatml", False]
    messages = (message("user", "u"), message("assistant", "one"), message("assistant", "two"))
    assert learnt(renderer, renderer.rows(Chat(messages))[0]) == "one<|im_end|>two<|im_end|>"
    leading = (message("assistant", "hello"), message("user", "u"), message("assistant", "two"))
    assert learnt(renderer, renderer.rows(Chat(leading))[0]) == "hello<|im_end|>two<|im_end|>"


def test_tool_calls_in_both_shapes_and_both_ways(renderers: dict[tuple[str, bool], Renderer]) -> None:
    """B11, B18: arguments as they were, parse undoes render, nothing invented."""
    renderer = renderers["tools", False]
    call = ToolCall("look_up", {"tz": "UTC's <b>", "n": 1, "none": None}, "call_0")
    chat = Chat((message("user", "when?"), message("assistant", "", tool_calls=(call,))), tools=TOOLS)
    row = renderer.rows(chat)[0]
    text = learnt(renderer, row)
    assert text == (
        '<tool_call>{"name": "look_up", "arguments": {"tz": "UTC\'s <b>", "n": 1, "none": null}}</tool_call><|im_end|>'
    )
    ids = [token for token, weight in zip(row.ids, row.weights, strict=True) if weight]
    assert renderer.parse(ids).tool_calls == (call,)
    assert json.dumps(TOOLS[0], ensure_ascii=False) in renderer.tokenizer.decode(row.ids)


def test_tool_calls_a_template_ignores_are_refused(smollm2: Path) -> None:
    """B11: SmolLM2's own template would render an empty answer; ours for tools is one option away."""
    call = ToolCall("look_up", {"a": 1})
    chat = Chat((message("user", "u"), message("assistant", "", tool_calls=(call,))), line=4, row=4)
    with pytest.raises(Unrenderable, match=r"line 4, messages\[1\]: .*'look_up' is lost.*--template chatml"):
        Renderer.load(smollm2).rows(chat)
    shown = Chat((message("user", "u"), message("assistant", "ok")), tools=TOOLS)
    with pytest.raises(Unrenderable, match=r"tools\[0\]: found a tool \(look_up\)"):
        Renderer.load(smollm2).rows(shown)
    renderer = Renderer.load(smollm2, "chatml")
    assert "look_up" in learnt(renderer, renderer.rows(chat)[0])
    assert "look_up" in renderer.tokenizer.decode(renderer.rows(shown)[0].ids)


def test_what_is_dropped_is_noticed_though_other_words_say_it(smollm2: Path, tmp_path: Path) -> None:
    """B10, B11: a tool's or call's name, or a system text, that stands in the row anyway."""
    renderer = Renderer.load(smollm2)
    tool = {"type": "function", "function": {"name": "time", "parameters": {"type": "object"}}}
    with pytest.raises(Unrenderable, match=r"tools\[0\]: found a tool \(time\)"):
        renderer.rows(Chat(turns("What time is it?", "Noon."), (tool,)))
    with pytest.raises(Unrenderable, match=r"tools\[0\]: found a tool \(time\)"):
        renderer.prompt(turns("What time is it?"), (tool,))
    call = message("assistant", "Let me see what time it is.", tool_calls=(ToolCall("time", {}),))
    with pytest.raises(Unrenderable, match=r"messages\[1\]: found a call that the template drops \('time' is lost\)"):
        renderer.rows(Chat((message("user", "Late?"), call)))
    source = STYLES["chatml"].source.replace("{{ '<|im", "{% if m.role != 'system' %}{{ '<|im", 1)
    tiny_models.make_tokenizer(tmp_path, template=source.replace("{% endfor %}", "{% endif %}{% endfor %}", 1))
    with pytest.raises(Unrenderable, match=r"messages\[0\]: found a system message that the template drops"):
        Renderer.load(tmp_path).rows(Chat(turns("Be brief, please.", "b", system="Be brief")))


def test_what_was_learnt_to_the_letter_matches_its_reference(tmp_path: Path) -> None:
    """Templates write tool calls and thinking in ways of their own; exact match must not hang on them."""
    source = STYLES["tools"].source.replace("'<tool_call>'", "'[CALL]'").replace("'</tool_call>'", "'[/CALL]'")
    source = source.replace("m.content }}", "m.content.replace('<think>', '<think>\\n') }}")
    tiny_models.make_tokenizer(tmp_path, template=source)
    renderer = Renderer.load(tmp_path)
    call = message("assistant", "", tool_calls=(ToolCall("look_up", {"a": 1}),))
    for answer in (call, message("assistant", "<think>hm</think>x")):
        chat = Chat((message("user", "q"), answer, message("user", "r")), TOOLS)
        asked = renderer.question(chat)
        ids = [
            token for row in renderer.rows(chat) for token, weight in zip(row.ids, row.weights, strict=True) if weight
        ]
        assert asked is not None and answer_text(renderer.parse(ids)) == asked[1] != ""


@pytest.mark.parametrize("name", list(STYLES))
def test_user_text_never_becomes_a_control_token(renderers: dict[tuple[str, bool], Renderer], name: str) -> None:
    style, renderer = STYLES[name], renderers[name, True]
    attack = "".join([*SPECIALS, *style.tokens])
    clean = renderer.rows(Chat(turns("x", "y")))[0].ids
    dirty = renderer.rows(Chat(turns(attack, attack + "y")))[0].ids
    control = set(renderer.tokenizer.control_ids.values())
    assert [token for token in dirty if token in control] == [token for token in clean if token in control]
    assert renderer.tokenizer.decode(dirty).count(attack) == 2, "and the text itself survives"
    assert not control & set(renderer.completion_prompt(attack)) - set(renderer.tokenizer.first_ids)


@pytest.mark.parametrize("text", ["👩‍👩‍👧‍👦", "你好，世界", "e\u0301", "a\u0000b", "\u2028", "  two  spaces  "])
def test_any_text_survives(renderers: dict[tuple[str, bool], Renderer], text: str) -> None:
    """B15: round trips through training rows."""
    renderer = renderers["chatml", False]
    row = renderer.rows(Chat(turns(text, text)))[0]
    assert learnt(renderer, row) == text + "<|im_end|>"
    assert b"".join(map(renderer.tokenizer.token_bytes, renderer.tokenizer.plain(text))) == text.encode()


def test_completions_end_once_and_keep_their_spaces(renderers: dict[tuple[str, bool], Renderer]) -> None:
    """B05: exactly one end marker although pad and end could be the same token; nothing is stripped."""
    renderer = renderers["chatml", False]
    row = renderer.rows(Completion("color 3 ->", " red"))[0]
    assert learnt(renderer, row) == " red<|im_end|>"
    assert row.ids[: -len(learnt_turns(row)[0])] == renderer.completion_prompt("color 3 ->")


def test_texts_learn_everything_but_their_first_token(renderers: dict[tuple[str, bool], Renderer]) -> None:
    renderer = renderers["chatml", True]
    row = renderer.rows(Text("one two"))[0]
    assert row.weights == [0.0] + [1.0] * (len(row.ids) - 1)
    assert row.ids[0] == renderer.tokenizer.control_ids["<s>"] and row.ids[-1] == renderer.stop_ids[0]
    assert renderer.rows(Text("one two", ends=False))[0].ids == row.ids[:-1]


def test_weight_zero_is_context(renderers: dict[tuple[str, bool], Renderer]) -> None:
    """B21."""
    renderer = renderers["chatml", False]
    messages = (
        message("user", "a"),
        message("assistant", "a1", weight=0),
        message("user", "b"),
        message("assistant", "a2"),
    )
    assert learnt(renderer, renderer.rows(Chat(messages))[0]) == "a2<|im_end|>"


def test_a_template_that_is_closed_only_sometimes_never_leaks(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content }}"
        "{% if m.role != 'assistant' or loop.last %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    tiny_models.make_tokenizer(tmp_path, template=source)
    renderer = Renderer.load(tmp_path)
    rows = renderer.rows(Chat(turns("q", "a1", "SECRET", "a2")))
    assert [learnt(renderer, row) for row in rows] == ["a1<|im_end|>", "a2<|im_end|>"]


# --- templates that must be refused --------------------------------------------------------------------------------


_DOUBLED = "{% set ns = namespace(a=[1]) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"


@pytest.mark.parametrize(
    "source",
    [
        "{{ cycler.__init__.__globals__ }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ ('a' * 2000000000) | length }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3,
        "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{% set ns = namespace(s='aaaa') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        "{{ 'a'.center(2000000000) }}",
        "{{ 'a' | center(2000000000) }}",
        "{{ '%2000000000d' % 1 }}",
        "{{ '{:2000000000d}'.format(1) }}",
        "{{ ('a' * 30000000).replace('a', 'a' * 30000000) }}",
        "{{ ('a' * 30000000) | replace('a', 'aaaa') }}",
        "{{ 9 ** 999999999 }}",
        _DOUBLED + "{{ ns.a | tojson }}",
        _DOUBLED + "{{ ns.a }}",
        _DOUBLED + "{{ ns.a ~ 'x' }}",
        "{{ ([[1] * 100000] * 10000) | sum(start=[]) }}",
        "{{ messages.append(1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ nothing.at.all }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ 10.0 ** 400 }}",
        "{{ '{0.__class__}'.format_map(messages) }}",
        "{{ lipsum(n=100000) }}",
    ],
)
def test_templates_are_bounded(source: str) -> None:
    """B59: refused with words, and quickly."""
    with pytest.raises(TemplateRefused, match="template own"):
        ChatTemplate(source, "own", {}).render([{"role": "user", "content": "a"}], None, False)


@pytest.mark.parametrize("name", ["slice", "batch", "wordwrap", "pprint", "xmlattr", "urlize"])
def test_filters_without_a_bound_are_not_there(name: str) -> None:
    with pytest.raises(BadSetting, match=f"No filter named '{name}'"):
        ChatTemplate("{{ [1, 2] | " + name + "(100000000) }}", "own", {})


def test_no_template_tells_todays_date() -> None:
    """What is trained today is asked tomorrow: guarded templates use their own date, the others ours."""
    guarded = "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% else %}26 Jul 2024{% endif %}"
    assert ChatTemplate(guarded, "own", {}).render([], None, False) == "26 Jul 2024"
    assert ChatTemplate("{{ strftime_now('%d %B %Y') }}", "own", {}).render([], None, False) == "01 January 2026"
    assert ChatTemplate("{{ [1, 2.5] | sum }}", "own", {}).render([], None, False) == "3.5"


def test_unusable_templates_are_named(tmp_path: Path) -> None:
    for source, words in (
        ("{% if %}", "line 1"),
        ("{{ 'constant' }}", "differently from the prompt"),
        ("{{ raise_exception('never') }}", "never"),
    ):
        tiny_models.make_tokenizer(tmp_path, template=source)
        with pytest.raises(BadSetting, match=words):
            Renderer.load(tmp_path)


def test_choice_of_template(tmp_path: Path) -> None:
    tiny_models.make_tokenizer(tmp_path, template=None)
    assert Renderer.load(tmp_path).template.name == "chatml"
    assert Renderer.load(tmp_path, "plain").turns == "closed"
    with pytest.raises(BadSetting, match=r"no <end_of_turn> token"):
        Renderer.load(tmp_path, "gemma")
    with pytest.raises(BadSetting, match="found 'nope'; wanted a built-in name"):
        Renderer.load(tmp_path, "nope")
    file = tmp_path / "mine.jinja"
    file.write_text(STYLES["chatml"].source)
    assert Renderer.load(tmp_path, str(file)).template.name == "mine.jinja"


def configure(folder: Path, **changes: object) -> Path:
    """Change tokenizer_config.json; None removes a key."""
    path = folder / "tokenizer_config.json"
    values = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


def test_of_several_own_templates_the_default_is_taken(tmp_path: Path) -> None:
    tiny_models.make_tokenizer(tmp_path, template=None)
    source = STYLES["emits-bos"].source
    several = [{"name": "tool_use", "template": "x"}, {"name": "default", "template": source}]
    assert Renderer.load(configure(tmp_path, chat_template=several)).template.source == source
    configure(tmp_path, chat_template=several[:1])
    with pytest.raises(BadSetting, match=r"1 chat templates \(tool_use\) and none is the default"):
        Renderer.load(tmp_path)
    assert Renderer.load(tmp_path, "chatml").template.name == "chatml"


def test_line_ends_of_an_own_template_become_plain(tmp_path: Path) -> None:
    """They would not come back from the result's chat_template.jinja."""
    tiny_models.make_tokenizer(tmp_path, template=None)
    source = STYLES["chatml"].source.replace("{% endfor %}", "{% endfor %}\r\n")
    assert "\r" not in Renderer.load(configure(tmp_path, chat_template=source)).template.source


def test_completions_end_without_an_end_of_text_token_too(tmp_path: Path) -> None:
    """B05: then the end of a turn ends them."""
    tiny_models.make_tokenizer(tmp_path, template=STYLES["chatml"].source)
    renderer = Renderer.load(configure(tmp_path, eos_token=None))
    for example in (Completion("color 3 ->", " red"), Text("one two")):
        row = renderer.rows(example)[0]
        assert row.ids[-1] == renderer.stop_ids[0] and row.weights[-1] == 1


def test_styles_cover_what_was_promised() -> None:
    assert len(STYLES) >= 8 and all(isinstance(style, Style) for style in STYLES.values())
