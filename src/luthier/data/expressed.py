"""Whether a rendered conversation says everything that the record says.

Templates drop things without a word: tool calls they do not know, a system turn they have no place for, tools. A row
that lost what its answer depends on must not be trained, so each part is looked for in the text, white space aside
(templates trim and indent) and in either spelling (raw, or inside JSON).

Does not know: templates, tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from luthier.spec.data import Chat, Message, Problem

Break = Callable[[str], str]


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
    for n, tool in enumerate(chat.tools):
        name = str((tool.get("function") or {}).get("name", ""))
        if _missing([broken(name)], squeezed) is not None:
            found = f"a tool ({name}) that the template does not show to the model"
            return Problem(chat.line, f"tools[{n}]", found, "a template with tools", "Use --template chatml.", chat.row)
    return None


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
