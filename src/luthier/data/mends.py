"""Changes to one record's JSON value: private data out, roles by their usual names, endings added.

Each gives a new value and what it did, and leaves what it does not understand as it is. A change never tells what was
private: neither the text nor a hash of it, which short texts can be found from.
Does not know: files, which records are changed (fix.py).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from luthier.data.private import find_private
from luthier.data.strict_json import JsonFault, parse_json

_ROLES = {  # as people write them -> as the format has them
    "human": "user",
    "prompter": "user",
    "customer": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "agent": "assistant",
}
_OWN_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_BETWEEN = "\n\n"  # joins two turns of one speaker


@dataclass(frozen=True, slots=True)
class Change:
    """What was done to one field: `what` is a short phrase without anything private."""

    change: str
    field: str
    what: str


def redact(value: Any) -> tuple[Any, list[Change]]:
    """Every likely secret and personal datum of every text below `value` replaced by [what it looked like].

    JSON text inside a string (arguments of calls) is opened, so that it stays JSON.
    """
    changes: list[Change] = []
    return _redacted(value, "", changes), changes


def _redacted(value: Any, at: str, changes: list[Change], key: str = "") -> Any:
    """`key`: the one that a text stands under, which may tell what it is: {"password": "..."}."""
    if isinstance(value, dict):
        return {key: _redacted(item, f"{at}.{key}" if at else key, changes, key) for key, item in value.items()}
    if isinstance(value, list):
        return [_redacted(item, f"{at}[{n}]", changes) for n, item in enumerate(value)]
    return _redacted_text(value, at, changes, key) if isinstance(value, str) else value


def _redacted_text(text: str, at: str, changes: list[Change], key: str) -> str:
    if text[:1] in ("{", "["):
        try:
            inside = parse_json(text)
        except JsonFault:
            inside = None
        if isinstance(inside, dict | list):
            before = len(changes)
            made = _redacted(inside, at, changes)
            return json.dumps(made, ensure_ascii=False) if len(changes) > before else text
    found = sorted(find_private(text), key=lambda one: (one.start, -one.end))
    if not found and any(one.kind == "secret" for one in find_private(f'"{key}": "{text}"')):
        changes.append(Change("redacted", at, "password or key"))
        return "[password or key]"
    made, end = [], 0
    for one in found:
        if one.start < end:  # the same digits as another kind of thing
            if one.end > end:
                made.append("")
                end = one.end
            continue
        made += [text[end : one.start], f"[{one.what}]"]
        changes.append(Change("redacted", at, one.what))
        end = one.end
    return "".join([*made, text[end:]]) if found else text


# -- roles -------------------------------------------------------------------------------------------------------------


def normalise_roles(value: Any) -> tuple[Any, list[Change]]:
    """Roles of `messages` by their usual names, two turns of one speaker in a row joined, turns after the last answer
    removed. Other records, and conversations that hold anything else than messages, come back as they are."""
    turns = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        return value, []
    changes: list[Change] = []
    renamed = [_renamed(turn, f"messages[{n}].role", changes) for n, turn in enumerate(turns)]
    joined = _joined(renamed, changes)
    last = max((n for n, turn in enumerate(joined) if turn.get("role") == "assistant"), default=len(joined) - 1)
    for n, turn in enumerate(joined[last + 1 :], last + 1):
        changes += [Change("removed", f"messages[{n}]", f"a {turn.get('role')} message after the last answer")]
    return ({**value, "messages": joined[: last + 1]}, changes) if changes else (value, [])


def _renamed(turn: dict[str, Any], at: str, changes: list[Change]) -> dict[str, Any]:
    role = turn.get("role")
    if not isinstance(role, str) or role in _OWN_ROLES:
        return turn
    plain = role.strip().lower()
    name = plain if plain in _OWN_ROLES - {"tool", "function"} else _ROLES.get(plain)
    if name is None:
        return turn
    changes.append(Change("role", at, f"{role!r} is {name}"))
    return {**turn, "role": name}


def _joined(turns: Sequence[dict[str, Any]], changes: list[Change]) -> list[dict[str, Any]]:
    """Plain turns of the same speaker in a row as one. Those with calls, names or unlike weights stay apart."""
    made: list[dict[str, Any]] = []
    for n, turn in enumerate(turns):
        before = made[-1] if made else {}
        alike = {key: item for key, item in turn.items() if key != "content"} == {
            key: item for key, item in before.items() if key != "content"
        }
        texts = isinstance(turn.get("content"), str) and isinstance(before.get("content"), str)
        if turn.get("role") in ("user", "assistant") and alike and texts and not turn.get("tool_calls"):
            made[-1] = {**before, "content": before["content"] + _BETWEEN + turn["content"]}
            changes.append(Change("joined", f"messages[{n}]", f"with the {turn['role']} message before it"))
        else:
            made.append(turn)
    return made


# -- endings -----------------------------------------------------------------------------------------------------------


def add_ending(value: Any, key: str, ending: str) -> tuple[Any, list[Change]]:
    """`ending` after the text of `key` (prompt or completion) that does not have it."""
    text = value.get(key) if isinstance(value, dict) else None
    if not isinstance(text, str) or text.endswith(ending) or not {"prompt", "completion"} <= value.keys():
        return value, []
    return {**value, key: text + ending}, [Change("ending", key, f"added {ending!r}")]


def add_space(value: Any) -> tuple[Any, list[Change]]:
    """A space before a completion that begins without one."""
    text = value.get("completion") if isinstance(value, dict) else None
    if not isinstance(text, str) or text.startswith(" ") or not isinstance(value.get("prompt"), str):
        return value, []
    return {**value, "completion": f" {text}"}, [Change("space", "completion", "a space before it")]
