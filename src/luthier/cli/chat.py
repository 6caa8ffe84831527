"""`luthier chat`: talk to a model. Streams, keeps the conversation, and stops where the model was taught to stop.

At a terminal it asks; otherwise each line of stdin is a message. What a template cannot express is refused in a
sentence and the conversation goes on without it. Does not know: tokens of any one model, decoding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from luthier.cli.evaluate import load
from luthier.cli.output import console, print_error, print_json, visible
from luthier.spec.data import Message
from luthier.spec.errors import BadSetting, LuthierError, UserError
from luthier.spec.job import Precision

if TYPE_CHECKING:
    from luthier.data.render import Renderer
    from luthier.engine.generate import Sampling

PROMPT = "you> "
COMMANDS = """\
/system TEXT   set the system message and start over (without TEXT: remove it)
/reset         forget the conversation, keep the system message
/help          show this
/quit          leave (so does Ctrl-D)
Ctrl-C stops an answer."""


def chat(
    model: Annotated[str, typer.Argument(help="A run folder, a tuned model, or any model name.", show_default=False)],
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    message: Annotated[
        list[str] | None, typer.Option("--message", "-m", help="Ask this and leave; repeat it for several turns.")
    ] = None,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest tokens of this total.")] = 1.0,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer in tokens.")] = 512,
    seed: Annotated[int, typer.Option("--seed", help="The same seed draws the same answers.")] = 0,
    template: Annotated[
        str | None, typer.Option("--template", help="Chat template: a built-in name or a .jinja file.")
    ] = None,
    precision: Annotated[Precision, typer.Option("--precision", help="Weights and activations.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as a JSON object on a line.")] = False,
    server: Annotated[
        str | None, typer.Option("--server", metavar="URL", help="Ask a server's model instead of one of this machine.")
    ] = None,
) -> None:
    """Talk to a model: your run's result, a tuned model, or a base.

    Without --message, each line that you type (or send through stdin) is a message; /help lists what else can be
    typed.
    """
    for words in (system or "", *(message or [])):
        refuse_broken_text(words)
    if server is not None:
        if template is not None or precision != "auto":
            raise BadSetting("--template and --precision are the server's to choose.", param="server")
        options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        _talk(_remote(server, model, options, system, as_json), message)
        return
    from luthier.engine.generate import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    loaded = load(model, precision)
    from luthier.data.render import Renderer

    _talk(Conversation(loaded.model, Renderer.load(loaded.folder, template), sampling, system, as_json), message)


def _remote(server: str, model: str, options: dict[str, Any], system: str | None, as_json: bool) -> Talk:
    from luthier.cli.client import connect
    from luthier.cli.remote import RemoteConversation

    return RemoteConversation(connect(server), model, options, system, as_json)


class Talk(Protocol):
    """A conversation with a model, here or on a server."""

    system: str | None

    @property
    def turns(self) -> list[Any]: ...

    def answer(self, text: str) -> None: ...


def _talk(talk: Talk, message: list[str] | None) -> None:
    if message:
        for text in message:
            talk.answer(text)
    else:
        converse(talk)


@dataclass
class Conversation:
    """The messages so far, and the model that answers them. Answers go to stdout as they come, notes to stderr."""

    model: Any
    renderer: Renderer
    sampling: Sampling
    system: str | None = None
    as_json: bool = False
    turns: list[Message] = field(default_factory=list)

    def answer(self, text: str) -> None:
        """Ask `text` and print the answer. Both are kept, unless the question is refused: then neither is.

        Ctrl-C ends the answer where it is. Raises UserError when the template or the context cannot hold the messages.
        """
        from luthier.engine.generate import context_of, generate

        prompt = self._prompt(text)
        printed = Printed(self.renderer, _silent if self.as_json else told)
        try:
            done = generate(
                self.model,
                [prompt],
                self.renderer.stop_ids,
                self.renderer.tokenizer.pad_id,
                self.sampling,
                context=context_of(self.model),
                on_token=lambda _, token: printed.push(token),
            )
            reason: str = done[0].finish_reason
        except KeyboardInterrupt:
            reason = "interrupted"
        said = printed.close()
        if said or reason != "interrupted":
            self.turns += [Message("user", text), self.renderer.parse(printed.ids)]
        self._tell(said, reason, len(prompt), len(printed.ids))

    def _prompt(self, text: str) -> list[int]:
        from luthier.data.render import Unrenderable

        for words in (text, self.system or ""):
            refuse_broken_text(words)
        system = [Message("system", self.system)] if self.system else []
        try:
            return self.renderer.prompt([*system, *self.turns, Message("user", text)])
        except Unrenderable as error:
            raise UserError(
                f"The chat template cannot express these messages: {error.problem.found}.",
                param="message",
                hint=error.problem.hint or "Change the messages, or choose another --template.",
            ) from error

    def _tell(self, said: str, reason: str, asked: int, answered: int) -> None:
        if self.as_json:
            usage = {"prompt_tokens": asked, "completion_tokens": answered}
            print_json({"content": said, "finish_reason": reason, **usage})
            return
        told("" if said.endswith("\n") else "\n")
        if reason == "length":
            note(f"(cut after {answered:,} tokens; --max-tokens allows more)")
        elif reason == "interrupted":
            note("(stopped)")


class Printed:
    """Generated ids to text on its way out. Holds back what is not text: stop tokens, what the template itself puts
    before an answer, halves of characters."""

    def __init__(self, renderer: Renderer, write: Callable[[str], None]) -> None:
        self.renderer, self.write = renderer, write
        self.ids: list[int] = []
        self._stream = renderer.stream()
        self._stops = set(renderer.stop_ids)
        self._lead: str | None = ""  # what has come while it may still be the template's lead; None afterwards
        self._written = ""

    def push(self, token: int) -> None:
        self.ids.append(token)
        if token in self._stops:
            return
        text = self._stream.push(token)
        if self._lead is None:
            self._write(text)
            return
        self._lead += text
        lead = self.renderer.lead
        if len(self._lead) < len(lead) and lead.startswith(self._lead):
            return
        text, self._lead = self._lead.removeprefix(lead), None
        self._write(text)

    def close(self) -> str:
        """Write what was held back, and return the whole answer."""
        whole = self.renderer.answer(self.ids)
        if whole.startswith(self._written):
            self._write(whole[len(self._written) :])
        return whole

    def _write(self, text: str) -> None:
        self._written += text
        self.write(text)


def converse(talk: Talk) -> None:
    """Messages until there are none left. At a terminal a refused message does not end the conversation."""
    asking = sys.stdin.isatty()
    if asking:
        note("Type a message. /help shows what else can be typed.")
    for line in _typed() if asking else _lines():
        word, _, rest = line.partition(" ")
        if word in ("/quit", "/exit"):
            return
        if word in ("/help", "/reset", "/system"):
            _command(talk, word, rest.strip())
            continue
        try:
            talk.answer(line)
        except UserError as error:
            if not asking:
                raise
            _explain(error, talk)


def _command(talk: Talk, word: str, text: str) -> None:
    if word == "/help":
        note(COMMANDS)
        return
    talk.turns.clear()
    if word == "/system":
        talk.system = text or None
        note("The system message is set; the conversation starts over." if text else "No system message any more.")
    else:
        note("The conversation starts over.")


def _explain(error: LuthierError, talk: Talk) -> None:
    print_error(error.message, error.hint)
    if talk.turns or talk.system:
        note("The message was left out. /reset starts over, /system changes the system message.")


def _typed() -> Iterator[str]:
    """Lines from the terminal, with editing and history. Ctrl-C empties the line, Ctrl-D ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            line = input(PROMPT).strip()
        except KeyboardInterrupt:
            sys.stdout.write("\n")
            note("(Ctrl-D or /quit leaves)")
            continue
        except EOFError:
            sys.stdout.write("\n")
            return
        if line:
            yield line


def _lines() -> Iterator[str]:
    """Lines of stdin that are not blank. Raises UserError for bytes that are not text."""
    try:
        for line in sys.stdin:
            if line.strip():
                yield line.strip()
    except UnicodeDecodeError as error:
        raise _not_text(f"byte {error.object[error.start]:#04x}") from error


def refuse_broken_text(text: str) -> None:
    """Half a surrogate pair, which is how Python keeps bytes of the command line that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise _not_text(f"U+{ord(text[error.start]):04X}") from error


def _not_text(found: str) -> UserError:
    return UserError(f"A message is not valid UTF-8 text: found {found}.", param="message", hint="Send it as UTF-8.")


def note(text: str) -> None:
    console(stderr=True).print(text, style="dim", markup=False, soft_wrap=True)


def told(text: str) -> None:
    """`text` on stdout, at once."""
    sys.stdout.write(visible(text))
    sys.stdout.flush()


def _silent(text: str) -> None:
    del text
