"""Records -> Examples: which format a record is in, told by its keys, and what each format means.

Every problem is reported, none repaired in silence; a record gives one Example or at least one error.
Does not know: bytes (read.py), the rules inside a chat (messages.py), tokens (render.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from luthier.data.messages import (
    MISSING,
    Findings,
    check_function,
    check_turns,
    json_text,
    read_call,
    read_messages,
    read_tools,
    read_weight,
    refuse_unknown,
    shown,
    text_at,
)
from luthier.data.read import OnBytes, Record, is_plain_text, read_records
from luthier.data.strict_json import JsonFault, parse_json, quote
from luthier.spec.data import Chat, Completion, Example, Message, Problem, Text, ToolCall

FORMATS: dict[str, str] = {
    "chat": "OpenAI chat: {messages, tools?}; every assistant message is learnt unless its weight is 0.",
    "completion": "{prompt, completion}, both text; the completion is learnt, no chat template is involved.",
    "conversational": "{prompt, completion}, both lists of messages; only the completion's answers are learnt.",
    "alpaca": "{instruction, input?, output, system?, history?}; every answer is learnt.",
    "sharegpt": "{conversations, system?, tools?} with from/value (or role/content) turns; every answer is learnt.",
    "text": "{text}, or a .txt file as one document; everything is learnt.",
}
KEYS: dict[str, frozenset[str]] = {
    "chat": frozenset({"messages", "tools", "parallel_tool_calls", "functions"}),
    "completion": frozenset({"prompt", "completion"}),
    "conversational": frozenset({"prompt", "completion", "tools", "parallel_tool_calls"}),
    "alpaca": frozenset({"instruction", "input", "output", "system", "history"}),
    "sharegpt": frozenset({"conversations", "system", "tools"}),
    "text": frozenset({"text"}),
}
_PREFERENCE = frozenset({"chosen", "rejected", "kto_tag"}) | {
    f"{prefix}preferred_{suffix}" for prefix in ("", "non_") for suffix in ("output", "completion")
}
_USER = frozenset({"human", "user"})
_ASSISTANT = frozenset({"gpt", "assistant", "model", "chatgpt", "bot"})
_CALL = frozenset({"function_call", "tool_call"})
_RESULT = frozenset({"observation", "tool", "function_response", "tool_response"})
_TURN_KEYS = frozenset({"from", "value", "weight"})
_MOST_UNKNOWN_KEYS = 100


def detect(value: Any) -> str | None:
    """The format of one record by its top-level keys: a name in FORMATS, "preference", or None."""
    if not isinstance(value, dict):
        return None
    if not _PREFERENCE.isdisjoint(value) or isinstance(value.get("label"), bool):
        return "preference"
    if "messages" in value:
        return "chat"
    if "conversations" in value:
        return "sharegpt"
    if "prompt" in value and "completion" in value:
        lists = isinstance(value["prompt"], list) or isinstance(value["completion"], list)
        return "conversational" if lists else "completion"
    if "instruction" in value and "output" in value:
        return "alpaca"
    return "text" if "text" in value else None


def read_examples(path: Path, on_bytes: OnBytes | None = None) -> Iterator[Example | Problem]:
    """Every record of `path` as an Example, or its Problems; warnings come just before the Example they are about.

    Warnings about the file as a whole come last. `on_bytes` as in read_records. Raises NotFound on the first step.
    """
    if is_plain_text(path):
        yield from _plain_text(path, on_bytes)
        return
    reader = Reader(path.name)
    for item in read_records(path, on_bytes):
        if isinstance(item, Problem):
            yield item
        else:
            yield from reader.read(item)
    yield from reader.unknown_keys()


def _plain_text(path: Path, on_bytes: OnBytes | None) -> Iterator[Example | Problem]:
    """One document: every block but the last says that it goes on."""
    held: Record | None = None
    for item in read_records(path, on_bytes):
        if isinstance(item, Problem):
            if held is not None:
                yield Text(held.value, True, held.line, held.row)
                held = None
            yield item
            continue
        if held is not None:
            yield Text(held.value, False, held.line, held.row)
        elif item.row == 1 and _looks_like_json(item.value):
            found, hint = "JSON in a .txt file", "Rename it to .jsonl if its lines are records."
            yield Problem(1, "", found, "plain text", hint, 1, "warning", path.name)
        held = item
    if held is not None:
        yield Text(held.value, True, held.line, held.row)


def _looks_like_json(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    if not first.startswith(("{", "[")):
        return False
    try:
        return isinstance(parse_json(first), dict | list)
    except JsonFault:
        return False


class Reader:
    """Records of one file to Examples. It remembers the file's format, and the keys that no rule knows.

    `unknown`: {key: [line and row of the first record that has it, number of records]}.
    """

    def __init__(self, file: str, format: str | None = None, format_line: int = 0) -> None:
        self.file = file
        self.format = format
        self.format_line = format_line
        self.unknown: dict[str, list[int]] = {}  # key -> first line, first row, number of records

    def read(self, record: Record) -> Iterator[Example | Problem]:
        findings = Findings(self.file, record.line, record.row)
        example = self._example(record, findings)
        yield from findings.problems
        if example is not None and not findings.failed:
            yield example

    def _example(self, record: Record, findings: Findings) -> Example | None:
        value = record.value
        kind = detect(value)
        if kind is None:
            self._refuse_shape(value, findings)
            return None
        if kind == "preference":
            hint = "Choose dpo (`luthier train --objective dpo`), or write the preferred answers as chat records."
            wanted = "a record to imitate; preference data needs a preference method"
            findings.error("", f"a preference record ({_keys(value)})", wanted, hint)
            return None
        if self.format is None:
            self.format, self.format_line = kind, record.line
        if kind != self.format:
            wanted = f"{_a(self.format)} record, as in line {self.format_line}"
            findings.error("", f"{_a(kind)} record", wanted, "Put each format into a file of its own.")
            return None
        if not value.keys() <= KEYS[kind]:
            self.note_unknown(value, KEYS[kind], record)
        return dataclasses.replace(_READERS[kind](value, findings), line=record.line, row=record.row)

    def _refuse_shape(self, value: Any, findings: Findings) -> None:
        if not isinstance(value, dict):
            findings.error("", shown(value), "an object")
        elif self.format is not None:
            wanted = f"{_a(self.format)} record, as in line {self.format_line}"
            findings.error("", _keys(value), wanted, f"That is {FORMATS[self.format]}")
        else:
            shapes = "; ".join(("messages", "prompt and completion", "instruction and output", "conversations", "text"))
            findings.error("", _keys(value), f"the keys of a known format: {shapes}", "See docs/data-formats.md.")

    def note_unknown(self, value: dict[str, Any], known: frozenset[str], record: Record) -> None:
        """Remember the keys that are not `known`."""
        for key in value:
            if key not in known:
                if key not in self.unknown and len(self.unknown) >= _MOST_UNKNOWN_KEYS:
                    key = "(other keys)"
                self.unknown.setdefault(key, [record.line, record.row, 0])[2] += 1

    def unknown_keys(self) -> Iterator[Problem]:
        for key, (line, row, count) in self.unknown.items():
            found = f"the key {quote(key)} in {count:,} record{'s' if count > 1 else ''}"
            wanted = "only " + ", ".join(sorted(KEYS[self.format or "text"]))
            yield Problem(line, key, found, wanted, "It was ignored.", row, "warning", self.file)


def _a(kind: str) -> str:
    return f"an {kind}" if kind[0] == "a" else f"a {kind}"


def _keys(value: dict[str, Any]) -> str:
    names = ", ".join(quote(key)[1:-1] for key in list(value)[:12])
    return f"the keys {names}" if names else "an empty object"


def _chat(value: dict[str, Any], findings: Findings) -> Example:
    messages = read_messages(value["messages"], "messages", findings)
    check_turns(messages, "messages", findings)
    return Chat(tuple(messages), _tools(value, findings))


def _tools(value: dict[str, Any], findings: Findings) -> tuple[dict[str, Any], ...]:
    """`tools` as given, or the older `functions` in the wrapper that tools have."""
    parallel = value.get("parallel_tool_calls")
    if parallel is not None and not isinstance(parallel, bool):
        findings.error("parallel_tool_calls", shown(parallel), "true or false")
    functions = value.get("functions")
    if functions is None:
        return read_tools(value.get("tools"), "tools", findings)
    if value.get("tools") is not None:
        findings.error("functions", "functions beside tools", "one of the two")
    if not isinstance(functions, list):
        findings.error("functions", shown(functions), "a list of functions")
        return ()
    for index, function in enumerate(functions):
        check_function(function, f"functions[{index}]", findings)
    return tuple({"type": "function", "function": function} for function in functions)


def _completion(value: dict[str, Any], findings: Findings) -> Example:
    prompt = text_at(value, "prompt", "", findings)
    completion = text_at(value, "completion", "", findings)
    _check_learnt(value, "completion", findings)
    return Completion(prompt, completion)


def _check_learnt(value: dict[str, Any], key: str, findings: Findings) -> None:
    """Text to learn: empty is refused, blank is worth a warning."""
    text = value.get(key)
    if text == "":
        findings.error(key, "empty text", "at least one character")
    elif isinstance(text, str) and not text.strip():
        findings.warn(key, "nothing but white space", "text", "Blank answers teach blank answers.")


def _conversational(value: dict[str, Any], findings: Findings) -> Example:
    prompt = read_messages(value["prompt"], "prompt", findings)
    completion = read_messages(value["completion"], "completion", findings)
    check_turns(completion, "completion", findings)
    context = [dataclasses.replace(turn, weight=0) if turn.role == "assistant" else turn for turn in prompt]
    return Chat((*context, *completion), _tools(value, findings))


def _alpaca(value: dict[str, Any], findings: Findings) -> Example:
    system = text_at(value, "system", "", findings, optional=True)
    question = text_at(value, "instruction", "", findings)
    more = text_at(value, "input", "", findings, optional=True)
    answer = text_at(value, "output", "", findings)
    asked = f"{question}\n{more}" if question and more else question or more
    if not asked and not findings.failed:
        findings.error("instruction", "empty text, and no input", "a question")
    _check_learnt(value, "output", findings)
    messages = [Message("system", system)] if system else []
    messages += _history(value.get("history"), findings)
    messages += [Message("user", asked), Message("assistant", answer)]
    return Chat(tuple(messages))


def _history(value: Any, findings: Findings) -> list[Message]:
    if value is None:
        return []
    if not isinstance(value, list):
        findings.error("history", shown(value), "a list of [question, answer] pairs")
        return []
    turns: list[Message] = []
    for index, pair in enumerate(value):
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair):
            turns += [Message("user", pair[0]), Message("assistant", pair[1])]
            if not pair[1].strip():
                findings.warn(f"history[{index}][1]", "a blank answer", "text", "Blank answers teach blank answers.")
        else:
            findings.error(f"history[{index}]", shown(pair), "a pair of texts, [question, answer]")
    return turns


def _sharegpt(value: dict[str, Any], findings: Findings) -> Example:
    at, turns = "conversations", value["conversations"]
    if isinstance(turns, list) and turns and isinstance(turns[0], dict) and "role" in turns[0]:
        messages = read_messages(turns, at, findings)
    else:
        messages = read_sharegpt_turns(turns, at, findings)
    check_turns(messages, at, findings)
    system = text_at(value, "system", "", findings, optional=True)
    if system and any(message.role == "system" for message in messages):
        findings.error("system", "a system text beside a system turn", "one of the two")
    if system:
        messages.insert(0, Message("system", system))
    return Chat(tuple(messages), read_sharegpt_tools(value.get("tools"), findings))


def read_sharegpt_tools(value: Any, findings: Findings) -> tuple[dict[str, Any], ...]:
    """A list, or JSON text of one ("" is none); functions without the wrapper of a tool get it."""
    if isinstance(value, str):
        value = json_text(value, "tools", findings) if value.strip() else None
        if value is MISSING:
            return ()
    return read_tools(value, "tools", findings, bare=True)


def read_sharegpt_turns(value: Any, at: str, findings: Findings) -> list[Message]:
    """A list of from/value turns."""
    return _Turns(findings).read(value, at)


class _Turns:
    """from/value turns -> Messages. Calls have no ids there: they are numbered, and results answer them in order."""

    def __init__(self, findings: Findings) -> None:
        self.findings = findings
        self.calls = 0
        self.pending: list[str] = []

    def read(self, value: Any, at: str) -> list[Message]:
        if not isinstance(value, list) or not value:
            self.findings.error(at, shown(value), "a list of at least one turn")
            return []
        made = (self._turn(item, f"{at}[{index}]") for index, item in enumerate(value))
        return [message for message in made if message is not None]

    def _turn(self, item: Any, at: str) -> Message | None:
        if not isinstance(item, dict):
            self.findings.error(at, shown(item), "a turn, an object with from and value")
            return None
        if not item.keys() <= _TURN_KEYS:
            refuse_unknown(item, _TURN_KEYS, at, self.findings)
        speaker = item.get("from", MISSING)
        if not isinstance(speaker, str):
            self.findings.error(f"{at}.from", shown(speaker), "the name of a speaker")
            return None
        weight = read_weight(item, speaker in _ASSISTANT | _CALL, at, self.findings)
        if speaker in _CALL:
            return Message("assistant", "", tool_calls=self._calls(item, at), weight=weight)
        text = text_at(item, "value", at, self.findings)
        if speaker in _ASSISTANT:
            return Message("assistant", text, weight=weight)
        if speaker in _RESULT:
            return Message("tool", text, tool_call_id=self.pending.pop(0) if self.pending else "call_0")
        if speaker in _USER:
            self.pending.clear()
            return Message("user", text)
        if speaker == "system":
            return Message("system", text)
        known = ", ".join(sorted(_USER | _ASSISTANT | _CALL | _RESULT | {"system"}))
        self.findings.error(f"{at}.from", quote(speaker), f"one of {known}")
        return None

    def _calls(self, item: dict[str, Any], at: str) -> tuple[ToolCall, ...]:
        text = text_at(item, "value", at, self.findings)
        value = json_text(text, f"{at}.value", self.findings) if isinstance(item.get("value"), str) else MISSING
        if value is MISSING:
            return ()
        made: list[ToolCall] = []
        if value == []:
            self.findings.error(f"{at}.value", "an empty list", "at least one call")
        for one in value if isinstance(value, list) else [value]:
            call = read_call(one, f"{at}.value", f"call_{self.calls}", self.findings)
            if call is not None:
                self.calls += 1
                self.pending.append(call.id or "")
                made.append(call)
        return tuple(made)


def _text(value: dict[str, Any], findings: Findings) -> Example:
    text = text_at(value, "text", "", findings)
    _check_learnt(value, "text", findings)
    return Text(text)


_READERS: dict[str, Callable[[dict[str, Any], Findings], Example]] = {
    "chat": _chat,
    "completion": _completion,
    "conversational": _conversational,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "text": _text,
}
