"""The counters of the OpenAI cookbook's chat data check, under its names, so that both can be compared line by line.

They are older than tools, so good tool rows trip them: they are shown as counts and decide nothing here.
Does not know: files; tokens (a counting function comes in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

COUNTERS = (
    "data_type",
    "missing_messages_list",
    "message_missing_key",
    "message_unrecognized_key",
    "unrecognized_role",
    "missing_content",
    "example_missing_assistant_message",
)
_KEYS = frozenset({"role", "content", "name", "function_call", "weight"})
_ROLES = frozenset({"system", "user", "assistant", "function"})
MAX_LENGTH = 4096  # tokens of a row that are billed
_EPOCHS, _FEWEST, _MOST, _LEAST_EPOCHS, _MOST_EPOCHS = 3, 100, 25_000, 1, 25


def errors(record: Any) -> Iterator[str]:
    """A name out of COUNTERS for every error of one record, as often as it is made."""
    if not isinstance(record, dict):
        yield "data_type"
        return
    messages = record.get("messages")
    if not messages or not isinstance(messages, list):
        yield "missing_messages_list"
        return
    messages = [message if isinstance(message, dict) else {} for message in messages]
    for message in messages:
        if "role" not in message or "content" not in message:
            yield "message_missing_key"
        if not message.keys() <= _KEYS:
            yield "message_unrecognized_key"
        if message.get("role") not in _ROLES:
            yield "unrecognized_role"
        content = message.get("content")
        if (not content and not message.get("function_call")) or not isinstance(content, str):
            yield "missing_content"
    if not any(message.get("role") == "assistant" for message in messages):
        yield "example_missing_assistant_message"


def missing(record: Any) -> Iterator[str]:
    """missing_system, missing_user: what its messages lack."""
    messages = record.get("messages") if isinstance(record, dict) else None
    if isinstance(messages, list):
        roles = {message.get("role") for message in messages if isinstance(message, dict)}
        yield from (f"missing_{role}" for role in ("system", "user") if role not in roles)


def tokens(messages: list[dict[str, Any]], count: Callable[[str], int]) -> int:
    """Tokens of a conversation by the cookbook's rule: 3 a message, its values, 1 a name, and 3 for the answer."""
    total = 3
    for message in messages:
        total += 3 + sum(count(value) for value in message.values() if isinstance(value, str)) + ("name" in message)
    return total


def epochs(rows: int) -> int:
    """How many epochs the cookbook expects for so many rows."""
    if rows * _EPOCHS < _FEWEST:
        return min(_MOST_EPOCHS, _FEWEST // max(1, rows))
    if rows * _EPOCHS > _MOST:
        return max(_LEAST_EPOCHS, _MOST // rows)
    return _EPOCHS


def billed(lengths: list[int]) -> int:
    """Tokens of one epoch, each row up to MAX_LENGTH."""
    return sum(min(MAX_LENGTH, length) for length in lengths)
