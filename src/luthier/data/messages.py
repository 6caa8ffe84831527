"""The rules of one chat: a list of JSON messages -> Message records, every breach named by its path.

Nothing is repaired in silence: a value is taken as it stands, or refused. Does not know: files, top-level keys,
templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luthier.data.strict_json import JsonFault, parse_json, quote
from luthier.spec.data import Message, Problem, Role, Severity, ToolCall

_ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",  # the older name of a tool's answer
}
_NULL_KEYS = frozenset({"refusal", "reasoning_content", "audio", "annotations"})
_KEYS = _NULL_KEYS | {"role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call"}
MISSING = object()


class Findings:
    """What was found in one record; it knows the place, so the rules need not."""

    __slots__ = ("failed", "file", "line", "problems", "row")

    def __init__(self, file: str, line: int, row: int) -> None:
        self.file = file
        self.line = line
        self.row = row
        self.problems: list[Problem] = []
        self.failed = False

    def error(self, field: str, found: str, wanted: str, hint: str = "") -> None:
        self.failed = True
        self._add(field, found, wanted, hint, "error")

    def warn(self, field: str, found: str, wanted: str, hint: str = "") -> None:
        self._add(field, found, wanted, hint, "warning")

    def _add(self, field: str, found: str, wanted: str, hint: str, severity: Severity) -> None:
        self.problems.append(Problem(self.line, field, found, wanted, hint, self.row, severity, self.file))


def shown(value: Any) -> str:
    """A short phrase for a JSON value."""
    if value is MISSING:
        return "nothing (no such key)"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return quote(value)
    if isinstance(value, list):
        return "a list" if value else "an empty list"
    if isinstance(value, dict):
        return "an object with the keys " + ", ".join(list(value)[:8]) if value else "an empty object"
    return str(value) if len(str(value)) < 24 else f"{str(value)[:20]}..."  # a number, without quotes


def text_at(holder: dict[str, Any], key: str, at: str, findings: Findings, *, optional: bool = False) -> str:
    """A string; "" where an optional one is null or absent, or after an error."""
    value = holder.get(key, MISSING)
    if isinstance(value, str):
        return value
    if not (optional and (value is None or value is MISSING)):
        findings.error(f"{at}.{key}" if at else key, shown(value), "text")
    return ""


def read_messages(value: Any, at: str, findings: Findings) -> list[Message]:
    """The messages of one list; those with an error are left out and recorded in `findings`."""
    if not isinstance(value, list):
        findings.error(at, shown(value), "a list of messages")
        return []
    if not value:
        findings.error(at, "an empty list", "at least one message")
    made = (_message(item, f"{at}[{index}]", findings) for index, item in enumerate(value))
    return [message for message in made if message is not None]


def check_turns(messages: Sequence[Message], at: str, findings: Findings) -> None:
    """The rules over all turns. `messages[i]` is the element `at[i]` of the file."""
    if findings.failed:
        return  # a turn that was refused might be the one that is missed here
    answers = [(index, turn) for index, turn in enumerate(messages) if turn.role == "assistant"]
    if not answers:
        findings.error(at, "no assistant message", "at least one", "There is no answer to learn from.")
        return
    if not any(turn.weight for _, turn in answers):
        findings.error(at, "weight 0 on every assistant message", "weight 1 on at least one, or no weight at all")
    for index, turn in answers:
        if turn.weight and not turn.tool_calls and not turn.content.strip():
            findings.warn(f"{at}[{index}].content", "a blank answer", "text", "Blank answers teach blank answers.")
    if messages[-1].role != "assistant":
        found, hint = f'"{messages[-1].role}" in the last message', "What follows the last answer is never learnt."
        findings.warn(f"{at}[{len(messages) - 1}].role", found, "assistant", hint)


def _message(item: Any, at: str, findings: Findings) -> Message | None:
    if not isinstance(item, dict):
        findings.error(at, shown(item), "a message, an object with role and content")
        return None
    if not item.keys() <= _KEYS:
        refuse_unknown(item, _KEYS, at, findings)
    name = item.get("role", MISSING)
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        findings.error(f"{at}.role", shown(name), "one of " + ", ".join(_ROLES))
        return None
    if not _NULL_KEYS.isdisjoint(item):
        _refuse_unsupported(item, role, at, findings)
    calls = _calls(item, role, at, findings)
    return Message(
        role,
        _content(item, role, at, findings),
        _name(item, name == "function", at, findings),
        calls,
        _tool_call_id(item, name == "tool", at, findings),
        read_weight(item, role == "assistant", at, findings),
    )


def refuse_unknown(item: dict[str, Any], known: frozenset[str], at: str, findings: Findings) -> None:
    for key in item:
        if key not in known:
            findings.error(f"{at}.{key}", f"the unknown key {quote(key)}", "one of " + ", ".join(sorted(known)))


def _refuse_unsupported(item: dict[str, Any], role: Role, at: str, findings: Findings) -> None:
    """Keys that API dumps carry as null; with a value they hold something that would be lost."""
    refusal = item.get("refusal")
    if refusal is not None:
        if role != "assistant" or not isinstance(refusal, str):
            findings.error(f"{at}.refusal", shown(refusal), "null, or text in an assistant message")
        elif item.get("content") is not None:
            findings.error(f"{at}.refusal", "a refusal beside content", "one of the two", "Keep the text in content.")
    if item.get("reasoning_content") is not None:
        hint = "Put it at the start of content, between <think> and </think>."
        findings.error(f"{at}.reasoning_content", shown(item["reasoning_content"]), "no separate reasoning", hint)
    if item.get("audio") is not None:
        findings.error(f"{at}.audio", shown(item["audio"]), "null", "This version trains on text only.")
    if item.get("annotations"):
        findings.error(f"{at}.annotations", shown(item["annotations"]), "null or an empty list", "Remove the key.")


def _content(item: dict[str, Any], role: Role, at: str, findings: Findings) -> str:
    content = item.get("content", MISSING)
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return _joined(content, f"{at}.content", findings)
    if content is not None and content is not MISSING:
        findings.error(f"{at}.content", shown(content), "text, or a list of text parts")
        return ""
    if role == "assistant" and (item.get("tool_calls") or item.get("function_call") is not None):
        return ""
    refusal = item.get("refusal")
    if role == "assistant" and isinstance(refusal, str):
        return refusal
    allowed = "text; only an assistant message with tool calls may have no content"
    findings.error(f"{at}.content", shown(content), allowed)
    return ""


def _joined(parts: list[Any], at: str, findings: Findings) -> str:
    texts: list[str] = []
    if not parts:
        findings.error(at, "an empty list", "text, or at least one text part")
    for index, part in enumerate(parts):
        place = f"{at}[{index}]"
        if not isinstance(part, dict):
            findings.error(place, shown(part), 'a part such as {"type": "text", "text": "..."}')
        elif part.get("type") != "text":
            kind = shown(part.get("type", MISSING))
            findings.error(f"{place}.type", kind, '"text"', "This version trains on text parts only.")
        else:
            refuse_unknown(part, frozenset({"type", "text"}), place, findings)
            texts.append(text_at(part, "text", place, findings))
    return "".join(texts)


def _name(item: dict[str, Any], required: bool, at: str, findings: Findings) -> str | None:
    value = item.get("name")
    if value is None and not required:
        return None
    if isinstance(value, str) and value:
        return value
    wanted = "the name of the function" if required else "text that is not empty, or no name"
    findings.error(f"{at}.name", shown(item.get("name", MISSING)), wanted)
    return None


def _tool_call_id(item: dict[str, Any], required: bool, at: str, findings: Findings) -> str | None:
    value = item.get("tool_call_id")
    if value is None and not required:
        return None
    if not required:
        findings.error(f"{at}.tool_call_id", shown(value), "this key on tool messages only")
    elif isinstance(value, str) and value:
        return value
    else:
        found = shown(item.get("tool_call_id", MISSING))
        findings.error(f"{at}.tool_call_id", found, "the id of the call that this message answers")
    return None


def read_weight(item: dict[str, Any], answer: bool, at: str, findings: Findings) -> int:
    """0 or 1; 1 when absent, or after an error. `answer`: whether the turn is the assistant's."""
    value = item.get("weight")
    if value is None:
        return 1
    if not answer:
        findings.error(f"{at}.weight", "a weight on another's turn", "weight on assistant turns only")
    elif type(value) is not int or value not in (0, 1):
        findings.error(f"{at}.weight", shown(value), "the integer 0 (context) or 1 (learnt)")
    else:
        return value
    return 1


def _calls(item: dict[str, Any], role: Role, at: str, findings: Findings) -> tuple[ToolCall, ...]:
    calls, legacy = item.get("tool_calls"), item.get("function_call")
    if calls is None and legacy is None:
        return ()
    if role != "assistant":
        key = "tool_calls" if calls is not None else "function_call"
        findings.error(f"{at}.{key}", f"a call in a {role} message", "calls in assistant messages only")
        return ()
    if legacy is not None:
        if calls is not None:
            findings.error(f"{at}.function_call", "function_call beside tool_calls", "one of the two")
        call = read_call(legacy, f"{at}.function_call", None, findings)
        return (call,) if call else ()
    if not isinstance(calls, list) or not calls:
        findings.error(f"{at}.tool_calls", shown(calls), "a list of at least one call, or no such key")
        return ()
    made = (_tool_call(call, f"{at}.tool_calls[{index}]", findings) for index, call in enumerate(calls))
    return tuple(call for call in made if call is not None)


def _tool_call(value: Any, at: str, findings: Findings) -> ToolCall | None:
    if not isinstance(value, dict):
        findings.error(at, shown(value), "a call, an object with id, type and function")
        return None
    refuse_unknown(value, frozenset({"id", "type", "function"}), at, findings)
    if value.get("type") != "function":
        findings.error(f"{at}.type", shown(value.get("type", MISSING)), '"function"')
    name = value.get("id")
    if name is not None and not isinstance(name, str):
        findings.error(f"{at}.id", shown(name), "text")
        name = None
    return read_call(value.get("function", MISSING), f"{at}.function", name, findings)


def read_call(value: Any, at: str, call_id: str | None, findings: Findings) -> ToolCall | None:
    """{"name", "arguments"} -> ToolCall; arguments given as JSON text and as an object come out equal."""
    if not isinstance(value, dict):
        findings.error(at, shown(value), "an object with name and arguments")
        return None
    refuse_unknown(value, frozenset({"name", "arguments"}), at, findings)
    name = value.get("name", MISSING)
    if not isinstance(name, str) or not name:
        findings.error(f"{at}.name", shown(name), "the name of a function")
        return None
    arguments = value.get("arguments", MISSING)
    if isinstance(arguments, str):
        arguments = _decoded(arguments, f"{at}.arguments", findings)
    elif not isinstance(arguments, dict):
        findings.error(f"{at}.arguments", shown(arguments), 'JSON text or an object; "{}" when there are none')
        return None
    return ToolCall(name, arguments, call_id)


def _decoded(text: str, at: str, findings: Findings) -> Any:
    value = json_text(text, at, findings)
    if isinstance(value, str):
        hint = "It was encoded twice; it is kept as this text. Remove one encoding if that was not meant."
        findings.warn(at, f"JSON text that holds the text {quote(value)}", "JSON text that holds an object", hint)
    elif value is not MISSING and not isinstance(value, dict):
        findings.warn(at, f"JSON text that holds {shown(value)}", "JSON text that holds an object")
    return value


def json_text(text: str, at: str, findings: Findings) -> Any:
    """The value that JSON text inside a string holds; MISSING after an error."""
    try:
        return parse_json(text)
    except JsonFault as fault:
        inside = f" ({fault.field})" if fault.field else ""
        place = "" if fault.position is None else f" at character {fault.position + 1}"
        wanted = f"JSON text: {fault.wanted}{inside}"
        findings.error(at, f"{quote(text)}, which has {fault.found}{place}", wanted, fault.hint)
        return MISSING


def read_tools(value: Any, at: str, findings: Findings, *, bare: bool = False) -> tuple[dict[str, Any], ...]:
    """Tool objects exactly as given. With `bare`, a function object without its wrapper gets one."""
    if value is None:
        return ()
    if not isinstance(value, list):
        findings.error(at, shown(value), "a list of tools")
        return ()
    made: list[dict[str, Any]] = []
    for index, item in enumerate(value):
        place = f"{at}[{index}]"
        wrapped = isinstance(item, dict) and not (bare and "function" not in item and "type" not in item)
        if not isinstance(item, dict):
            findings.error(place, shown(item), "a tool, an object with type and function")
        elif not wrapped:
            check_function(item, place, findings)
            made.append({"type": "function", "function": item})
        else:
            if item.get("type") != "function":
                findings.error(f"{place}.type", shown(item.get("type", MISSING)), '"function"')
            check_function(item.get("function", MISSING), f"{place}.function", findings)
            made.append(item)
    return tuple(made)


def check_function(value: Any, at: str, findings: Findings) -> None:
    """What templates rely on in the description of a function; everything else in it is the user's."""
    if not isinstance(value, dict):
        findings.error(at, shown(value), "an object with name, description and parameters")
        return
    name = value.get("name", MISSING)
    if not isinstance(name, str) or not name:
        findings.error(f"{at}.name", shown(name), "the name of the function")
    parameters = value.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        findings.error(f"{at}.parameters", shown(parameters), "a JSON Schema object")
