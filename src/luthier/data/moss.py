"""MOSS plug-in records: dialogues with inner thoughts, commands and tool results, to conversations with tool calls.

A turn of such a record becomes up to four messages: the question; the thoughts with the calls, which are learnt; the
results, which are context and never learnt; the answer. What MOSS could call stands in its instruction as
`API: Search(query)`, which makes the tools. Records are read, never written.
Does not know: files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from luthier.data.messages import MISSING, Findings, shown
from luthier.data.strict_json import JsonFault, quote, scan_value
from luthier.spec.data import Chat, Message, ToolCall

_MARKS = {  # key of a turn -> its opening and closing mark
    "Human": ("<|Human|>:", "<eoh>"),
    "Inner Thoughts": ("<|Inner Thoughts|>:", "<eot>"),
    "Commands": ("<|Commands|>:", "<eoc>"),
    "Tool Responses": ("<|Results|>:", "<eor>"),
    "MOSS": ("<|MOSS|>:", "<eom>"),
}
_API = re.compile(r"API: (\w+)\(([\w ,]*)\)")
_NAME = re.compile(r"(\w+)\(\s*")
_NONE = re.compile(r"None\.?")
_BETWEEN = re.compile(r"\s*(?:,|\n)\s*")


class _NoCall(Exception):
    """Commands that are not a list of calls; the text says what stands there."""


def is_moss(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("chat"), dict) and "meta_instruction" in value


def read_moss(value: dict[str, Any], findings: Findings) -> Chat | None:
    """The conversation of one record; None, with errors in `findings`, where it cannot be told.

    Without commands a turn is question and answer, the answer beginning with the thoughts in <think> marks.
    """
    instruction = value.get("meta_instruction")
    if not isinstance(instruction, str):
        findings.error("meta_instruction", shown(instruction), "text")
        return None
    signatures = {name: [word.strip() for word in words.split(",")] for name, words in _API.findall(instruction)}
    messages = [Message("system", instruction)] if instruction else []
    calls = 0
    for key, turn in value["chat"].items():
        at = f"chat.{key}"
        if not isinstance(turn, dict):
            findings.error(at, shown(turn), "an object with Human, Inner Thoughts, Commands, Tool Responses and MOSS")
            continue
        texts = {name: _between_marks(turn, name, at, findings) for name in _MARKS}
        for name in turn.keys() - _MARKS.keys():
            findings.error(f"{at}.{name}", f"the unknown key {quote(name)}", "one of " + ", ".join(_MARKS))
        if not findings.failed:
            made = _messages(texts, signatures, calls, at, findings)
            calls += sum(len(message.tool_calls) for message in made)
            messages += made
    if not value["chat"]:
        findings.error("chat", "an empty object", "at least one turn")
    return None if findings.failed else Chat(tuple(messages), _tools(signatures))


def _between_marks(turn: dict[str, Any], name: str, at: str, findings: Findings) -> str:
    """The text of one part without its marks and the space around it; "" for None."""
    text = turn.get(name, MISSING)
    if not isinstance(text, str):
        findings.error(f"{at}.{name}", shown(text), "text")
        return ""
    opening, closing = _MARKS[name]
    text = text.strip()
    if not text.startswith(opening) or not text.endswith(closing):
        findings.error(f"{at}.{name}", quote(text, 40), f"text between {opening} and {closing}")
        return ""
    text = text[len(opening) : -len(closing)].strip()
    return "" if name not in ("Human", "MOSS") and _NONE.fullmatch(text) else text


def _messages(
    texts: dict[str, str], signatures: dict[str, list[str]], before: int, at: str, findings: Findings
) -> list[Message]:
    thoughts = f"<think>\n{texts['Inner Thoughts']}\n</think>\n\n" if texts["Inner Thoughts"] else ""
    asked = Message("user", texts["Human"])
    try:
        spelt = _calls(texts["Commands"], signatures)
    except _NoCall as fault:
        wanted = 'calls such as Search("..."), separated by commas, or None'
        findings.error(f"{at}.Commands", str(fault), wanted, "Correct the record or leave it out.")
        return []
    if not spelt:
        return [asked, Message("assistant", thoughts + texts["MOSS"])]
    results = _results(texts["Tool Responses"], [text for text, _ in spelt])
    if results is None:
        found = f"one text for {len(spelt)} calls, without the calls that its parts belong to"
        findings.error(f"{at}.Tool Responses", found, "each call, then => and its result")
        return []
    calls = tuple(ToolCall(call.name, call.arguments, f"call_{before + n}") for n, (_, call) in enumerate(spelt))
    answers = [Message("tool", text, tool_call_id=call.id) for call, text in zip(calls, results, strict=True)]
    turns = [asked, Message("assistant", thoughts.strip(), tool_calls=calls), *answers]
    return [*turns, Message("assistant", texts["MOSS"])]


def _calls(text: str, signatures: dict[str, list[str]]) -> list[tuple[str, ToolCall]]:
    """Each call as it is spelt and as it is meant. Raises _NoCall."""
    found: list[tuple[str, ToolCall]] = []
    at = 0
    while at < len(text):
        none = _NONE.match(text, at)
        if none:
            at = none.end()
        else:
            end, call = _call(text, at, signatures)
            found.append((text[at:end], call))
            at = end
        between = _BETWEEN.match(text, at) if at < len(text) else None
        if between is None and at < len(text):
            raise _NoCall(f"{quote(text[at:], 40)} after a call")
        at = between.end() if between else at
    return found


def _call(text: str, at: int, signatures: dict[str, list[str]]) -> tuple[int, ToolCall]:
    opened = _NAME.match(text, at)
    if not opened:
        raise _NoCall(quote(text[at:], 40))
    name, at = opened[1], opened.end()
    if name not in signatures:
        raise _NoCall(f"{name}, which the instruction does not name")
    values: list[Any] = []
    while text[at : at + 1] != ")":
        try:
            value, at = scan_value(text, at)
        except JsonFault as fault:
            raise _NoCall(f"{name} with {fault.found}") from fault
        values.append(value)
        at += len(text[at:]) - len(text[at:].lstrip(" ,"))
        if at >= len(text):
            raise _NoCall(f"{name} without a closing bracket")
    if len(values) != len(signatures[name]):
        raise _NoCall(f"{name} with {len(values)} arguments, of which its API has {len(signatures[name])}")
    return at + 1, ToolCall(name, dict(zip(signatures[name], values, strict=True)))


def _results(text: str, calls: Sequence[str]) -> list[str] | None:
    """The result of each call: the parts of the text that follow `call =>`; of one call alone, all of it."""
    starts, at = [], 0
    for call in calls:
        begin = text.find(f"{call} =>", at)
        if begin < 0:
            return [text] if len(calls) == 1 else None
        at = begin + len(call) + 3
        starts.append((begin, at))
    if starts[0][0]:
        return [text] if len(calls) == 1 else None
    ends = [begin for begin, _ in starts[1:]] + [len(text)]
    return [text[start:end].strip() for (_, start), end in zip(starts, ends, strict=True)]


def _tools(signatures: dict[str, list[str]]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "parameters": {
                    "type": "object",
                    "properties": {word: {"type": "string"} for word in words},
                    "required": list(words),
                },
            },
        }
        for name, words in signatures.items()
    )
