"""What one example shows by itself: blank answers, odd turns, calls, control tokens, broken characters, private data.

The same looks serve the report (doctor.py) and the dropping of rows (fix.py), so that both mean the same rows.
Does not know: other rows, files, tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass

from luthier.data.characters import COMMON_CONTROL, broken
from luthier.data.pairs import Meaning, as_chats, field_of
from luthier.data.private import find_private, masked
from luthier.data.strict_json import quote
from luthier.data.toolcalls import look_at_calls
from luthier.spec.data import Chat, Completion, Example, Message, Preference


@dataclass(frozen=True, slots=True)
class Mark:
    """A finding about one example: its kind (a name in findings.KINDS), where in it, and what was found."""

    kind: str
    field: str
    detail: str


def look(example: Meaning, control: re.Pattern[str] | None = COMMON_CONTROL) -> Iterator[Mark]:
    """Every mark of `example`. `control` finds the control tokens that its texts should not spell."""
    if isinstance(example, Preference):
        yield from _pair(example, control)
        return
    if isinstance(example, Chat):
        yield from _turns(example)
        for kind, at, detail in look_at_calls(example):
            yield Mark(kind, at, detail)
    elif isinstance(example, Completion) and not example.completion.strip():
        yield Mark("blank_answer", "completion", "nothing but white space")
    for at, text in texts(example):
        yield from look_at_text(at, text, control)


def _pair(pair: Preference, control: re.Pattern[str] | None) -> Iterator[Mark]:
    """Marks of the preferred conversation, and of what the other answer says: it may be a bad one."""
    good, bad = as_chats(pair)
    if pair.preferred == pair.rejected:
        yield Mark("same_answers", "preferred", "equal to rejected")
    for mark in look(good, control):
        yield Mark(mark.kind, field_of(pair, mark.field, "preferred"), mark.detail)
    for at, text in texts(bad):
        place = field_of(pair, at, "rejected")
        if place.startswith("rejected"):
            yield from look_at_text(place, text, control)


def texts(example: Example) -> Iterator[tuple[str, str]]:
    """(field, text) of everything that is said in `example`; of calls, their arguments as JSON."""
    if isinstance(example, Chat):
        for n, message in enumerate(example.messages):
            if message.content:
                yield f"messages[{n}].content", message.content
            for m, call in enumerate(message.tool_calls):
                yield f"messages[{n}].tool_calls[{m}]", json.dumps(call.arguments, ensure_ascii=False)
    elif isinstance(example, Completion):
        yield "prompt", example.prompt
        yield "completion", example.completion
    else:
        yield "text", example.text


def look_at_text(at: str, text: str, control: re.Pattern[str] | None) -> Iterator[Mark]:
    found = control.search(text) if control is not None else None
    if found:
        yield Mark("special_tokens", at, quote(found[0], 60))
    wrong = broken(text)
    if wrong:
        yield Mark("mixed_encodings", at, wrong)
    for private in find_private(text):
        yield Mark(private.kind, at, masked(text, private))


def _turns(chat: Chat) -> Iterator[Mark]:
    turns = chat.messages
    for n, turn in enumerate(turns):
        if turn.role == "assistant" and turn.weight and not turn.tool_calls and not turn.content.strip():
            yield Mark("blank_answer", f"messages[{n}].content", "nothing but white space" if turn.content else "empty")
    if not any(turn.role == "user" for turn in turns):
        yield Mark("missing_user", "messages", f"only {' and '.join(dict.fromkeys(turn.role for turn in turns))}")
    open_calls: list[str | None] = []
    for n, turn in enumerate(turns):
        odd = _odd(turns, n, open_calls)
        if odd:
            yield Mark("odd_roles", f"messages[{n}].role", odd)
        if turn.role == "assistant":
            open_calls = [call.id for call in turn.tool_calls]
        elif turn.role == "tool":
            _answer(open_calls, turn.tool_call_id)
        else:
            open_calls = []
    if turns[-1].role != "assistant":
        yield Mark("odd_roles", f"messages[{len(turns) - 1}].role", f"{turns[-1].role} in the last message")


def _odd(turns: tuple[Message, ...], n: int, open_calls: list[str | None]) -> str | None:
    """What is unusual about turn n, given what came before it."""
    role, before = turns[n].role, turns[n - 1].role if n else ""
    if role in ("system", "developer") and n:
        return f"{role} message after {before}"
    if role == "tool":
        if not open_calls:
            return "a tool's answer that no call asked for"
        told = turns[n].tool_call_id
        if told is not None and None not in open_calls and told not in open_calls:
            return f"a tool's answer to {quote(told)}, and the open calls are {', '.join(map(str, open_calls))}"
        return None
    if open_calls and role in ("user", "assistant") and n:
        return f"{role} message while a call waits for its answer"
    if role == before and role in ("user", "assistant"):
        return f"two {role} messages in a row"
    if role == "assistant" and before not in ("user", "tool") and any(turn.role == "user" for turn in turns[n:]):
        return "an assistant message before anybody asked"
    return None


def _answer(open_calls: list[str | None], told: str | None) -> None:
    """Close one call: the one that is named, else the first."""
    if told in open_calls:
        open_calls.remove(told)
    elif open_calls:
        open_calls.pop(0)
