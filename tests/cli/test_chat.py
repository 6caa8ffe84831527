"""`luthier chat`: what is printed is what the model answered, and nothing that goes wrong ends in a traceback."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from luthier.cli import main
from luthier.cli.chat import Conversation, Printed, converse
from luthier.data.render import Renderer
from luthier.engine import generate as decoding
from luthier.engine import models
from luthier.engine.generate import Generation, Sampling, generate
from luthier.spec.data import Message
from luthier.spec.errors import UserError
from tests.tiny import make_tokenizer

Said = tuple[int, str, str]  # exit code, stdout, stderr
Run = Callable[..., Said]
THINKING = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{{ '<think>\\n</think>\\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    def invoke(*arguments: str | Path, stdin: str = "") -> Said:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as left:
            main(["chat", *map(str, arguments)])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return invoke


@pytest.fixture(scope="module")
def model(tiny: Path) -> Any:
    return models.load_base(tiny, "float32").eval()


@pytest.fixture(scope="module")
def renderer(tiny: Path) -> Renderer:
    return Renderer.load(tiny)


@pytest.fixture
def talk(model: Any, renderer: Renderer) -> Conversation:
    return Conversation(model, renderer, Sampling(max_tokens=6))


def scripted(monkeypatch: pytest.MonkeyPatch, renderer: Renderer, *answers: str | BaseException) -> list[list[int]]:
    """Decoding that answers from a list (an exception: after its first word) and notes the prompts it gets."""
    waiting = list(answers)
    prompts: list[list[int]] = []

    def answer(model: Any, asked: list[list[int]], stops: list[int], *rest: Any, on_token: Any, **more: Any) -> Any:
        prompts.append(asked[0])
        text = waiting.pop(0)
        if isinstance(text, BaseException):
            for token in renderer.tokenizer.plain("partly"):
                on_token(0, token)
            raise text
        ids = [*renderer.tokenizer.plain(text), stops[0]]
        for token in ids:
            on_token(0, token)
        return [Generation(ids, "stop")]

    monkeypatch.setattr(decoding, "generate", answer)
    return prompts


def typing_in(monkeypatch: pytest.MonkeyPatch, *lines: str | BaseException) -> None:
    """A terminal at which these lines are typed; then Ctrl-D."""
    waiting = iter(lines)

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def typed(prompt: str = "") -> str:
        line = next(waiting, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", typed)


# -- one question ------------------------------------------------------------------------------------------------------


def test_prints_the_models_answer(run: Run, tiny: Path, model: Any, renderer: Renderer) -> None:
    prompt = renderer.prompt([Message("system", "be kind"), Message("user", "the fox")])
    done = generate(model, [prompt], renderer.stop_ids, 0, Sampling(max_tokens=9), context=512)[0]
    code, out, err = run(
        tiny, "--system", "be kind", "-m", "the fox", "--max-tokens", "9", "--precision", "float32", "--json"
    )
    assert code == 0
    assert json.loads(out) == {
        "content": renderer.answer(done.ids),
        "finish_reason": done.finish_reason,
        "prompt_tokens": len(prompt),
        "completion_tokens": len(done.ids),
    }
    assert "Traceback" not in err


def test_an_answer_that_was_cut_says_so(run: Run, tiny: Path) -> None:
    code, out, err = run(tiny, "-m", "the fox", "--max-tokens", "3", "--precision", "float32")
    assert code == 0
    assert out.endswith("\n")
    assert "(cut after 3 tokens; --max-tokens allows more)" in err


def test_messages_make_one_conversation(
    run: Run, tiny: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = scripted(monkeypatch, renderer, "one", "two")
    code, out, _ = run(tiny, "-m", "the fox", "-m", "the dog")
    turns = [Message("user", "the fox"), Message("assistant", "one"), Message("user", "the dog")]
    assert (code, out) == (0, "one\ntwo\n")
    assert prompts == [renderer.prompt(turns[:1]), renderer.prompt(turns)]


def test_lines_of_stdin_are_messages(run: Run, tiny: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = scripted(monkeypatch, renderer, "one", "two", "three")
    code, out, _ = run(tiny, stdin="the fox\n\n  the dog \n/reset\n/usr/bin holds what?\n/quit\nnever\n")
    assert (code, out) == (0, "one\ntwo\nthree\n")
    assert prompts[2] == renderer.prompt([Message("user", "/usr/bin holds what?")])


def test_control_characters_of_an_answer_do_not_reach_the_terminal(
    run: Run, tiny: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted(monkeypatch, renderer, "a\x1b[2Jb\tc\nd")
    assert run(tiny, "-m", "x")[1] == "a\\x1b[2Jb\tc\nd\n"


def test_half_a_character_is_refused_before_anything_is_loaded(run: Run) -> None:
    code, out, err = run("no-such-model", "-m", "half \ud83d")
    assert (code, out) == (2, "")
    assert "not valid UTF-8 text: found U+D83D" in err


def test_bytes_on_stdin_that_are_no_text(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8"))
    with pytest.raises(UserError, match="found byte 0xe9"):
        converse(talk)


def test_a_message_that_the_template_refuses_is_a_sentence(run: Run, tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "strict.jinja"
    own = (tiny / "chat_template.jinja").read_text()
    template.write_text("{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + own)
    code, out, err = run(tiny, "--template", template, "--system", "be kind", "-m", "hello")
    assert (code, out) == (2, "")
    assert "The chat template cannot express these messages" in err
    assert "no system here" in err
    assert "Traceback" not in err


def test_a_message_longer_than_the_context(run: Run, tiny: Path) -> None:
    code, _, err = run(tiny, "-m", "fox " * 600)
    assert code == 2
    assert "the model reads at most 512" in err


@pytest.mark.parametrize("option", [("--temperature", "-1"), ("--top-p", "0"), ("--max-tokens", "0")])
def test_sampling_that_means_nothing_is_refused(run: Run, option: tuple[str, str]) -> None:
    code, _, err = run("no-such-model", "-m", "x", *option)
    assert code == 2
    assert f"{option[0]}: found {option[1]}" in err


def test_the_same_seed_draws_the_same_answer(run: Run, tiny: Path) -> None:
    options = ("-m", "the fox", "--temperature", "1", "--max-tokens", "12", "--json", "--precision", "float32")
    drawn = [run(tiny, *options, "--seed", seed)[1] for seed in ("1", "1", "2")]
    assert drawn[0] == drawn[1] != drawn[2]


# -- a conversation ----------------------------------------------------------------------------------------------------


def test_commands_at_a_terminal(
    talk: Conversation, renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = scripted(monkeypatch, renderer, "one", "two", "three", "four")
    typing_in(monkeypatch, "a", "/system be kind", "b", "", "/reset", "c", "/system", "d", "/help", "/quit", "never")
    converse(talk)
    system = Message("system", "be kind")
    asked = [
        [Message("user", "a")],
        [system, Message("user", "b")],
        [system, Message("user", "c")],
        [Message("user", "d")],
    ]
    assert prompts == [renderer.prompt(turns) for turns in asked]
    out, err = capsys.readouterr()
    assert out == "one\ntwo\nthree\nfour\n"
    assert "/system TEXT" in err


def test_ctrl_c_ends_the_answer_and_not_the_conversation(
    talk: Conversation, renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = scripted(monkeypatch, renderer, KeyboardInterrupt(), "two")
    typing_in(monkeypatch, "a", KeyboardInterrupt(), "b")
    converse(talk)
    turns = [Message("user", "a"), Message("assistant", "partly"), Message("user", "b")]
    assert prompts[1] == renderer.prompt(turns)
    out, err = capsys.readouterr()
    assert out == "partly\n\ntwo\n\n"
    assert "(stopped)" in err
    assert "(Ctrl-D or /quit leaves)" in err


def test_ctrl_c_before_the_first_word_forgets_the_question(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(decoding, "generate", interrupted)
    talk.answer("a")
    assert talk.turns == []


def test_a_refused_message_leaves_the_conversation_as_it_was(
    talk: Conversation, renderer: Renderer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    typing_in(monkeypatch, "a", "half \ud83d", "fox " * 600, "b")
    converse(talk)
    assert [turn.content for turn in talk.turns if turn.role == "user"] == ["a", "b"]
    assert capsys.readouterr().err.count("Error:") == 2


# -- streaming ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["chatml", "thinking"])
def styles(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Renderer]:
    folder = tmp_path_factory.mktemp(request.param)
    make_tokenizer(folder, **({"template": THINKING} if request.param == "thinking" else {}))
    yield Renderer.load(folder)
    shutil.rmtree(folder)


def streamed(renderer: Renderer, ids: list[int]) -> tuple[list[str], str]:
    pieces: list[str] = []
    printed = Printed(renderer, pieces.append)
    for token in ids:
        printed.push(token)
    return pieces, printed.close()


TEXTS = some.text(alphabet=some.sampled_from("ab <>/think\n|im_end你好👩‍👧é"), max_size=40)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS, lead=some.booleans(), cut=some.integers(0, 3), stopped=some.booleans())
def test_the_stream_is_the_answer(styles: Renderer, text: str, lead: bool, cut: int, stopped: bool) -> None:
    """Whatever comes, in whatever pieces: characters whole, no stop token, no lead, nothing lost."""
    ids = styles.tokenizer.plain(("<think>\n</think>\n" if lead else "") + text)
    ids = ids[: len(ids) - cut] + ([styles.stop_ids[0]] if stopped else [])
    pieces, whole = streamed(styles, ids)
    assert "".join(pieces) == whole == styles.answer(ids)
    assert "<|im_end|>" not in whole or "<|im_end|>" in text


def test_the_lead_of_a_template_never_shows(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, template=THINKING)
    renderer = Renderer.load(tmp_path)
    plain = renderer.tokenizer.plain
    assert streamed(renderer, [*plain("<think>\n</think>\nyes"), renderer.stop_ids[0]])[1] == "yes"
    assert streamed(renderer, plain("<think>\nhm"))[1] == "<think>\nhm"
    assert streamed(renderer, plain("<thi"))[1] == "<thi"


def test_text_comes_as_soon_as_it_is_whole(renderer: Renderer) -> None:
    pieces: list[str] = []
    printed = Printed(renderer, pieces.append)
    ids = renderer.tokenizer.plain("a龘b")
    assert len(ids) > 3, "a tokenizer that knows the character whole proves nothing"
    seen = []
    for token in ids:
        printed.push(token)
        seen.append("".join(pieces))
    assert seen[0] == "a"
    assert seen[-2:] == ["a龘", "a龘b"]


# -- a real model ------------------------------------------------------------------------------------------------------


def test_a_real_model_answers_and_stops(run: Run, smollm2: Path) -> None:
    code, out, _ = run(smollm2, "-m", "What is the capital of France?", "--json", "--max-tokens", "64")
    answer = json.loads(out)
    assert code == 0
    assert answer["finish_reason"] == "stop"
    assert "Paris" in answer["content"]
    assert "<|" not in answer["content"]
