"""An assistant's answer as text, both ways: what a model wrote becomes a message, a reference becomes comparable text.

Does not know: tokens, templates.
"""

from __future__ import annotations

import json
import re

from luthier.spec.data import Message, ToolCall

_TOOL_CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)


def parse_answer(text: str) -> Message:
    """Text to a message; `<tool_call>{...}</tool_call>` blocks become tool calls when all of them are valid."""
    calls: list[ToolCall] = []
    for block in _TOOL_CALL.findall(text):
        try:
            value = json.loads(block)
            calls.append(ToolCall(str(value["name"]), value.get("arguments", {}), f"call_{len(calls)}"))
        except (ValueError, KeyError, TypeError):
            return Message("assistant", text)
    if not calls:
        return Message("assistant", text)
    return Message("assistant", _TOOL_CALL.sub("", text).strip(), tool_calls=tuple(calls))


def answer_text(message: Message) -> str:
    """A reference answer as one text, for exact match: the content, then each call as compact JSON."""
    calls = [
        json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False) for call in message.tool_calls
    ]
    return "\n".join([part for part in (message.content, *calls) if part])
