"""Whether a rendered conversation says everything that the record says.

Templates drop things without a word: tool calls they do not know, a system turn they have no place for, tools. A row
that lost what its answer depends on must not be trained, so each part is looked for in the text, white space aside
(templates trim and indent) and in either spelling (raw, or inside JSON). Words can also stand in the text because some
other part says them; for parts that templates are known to drop, the proof is that the text changes without them.

Does not know: templates, tokens.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from luthier.spec.data import Chat, Message, Problem

Break = Callable[[str], str]
_OTHER = "Xyzzy"


def lost(chat: Chat, text: str, answers: Mapping[int, str], broken: Break) -> Problem | None:
    """The first part of `chat` that the rendered `text` does not say, or None. `answers[n]` is the text of learnt
    turn n; it must say the whole answer, while earlier answers may have lost their thinking. `broken` is what was done
    to the record's texts before rendering."""
    squeezed = _squeeze(text)
    for n, message in enumerate(chat.messages):
        parts = [broken(part) for part in _parts(message)]
        if n in answers:
            missing = _missing(parts, _squeeze(answers[n]))
            found = "an answer that the template does not write"
        else:
            if message.role == "assistant":
                parts = [part.rsplit("</think>", 1)[-1] for part in parts]
            missing = _missing(parts, squeezed)
            found = f"a {message.role} message that the template drops"
        if missing is not None:
            hint = "Use --template chatml for tool calls." if message.tool_calls else "Choose another --template."
            wanted = "a template that writes all of it"
            return Problem(chat.line, f"messages[{n}]", f"{found} ({_short(missing)} is lost)", wanted, hint, chat.row)
    for n in range(len(chat.tools)):
        if _missing([broken(_tool_name(chat, n))], squeezed) is not None:
            return _tool_problem(chat, n)
    return None


def without(chat: Chat) -> Iterator[tuple[Chat, Problem]]:
    """Variants of `chat` that say something less or else, each with the Problem there is when it renders to the same
    text: without its tools, without a message's calls, with other words in a message whose own are found elsewhere."""
    if chat.tools:
        yield dataclasses.replace(chat, tools=()), _tool_problem(chat, 0)
    squeezed = [_squeeze(message.content) for message in chat.messages]
    for n, message in enumerate(chat.messages):
        if message.tool_calls:
            yield _with(chat, n, tool_calls=()), _dropped(chat, n, "a call that", message.tool_calls[0].name)
        elif message.role in ("system", "developer", "tool") and any(
            squeezed[n] in other for m, other in enumerate(squeezed) if m != n
        ):
            variant = _with(chat, n, content=f"{message.content} {_OTHER}")
            yield variant, _dropped(chat, n, f"a {message.role} message that", message.content)


def _with(chat: Chat, n: int, **changes: Any) -> Chat:
    changed = dataclasses.replace(chat.messages[n], **changes)
    return dataclasses.replace(chat, messages=(*chat.messages[:n], changed, *chat.messages[n + 1 :]))


def _dropped(chat: Chat, n: int, what: str, missing: str) -> Problem:
    hint = "Use --template chatml for tool calls." if chat.messages[n].tool_calls else "Choose another --template."
    found = f"{what} the template drops ({_short(missing)} is lost)"
    return Problem(chat.line, f"messages[{n}]", found, "a template that writes all of it", hint, chat.row)


def _tool_problem(chat: Chat, n: int) -> Problem:
    found = f"a tool ({_tool_name(chat, n)}) that the template does not show to the model"
    return Problem(chat.line, f"tools[{n}]", found, "a template with tools", "Use --template chatml.", chat.row)


def _tool_name(chat: Chat, n: int) -> str:
    return str((chat.tools[n].get("function") or {}).get("name", ""))


def _parts(message: Message) -> Iterator[str]:
    yield message.content
    for call in message.tool_calls:
        yield call.name
        yield from _leaves(call.arguments)


def _leaves(value: Any) -> Iterator[str]:
    """Keys, texts and numbers inside tool-call arguments, which a template must show in some layout."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _missing(parts: Iterable[str], squeezed: str) -> str | None:
    for part in parts:
        as_json = json.dumps(part, ensure_ascii=False)[1:-1]
        if _squeeze(part) not in squeezed and _squeeze(as_json) not in squeezed:
            return part
    return None


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _short(text: str, limit: int = 40) -> str:
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
