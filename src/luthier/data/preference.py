"""Preference records: one prompt, an answer that is preferred and one that is not; every spelling that people use.

Does not know: files (rows.py, pairs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.data.formats import read_sharegpt_tools, read_sharegpt_turns
from luthier.data.messages import MISSING, Findings, read_messages, read_tools, refuse_unknown, shown
from luthier.data.read import Record
from luthier.spec.data import Message, Preference

_CHOSEN = ("preferred_output", "preferred_completion", "chosen")
_REJECTED = ("non_preferred_output", "non_preferred_completion", "rejected")
_INPUT = frozenset({"messages", "tools", "parallel_tool_calls"})
_PROMPTS = ("input", "prompt", "conversations", "messages", "instruction")
KEYS = frozenset({*_CHOSEN, *_REJECTED, *_PROMPTS, "system", "tools", "parallel_tool_calls"})


def read_preference(record: Record, findings: Findings) -> Preference | None:
    """The pair that a record holds; None, with errors in `findings`, when it holds none.

    Spellings: {input: {messages, tools?}, preferred_output, non_preferred_output} (also *_completion), and chosen and
    rejected (texts, turns or lists of turns) beside prompt, instruction and input, conversations or messages. Where the
    two answers are whole conversations, what they share at the start is the prompt.
    """
    value = record.value
    if isinstance(value.get("label"), bool) or "kto_tag" in value:
        key = "label" if "label" in value else "kto_tag"
        findings.error(key, shown(value[key]), "two answers to compare", "An answer with a mark alone is no pair.")
        return None
    good, bad = _named(value, _CHOSEN, findings), _named(value, _REJECTED, findings)
    if good is None or bad is None:
        return None
    prompt, tools = _prompt(value, findings)
    preferred, rejected = (_answer(value[key], key, findings) for key in (good, bad))
    if not findings.failed and preferred[0].role != "assistant":
        prompt, preferred, rejected = _without_prompt(prompt, preferred, rejected, good, findings)
    for key, turns in ((good, preferred), (bad, rejected)):
        _check_answer(turns, key, findings)
    if not findings.failed and not any(turn.role in ("user", "tool") for turn in prompt):
        findings.error("", "no prompt", "what was asked, before the two answers")
    if findings.failed:
        return None
    return Preference(tuple(prompt), tuple(preferred), tuple(rejected), tools, record.line, record.row)


def _named(value: dict[str, Any], names: Sequence[str], findings: Findings) -> str | None:
    there = [name for name in names if name in value]
    if len(there) == 1:
        return there[0]
    found = f"{there[0]} beside {there[1]}" if there else "no such key"
    findings.error(there[0] if there else names[0], found, "one of " + ", ".join(names))
    return None


def _prompt(value: dict[str, Any], findings: Findings) -> tuple[list[Message], tuple[dict[str, Any], ...]]:
    """The turns before the answers and the tools. A conversation within the answers has no key of its own: []."""
    given = value.get("input")
    if isinstance(given, dict):
        refuse_unknown(given, _INPUT, "input", findings)
        turns = read_messages(given.get("messages", MISSING), "input.messages", findings)
        return turns, read_tools(given.get("tools"), "input.tools", findings)
    tools = read_sharegpt_tools(value.get("tools"), findings)
    system = value.get("system")
    if system is not None and not isinstance(system, str):
        findings.error("system", shown(system), "text")
    turns = [Message("system", system)] if isinstance(system, str) and system else []
    key = _prompt_key(value)
    if key is None:
        return turns, tools
    asked = value[key]
    if key == "instruction" and isinstance(asked, str) and isinstance(given, str) and given:
        asked = f"{asked}\n{given}" if asked else given
    return turns + _turns(asked, key, "user", findings), tools


def _prompt_key(value: dict[str, Any]) -> str | None:
    return next((name for name in ("prompt", "conversations", "messages", "instruction") if name in value), None)


def known_keys(value: dict[str, Any]) -> frozenset[str]:
    """The keys of a record that reading it makes use of."""
    unused = {name for name in _PROMPTS if name != _prompt_key(value)} - {"input"}
    return KEYS - (unused | {"instruction"} if isinstance(value.get("input"), dict) else unused)


def _turns(value: Any, at: str, role: str, findings: Findings) -> list[Message]:
    """A text, one turn or a list of turns; turns are role/content or from/value."""
    if isinstance(value, str):
        return [Message("assistant" if role == "assistant" else "user", value)]
    listed = [value] if isinstance(value, dict) else value
    if isinstance(listed, list) and listed and isinstance(listed[0], dict) and "from" in listed[0]:
        return read_sharegpt_turns(listed, at, findings)
    return read_messages(listed, at, findings)


def _answer(value: Any, at: str, findings: Findings) -> list[Message]:
    return _turns(value, at, "assistant", findings)


def _without_prompt(
    prompt: list[Message], preferred: list[Message], rejected: list[Message], key: str, findings: Findings
) -> tuple[list[Message], list[Message], list[Message]]:
    """Answers that repeat the conversation: their common start is the prompt, and must end with what `prompt` says."""
    shared = 0
    for one, other in zip(preferred, rejected, strict=False):
        if one != other or (one.role == "assistant" and shared == len(preferred) - 1):
            break
        shared += 1
    asked = preferred[:shared]
    system = [turn for turn in prompt if turn.role == "system"]
    said = [turn for turn in prompt if turn.role != "system"]
    if said and asked[-len(said) :] != said:
        findings.error(key, "a conversation that does not begin with the prompt", "the prompt, or the answer alone")
    if not any(turn.role == "system" for turn in asked):
        asked = system + asked
    return asked, preferred[shared:], rejected[shared:]


def _check_answer(turns: Sequence[Message], at: str, findings: Findings) -> None:
    if findings.failed:
        return
    if not any(turn.role == "assistant" for turn in turns):
        findings.error(at, "no assistant message", "at least one")
    for index, turn in enumerate(turns):
        if turn.role not in ("assistant", "tool"):
            findings.error(f"{at}[{index}].role", f'"{turn.role}"', "assistant or tool")
